"""GPTQ folder -> GGUF or ONNX: the same codes and scales in another format, so that nothing further is lost."""

from __future__ import annotations

from pathlib import Path

import click
from gramlite.export.report import judge_command, print_artifact
from gramlite.export.smoke import recorded_margins, smoke_judge, smoke_option

from gramlite.console import progress_bar
from gramlite.formats.artifact import Manifest, read_manifest
from gramlite.formats.pack_gguf import pack_gguf as write_packed
from gramlite.generation.scaffold import ChatTemplate
from gramlite.judging.template import judge_template
from gramlite.options import chat_options
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
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="The file, or for ONNX the folder, to write."
)
@click.option(
    "--embedding",
    metavar="[f16|q8_0]",
    type=click.Choice(EMBEDDINGS, case_sensitive=False),
    default="f16",
    show_default=True,
    help="Type of the embedding and the head.",
)
@click.option("--template", metavar="NAME|FILE", help="The judge's template; by default the one recorded.")
@chat_options
@smoke_option
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    folder: Path,
    target: str,
    output: Path,
    embedding: str,
    template: str | None,
    chat: ChatTemplate,
    smoke: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write a GPTQ FOLDER as a GGUF file or an ONNX folder with the very same weights, which run without CUDA."""
    pack = pack_gguf
    if target == "onnx":
        from .pack_onnx import pack_onnx as pack
    manifest = pack(folder, output, embedding=embedding, template=template, force=force)
    if smoke:
        margins = recorded_margins(read_manifest(folder), manifest.template)
        manifest = smoke_judge(output, manifest, margins, template=template, chat=chat, force=force)
    print_artifact(output, manifest, command=judge_command(output, manifest), as_json=as_json)
