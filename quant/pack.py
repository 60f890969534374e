"""GPTQ folder -> GGUF or ONNX: the same codes and scales in another format, so that nothing further is lost."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click
from gramlite.export.options import ArtifactOptions, artifact_options
from gramlite.export.smoke import recorded_margins, smoke_judge

from gramlite.console import progress_bar
from gramlite.formats.artifact import Manifest, read_manifest
from gramlite.formats.pack_gguf import pack_gguf as write_packed
from gramlite.judging.template import judge_template
from gramlite.storage import check_output

EMBEDDINGS = ("f16", "q8_0")


def pack_gguf(
    source: Path, destination: Path, *, embedding: str = "f16", template: str | None = None, force: bool = False
) -> Manifest:
    """Write a GPTQ folder as one GGUF file with the folder's template, or with the one named or in a file."""
    check_output(Path(destination), [source], force=force, file=True, inputs=[template])
    judge = judge_template(Path(source), template)
    return write_packed(source, destination, embedding=embedding, template=judge, force=force, progress=progress_bar)


@click.command("pack", short_help="GPTQ folder -> GGUF or ONNX, bit for bit")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--to", "target", type=click.Choice(["gguf", "onnx"]), default="gguf", show_default=True)
@click.option(
    "--embedding",
    metavar="[f16|q8_0]",
    type=click.Choice(EMBEDDINGS, case_sensitive=False),
    default="f16",
    show_default=True,
    help="Type of the embedding and the head.",
)
@artifact_options("The file, or for ONNX the folder, to write.", kind="file", template="the one recorded")
def command(folder: Path, target: str, embedding: str, options: ArtifactOptions) -> None:
    """Write a GPTQ FOLDER as a GGUF file or an ONNX folder with the very same weights, which run without CUDA."""
    pack = pack_gguf
    if target == "onnx":
        from .pack_onnx import pack_onnx as pack
    manifest = pack(folder, options.output, embedding=embedding, **options.writing)
    margins = recorded_margins(read_manifest(folder), manifest.template)
    options.finish(manifest, partial(smoke_judge, source=margins))
