"""Opens a model as a judge: finds its format, checks its manifest, its template and its chat scaffold."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .backends.protocol import Backend, open_backend
from .errors import InputError, ModelError
from .formats.artifact import PICKLE_SUFFIXES, Artifact, Manifest, artifact_sha256, read_manifest, verify_files
from .formats.model_folder import is_text, read_json_object
from .generation.scaffold import OWN_TEMPLATE, ChatTemplate, scaffold_for
from .judging.confidence import stored_calibration
from .judging.judge import Judge, Settings
from .judging.settings import MOST_SEQUENCES
from .judging.template import resolve_template
from .ranking.rank import rank
from .runtime.options import RuntimeOptions
from .storage import sha256_cached

logger = logging.getLogger("gramlite")


def load(
    model: str | Path | None = None,
    *,
    template: str | None = None,
    settings: Settings | None = None,
    runtime: RuntimeOptions | None = None,
    chat_template: str | None = None,
    trust_template: bool = False,
    calibrated: bool = False,
) -> Judge:
    """Open a judge.

    `model` is an artifact's file or folder; None is the reference judge, built once into the cache. `template` is a
    built-in name or a file, where the model does not say itself. `chat_template` is a built-in scaffold's name or a
    Jinja file to use in place of the model's own; an unknown one is only run with `trust_template`. `calibrated`
    applies the calibration that is stored for these settings, and raises InputError where none is. Raises ModelError
    for a model that is refused and ResourceError for one that does not fit.
    """
    if model is None:
        from .reference.files import cached_gguf

        model = cached_gguf()
        logger.info("No model was given; using the reference judge (SmolLM2-135M with gramlite's adapter, Q8_0).")
    settings, runtime = settings or Settings(), runtime or RuntimeOptions()
    artifact = open_artifact(Path(model))
    backend = open_backend(artifact, replace(runtime, parallel=runtime.parallel or MOST_SEQUENCES))
    if (runtime.parallel or 1) > 1 and backend.capabilities.sequences == 1 and not runtime.deterministic:
        told = (runtime.parallel, artifact.path, artifact.format)
        logger.warning(
            "--parallel %d changes nothing: %s (%s) runs one sequence at a time. GGUF files run several.", *told
        )
    try:
        chat = ChatTemplate(choice=chat_template, trust=trust_template)
        judge = _judge(artifact, backend, template, settings, runtime, chat)
        if calibrated:
            judge = judge.calibrated(stored_calibration(artifact.path, judge.model, judge.settings_record))
        return judge
    except BaseException:
        backend.close()
        raise


def _judge(
    artifact: Artifact,
    backend: Backend,
    template: str | None,
    settings: Settings,
    runtime: RuntimeOptions,
    chat: ChatTemplate = OWN_TEMPLATE,
) -> Judge:
    metadata = backend.metadata
    recorded = (artifact.manifest.template if artifact.manifest else None) or {}
    embedded = metadata.get("template") or {}
    chat_template = metadata.get("chat_template")
    if not isinstance(embedded, dict) or not (chat_template is None or is_text(chat_template)):
        raise ModelError(f"{artifact.path} has a template that is no text. Export or download it again.")
    folder = artifact.path if artifact.path.is_dir() else artifact.path.parent
    chosen = resolve_template(template, {**recorded, **embedded}, folder)
    scaffold = scaffold_for(
        chat_template,
        thinks=chosen.form.thinks,
        trust=chat.trust,
        bos=str(metadata.get("bos") or ""),
        eos=str(metadata.get("eos") or ""),
        special=metadata.get("special"),
        choice=chat.choice,
    )
    if chat.choice and (strangers := scaffold.marks - backend.vocabulary.special_tokens.keys()):
        logger.warning(
            "%s has no token %s, which the chat template %s writes: it was trained with another one.",
            artifact.path, ", ".join(sorted(strangers)), chat.choice,
        )  # fmt: skip
    model = describe_model(artifact, metadata, runtime)
    return Judge(
        backend, chosen, scaffold, settings, model, adapter=runtime.adapter, parallel=runtime.parallel, rank=rank
    )


def open_artifact(path: Path) -> Artifact:
    """An artifact on disk, its manifest checked.

    Raises InputError where there is nothing, ModelError for a pickle, an unknown format or a manifest that disagrees.
    """
    if not path.exists():
        raise InputError(f"There is no model at {path}. Give the path of a GGUF file or of an artifact's folder.")
    if path.is_dir() and not any(path.iterdir()):
        raise ModelError(f"The folder {path} is empty.")
    manifest = read_manifest(path)
    artifact = Artifact(path, detect_format(path, manifest), manifest)
    if manifest:
        verify_files(path, manifest)
    return artifact


def detect_format(path: Path, manifest: Manifest | None) -> str:
    """The name of the backend for a file or folder; raises ModelError when there is none."""
    if manifest:
        return manifest.format
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise ModelError(
            f"{path} is a pickle checkpoint, which can run code when it is opened. Convert it to safetensors."
        )
    if path.is_file():
        if path.suffix == ".json":
            return str(read_json_object(path).get("format", "unknown"))
        return "gguf"  # whose header check says what a file that is none really is
    if (path / "genai_config.json").is_file():
        return "onnx"
    if (path / "config.json").is_file():
        settings = read_json_object(path / "config.json").get("quantization_config")
        return "gptq" if isinstance(settings, dict) and settings.get("quant_method") == "gptq" else "hf"
    raise ModelError(f"The folder {path} is no model: it holds neither config.json nor genai_config.json.")


def describe_model(artifact: Artifact, metadata: Mapping[str, Any], runtime: RuntimeOptions) -> dict[str, Any]:
    """The `model` object of a judged row."""
    quantization = artifact.manifest.quantization if artifact.manifest else None
    described = {
        "name": artifact.name,
        "format": artifact.format,
        "quantization": metadata.get("quantization")
        if runtime.load_in
        else quantization or metadata.get("quantization"),
        "sha256": artifact_sha256(artifact.path),
    }
    return described | ({"adapter": sha256_cached(Path(runtime.adapter))} if runtime.adapter else {})
