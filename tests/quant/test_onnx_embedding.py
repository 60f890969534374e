"""An ONNX graph's embedding in 8 bits: what onnxruntime reads from it, and whose bytes they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="ONNX needs onnx: pip install 'gramlite[onnx]'")
pytest.importorskip("onnxruntime", reason="ONNX needs onnxruntime: pip install 'gramlite[onnx]'")

import onnx
import onnxruntime
from gramlite.quant.onnx_embedding import shrink_embedding
from onnx import TensorProto, helper, numpy_helper

from gramlite.errors import ModelError
from gramlite.formats.onnx_graph import parse

ROWS, WIDTH, SIZE = 300, 64, 32
IDS = np.array([[0, 7, 299, 7, 12]], dtype=np.int64)


def table(seed: int = 0) -> Any:
    values = np.random.default_rng(seed).standard_normal((ROWS, WIDTH)).astype(np.float32)
    values[7] = 0
    return values


def eight_bits(values: Any) -> tuple[Any, Any]:
    """Codes and scales as the model builder has them: of the extreme with its sign, which becomes code 0."""
    grouped = values.reshape(len(values), -1, SIZE)
    extreme = np.take_along_axis(grouped, np.abs(grouped).argmax(axis=2, keepdims=True), axis=2)
    scales = (extreme / -128).astype(np.float32)
    steps = np.where(scales == 0, 1, scales)
    return np.clip(np.rint(grouped / steps) + 128, 0, 255).astype(np.uint8), scales[..., 0]


def write_graph(
    folder: Path, values: Any, head: Any, *, bits: int = 8, external: bool = True, dtype: str = "float32"
) -> Path:
    """The two ends of a decoder as the model builder writes them, nothing between them."""
    codes, scales = eight_bits(head)
    nodes = [
        helper.make_node("Gather", ["embed", "input_ids"], ["states"], name="/model/embed_tokens/Gather"),
        helper.make_node(
            "MatMulNBits", ["states", "head_Q8", "head_scales"], ["logits"], name="/lm_head/MatMul_Q8",
            domain="com.microsoft", K=WIDTH, N=ROWS, bits=bits, block_size=SIZE,
        ),
    ]  # fmt: skip
    kind = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}[dtype]
    weights = {"unused": np.zeros(10, np.float32), "embed": values.astype(dtype), "head_Q8": codes,
               "head_scales": scales.astype(dtype)}  # fmt: skip
    graph = helper.make_graph(
        nodes, "ends",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "length"])],
        [helper.make_tensor_value_info(name, kind, [1, "length", width])
         for name, width in (("states", WIDTH), ("logits", ROWS))],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    folder.mkdir()
    path = folder / "model.onnx"
    onnx.save_model(model, str(path), save_as_external_data=external, location="model.onnx.data", size_threshold=0)
    return path


def run(path: Path) -> tuple[Any, Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    states, logits = session.run(["states", "logits"], {"input_ids": IDS})
    return states, logits


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.parent.iterdir())


@pytest.mark.parametrize("external", [True, False])
def test_a_tied_head_and_the_embedding_are_the_same_bytes(external: bool, tmp_path: Path) -> None:
    values = table()
    path = write_graph(tmp_path / "graph", values, values, external=external)
    before, size = run(path), size_of(path)
    assert shrink_embedding(path, 16) == "head"
    codes, scales = eight_bits(values)
    wanted = ((codes.astype(np.float32) - 128) * scales[..., None]).reshape(ROWS, WIDTH)[IDS]
    states, logits = run(path)
    assert np.array_equal(states, wanted) and np.abs(states - before[0]).max() < 0.05
    assert np.abs(logits - before[1]).max() < 0.2
    assert "embed" not in {tensor.name for tensor in parse(path).graph.initializer}
    if external:
        assert size_of(path) < size - values.nbytes + 3 * 4096, "and lie in the file once"
        places = [
            [(entry.key, entry.value) for entry in tensor.external_data] for tensor in parse(path).graph.initializer
        ]
        assert len(places) - len({tuple(place) for place in places}) == 2
        assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_graphs_for_cuda_share_too(tmp_path: Path) -> None:
    values = table()
    values[11] *= 1e-5  # a token that was never trained: its scales are no normal numbers in float16
    path = write_graph(tmp_path / "graph", values, values, dtype="float16")
    before = run(path)
    assert shrink_embedding(path, SIZE) == "head"
    states, logits = run(path)
    assert states.dtype == np.float16 and np.abs(states - before[0]).max() < 0.05
    assert np.abs(logits - before[1]).max() < 0.3


@pytest.mark.parametrize("external", [True, False])
@pytest.mark.parametrize("untied", ["another head", "a head of 4 bits"])
def test_an_embedding_of_its_own_is_rounded_to_nearest(untied: str, external: bool, tmp_path: Path) -> None:
    values = table()
    path = write_graph(tmp_path / "graph", values, table(1) if untied == "another head" else values, external=external)
    if untied == "a head of 4 bits":
        model = parse(path)
        next(attribute for attribute in model.graph.node[1].attribute if attribute.name == "bits").i = 4
        path.write_bytes(model.SerializeToString())
        assert shrink_embedding(path, SIZE) == "int8"
        return
    before = run(path)
    assert shrink_embedding(path, SIZE) == "int8"
    states, logits = run(path)
    grouped = np.abs(values.reshape(ROWS, -1, SIZE)).max(axis=2)
    allowed = np.repeat(grouped / 127 / 2, SIZE, axis=1)[IDS]
    assert (np.abs(states - before[0]) <= allowed + 1e-6).all()
    assert np.array_equal(states[0, 1], np.zeros(WIDTH)), "a row of zeros stays one"
    assert np.abs(logits - before[1]).max() < 0.5


def test_groups_are_as_large_as_the_rows_allow(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "groups", table(), table(1))
    assert shrink_embedding(path, 128) == "int8"
    assert [each.i for each in parse(path).graph.node[0].attribute if each.name == "block_size"] == [64]
    path = write_graph(tmp_path / "graph", table()[:, :40].copy(), table(1))
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    assert shrink_embedding(path, 128) == "float"
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_a_graph_of_another_make_is_refused(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "graph", table(), table())
    model = parse(path)
    model.graph.node[0].name = "/embedding"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="no embedding where the model builder puts it"):
        shrink_embedding(path, SIZE)
