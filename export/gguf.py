"""Hugging Face checkpoint -> GGUF in F32, F16 or BF16, with nothing lost beyond the dtype.

The plan comes first: every tensor is matched by name and shape, the tokenizer is read, the header is laid out. Then the
weights stream from the safetensors files into the GGUF piece by piece, hashed on both sides. Linear layers and
embeddings take the dtype asked for, vectors (norms, biases) stay F32, as llama.cpp needs them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click

from gramlite.console import progress_bar
from gramlite.formats.architecture import ExpectedTensor
from gramlite.formats.artifact import Manifest
from gramlite.formats.checkpoint import StoredTensor, open_checkpoint
from gramlite.formats.gguf_writer import HEADER_BYTES, Data, check_written, write_model
from gramlite.formats.publish import describe_source, publish_file, template_record, tool_versions
from gramlite.formats.tensor_stream import SourceHash, convert_checked, permute_heads, read_ahead, read_pieces
from gramlite.judging.template import judge_template
from gramlite.storage import check_output
from gramlite.terminal import note

from .options import ArtifactOptions, artifact_options
from .plan import ExportPlan, plan_export
from .smoke import smoke_judge

DTYPES = ("f16", "bf16", "f32")


def export_gguf(
    folder: Path, destination: Path, *, dtype: str = "f16", template: str | None = None, force: bool = False
) -> Manifest:
    """Write a checkpoint folder as one GGUF file with its manifest beside it, and return the manifest.

    `dtype` is f16, bf16 or f32; `template` a built-in judge template's name or a file, by default the one of the
    checkpoint's manifest or model card. Raises ModelError, which names it, for a checkpoint that is refused,
    InputError when `destination` exists and `force` is not set, ResourceError when the disk is full.
    """
    folder, destination = Path(folder), Path(destination)
    destination = check_output(destination, [folder], force=force, file=True, inputs=[template])
    plan = plan_export(open_checkpoint(folder), dtype)
    model, name = plan.model, destination.stem
    judge = judge_template(folder, template)

    def build(temporary: Path) -> Manifest:
        hashes: dict[str, str] = {}
        with progress_bar(model.payload) as advance:
            data = stored_tensors(plan, hashes)
            sha256 = write_model(temporary, model, data, name=name, template=judge, advance=advance)
        checked = check_written(temporary, folder)
        return Manifest(
            format="gguf",
            name=name,
            quantization=model.file_type,
            method="export",
            source=describe_source(folder, hashes),
            settings={
                "dtype": dtype,
                "pre_tokenizer": model.vocabulary.pre,
                "strings_tokenized_alike": checked,
                "notes": list(plan.notes),
            },
            tools=tool_versions("gguf", "numpy"),
            template=template_record(judge),
            bits_per_weight=model.bits_per_weight,
            files={destination.name: sha256},
        )

    return publish_file(destination, build, folder, force=force, need_bytes=model.payload + HEADER_BYTES)


def stored_tensors(plan: ExportPlan, hashes: dict[str, str]) -> Data:
    """The model's tensors as they stream from the source's files, whose sha256 are put into `hashes` by name."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read") as reader:
        for file in plan.checkpoint.files:
            with file.open("rb", buffering=0) as source:
                source_hash = SourceHash(file)
                tensors = [tensor for tensor in plan.checkpoint.tensors.values() if tensor.file == file]
                source_hash.update(source.read(tensors[0].start if tensors else file.stat().st_size))
                for tensor in tensors:
                    expected = plan.expected.get(tensor.name)
                    heads = expected.heads if expected else 0
                    pieces = read_ahead(source_hash.over(read_pieces(source, tensor, heads=heads)), reader)
                    if expected:
                        yield expected.target, (convert_piece(piece, tensor, expected, plan) for piece in pieces)
                    for _ in pieces:  # of a tensor that is left out
                        pass
                hashes[file.name] = source_hash.hexdigest()


def convert_piece(piece: bytes, tensor: StoredTensor, expected: ExpectedTensor, plan: ExportPlan) -> Any:
    """One piece as the file holds it: converted, checked to be finite, its heads' rows in llama.cpp's order."""
    values = convert_checked(piece, tensor, plan.stored_as(expected))
    if expected.heads:
        heads = expected.heads * len(piece) // tensor.bytes
        values = permute_heads(values, heads, plan.model.architecture.head_size)
    return values


@click.command("gguf", short_help="checkpoint -> GGUF in f16, bf16 or f32")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(DTYPES, case_sensitive=False),
    default="f16",
    show_default=True,
    help="Type of the weights.",
)
@artifact_options("The GGUF file to write.", kind="file")
def command(checkpoint: Path, dtype: str, options: ArtifactOptions) -> None:
    """Write a Hugging Face CHECKPOINT folder (Llama, Mistral, Qwen2, Qwen3) as one GGUF file, lossless beyond the dtype."""
    manifest = export_gguf(checkpoint, options.output, dtype=dtype, **options.writing)
    if not manifest.template:
        note("note: no judge template was found; give --template when you judge")
    options.finish(manifest, partial(smoke_judge, source=checkpoint))
