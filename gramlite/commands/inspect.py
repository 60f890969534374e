"""`gramlite inspect`: what a model file or folder is, read from its headers alone, without loading it."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gramlite.errors import GramliteError, ModelError
from gramlite.terminal import say_json

if TYPE_CHECKING:
    from gramlite.formats.artifact import Artifact
    from gramlite.runtime.placement import Memory

CONTEXTS = (2048, 4096, 8192, 16384, 32768)
MEMORY = {"kv_cache": "KV cache"}
MiB = 1 << 20


def memory_needed(size: Memory, trained: int) -> dict[int, dict[str, int]]:
    """The bytes that a model takes by its context; one that was trained for less than all of them has its own."""
    contexts = [context for context in CONTEXTS if context <= trained] or [trained]
    needed = {context: size.at(context) for context in contexts}
    return {context: {**asdict(parts), "total": parts.total} for context, parts in needed.items()}


def inspect_gguf(path: Path) -> dict[str, Any]:
    """What a GGUF file says of itself and the memory it needs, in bytes; raises ModelError when it is refused."""
    from gramlite.formats.gguf_header import hyperparameters, read_header
    from gramlite.formats.quantization import bits_per_weight, quantization_name
    from gramlite.runtime.gguf_memory import LayeredFootprint, choose_layout
    from gramlite.runtime.options import RuntimeOptions

    header = read_header(path)
    sizes = hyperparameters(header)
    return {
        "path": str(path),
        "format": "gguf",
        "name": header.metadata.get("general.name"),
        "architecture": header.architecture,
        "quantization": quantization_name(header),
        "bits_per_weight": round(bits_per_weight(header), 3),
        "bytes": header.file_bytes,
        "layers": sizes.blocks,
        "embedding": sizes.embedding,
        "heads": sizes.heads,
        "key_value_heads": sizes.key_value_heads,
        "vocabulary": sizes.vocabulary,
        "context": sizes.context,
        "template": header.metadata.get("gramlite.template.name"),
        "chat_template": known_chat_template(header.metadata.get("tokenizer.chat_template")),
        "memory": memory_needed(LayeredFootprint(header, choose_layout(RuntimeOptions())), sizes.context),
    }


def inspect_folder(artifact: Artifact) -> dict[str, Any]:
    """What an hf, gptq or onnx folder says of itself and the memory it needs, in bytes; ModelError when it is refused."""
    from gramlite.formats.model_folder import read_model_folder
    from gramlite.runtime.folder_memory import footprint, quantization_of, stored_bytes, stored_type, weight_count

    folder = read_model_folder(artifact.path)
    weights = weight_count(folder)
    if artifact.format == "onnx":
        from gramlite.formats.onnx_graph import read_graph
        from gramlite.runtime import onnx_folder

        graph = read_graph(artifact.path / onnx_folder.graph_name(artifact))
        stored, quantization, size = graph.weights, None, onnx_folder.footprint(folder, graph)
        where = "onnxruntime"
    else:
        sizes = stored_bytes(artifact.path)
        stored, quantization = sum(sizes.values()), quantization_of(folder) or stored_type(artifact.path, sizes)
        on_cuda = artifact.format == "gptq"  # on the CPU it runs packed as GGUF
        size = footprint(folder, sizes, 2 if on_cuda else 4)
        where = "CUDA, float16" if on_cuda else "the CPU, float32"
    manifest = artifact.manifest
    names = folder.config.get("architectures")
    architecture = names[0] if isinstance(names, list) and names else folder.config.get("model_type")
    heads = folder.count("num_attention_heads")
    return {
        "path": str(artifact.path),
        "format": artifact.format,
        "name": artifact.name,
        "architecture": architecture,
        "quantization": (manifest.quantization if manifest else None) or quantization,
        "bits_per_weight": round(8 * stored / weights, 3) if weights else None,
        "bytes": sum(file.stat().st_size for file in artifact.path.rglob("*") if file.is_file()),
        "layers": folder.count("num_hidden_layers"),
        "embedding": folder.count("hidden_size"),
        "heads": heads,
        "key_value_heads": folder.count("num_key_value_heads", heads),
        "vocabulary": folder.count("vocab_size"),
        "context": folder.context,
        "template": template_name(artifact),
        "chat_template": known_chat_template(folder.chat_template),
        "source": manifest.source.get("name") if manifest else None,
        "memory_on": where,
        "memory": memory_needed(size, folder.context),
    }


def template_name(artifact: Artifact) -> str | None:
    """The judge template that the folder names or has in its model card, None where --template has to."""
    from gramlite.judging.template import resolve_template

    recorded = (artifact.manifest.template if artifact.manifest else None) or {}
    try:
        return resolve_template(None, recorded, artifact.path).name
    except GramliteError:
        return None


def known_chat_template(text: object) -> str | None:
    """The name of a chat template that is built in, `unknown` for another one."""
    from gramlite.formats.model_folder import is_text
    from gramlite.generation.scaffold import KNOWN_TEMPLATES, template_hash

    known = KNOWN_TEMPLATES.get(template_hash(text)) if is_text(text) else None
    return known.name if known else "unknown" if text else None


def inspect_model(path: Path) -> dict[str, Any]:
    """What an artifact is: its format, its manifest and what its headers say."""
    from gramlite.loading import open_artifact

    artifact = open_artifact(path)
    if artifact.format == "gguf":
        found = inspect_gguf(path)
    elif path.is_dir():
        found = inspect_folder(artifact)
    else:
        found = {"path": str(path), "format": artifact.format}
    return {**found, "manifest": asdict(artifact.manifest) if artifact.manifest else None}


def show(found: dict[str, Any]) -> None:
    """Print what was found in columns, and the memory as a table."""
    from gramlite.console import show_facts, show_table

    facts = [
        (key.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
        for key, value in found.items()
        if key not in ("memory", "memory_on", "manifest") and value is not None
    ]
    manifest = found.get("manifest")
    made = f"made by {manifest['method']}" if manifest and manifest["method"] else str(bool(manifest))
    show_facts([*facts, ("manifest", made)])
    if found.get("memory"):
        rows = [
            {"context": f"{context:,}"} | {MEMORY.get(part, part): f"{needed[part] / MiB:,.0f}" for part in needed}
            for context, needed in found["memory"].items()
        ]
        show_table(f"Memory needed on {found.get('memory_on', 'the CPU')}, MiB", rows, left=0)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object, also on a terminal.")
def command(model: Path, as_json: bool) -> None:
    """Say what MODEL is: architecture, size, quantization, template, context and the memory it needs."""
    if not model.exists():
        raise ModelError(f"There is no model at {model}.")
    found = inspect_model(model)
    if as_json or not sys.stdout.isatty():
        say_json(found)
    else:
        show(found)
