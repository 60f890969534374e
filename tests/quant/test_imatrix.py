"""The importance matrix against hooks on the whole model, and its file as llama.cpp's reader sees it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gramlite.quant.calibration import Transcript
from gramlite.quant.imatrix import ImportanceMatrix, collect_importance, read_imatrix, write_imatrix

from gramlite.errors import InputError, ModelError

from .conftest import FAMILIES
from .test_stream import watch

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_means_are_those_of_transformers(
    family: str, make_checkpoint: Callable[..., Path], transcripts: list[Transcript]
) -> None:
    folder = make_checkpoint(family)
    matrix = collect_importance(folder, transcripts, dataset="made up")
    moments, _ = watch(folder, transcripts)
    tokens = sum(len(transcript.ids) for transcript in transcripts)
    assert (matrix.tokens, matrix.chunks) == (tokens, 12)
    means = matrix.means()
    assert len(means) == 14
    for layer in range(2):
        for name, short in GGUF_NAMES.items():
            expected = moments[f"model.layers.{layer}.{name}"].diagonal().numpy() / tokens
            assert np.allclose(means[f"blk.{layer}.{short}.weight"], expected, rtol=1e-3)


def test_file_round_trip_and_layout(tmp_path: Path) -> None:
    import gguf

    values = np.random.default_rng(0).random(48).astype(np.float32)
    matrix = ImportanceMatrix({"blk.0.attn_q.weight": values, "blk.1.ffn_up.weight": values * 2}, 300, 4, ("a", "b"))
    write_imatrix(tmp_path / "x.gguf", matrix)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.chunk_count").contents() == 4
    assert reader.get_field("imatrix.chunk_size").contents() == 75
    assert reader.get_field("imatrix.datasets").contents() == ["a", "b"]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["blk.0.attn_q.weight.in_sum2"].shape.tolist() == [48, 1]
    assert tensors["blk.0.attn_q.weight.counts"].data.ravel().tolist() == [300.0]
    back = read_imatrix(tmp_path / "x.gguf")
    assert (back.tokens, back.chunks, back.datasets) == (300, 4, ("a", "b"))
    assert np.array_equal(back.sums["blk.1.ffn_up.weight"], values * 2)
    with pytest.raises(InputError, match="already exists"):
        write_imatrix(tmp_path / "x.gguf", matrix)


def test_refusals(tmp_path: Path, reference_q8: Path) -> None:
    with pytest.raises(ModelError, match="no importance matrix"):
        read_imatrix(reference_q8)
    (tmp_path / "old.dat").write_bytes(b"\x01\x00\x00\x00" * 20)
    with pytest.raises(ModelError):
        read_imatrix(tmp_path / "old.dat")
    empty = ImportanceMatrix({"blk.0.attn_q.weight": np.ones(4, np.float32)}, 0, 0, ())
    write_imatrix(tmp_path / "empty.gguf", empty)
    with pytest.raises(ModelError, match="do not belong together"):
        read_imatrix(tmp_path / "empty.gguf")
