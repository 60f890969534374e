"""The onnx backend on a decoder written by hand: numpy's logits whatever is reused, and hostile graphs refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the onnx backend needs onnxruntime: pip install 'gramlite[onnx]'")
pytest.importorskip("onnx", reason="the onnx backend needs onnx: pip install 'gramlite[onnx]'")
pytest.importorskip("tokenizers", reason="the onnx backend needs tokenizers: pip install 'gramlite[onnx]'")

import onnx
from onnx_decoder import decoder_model, numpy_logits, random_weights, save, write_decoder

from gramlite.backends.onnx import CELLS, OnnxBackend, machine, open_artifact
from gramlite.errors import GramliteError, InputError, ModelError, ResourceError
from gramlite.formats.artifact import Artifact
from gramlite.formats.onnx_graph import read_graph
from gramlite.loading import detect_format
from gramlite.runtime.options import PIECE, RuntimeOptions

from ..export.conftest import write_tokenizer
from .conftest import logits_of

CPU = RuntimeOptions(device="cpu", threads=1)  # tiny models gain nothing from more


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("decoder") / "model"
    weights = random_weights(write_tokenizer(folder, "smollm"))
    return write_decoder(folder, weights), weights


@pytest.fixture
def copy(decoder: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(decoder[0], tmp_path / "copy"))


def opened(folder: Path, options: RuntimeOptions = CPU) -> OnnxBackend:
    return open_artifact(Artifact(folder, "onnx", None), options)


def tokens(count: int, seed: int = 1) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 600, count)]


def test_logits_are_numpys(decoder: tuple[Path, dict[str, Any]]) -> None:
    folder, weights = decoder
    ids = tokens(90)
    wanted = numpy_logits(weights, ids)
    backend = opened(folder)
    found, cached = logits_of(backend, ids[:80], (30, 60), [ids[80:81], ids[81:90]])
    assert cached == 0 and backend.vocabulary.size == len(wanted[0])
    for logits, position in zip(found, (79, 80, 89), strict=True):
        assert np.abs(logits - wanted[position]).max() < 1e-3
    again, cached = logits_of(backend, ids[:80], (30, 60))
    assert cached == 60 and np.array_equal(again[0], found[0]), "bit for bit, over what was decoded before"
    other = [*ids[:30], *tokens(20, seed=2)]
    third, cached = logits_of(backend, other, (30,))
    assert cached == 30 and np.abs(third[0] - numpy_logits(weights, other)[-1]).max() < 1e-3
    backend.close()


def test_buffers_grow_and_start_empty(decoder: tuple[Path, dict[str, Any]]) -> None:
    folder, weights = decoder
    backend = opened(folder)
    short, long = tokens(40), [*tokens(40), *tokens(PIECE + CELLS, seed=5)]
    logits_of(backend, short, (30,))
    assert backend._cells == CELLS
    found, cached = logits_of(backend, long, (30,))
    assert cached == 0 and backend._cells == 3 * CELLS
    assert np.abs(found[0] - numpy_logits(weights, long)[-1]).max() < 1e-3
    assert logits_of(backend, short, (30,))[1] == 30
    backend.close()


def test_abort_reaches_a_run_that_is_under_way(decoder: tuple[Path, dict[str, Any]]) -> None:
    backend = opened(decoder[0])
    session = backend._session

    class Stopping:
        """Asks for the stop at the moment the run begins, as another thread would."""

        def io_binding(self) -> Any:
            return session.io_binding()

        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            backend.abort()
            session.run_with_iobinding(binding, options)

    backend._session = Stopping()
    with pytest.raises(GramliteError, match="stopped"):
        logits_of(backend, tokens(20))
    backend._session = session
    assert np.isfinite(logits_of(backend, tokens(20))[0][0]).all()
    backend.close()


def test_a_folder_is_known_by_its_configuration(decoder: tuple[Path, dict[str, Any]]) -> None:
    assert detect_format(decoder[0], None) == "onnx"


def test_refusals(copy: Path) -> None:
    with pytest.raises(InputError, match="no --adapter"):
        opened(copy, RuntimeOptions(device="cpu", adapter="x"))
    with pytest.raises(InputError, match="trained for"):
        opened(copy, RuntimeOptions(device="cpu", context=5000))
    if not machine().gpus:
        with pytest.raises(ResourceError, match="--device cuda was asked for"):
            opened(copy, RuntimeOptions(device="cuda"))
    data = (copy / "model.onnx").read_bytes()
    (copy / "model.onnx").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="no readable ONNX graph"):
        opened(copy)
    (copy / "model.onnx").write_bytes(b"\x08\x09" + b"\x0a" * 100)
    with pytest.raises(ModelError, match=str(copy)):
        opened(copy)
    for name in ("../model.onnx", "/etc/passwd", ""):
        (copy / "genai_config.json").write_text(json.dumps({"model": {"decoder": {"filename": name}}}))
        with pytest.raises(ModelError, match="names no decoder of this folder"):
            opened(copy)


def relocate(model: Any, location: str) -> None:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location


def in_a_branch(model: Any, location: str) -> None:
    """Hide a weight that lies elsewhere in the attribute of a node of a node's subgraph."""
    from onnx import TensorProto, helper

    tensor = TensorProto(name="hidden", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    branch = helper.make_graph([constant], "branch", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, [1])])
    model.graph.node.append(helper.make_node("If", ["one"], ["unused"], then_branch=branch, else_branch=branch))


@pytest.mark.parametrize("place", [relocate, in_a_branch])
@pytest.mark.parametrize(
    "location", ["/etc/hostname", "../outside.data", "a/../../outside.data", "C:\\x", "\\\\host\\x", "link.data", ""]
)
def test_weights_outside_the_folder_are_refused(copy: Path, place: Callable[[Any, str], None], location: str) -> None:
    shutil.copy(copy / "model.onnx.data", copy.parent / "outside.data")
    os.symlink(copy.parent / "outside.data", copy / "link.data")
    model = onnx.load_model(str(copy / "model.onnx"), load_external_data=False)
    place(model, location)
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="outside of its folder"):
        opened(copy)


@pytest.mark.parametrize(
    ("key", "value"), [("offset", "-8"), ("offset", "1e3"), ("length", "12"), ("offset", "99999999")]
)
def test_extents_beyond_the_file_are_refused(copy: Path, key: str, value: str) -> None:
    model = onnx.load_model(str(copy / "model.onnx"), load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == key:
            entry.value = value
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="unusable offset|does not hold"):
        read_graph(copy / "model.onnx")


def test_a_cut_or_missing_data_file_is_refused(copy: Path) -> None:
    data = copy / "model.onnx.data"
    os.truncate(data, data.stat().st_size - 4)
    with pytest.raises(ModelError, match="does not hold the"):
        opened(copy)
    data.unlink()
    with pytest.raises(ModelError, match="is missing"):
        opened(copy)


def without_attention(model: Any) -> None:
    next(node for node in model.graph.node if node.domain).op_type = "MultiHeadAttention"


def foreign_operator(model: Any) -> None:
    model.graph.node[0].domain = "evil.custom"


def further_input(model: Any) -> None:
    model.graph.input.add().CopyFrom(model.graph.input[0])
    model.graph.input[-1].name = "position_ids"


def lost_output(model: Any) -> None:
    model.graph.output[1].name = "present.0.other"


def caches_that_differ(model: Any) -> None:
    model.graph.input[3].type.tensor_type.shape.dim[1].dim_value = 1


def weight_of_another_name(model: Any) -> None:
    model.graph.initializer[0].name += "_Q8G32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (weight_of_another_name, "which nothing in it is"),
        (without_attention, "no GroupQueryAttention"),
        (foreign_operator, "operators of 'evil.custom'"),
        (further_input, "position_ids"),
        (lost_output, "no output"),
        (caches_that_differ, "no KV cache of one shape"),
    ],
)
def test_graphs_that_are_no_decoders_are_refused(
    change: Callable[[Any], None], message: str, copy: Path, decoder: tuple[Path, dict[str, Any]]
) -> None:
    model = decoder_model(decoder[1])
    change(model)
    save(model, copy / "model.onnx", external=False)
    with pytest.raises(ModelError, match=message):
        opened(copy)
