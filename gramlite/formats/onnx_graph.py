"""An ONNX decoder's graph, checked before native code sees it: where its weights lie, its operators, its KV cache.

Format: onnx.proto (IR), and the names that onnxruntime-genai's model builder gives to inputs and outputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from gramlite.errors import ModelError

MAX_GRAPH_BYTES = (1 << 31) - 1  # what a protobuf message can be
MAX_DEPTH = 64
DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
ATTENTION = "GroupQueryAttention"
PAST = re.compile(r"^past_key_values\.(\d+)\.(key|value)$")
ITEM_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 21: 4, 22: 4}
FLOAT, UINT8, FLOAT16, BFLOAT16 = 1, 2, 10, 16  # TensorProto.DataType


@dataclass(frozen=True)
class OnnxGraph:
    """A checked graph: `past` are the KV inputs' names, each with `key_value_heads`; `head_size` is 0 where it is open.

    `files` are the files that hold its weights, `weights` their bytes; `half` says that the KV cache is in 16 bits,
    as CUDA's attention needs it.
    """

    path: Path
    past: tuple[str, ...]
    key_value_heads: int
    head_size: int
    vocabulary: int
    inputs: frozenset[str]
    half: bool
    files: tuple[Path, ...]
    weights: int


def read_graph(path: Path) -> OnnxGraph:
    """Parse and check a decoder's .onnx file and the extents of its external data.

    Raises ModelError, which says what is wrong: external data outside the folder or beyond its file's end, operators
    of other domains, or a graph that is no decoder with GroupQueryAttention.
    """
    model = parse(path)
    files: dict[Path, None] = {}
    weights = 0
    for tensor in tensors_in(model):
        if tensor.data_location == tensor.EXTERNAL:
            file, size = external_extent(path, tensor)
            files[file] = None
            weights += size
        else:
            weights += tensor.ByteSize()
    operators = {(node.domain, node.op_type) for node in nodes_in(model)}
    foreign = sorted(domain for domain, _ in operators if domain not in DOMAINS)
    if foreign:
        raise ModelError(f"{path} uses operators of {foreign[0]!r}, which are not part of onnxruntime.")
    if ("com.microsoft", ATTENTION) not in operators:
        raise ModelError(
            f"{path} has no {ATTENTION}, so its KV cache cannot be shared. Type: gramlite export onnx CHECKPOINT -o OUT"
        )
    undefined = sorted(undefined_inputs(model.graph))
    if undefined:
        raise ModelError(f"{path} has operators that read {undefined[0]!r}, which nothing in it is. Export it again.")
    return describe(path, model, tuple(files), weights)


def undefined_inputs(graph: Any) -> set[str]:
    """What the graph's operators read and neither its inputs, its weights nor its operators are."""
    known = {"", *(value.name for value in graph.input), *(tensor.name for tensor in graph.initializer)}
    known |= {name for node in graph.node for name in node.output}
    known |= {tensor.values.name for tensor in graph.sparse_initializer}
    return {name for node in graph.node for name in node.input} - known


def parse(path: Path) -> Any:
    """The file as a protobuf message, its external data left where they are."""
    import onnx

    try:
        if path.stat().st_size > MAX_GRAPH_BYTES:
            raise ModelError(f"{path} is larger than an ONNX graph can be. Download it again.")
        model = onnx.load_model(str(path), load_external_data=False)
    except ModelError:
        raise
    except Exception as error:  # protobuf's own kinds, OSError, RecursionError
        raise ModelError(f"{path} is no readable ONNX graph ({type(error).__name__}). Export it again.") from error
    return model


def messages_in(message: Any, depth: int = 0) -> Iterator[Any]:
    """A protobuf message and every message inside it."""
    if depth > MAX_DEPTH:
        raise ModelError("The ONNX graph is nested too deeply to be a model.")
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                if hasattr(part, "ListFields"):
                    yield from messages_in(part, depth + 1)


def tensors_in(model: Any) -> Iterator[Any]:
    """Every TensorProto, in initializers, attributes and functions alike."""
    return (part for part in messages_in(model) if part.DESCRIPTOR.name == "TensorProto")


def nodes_in(model: Any) -> Iterator[Any]:
    return (part for part in messages_in(model) if part.DESCRIPTOR.name == "NodeProto")


def external_extent(path: Path, tensor: Any) -> tuple[Path, int]:
    """The file of a tensor's external data and its bytes; raises ModelError where they lie outside folder or file."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    folder = path.parent.resolve()
    unsafe = (
        not location
        or "\0" in location
        or PurePosixPath(location).is_absolute()
        or bool(PureWindowsPath(location).drive or PureWindowsPath(location).root)
        or ".." in PureWindowsPath(location).parts
    )
    file = folder / location
    if unsafe or file.is_symlink() or not file.resolve().is_relative_to(folder):
        raise ModelError(f"{path} places weights at {location!r}, outside of its folder, and is refused.")
    if not file.is_file():
        raise ModelError(f"{file} is missing; {path.name} has weights in it. Export or download it again.")
    offset, length = (_count(path, tensor, entries.get(key), key) for key in ("offset", "length"))
    size = file.stat().st_size
    length = size - offset if "length" not in entries else length
    if tensor.data_type not in ITEM_BITS or any(side < 0 for side in tensor.dims):
        raise ModelError(f"{path} has the tensor {tensor.name!r} of an unknown type or shape.")
    needed = -(-math.prod(tensor.dims) * ITEM_BITS[tensor.data_type] // 8)
    if length != needed or offset + length > size:
        raise ModelError(f"{file} does not hold the {needed:,} bytes of {tensor.name!r}. Export or download it again.")
    return file, length


def read_values(path: Path, tensor: Any) -> Any:
    """A weight as a numpy array, wherever its data lie; raises ModelError where that is outside folder or file."""
    from onnx import numpy_helper

    if tensor.data_location == tensor.EXTERNAL:
        external_extent(path, tensor)
    return numpy_helper.to_array(tensor, base_dir=str(path.parent))


def external_offset(tensor: Any) -> int:
    """Where in its file a tensor's external data begin, once `external_extent` has accepted them."""
    return next((int(entry.value) for entry in tensor.external_data if entry.key == "offset"), 0)


def external_location(tensor: Any) -> str:
    """The file of a tensor's external data as the graph names it."""
    return next(str(entry.value) for entry in tensor.external_data if entry.key == "location")


def _count(path: Path, tensor: Any, text: str | None, key: str) -> int:
    if text is None:
        return 0
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ModelError(f"{path} has the unusable {key} {text!r} for {tensor.name!r}. Export or download it again.")
    return int(text)


def describe(path: Path, model: Any, files: tuple[Path, ...], weights: int) -> OnnxGraph:
    """What the runtime needs to know; raises ModelError for a graph whose inputs and outputs are not a decoder's."""
    shapes = {value.name: _shape(value) for value in (*model.graph.input, *model.graph.output)}
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    inputs = {value.name for value in model.graph.input} - {tensor.name for tensor in model.graph.initializer}
    past = tuple(sorted((name for name in inputs if PAST.match(name)), key=_past_order))
    wrong = inputs - set(past) - {"input_ids", "attention_mask"}
    caches = {tuple(shapes[name][1::2]) for name in past if len(shapes[name]) == 4}
    types = {kinds[name] for name in past}
    outputs = {value.name for value in model.graph.output}
    missing = {"logits", *(present_name(name) for name in past)} - outputs
    logits = shapes.get("logits", [])
    faults = {
        f"the inputs {sorted(wrong)}": bool(wrong),
        f"no output {sorted(missing)}": bool(missing),
        "no input_ids and attention_mask": not {"input_ids", "attention_mask"} <= inputs,
        "no KV cache of one shape and type": len(caches) != 1 or len(types) != 1 or not types <= {FLOAT, FLOAT16},
        "logits of no fixed width": not logits or not logits[-1],
    }
    for what, wrong_here in faults.items():
        if wrong_here:
            raise ModelError(f"{path} has {what}, so it is no decoder that can be run here. Export it again.")
    heads, size = next(iter(caches))
    if not heads:
        raise ModelError(f"{path} has a KV cache of unknown size. Export it again.")
    return OnnxGraph(
        path=path,
        past=past,
        key_value_heads=heads,
        head_size=size,
        vocabulary=logits[-1],
        inputs=frozenset(inputs),
        half=types == {FLOAT16},
        files=files,
        weights=weights,
    )


def present_name(past: str) -> str:
    return past.replace("past_key_values.", "present.", 1)


def _past_order(name: str) -> tuple[int, str]:
    match = PAST.match(name)
    assert match
    return int(match[1]), match[2]


def _shape(value: Any) -> list[int]:
    """Sizes, 0 where one is not fixed."""
    return [int(size.dim_value) for size in value.type.tensor_type.shape.dim]
