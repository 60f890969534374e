"""The embedding of an ONNX graph in 8 bits; onnxruntime-genai's model builder leaves it in floating point.

`GatherBlockQuantized` looks up rows of codes and scales as `MatMulNBits` multiplies by them. Where the head is the
embedding's own matrix and has 8 bits, both operators read the same bytes of the file; else the rows are rounded here.
(The builder shares the two in 4-bit graphs alone, and release 0.18 then names weights that the graph does not have.)
Operators: docs/ContribOperators.md of onnxruntime.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gramlite.errors import ModelError
from gramlite.formats.onnx_graph import (
    FLOAT,
    FLOAT16,
    UINT8,
    external_extent,
    external_location,
    external_offset,
    parse,
    read_values,
    tensors_in,
)

GATHER = "/model/embed_tokens/Gather"
HEAD = "/lm_head/"
BITS = 8
MIDDLE = 1 << (BITS - 1)
GROUP_SIZES = (256, 128, 64, 32, 16)  # that the operator has
STEPS = 2  # by which a group's extreme may be cut; another matrix's values are off by dozens
SMALLEST = {FLOAT: 0.0, FLOAT16: 2.0**-14}  # float16's least normal number: smaller scales are no longer exact
ALIGNMENT = 4096  # bytes, so that weights can be mapped
PIECE_BYTES = 1 << 24
NUMPY_TYPES: dict[int, np.dtype[Any]] = {FLOAT: np.dtype("<f4"), UINT8: np.dtype("u1"), FLOAT16: np.dtype("<f2")}

Array = npt.NDArray[Any]


def shrink_embedding(path: Path, group_size: int) -> str:
    """Put 8-bit codes in place of the embedding in the graph at `path`, and return whose they are.

    "head" says that they are the head's, "int8" that they are the embedding's own, rounded to nearest in groups of
    `group_size` or of half as many and so on, and "float" that its rows are no multiple of 16, so that nothing was
    changed.
    Raises ModelError for a graph that the builder does not make.
    """
    model = parse(path)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    gathers = [node for node in model.graph.node if node.name == GATHER and node.op_type == "Gather"]
    table = tensors.get(gathers[0].input[0]) if len(gathers) == 1 else None
    if table is None or len(table.dims) != 2 or table.data_type not in (FLOAT, FLOAT16):
        raise ModelError(f"{path} has no embedding where the model builder puts it. Is this version of it supported?")
    operands, size = head_operands(model, tensors, table)
    if operands and all(same_rows(path, table, operands, size)):
        kind, parts = "head", [alias(table, part) for part in operands]
    else:
        fitting = (size for size in GROUP_SIZES if size <= group_size and not table.dims[1] % size)
        size = next(fitting, 0)
        if not size:
            return "float"
        kind, parts = "int8", round_table(path, table, size)
    exchange(model.graph, gathers[0], table, parts, size)
    keep_used(path, model)
    return kind


def head_operands(model: Any, tensors: dict[str, Any], table: Any) -> tuple[list[Any], int]:
    """The codes, scales and, where it has them, zero points of an 8-bit head of the embedding's shape; its groups' size."""
    for node in model.graph.node:
        if node.op_type == "MatMulNBits" and node.name.startswith(HEAD):
            found = {attribute.name: attribute.i for attribute in node.attribute}
            operands = [tensors.get(name) for name in list(node.input)[1:4]]
            shape, size = tuple(found.get(name, 0) for name in ("bits", "N", "K")), found.get("block_size", 0)
            fits = shape == (BITS, *table.dims) and size in GROUP_SIZES and not table.dims[1] % size
            types = [operand and operand.data_type for operand in operands]
            if fits and types in ([UINT8, table.data_type], [UINT8, table.data_type, UINT8]):
                return operands, size
    return [], 0


def same_rows(path: Path, table: Any, operands: Sequence[Any], size: int) -> Iterator[bool]:
    """For one piece of rows after the other, whether the operands are the table's values, rounded."""
    for start, stop in pieces(table):
        shape = (stop - start, table.dims[1] // size, size)
        values, codes = (
            read_rows(path, tensor, table.dims[0], start, stop).reshape(shape).astype(np.float32)
            for tensor in (table, operands[0])
        )
        others = [read_rows(path, tensor, table.dims[0], start, stop).astype(np.float32) for tensor in operands[1:]]
        scales, *zeros = (each.reshape(*shape[:2], 1) for each in others)
        error = np.abs((codes - (zeros[0] if zeros else MIDDLE)) * scales - values)
        yield bool((error <= STEPS * np.abs(scales) + SMALLEST[table.data_type]).all())


def alias(table: Any, operand: Any) -> Any:
    """Another name and shape for the bytes of a head's operand."""
    import onnx

    other = onnx.TensorProto()
    other.CopyFrom(operand)
    other.name = f"{table.name}:{operand.name}"
    del other.dims[:]
    other.dims.extend([table.dims[0], math.prod(operand.dims) // table.dims[0]])
    return other


def round_table(path: Path, table: Any, size: int) -> list[Any]:
    """The table's codes, [rows, width] around 128, and scales, [rows, width / size], of each group's largest / 127.

    The data go behind the weights' own file where the table lies in it.
    """
    import onnx

    rows, width = table.dims
    scales = np.empty((rows, width // size), dtype=NUMPY_TYPES[table.data_type])
    tensors = [onnx.TensorProto(name=f"{table.name}_Q8", data_type=UINT8, dims=table.dims),
               onnx.TensorProto(name=f"{table.name}_scales", data_type=table.data_type, dims=scales.shape)]  # fmt: skip

    def codes() -> Iterator[bytes]:
        for start, stop in pieces(table):
            values = read_rows(path, table, rows, start, stop).astype(np.float32).reshape(stop - start, -1, size)
            largest = np.abs(values).max(axis=2) / np.float32(MIDDLE - 1)
            scales[start:stop] = largest
            steps = scales[start:stop].astype(np.float32)[..., None]
            found = np.rint(np.divide(values, steps, where=steps > 0, out=np.zeros_like(values)))
            yield (found.clip(-MIDDLE, MIDDLE - 1) + MIDDLE).astype(np.uint8).tobytes()

    def known() -> Iterator[bytes]:  # once the codes are
        yield scales.tobytes()

    for tensor, data in zip(tensors, (codes(), known()), strict=True):
        if table.data_location != table.EXTERNAL:
            tensor.raw_data = b"".join(data)
            continue
        file, _ = external_extent(path, table)
        with file.open("ab") as output:
            start = align(output)
            for piece in data:
                output.write(piece)
            place(tensor, external_location(table), start, output.tell() - start)
    return tensors


def exchange(graph: Any, gather: Any, table: Any, parts: Sequence[Any], size: int) -> None:
    """Put the operator that reads codes in the place of the one that reads floats, and its weights in that of the table."""
    import onnx

    inputs = [parts[0].name, gather.input[1], *(tensor.name for tensor in parts[1:])]
    node = onnx.helper.make_node(
        "GatherBlockQuantized", inputs, gather.output, name=f"{GATHER}BlockQuantized", domain="com.microsoft",
        bits=BITS, block_size=size, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    index = list(graph.node).index(gather)
    graph.node.remove(gather)
    graph.node.insert(index, node)
    graph.initializer.remove(table)
    graph.initializer.extend(parts)


def keep_used(path: Path, model: Any) -> None:
    """Write the data files anew with what the graph's weights still use, once what two of them share; then the graph."""
    kept: dict[Path, dict[tuple[int, int], list[Any]]] = {}
    for tensor in tensors_in(model):
        if tensor.data_location == tensor.EXTERNAL:
            file, size = external_extent(path, tensor)
            kept.setdefault(file, {}).setdefault((external_offset(tensor), size), []).append(tensor)
    for file, extents in kept.items():
        fresh = file.with_name(file.name + ".new")
        with file.open("rb") as source, fresh.open("wb") as output:
            for (offset, size), tensors in sorted(extents.items()):
                start = align(output)
                source.seek(offset)
                for done in range(0, size, PIECE_BYTES):
                    output.write(source.read(min(PIECE_BYTES, size - done)))
                for tensor in tensors:
                    place(tensor, external_location(tensor), start, size)
        os.replace(fresh, file)
    path.write_bytes(model.SerializeToString())


def pieces(table: Any) -> Iterator[tuple[int, int]]:
    """Rows of the table from start to stop, as many as make 16 MiB of float32."""
    rows, width = table.dims
    step = max(1, PIECE_BYTES // (4 * width))
    return ((start, min(rows, start + step)) for start in range(0, rows, step))


def read_rows(path: Path, tensor: Any, rows: int, start: int, stop: int) -> Array:
    """Rows of a weight that has as many values in each of `rows`, whatever its shape."""
    if tensor.data_location != tensor.EXTERNAL:
        whole: Array = read_values(path, tensor).reshape(rows, -1)
        return whole[start:stop]
    file, size = external_extent(path, tensor)
    with file.open("rb") as source:
        source.seek(external_offset(tensor) + start * (size // rows))
        data = source.read((stop - start) * (size // rows))
    return np.frombuffer(data, dtype=NUMPY_TYPES[tensor.data_type]).reshape(stop - start, -1)


def align(output: BinaryIO) -> int:
    output.write(bytes(-output.tell() % ALIGNMENT))
    return output.tell()


def place(tensor: Any, location: str, offset: int, size: int) -> None:
    """Say where a weight's data lie."""
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(size))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    tensor.data_location = tensor.EXTERNAL
