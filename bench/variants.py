"""The types of a sweep: how each is spelled, and the targets that it is made of.

F16, BF16, F32              the checkpoint exported, with nothing lost beyond the dtype
Q4_K_M, Q4_0, IQ4_XS, ...   the F16 file quantized by llama.cpp
Q4_K_M+imatrix, ...         each matrix with or without the importance matrix, as the calibration finds it better
auto:4.5bpw                 the types, too, chosen by the calibration
gptq:BITSxGROUP[:OPTION]... GPTQ, packed into GGUF; the options are `asym`, `no-focus`, `no-search`, `q8_0` (the
                            embedding's type; F16 otherwise) and PART=BITS (`v_proj=8`)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gramlite.errors import InputError
from gramlite.formats.artifact import Manifest
from gramlite.formats.quantization import FILE_TYPES
from gramlite.generation.scaffold import OWN_TEMPLATE, ChatTemplate
from gramlite.storage import atomic_output, sha256_cached

from .builder import Target

if TYPE_CHECKING:
    from gramlite.quant.calibration import Transcript

    from gramlite.generation.decoder import Mode

EXPORTED = ("F16", "BF16", "F32")
AUTO = re.compile(r"^auto:\d+(\.\d+)?bpw$", re.IGNORECASE)
GPTQ = re.compile(r"^gptq:(\d+)x(\d+)((?::[^:]+)*)$", re.IGNORECASE)
SWITCHES: dict[str, dict[str, Any]] = {
    "asym": {"symmetric": False},
    "no-focus": {"focus": False},
    "no-search": {"search": False},
}


@dataclass(frozen=True)
class Variant:
    """One type of a sweep. `gptq` holds the quantizer's own settings; `path` is a model that is there already."""

    name: str
    kind: str
    calibrated: bool = False
    gptq: Mapping[str, Any] = field(default_factory=dict)
    embedding: str = "f16"
    path: Path | None = None

    @property
    def is_calibrated(self) -> bool:
        return self.calibrated or bool(self.gptq)

    @property
    def file_name(self) -> str:
        """The name that files and run folders of this type have."""
        return re.sub(r"[^\w.+=-]", "-", self.name)


def parse_types(text: str) -> list[Variant]:
    """Types separated by commas, the base first; raises InputError for one that is unknown or there twice."""
    found = [parse_variant(part.strip()) for part in text.split(",") if part.strip()]
    if not found:
        raise InputError("--types names no type. Write types such as F16,Q8_0,Q4_K_M,gptq:4x64.")
    names = [variant.name for variant in found]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"--types names {doubled} twice.")
    return found


def parse_variant(text: str) -> Variant:
    """One type; raises InputError that says how types are spelled."""
    if matched := GPTQ.match(text):
        return _gptq(text, int(matched[1]), int(matched[2]), [part for part in matched[3].split(":") if part])
    name, equals, path = text.partition("=")
    if equals:
        if not name or not Path(path).exists():
            raise InputError(f"{text!r} is to be NAME=PATH, and there is no model at {path!r}.")
        return Variant(name, "given", path=Path(path).resolve())
    if AUTO.match(text):
        return Variant(text.lower(), text.lower(), calibrated=True)
    kind, plus, extra = text.partition("+")
    kind, extra = kind.upper(), extra.lower()
    if extra.startswith("low-rank"):
        raise InputError(f"{text!r}: +low-rank was removed. Take {kind}+imatrix or auto:4.5bpw, with --calibration.")
    if kind not in FILE_TYPES.values() or (plus and (kind in EXPORTED or extra != "imatrix")):
        raise InputError(
            f"There is no type {text!r}. Types are F16, llama.cpp's (Q8_0, Q4_K_M, Q4_0+imatrix, ...), "
            "auto:4.5bpw, gptq:4x64, gptq:4x32:asym, ... (bits, weights that share a scale, options), and NAME=PATH for "
            "a model that is there."
        )
    name = f"{kind}+{extra}" if plus else kind
    return Variant(name, kind, calibrated=extra == "imatrix")


def _gptq(text: str, bits: int, group_size: int, options: list[str]) -> Variant:
    settings: dict[str, Any] = {"bits": bits, "group_size": group_size}
    exceptions: list[tuple[str, int]] = []
    embedding = "f16"
    for option in options:
        part, equals, own_bits = option.partition("=")
        if option.lower() in SWITCHES:
            settings |= SWITCHES[option.lower()]
        elif option.lower() in ("f16", "q8_0"):
            embedding = option.lower()
        elif equals and part and own_bits.isdigit():
            exceptions.append((part, int(own_bits)))
        else:
            raise InputError(
                f"{text}: there is no option {option!r}. GPTQ's are {', '.join(SWITCHES)}, q8_0 (the embedding's type) "
                "and PART=BITS, as in v_proj=8."
            )
    if exceptions:
        settings["exceptions"] = tuple(exceptions)
    return Variant(text.lower(), "gptq", gptq=settings, embedding=embedding)


# --- what each is made of ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SweepSource:
    """What a sweep quantizes: a checkpoint, and the pairs, judged in `mode`, or the transcripts that calibrate."""

    checkpoint: Path
    calibration: Path | None = None
    tokens: int = 65_536
    seed: int = 0
    mode: Mode = "direct"
    template: str | None = None
    chat: ChatTemplate = OWN_TEMPLATE
    threads: int | None = None

    @property
    def checkpoint_sha256(self) -> str:
        """One hash over the names and hashes of the checkpoint's files."""
        files = sorted(path for path in self.checkpoint.iterdir() if path.is_file() and not path.name.startswith("."))
        listing = [(path.name, sha256_cached(path)) for path in files]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    @property
    def calibration_mode(self) -> Mode | None:
        """The mode in which pairs are judged to calibrate; None where transcripts are given, or nothing."""
        from gramlite.quant.calibration import holds_transcripts

        return None if self.calibration is None or holds_transcripts(self.calibration) else self.mode

    def record(self) -> dict[str, Any]:
        """What a sweep's record says of it."""
        calibration: dict[str, Any] | None = None
        if self.calibration:
            from gramlite.quant.calibration import VERSION

            calibration = {"name": self.calibration.name, "sha256": sha256_cached(self.calibration)}
            calibration |= {
                "tokens": self.tokens,
                "seed": self.seed,
                "mode": self.calibration_mode,
                "transcripts": VERSION,
            }
        return {
            "checkpoint": {"name": self.checkpoint.resolve().name, "sha256": self.checkpoint_sha256},
            "template": self.template,
            "calibration": calibration,
        }


def artifact_target(variant: Variant, source: SweepSource, folder: Path) -> Target:
    """The GGUF file of a type, with all that it needs, in the sweep's folder of artifacts."""
    path = folder / f"{variant.file_name}.gguf"
    if variant.gptq:
        gptq = _gptq_target(variant, source, folder)
        build = partial(build_packed, folder=gptq.path, embedding=variant.embedding)
        return Target(path, {"made": "pack", "embedding": variant.embedding}, build, (gptq,))
    if variant.kind in EXPORTED:
        return _exported_target(variant.kind, source, folder)
    if variant.calibrated:
        return _calibrated_target(path, variant.kind, source, folder)
    exported = _exported_target("F16", source, folder)
    build = partial(build_quantized, exported=exported.path, kind=variant.kind, threads=source.threads)
    return Target(path, {"made": "quantize", "kind": variant.kind}, build, (exported,))


def _calibrated_target(path: Path, kind: str, source: SweepSource, folder: Path) -> Target:
    transcripts, matrix = _transcripts_target(source, folder), _matrix_target(source, folder)
    build = partial(build_calibrated, source=source, kind=kind, transcripts=transcripts.path, matrix=matrix.path)
    return Target(path, {"made": "quantize calibrated", "kind": kind}, build, (transcripts, matrix))


def _exported_target(kind: str, source: SweepSource, folder: Path) -> Target:
    recipe = {
        "made": "export", "dtype": kind, "checkpoint": source.checkpoint_sha256, "template": source.template,
        "gramlite": version("gramlite"),
    }  # fmt: skip
    build = partial(build_exported, checkpoint=source.checkpoint, dtype=kind.lower(), template=source.template)
    return Target(folder / f"{kind}.gguf", recipe, build)


def _transcripts_target(source: SweepSource, folder: Path) -> Target:
    if source.calibration is None:
        raise InputError(
            "Types with +imatrix, auto and gptq need --calibration PAIRS.jsonl, pairs or transcripts of the judge."
        )
    exported = _exported_target("F16", source, folder)
    recipe = {"made": "transcripts", **source.record()["calibration"]}
    build = partial(build_transcripts, source=source, judge=exported.path)
    return Target(folder / "transcripts.jsonl", recipe, build, (exported,))


def _matrix_target(source: SweepSource, folder: Path) -> Target:
    transcripts = _transcripts_target(source, folder)
    build = partial(build_matrix, source=source, transcripts=transcripts.path)
    return Target(folder / "imatrix.gguf", {"made": "imatrix"}, build, (transcripts,))


def _gptq_target(variant: Variant, source: SweepSource, folder: Path) -> Target:
    from gramlite.quant.solve import GptqSettings

    transcripts = _transcripts_target(source, folder)
    settings = GptqSettings(**variant.gptq)
    name = ":".join(part for part in variant.name.split(":") if part not in ("f16", "q8_0")).replace(":", "-")
    build = partial(build_gptq, source=source, transcripts=transcripts.path, settings=dict(variant.gptq))
    return Target(folder / name, {"made": "gptq", "settings": asdict(settings)}, build, (transcripts,))


# --- the builds, each in a process of its own ----------------------------------------------------------------


def build_exported(path: Path, *, checkpoint: Path, dtype: str, template: str | None) -> Manifest:
    from gramlite.export.gguf import export_gguf

    return export_gguf(checkpoint, path, dtype=dtype, template=template, force=True)


def build_quantized(path: Path, *, exported: Path, kind: str, threads: int | None) -> Manifest:
    from gramlite.quant.gguf_file import quantize_source
    from gramlite.quant.source import open_source

    with open_source(exported, beside=path) as opened:
        return quantize_source(opened, path, kind=kind, force=True, threads=threads)


def build_calibrated(path: Path, *, source: SweepSource, kind: str, transcripts: Path, matrix: Path) -> Manifest:
    from gramlite.quant.calibrated import quantize_calibrated
    from gramlite.quant.calibration import read_transcripts
    from gramlite.quant.imatrix import read_imatrix
    from gramlite.quant.memory import pick_device
    from gramlite.quant.source import open_source

    chosen = read_transcripts(transcripts)
    with open_source(source.checkpoint, beside=path, template=source.template) as opened:
        return quantize_calibrated(
            source.checkpoint,
            opened,
            path,
            chosen,
            kind=kind,
            imatrix=read_imatrix(matrix),
            calibration=_described(source, chosen),
            device=pick_device("auto"),
            force=True,
        )


def build_transcripts(path: Path, *, source: SweepSource, judge: Path) -> None:
    from gramlite.quant.calibration import load_calibration, write_transcripts

    assert source.calibration is not None
    transcripts, _ = load_calibration(
        source.calibration,
        judge=judge,
        template=source.template,
        chat=source.chat,
        tokens=source.tokens,
        seed=source.seed,
        mode=source.mode,
    )
    with atomic_output(path, force=True) as temporary:
        write_transcripts(temporary, transcripts)


def build_matrix(path: Path, *, source: SweepSource, transcripts: Path) -> None:
    from gramlite.quant.calibration import read_transcripts
    from gramlite.quant.imatrix import collect_importance, write_imatrix

    assert source.calibration is not None
    matrix = collect_importance(source.checkpoint, read_transcripts(transcripts), dataset=source.calibration.name)
    write_imatrix(path, matrix, force=True)


def build_gptq(path: Path, *, source: SweepSource, transcripts: Path, settings: Mapping[str, Any]) -> None:
    from gramlite.quant.calibration import read_transcripts
    from gramlite.quant.gptq import quantize_gptq
    from gramlite.quant.memory import pick_device
    from gramlite.quant.solve import GptqSettings

    chosen = read_transcripts(transcripts)
    quantize_gptq(
        source.checkpoint,
        path,
        chosen,
        GptqSettings(**settings),
        calibration=_described(source, chosen),
        device=pick_device("auto"),
        template=source.template,
        force=True,
    )


def _described(source: SweepSource, chosen: Sequence[Transcript]) -> dict[str, Any]:
    from gramlite.quant.calibration import describe

    assert source.calibration is not None
    described = describe(chosen, tokens=source.tokens, seed=source.seed, source=source.calibration.name)
    return described | ({"mode": source.calibration_mode} if source.calibration_mode else {})


def build_packed(path: Path, *, folder: Path, embedding: str) -> Manifest:
    from gramlite.quant.pack import pack_gguf

    return pack_gguf(folder, path, embedding=embedding, force=True)
