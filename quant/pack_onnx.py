"""GPTQ folder -> ONNX folder whose MatMulNBits operators hold the very same codes, scales and zero points.

The graph is the model builder's. Its own repacking goes through float16 and rounds a second time, so every quantized
weight is written over with ours, and then read back and compared, bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gramlite.export.genai import GRAPH, build, initializers, require_builder, weight_bytes

from gramlite.console import progress_bar
from gramlite.errors import ModelError
from gramlite.formats.architecture import family_of
from gramlite.formats.artifact import Manifest, read_manifest, verify_files
from gramlite.formats.gguf_blocks import check_matmul_nbits, matmul_nbits, pack_bytes
from gramlite.formats.gptq_folder import GptqFolder, open_gptq
from gramlite.formats.onnx_graph import external_extent, external_offset, parse, read_graph, read_values
from gramlite.formats.publish import describe_source, publish_folder, tool_versions
from gramlite.formats.quantized_linear import QuantizedLinear
from gramlite.judging.template import judge_template
from gramlite.storage import check_output, sha256_cached

from .onnx_embedding import shrink_embedding

OPERATOR = "MatMulNBits"
NODE = re.compile(r"^/model/layers\.(\d+)/(attn|mlp)/(\w+)_proj/MatMulNBits$")
FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
UNQUANTIZED = "/lm_head/MatMul,/model/embed_tokens/Gather"
HEAD = "/lm_head"
EMBEDDING_GROUP = 32  # as Q8_0 has
TOOLS = ("onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "torch", "transformers")


@dataclass(frozen=True)
class PackedNode:
    """An operator of the graph and the folder's modules that its rows come from, in order."""

    node: Any
    modules: tuple[str, ...]

    def tensor_names(self) -> dict[str, str]:
        """The initializers that hold its packed codes, scales and, where it has them, zero points."""
        names = dict(zip(("B", "scales", "zero_points", "g_idx"), list(self.node.input)[1:], strict=False))
        if names.pop("g_idx", ""):
            raise ModelError(f"{self.node.name} has an order of its groups, which the folder has not.")
        return {key: name for key, name in names.items() if name}


def pack_onnx(
    source: Path, destination: Path, *, embedding: str = "f16", template: str | None = None, force: bool = False
) -> Manifest:
    """Write a GPTQ folder as an ONNX folder whose dequantized weights are the folder's own, bit for bit.

    `embedding` f16 keeps the embedding and the head exact (ONNX stores them as float32), q8_0 rounds both to 8 bits.
    Raises ModelError for a layer that MatMulNBits cannot hold, InputError for a taken `destination`.
    """
    source, destination = Path(source), Path(destination)
    destination = check_output(destination, [source], force=force, inputs=[template])
    folder = open_gptq(source)
    family_of(folder.config)
    require_builder()
    bits = {name: check(folder, name) for name in folder.linears}
    judge, origin = judge_template(source, template), read_manifest(source)
    if origin:
        verify_files(source, origin)
    options = {"nodes_to_exclude": UNQUANTIZED}
    if embedding == "q8_0":
        options = {"matmul_mixed_precision": "last_matmul:int8", "shared_embeddings": "false"}
    need_bytes = 3 * sum(tensor.bytes for tensor in folder.tensors.values()) + (64 << 20)
    layer_bytes = need_bytes // max(1, int(folder.config["num_hidden_layers"]))

    def write(output: Path) -> Manifest:
        with progress_bar(need_bytes) as advance:
            build(source, output, "int4", "cpu", options, advance, layer_bytes)
        if embedding == "q8_0":
            shrink_embedding(output / GRAPH, EMBEDDING_GROUP)
        put_weights(folder, output / GRAPH)
        read_graph(output / GRAPH)
        return Manifest(
            format="onnx",
            name=destination.name,
            quantization=f"INT{max(set(bits.values()), key=list(bits.values()).count)}",
            method="gptq",
            source=describe_source(source, {file.name: sha256_cached(file) for file in folder.files})
            | ({"source": origin.source} if origin else {}),
            settings={"embedding": embedding, "target": "cpu"} | (origin.settings if origin else {}),
            calibration=origin.calibration if origin else None,
            tools=tool_versions(*TOOLS),
            template=judge,
            bits_per_weight=round(8 * weight_bytes(output / GRAPH) / count_weights(folder), 4),
        )

    return publish_folder(destination, write, force=force, need_bytes=need_bytes)


def check(folder: GptqFolder, name: str) -> int:
    """A layer's bits; raises ModelError where MatMulNBits cannot hold it."""
    linear = folder.read_linear(name)
    check_matmul_nbits(name, linear)
    return linear.bits


def put_weights(folder: GptqFolder, path: Path) -> None:
    """Write every quantized layer's own bytes into the graph's data, then read them back and compare."""
    tensors = initializers(path)
    packed = list(packed_nodes(folder, parse(path)))
    for entry in packed:
        linears = [folder.read_linear(name) for name in entry.modules]
        check_attributes(entry, linears)
        parts = [operands(name, linear) for name, linear in zip(entry.modules, linears, strict=True)]
        for key, name in entry.tensor_names().items():
            put(path, tensors[name], np.concatenate([part[key].reshape(-1) for part in parts]))
    for entry in packed:
        wanted = np.concatenate([folder.read_linear(name).dequantize() for name in entry.modules])
        found = dequantize(entry, lambda name: read_values(path, tensors[name]))
        if not np.array_equal(found, wanted):
            raise ModelError(f"{entry.node.name} did not come back from the disk as it was written. Check the disk.")


def packed_nodes(folder: GptqFolder, model: Any) -> Iterator[PackedNode]:
    """The graph's quantized operators; raises ModelError unless together they are the folder's quantized modules."""
    left = set(folder.linears)
    for node in model.graph.node:
        if node.op_type != OPERATOR or node.name.startswith(HEAD):
            continue
        match = NODE.match(node.name)
        if match is None:
            raise ModelError(f"The graph has the operator {node.name!r}, which belongs to no layer that is known.")
        layer, block, kind = match.groups()
        place = f"model.layers.{layer}.{'self_attn' if block == 'attn' else 'mlp'}"
        modules = tuple(f"{place}.{part}_proj" for part in FUSED.get(kind, (kind,)))
        if not left.issuperset(modules):
            raise ModelError(f"The graph's {node.name!r} stands for {', '.join(modules)}, which the folder has not.")
        left -= set(modules)
        yield PackedNode(node, modules)
    if left:
        raise ModelError(
            f"The model builder left {sorted(left)[0]} unquantized. Quantize with one of the known families."
        )


def operands(name: str, linear: QuantizedLinear) -> dict[str, npt.NDArray[Any]]:
    """A layer's packed operands, with zero points also where they are all the middle code."""
    return {"zero_points": pack_bytes(linear.zeros, linear.bits)} | matmul_nbits(name, linear)


def check_attributes(entry: PackedNode, linears: list[QuantizedLinear]) -> None:
    """The operator's own settings must be those of the layers it stands for."""
    attributes = {attribute.name: attribute.i for attribute in entry.node.attribute}
    rows, columns = sum(len(linear.codes) for linear in linears), linears[0].codes.shape[1]
    for linear in linears:
        wanted = {"bits": linear.bits, "block_size": linear.group_size, "K": columns, "N": rows}
        for key, value in wanted.items():
            if attributes.get(key) != value:
                raise ModelError(f"The graph's {entry.node.name} has {key} {attributes.get(key)} where {value} is due.")


def dequantize(entry: PackedNode, fetch: Callable[[str], npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
    """The operator's weight [N, K], from what the files hold."""
    attributes = {attribute.name: attribute.i for attribute in entry.node.attribute}
    names = entry.tensor_names()
    bits, rows, size = attributes["bits"], attributes["N"], attributes["block_size"]
    groups = attributes["K"] // size
    codes = unpack_bytes(fetch(names["B"]).reshape(rows, groups, -1), bits)[..., :size]
    zeros = np.full((rows, groups), 1 << (bits - 1), dtype=np.uint8)
    if "zero_points" in names:
        zeros = unpack_bytes(fetch(names["zero_points"]).reshape(rows, -1), bits)[:, :groups]
    scales = fetch(names["scales"]).reshape(rows, groups, 1)
    weight: npt.NDArray[np.float32] = (codes.astype(np.float32) - zeros[..., None].astype(np.float32)) * scales
    return weight.reshape(rows, -1)


def unpack_bytes(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """The codes that `pack_bytes` packed, along the last axis."""
    if bits == 8:
        return packed
    return np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1).reshape(*packed.shape[:-1], -1)


def put(path: Path, tensor: Any, values: npt.NDArray[Any]) -> None:
    """Write a weight over the one of the same size that is there."""
    file, size = external_extent(path, tensor)
    data = values.tobytes()
    if len(data) != size:
        raise ModelError(f"{tensor.name} takes {size:,} bytes in the graph and {len(data):,} in the folder.")
    with file.open("r+b") as stream:
        stream.seek(external_offset(tensor))
        stream.write(data)


def count_weights(folder: GptqFolder) -> int:
    """The weights of the model, as they were before quantization."""
    linears = sum(folder.read_linear(name).codes.size for name in folder.linears)
    parts = tuple(f"{name}." for name in folder.linears)
    others = sum(int(np.prod(tensor.shape)) for name, tensor in folder.tensors.items() if not name.startswith(parts))
    return linears + others
