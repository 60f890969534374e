"""The GPTQ file format: bit-exact round trips, and the classic layout written out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gramlite.errors import ModelError
from gramlite.formats import gptq_folder
from gramlite.formats.gptq_folder import GptqWriter, open_gptq, pack_linear, pack_words, unpack_words
from gramlite.formats.quantized_linear import QuantizedLinear, natural_groups


def random_linear(
    bits: int, *, rows: int = 64, columns: int = 96, group_size: int = 32, shuffled: bool = False
) -> QuantizedLinear:
    draw = np.random.default_rng(bits)
    groups = natural_groups(columns, group_size)
    if shuffled:
        draw.shuffle(groups)
    return QuantizedLinear(
        codes=draw.integers(0, 1 << bits, (rows, columns)).astype(np.uint8),
        scales=draw.normal(0, 0.01, (rows, columns // group_size)).astype(np.float16),
        zeros=draw.integers(1, 1 << bits, (rows, columns // group_size)).astype(np.uint8),
        group_index=groups,
        bits=bits,
        group_size=group_size,
    )


def write(folder: Path, linears: dict[str, QuantizedLinear], **quantization: Any) -> Path:
    folder.mkdir()
    writer = GptqWriter(folder)
    for name, linear in linears.items():
        writer.add_linear(name, linear)
    writer.add("model.norm.weight", np.ones(96, np.float16))
    settings = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq"} | quantization
    writer.finish({"model_type": "llama", "dtype": "bfloat16"}, settings, folder)
    return folder


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_hold_codes_low_bits_first(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, (64, 5)).astype(np.uint8)
    words = pack_words(codes, bits).view(np.uint32)
    each = 32 // bits
    for row in range(64):
        shift = bits * (row % each)
        assert np.array_equal((words[row // each] >> shift) & ((1 << bits) - 1), codes[row])


def test_three_bit_words_are_laid_out_as_in_autogptq() -> None:
    """Ten codes, the 11th split 2 + 1; ten more behind a bit, the 22nd split 1 + 2; ten more behind two bits."""
    codes = np.random.default_rng(1).integers(0, 8, (32, 7)).astype(np.uint8)
    wide = codes.astype(np.uint64)
    words = np.zeros((3, 7), np.uint64)
    for position in range(10):
        words[0] |= wide[position] << np.uint64(3 * position)
        words[1] |= wide[11 + position] << np.uint64(3 * position + 1)
        words[2] |= wide[22 + position] << np.uint64(3 * position + 2)
    words[0] |= (wide[10] & np.uint64(3)) << np.uint64(30)
    words[1] |= (wide[10] >> np.uint64(2)) | ((wide[21] & np.uint64(1)) << np.uint64(31))
    words[2] |= wide[21] >> np.uint64(1)
    assert np.array_equal(pack_words(codes, 3).view(np.uint32), words.astype(np.uint32))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_round_trip(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (96, 33)).astype(np.uint8)
    assert np.array_equal(unpack_words(pack_words(codes, bits), bits), codes)


def test_tensors_have_the_shapes_and_types_of_the_format() -> None:
    parts = pack_linear(random_linear(4))
    assert {name: (part.shape, part.dtype.str) for name, part in parts.items()} == {
        "qweight": ((12, 64), "<i4"),
        "qzeros": ((3, 8), "<i4"),
        "scales": ((3, 64), "<f2"),
        "g_idx": ((96,), "<i4"),
    }
    linear = random_linear(4)
    assert np.array_equal(parts["qzeros"].view(np.uint32)[:, 0] & 15, linear.zeros[0] - 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shuffled", [False, True])
def test_folder_round_trip(bits: int, shuffled: bool, tmp_path: Path) -> None:
    linear = random_linear(bits, shuffled=shuffled)
    folder = open_gptq(write(tmp_path / "out", {"model.layers.0.mlp.up_proj": linear}))
    assert folder.linears == ("model.layers.0.mlp.up_proj",)
    back = folder.read_linear(folder.linears[0])
    for field in ("codes", "scales", "zeros", "group_index"):
        assert np.array_equal(getattr(back, field), getattr(linear, field))
    assert (back.bits, back.group_size, back.ordered) == (bits, 32, not shuffled)
    assert np.array_equal(back.dequantize(), linear.dequantize())
    assert np.array_equal(folder.read_float("model.norm.weight"), np.ones(96, np.float32))
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float16"


def test_dequantized_weight_is_scale_times_code_less_zero() -> None:
    linear = random_linear(4, shuffled=True)
    row, column = 17, 42
    group = linear.group_index[column]
    expected = float(linear.scales[row, group]) * (int(linear.codes[row, column]) - int(linear.zeros[row, group]))
    assert linear.dequantize()[row, column] == expected


def test_shards_are_numbered_and_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq_folder, "SHARD_BYTES", 6000)
    linears = {f"model.layers.{number}.mlp.up_proj": random_linear(4) for number in (0, 2, 10)}
    folder = open_gptq(write(tmp_path / "out", linears))
    assert folder.linears == tuple(linears)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert all(np.array_equal(folder.read_linear(name).codes, linear.codes) for name, linear in linears.items())


def test_second_layout_stores_zero_points_as_they_are(tmp_path: Path) -> None:
    linear = random_linear(4)
    folder = open_gptq(write(tmp_path / "out", {"layer": linear}, checkpoint_format="gptq_v2"))
    assert np.array_equal(folder.read_linear("layer").zeros, linear.zeros - 1)


def test_refusals(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", {"layer": random_linear(4)})
    config = json.loads((folder / "config.json").read_text())
    parts = pack_linear(random_linear(4))
    from safetensors.numpy import save_file

    def with_part(**changes: Any) -> Path:
        save_file({f"layer.{name}": part for name, part in (parts | changes).items()}, folder / "model.safetensors")
        return folder

    with pytest.raises(ModelError, match="zero points above 15"):
        open_gptq(with_part(qzeros=np.full_like(parts["qzeros"], -1))).read_linear("layer")
    with pytest.raises(ModelError, match="do not fit each other"):
        open_gptq(with_part(scales=parts["scales"][:2])).read_linear("layer")
    with pytest.raises(ModelError, match="group_index"):
        open_gptq(with_part(g_idx=parts["g_idx"] + 1)).read_linear("layer")
    with pytest.raises(ModelError, match="float16 cannot hold"):
        open_gptq(with_part(scales=np.full(parts["scales"].shape, 0.1, np.float32))).read_linear("layer")
    for changed, message in (
        ({"quantization_config": {"quant_method": "awq"}}, "no GPTQ checkpoint"),
        ({"quantization_config": {"quant_method": "gptq", "checkpoint_format": "marlin"}}, "'marlin'"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(ModelError, match=message):
            open_gptq(folder)


def symmetric(bits: int) -> QuantizedLinear:
    linear = random_linear(bits)
    return replace(linear, zeros=np.full_like(linear.zeros, 1 << (bits - 1)))


def stored_as(layout: str, linear: QuantizedLinear) -> QuantizedLinear:
    """What the writer, which takes one off zero points, has to be given for a layer to be stored in a layout."""
    return linear if layout == "gptq" else replace(linear, zeros=linear.zeros + np.uint8(1))


@pytest.mark.parametrize("declared", [{"sym": True}, {}], ids=["sym", "unsaid"])
@pytest.mark.parametrize(
    ("label", "layout"),
    [
        ("gptq", "gptq"),
        ("gptq_v2", "gptq_v2"),
        pytest.param("gptq", "gptq_v2", marks=pytest.mark.fault("zero-points")),
        pytest.param("gptq_v2", "gptq", marks=pytest.mark.fault("zero-points")),
    ],
)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_zero_points_are_right_whatever_the_label(
    bits: int, label: str, layout: str, declared: dict[str, Any], tmp_path: Path
) -> None:
    linear = symmetric(bits)
    written = {f"model.layers.{number}.mlp.up_proj": stored_as(layout, linear) for number in (0, 1)}
    folder = open_gptq(write(tmp_path / "out", written, bits=bits, checkpoint_format=label, **declared))
    for name in folder.linears:
        assert np.array_equal(folder.read_linear(name).zeros, linear.zeros)
        assert np.array_equal(folder.read_linear(name).dequantize(), linear.dequantize())
    assert (folder.stored_zero_offset == folder.labelled_offset) == (label == layout)


@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
def test_asymmetric_zero_points_are_what_the_label_says(label: str, tmp_path: Path) -> None:
    """Even where all are the middle code: a folder that says sym false is believed."""
    for number, linear in enumerate((random_linear(4), symmetric(4))):
        written = {"layer": stored_as(label, linear)} if number else {"layer": linear}
        folder = open_gptq(write(tmp_path / f"out{number}", written, checkpoint_format=label, sym=False))
        expected = linear.zeros if number or label == "gptq" else linear.zeros - 1
        assert np.array_equal(folder.read_linear("layer").zeros, expected)


@pytest.mark.fault("zero-points")
def test_zero_points_that_contradict_what_the_folder_says_are_refused_by_name(tmp_path: Path) -> None:
    right, other = symmetric(4), stored_as("gptq_v2", symmetric(4))
    mixed = replace(right, zeros=np.where(np.arange(3) == 1, other.zeros, right.zeros))
    cases: list[tuple[dict[str, QuantizedLinear], dict[str, Any]]] = [
        ({"one": right, "two": other}, {"sym": True}),
        ({"one": mixed}, {"sym": True}),
        ({"one": random_linear(4)}, {"sym": True}),
        ({"one": replace(right, zeros=right.zeros + np.uint8(3))}, {"sym": True, "checkpoint_format": "gptq_v2"}),
    ]
    for number, (linears, quantization) in enumerate(cases):
        folder = write(tmp_path / str(number), linears, **quantization)
        with pytest.raises(ModelError, match="checkpoint_format"):
            open_gptq(folder)
    wrapped = write(tmp_path / "wrapped", {"one": replace(right, zeros=right.zeros * 0)}, sym=False)
    with pytest.raises(ModelError, match="above 15 by its checkpoint_format 'gptq'"):
        open_gptq(wrapped).read_linear("one")
