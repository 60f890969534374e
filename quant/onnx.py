"""HF checkpoint -> ONNX folder with weight-only quantization (MatMulNBits), 8 or 4 bits, without calibration.

Activations stay in floating point: weight-only 8 bits is nearly lossless, while onnxruntime's `quantize_dynamic`, which
rounds activations too, moves a judge's verdicts far (KL 0.8 against 0.006 nats), and is not offered.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click
from gramlite.export.genai import TARGETS
from gramlite.export.onnx import publish
from gramlite.export.options import ArtifactOptions, artifact_options
from gramlite.export.smoke import smoke_judge

from gramlite.errors import InputError
from gramlite.formats.architecture import read_architecture
from gramlite.formats.artifact import Manifest
from gramlite.formats.checkpoint import read_config
from gramlite.formats.onnx_graph import read_graph

from .onnx_embedding import shrink_embedding

TYPES = {"int8": 8, "int4": 4}
GROUP_SIZES = (16, 32, 64, 128, 256)
SEARCH = "k_quant"
METHODS = ("default", "rtn", SEARCH)


def quantize_onnx(
    source: Path,
    destination: Path,
    *,
    type: str = "int8",
    group_size: int = 32,
    method: str | None = None,
    target: str = "cpu",
    template: str | None = None,
    force: bool = False,
) -> Manifest:
    """Quantize a checkpoint's matrices into an ONNX folder with its manifest, and return the manifest.

    `group_size` weights share a scale. `method` is the builder's: default and rtn round to nearest, k_quant searches
    scales and zero points; where none is given 4 bits have k_quant if their rows are long enough, and 8 bits default.
    The embedding and the head take 8 bits with int4 too: a verdict is read from two of the head's rows, and where the
    two are tied they lie in the folder once. Graphs for `target` cuda compute in fp16. Raises InputError for settings
    that don't exist, and what `export_onnx` raises.
    """
    for name, value, known in (("type", type, TYPES), ("group size", group_size, GROUP_SIZES),
                               ("method", method or METHODS[0], METHODS), ("target", target, TARGETS)):  # fmt: skip
        if value not in known:
            raise InputError(f"There is no {name} {value!r} for ONNX. Choose one of {', '.join(map(str, known))}.")
    method = choose_method(Path(source), type, group_size, method)
    options = {"block_size": str(group_size), "algo_config": method, "shared_embeddings": "false"}
    if type == "int4":
        options["matmul_mixed_precision"] = "last_matmul:int8"
    return publish(
        Path(source),
        Path(destination),
        precision=type,
        target=target,
        quantization=type.upper(),
        method="weight-only",
        options=options,
        settings={"bits": TYPES[type], "group_size": group_size, "method": method},
        template=template,
        force=force,
        finish=partial(finish, group_size),
    )


def finish(group_size: int, graph: Path) -> dict[str, object]:
    """Round the embedding too, read the graph again, and say whose codes the embedding has."""
    kind = shrink_embedding(graph, group_size)
    read_graph(graph)
    return {"embedding": kind}


def choose_method(source: Path, type: str, group_size: int, method: str | None) -> str:
    """How scales are found; raises InputError where the builder cannot search those of 4 bits, which it packs in twos."""
    if type != "int4" or method not in (None, SEARCH):
        return method or METHODS[0]
    sizes = read_architecture(read_config(source))
    widths = {sizes.hidden, sizes.feed_forward, sizes.heads * sizes.head_size}
    odd = [width for width in sorted(widths) if -(-width // group_size) % 2]
    if odd and method:
        raise InputError(
            f"Rows of {odd[0]} weights are an odd number of groups of {group_size}, for which there is no {SEARCH} in 4 "
            "bits. Choose another --group-size or --method."
        )
    return METHODS[0] if odd else SEARCH


@click.command("onnx", short_help="checkpoint -> ONNX, weights in 8 or 4 bits")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--type", "kind", type=click.Choice(list(TYPES), case_sensitive=False), default="int8", show_default=True)
@click.option("--group-size", type=int, default=32, show_default=True, help="Weights that share a scale.")
@click.option(
    "--method", type=click.Choice(METHODS), help="How scales are found; by default k_quant for 4 bits, default for 8."
)
@click.option("--target", type=click.Choice(TARGETS), default="cpu", show_default=True, help="Where it is to run.")
@artifact_options("The folder to write.")
def command(
    checkpoint: Path, kind: str, group_size: int, method: str | None, target: str, options: ArtifactOptions
) -> None:
    """Write a CHECKPOINT as an ONNX folder whose weights take 8 or 4 bits and whose activations are not rounded."""
    manifest = quantize_onnx(
        checkpoint,
        options.output,
        type=kind.lower(),
        group_size=group_size,
        method=method,
        target=target,
        **options.writing,
    )
    options.finish(manifest, partial(smoke_judge, source=checkpoint))
