"""A quantized file and the adapter beside it add up to the weights they were made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf as gguf_package
import numpy as np
import pytest
from click.testing import CliRunner
from gramlite.export.gguf import export_gguf
from gramlite.quant.ggml import dequantize_rows, rounded
from gramlite.quant.gguf import command
from gramlite.quant.low_rank import leading_factors, quantize_low_rank, split
from gramlite.quant.source import open_source

from gramlite import load
from gramlite.artifact import manifest_path, read_manifest
from gramlite.commands.inspect import inspect_gguf
from gramlite.errors import InputError, ModelError
from gramlite.gguf_header import read_header
from gramlite.reference_weights import dequantized

from ..export.conftest import checkpoint_of  # noqa: F401


@pytest.fixture(scope="module")
def exact(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    path = tmp_path_factory.mktemp("exact") / "judge.f32.gguf"
    shape = {"hidden_size": 128, "intermediate_size": 160, "num_attention_heads": 4, "initializer_range": 0.1}
    export_gguf(checkpoint_of("llama-tied", **shape), path, dtype="f32", template="gramlite")
    return path


@pytest.fixture(scope="module")
def made(exact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "judge.gguf"
    with open_source(exact, beside=path) as source:
        quantize_low_rank(source, path, kind="Q4_0", rank=32)
    return path


def test_a_tuned_four_bit_matrix_falls_apart_into_its_base_and_its_tuning() -> None:
    generator = np.random.default_rng(0)
    base = rounded(generator.normal(size=(192, 256)).astype(np.float32), "Q4_1")
    tuning = (generator.normal(size=(192, 24)) @ generator.normal(size=(24, 256)) * 0.004).astype(np.float32)
    found = split(base + tuning, "Q4_1", 32)
    share = float(np.square(tuning).sum() / np.square(base + tuning).sum())
    assert found.error < share / 30 < found.plain
    back = dequantize_rows(found.blocks, "Q4_1", 256) + found.b @ found.a
    assert np.square(back - base - tuning).mean() == pytest.approx(
        found.error * np.square(base + tuning).mean(), rel=1e-3
    )


def test_leading_factors_are_those_of_the_singular_values() -> None:
    matrix = np.random.default_rng(1).normal(size=(80, 120)).astype(np.float32) ** 3
    b, a = leading_factors(matrix, 32)
    sizes = np.linalg.svd(matrix, compute_uv=False)
    assert np.square(matrix - b @ a).sum() == pytest.approx(np.square(sizes[32:]).sum(), rel=0.02)


def test_file_and_adapter_add_up_to_what_the_manifest_says(exact: Path, made: Path) -> None:
    manifest = read_manifest(made)
    assert manifest and manifest.companion == "judge.low-rank.gguf"
    assert set(manifest.files) == {"judge.gguf", "judge.low-rank.gguf"}
    assert manifest.quantization == "Q4_0+low-rank32"
    low_rank = manifest.settings["low_rank"]
    source, written = read_header(exact), read_header(made)
    factors = {tensor.name: tensor for tensor in gguf_package.GGUFReader(made.with_name(manifest.companion)).tensors}
    assert len(factors) == 2 * low_rank["matrices"] == 28
    shares = []
    stored = {tensor.name: tensor for tensor in written.tensors}
    for old in source.tensors:
        if f"{old.name}.lora_a" not in factors:
            continue
        a, b = (
            gguf_package.dequantize(tensor.data, tensor.tensor_type)
            for tensor in (factors[f"{old.name}.lora_a"], factors[f"{old.name}.lora_b"])
        )
        weight = dequantized(source, old)
        shares.append(
            np.square(weight - dequantized(written, stored[old.name]) - b @ a).sum() / np.square(weight).sum()
        )
    assert np.mean(shares) == pytest.approx(low_rank["mean_error"], rel=1e-3)
    assert low_rank["mean_error"] < 0.7 * low_rank["mean_error_without"]
    assert low_rank["given_back"] < 0.8 and "need not bring the verdicts nearer" in manifest.settings["notes"][-1]


def test_its_memory_is_foretold_with_the_adapter(made: Path, tmp_path: Path) -> None:
    whole = inspect_gguf(made)
    (tmp_path / "judge.gguf").write_bytes(made.read_bytes())
    alone = inspect_gguf(tmp_path / "judge.gguf")
    assert whole["companion"] == alone["companion"] == "judge.low-rank.gguf" and alone["companion_bytes"] is None
    assert whole["companion_bytes"] == made.with_name("judge.low-rank.gguf").stat().st_size
    context = next(iter(whole["memory"]))
    more = whole["memory"][context]["total"] - alone["memory"][context]["total"]
    assert 0.5 * whole["companion_bytes"] < more <= whole["companion_bytes"]


def test_a_judge_applies_the_adapter_and_is_refused_without(made: Path, tmp_path: Path) -> None:
    with load(made, trust_template=True) as judge:
        assert judge.model["companion"]
    alone = tmp_path / "judge.gguf"
    alone.write_bytes(made.read_bytes())
    with pytest.raises(ModelError, match=r"only right together with the adapter 'judge.low-rank.gguf'"):
        load(alone)
    manifest = json.loads(manifest_path(made).read_text()) | {"companion": "../elsewhere.gguf"}
    (tmp_path / "judge.low-rank.gguf").write_bytes(made.with_name("judge.low-rank.gguf").read_bytes())
    manifest_path(alone).write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match="does not list its companion"):
        load(alone)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--low-rank", "20"], "multiple of 32, such as 32"),
        (["--low-rank", "256"], "more than the 64 rows"),
        (["--low-rank", "32", "--type", "F16"], "rounds no layer"),
        (["--low-rank", "32", "--calibration", "pairs.jsonl"], "without calibration"),
    ],
)
def test_refusals_leave_nothing_behind(exact: Path, tmp_path: Path, options: list[str], words: str) -> None:
    outcome = CliRunner().invoke(command, [str(exact), "-o", str(tmp_path / "out.gguf"), "--type", "Q4_0", *options])
    assert isinstance(outcome.exception, InputError) and words in str(outcome.exception)
    assert not list(tmp_path.iterdir())
