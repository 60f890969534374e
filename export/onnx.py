"""HF checkpoint -> ONNX folder for onnxruntime, in full or half precision, through onnxruntime-genai's model builder.

`optimum` is no second way: optimum-onnx 0.1.0 pins transformers below 4.58 and there reads a checkpoint that
transformers 5 saved with another rope_theta, without a word, and its graphs decode half as fast.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from gramlite.console import progress_bar
from gramlite.errors import InputError
from gramlite.formats.architecture import read_architecture
from gramlite.formats.artifact import Manifest, hash_files
from gramlite.formats.checkpoint import Checkpoint, open_checkpoint
from gramlite.formats.publish import describe_source, manifest_text, tool_versions, write_durably
from gramlite.generation.scaffold import ChatTemplate
from gramlite.judging.template import judge_template
from gramlite.options import chat_options
from gramlite.storage import FOLDER_MANIFEST, atomic_output, check_output, sha256_cached

from .genai import GRAPH, TARGETS, build, require_builder, weight_bytes
from .plan import match_tensors
from .report import judge_command, print_artifact
from .smoke import smoke_judge, smoke_option

DTYPES = {"fp32": 4.0, "fp16": 2.0}  # bytes a weight
QUANTIZED = 2.5  # bytes a weight for two copies of 8 bits and scales, since the graph's data are written anew
TOOLS = ("onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "torch", "transformers")


def export_onnx(
    source: Path,
    destination: Path,
    *,
    dtype: str = "fp32",
    template: str | None = None,
    force: bool = False,
) -> Manifest:
    """Write a checkpoint as an ONNX folder with its manifest, and return the manifest.

    fp32 is for the CPU, fp16 for CUDA. Raises ModelError for a checkpoint that is refused, InputError for a dtype that
    is unknown or a taken `destination`, ResourceError when the disk is full.
    """
    if dtype not in DTYPES:
        raise InputError(f"There is no dtype {dtype!r} for ONNX. Choose one of {', '.join(DTYPES)}.")
    return publish(
        Path(source),
        Path(destination),
        precision=dtype,
        target="cpu" if dtype == "fp32" else "cuda",
        quantization={"fp32": "F32", "fp16": "F16"}[dtype],
        method=None,
        options={},
        settings={},
        template=template,
        force=force,
    )


def publish(
    source: Path,
    destination: Path,
    *,
    precision: str,
    target: str,
    quantization: str,
    method: str | None,
    options: dict[str, str],
    settings: dict[str, object],
    template: str | None,
    force: bool,
    finish: Callable[[Path], dict[str, object]] = lambda graph: {},
) -> Manifest:
    """Build the graph and put the whole folder in place, its manifest inside; see `export_onnx` for what is raised.

    `finish` may change the graph before it is hashed, and says what to add to the settings.
    """
    destination = check_output(destination, [source], force=force, inputs=[template])
    checkpoint = open_checkpoint(source)
    match_tensors(checkpoint, read_architecture(checkpoint.config))  # the builder fills what is missing at random
    require_builder()
    assert target in TARGETS
    judge = judge_template(source, template)
    weights = count_weights(checkpoint)
    need_bytes = int(weights * DTYPES.get(precision, QUANTIZED)) + (64 << 20)
    if precision not in DTYPES:  # the first copy has the embedding in float32
        need_bytes += 4 * int(checkpoint.config["vocab_size"]) * int(checkpoint.config["hidden_size"])
    layer_bytes = need_bytes // max(1, int(checkpoint.config["num_hidden_layers"]))
    with progress_bar(need_bytes) as advance, atomic_output(destination, force=force, need_bytes=need_bytes) as folder:
        build(source, folder, precision, target, options, advance, layer_bytes)
        added = finish(folder / GRAPH)
        manifest = Manifest(
            format="onnx",
            name=destination.name,
            quantization=quantization,
            method=method,
            source=describe_source(source, {file.name: sha256_cached(file) for file in checkpoint.files}),
            settings={"precision": precision, "target": target, **settings, **added},
            tools=tool_versions(*TOOLS),
            template=judge,
            bits_per_weight=round(8 * weight_bytes(folder / GRAPH) / weights, 4),
            files=hash_files(folder),
        )
        write_durably(folder / FOLDER_MANIFEST, manifest_text(manifest))
    return manifest


def count_weights(checkpoint: Checkpoint) -> int:
    return sum(int(np.prod(tensor.shape)) for tensor in checkpoint.tensors.values())


@click.command("onnx", short_help="checkpoint -> ONNX, full or half precision")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option(
    "--dtype",
    metavar="[fp32|fp16]",
    type=click.Choice(list(DTYPES), case_sensitive=False),
    default="fp32",
    show_default=True,
    help="fp32 runs on the CPU, fp16 is for CUDA.",
)
@click.option("--template", metavar="NAME|FILE", help="The judge's template; by default that of the model card.")
@chat_options
@smoke_option
@click.option("--force", is_flag=True, help="Replace an existing folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    checkpoint: Path,
    output: Path,
    dtype: str,
    template: str | None,
    chat: ChatTemplate,
    smoke: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write a CHECKPOINT as an ONNX folder that onnxruntime runs."""
    manifest = export_onnx(checkpoint, output, dtype=dtype.lower(), template=template, force=force)
    if smoke:
        manifest = smoke_judge(output, manifest, checkpoint, template=template, chat=chat, force=force)
    print_artifact(output, manifest, command=judge_command(output, manifest), as_json=as_json)
