"""HF checkpoint -> ONNX folder for onnxruntime, in full or half precision, through onnxruntime-genai's model builder.

`optimum` is no second way: optimum-onnx 0.1.0 pins transformers below 4.58 and there reads a checkpoint that
transformers 5 saved with another rope_theta, without a word, and its graphs decode half as fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import click

from gramlite.console import progress_bar
from gramlite.errors import InputError
from gramlite.formats.architecture import read_architecture
from gramlite.formats.artifact import Manifest
from gramlite.formats.checkpoint import open_checkpoint
from gramlite.formats.publish import describe_source, publish_folder, tool_versions
from gramlite.judging.template import judge_template
from gramlite.storage import check_output, sha256_cached

from .genai import GRAPH, TARGETS, build, require_builder, weight_bytes
from .options import ArtifactOptions, artifact_options
from .plan import match_tensors
from .smoke import smoke_judge

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
    template: str | None,
    force: bool,
    method: str | None = None,
    options: Mapping[str, str] = MappingProxyType({}),
    settings: Mapping[str, object] = MappingProxyType({}),
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
    need_bytes = int(checkpoint.weights * DTYPES.get(precision, QUANTIZED)) + (64 << 20)
    if precision not in DTYPES:  # the first copy has the embedding in float32
        need_bytes += 4 * int(checkpoint.config["vocab_size"]) * int(checkpoint.config["hidden_size"])
    layer_bytes = need_bytes // max(1, int(checkpoint.config["num_hidden_layers"]))

    def write(folder: Path) -> Manifest:
        with progress_bar(need_bytes) as advance:
            build(source, folder, precision, target, options, advance, layer_bytes)
        added = finish(folder / GRAPH)
        return Manifest(
            format="onnx",
            name=destination.name,
            quantization=quantization,
            method=method,
            source=describe_source(source, {file.name: sha256_cached(file) for file in checkpoint.files}),
            settings={"precision": precision, "target": target, **settings, **added},
            tools=tool_versions(*TOOLS),
            template=judge,
            bits_per_weight=round(8 * weight_bytes(folder / GRAPH) / checkpoint.weights, 4),
        )

    return publish_folder(destination, write, force=force, need_bytes=need_bytes)


@click.command("onnx", short_help="checkpoint -> ONNX, full or half precision")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    metavar="[fp32|fp16]",
    type=click.Choice(list(DTYPES), case_sensitive=False),
    default="fp32",
    show_default=True,
    help="fp32 runs on the CPU, fp16 is for CUDA.",
)
@artifact_options("The folder to write.")
def command(checkpoint: Path, dtype: str, options: ArtifactOptions) -> None:
    """Write a CHECKPOINT as an ONNX folder that onnxruntime runs."""
    manifest = export_onnx(checkpoint, options.output, dtype=dtype.lower(), **options.writing)
    options.finish(manifest, partial(smoke_judge, source=checkpoint))
