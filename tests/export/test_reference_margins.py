"""The reference judge exported by every route: the margins of the F16 GGUF and of base + adapter against gold."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
from gramlite.export.adapter import export_adapter
from gramlite.export.gguf import export_gguf
from gramlite.export.merge import merge_adapter

import gramlite
from gramlite.judging.judge import Settings
from gramlite.judging.pair import Pair
from gramlite.runtime.options import RuntimeOptions

PACKAGED = Path(gramlite.__file__).parent / "data" / "reference"


def read_pairs(shared: Path, count: int) -> list[Pair]:
    with gzip.open(shared / "benchmarks/autoj.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows = [row for row in rows if row["response_a"] != row["response_b"]]  # those are ties without inference
    rows.sort(key=lambda row: len(row["prompt"] + row["response_a"] + row["response_b"]) if count < 50 else 0)
    return [Pair(row["prompt"], row["response_a"], row["response_b"], id=row["id"]) for row in rows[:count]]


def margins(model: Path, pairs: list[Pair], adapter: Path | None = None) -> Any:
    """margin_ab of each pair in nats, by direct judging on the CPU."""
    runtime = RuntimeOptions(device="cpu", threads=2, adapter=str(adapter) if adapter else None)
    judge = gramlite.load(model, settings=Settings(mode="direct", orders="ab"), runtime=runtime)
    try:
        return numpy.array([verdict.margin for verdict in judge.many(pairs)], dtype=float)
    finally:
        judge.close()


@pytest.fixture(scope="module")
def exported(reference_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "reference.F16.gguf"
    assert export_gguf(reference_checkpoint, path).template == {
        "name": "gramlite",
        "sha256": "c8e843491603712a62612949da26f6f6a036d3334e76de60a1cea1e1f3890f0e",
    }
    return path


def compare_with_gold(path: Path, shared: Path, gold: dict[str, Any], count: int) -> None:
    pairs = [pair for pair in read_pairs(shared, count) if pair.id in gold]
    wanted = numpy.array([gold[str(pair.id)]["margin_ab"] for pair in pairs])
    difference = numpy.abs(margins(path, pairs) - wanted)
    print(f"|margin - gold| of {len(pairs)} rows: mean {difference.mean():.4f}, largest {difference.max():.4f} nats")
    assert len(pairs) >= count - 5 and difference.max() < 0.05


def test_f16_margins_of_a_few_rows_are_gold(exported: Path, shared: Path, gold: dict[str, Any]) -> None:
    compare_with_gold(exported, shared, gold, 6)


@pytest.mark.slow
def test_f16_margins_of_200_rows_are_gold(exported: Path, shared: Path, gold: dict[str, Any]) -> None:
    compare_with_gold(exported, shared, gold, 200)


@pytest.mark.slow
def test_base_with_the_adapter_judges_as_the_merged_checkpoint(
    exported: Path, reference_base: Path, shared: Path, tmp_path: Path
) -> None:
    """Beside the adapter stands the sum in float32: a merged checkpoint also rounds it to bfloat16, an adapter cannot."""
    from safetensors.torch import load_file, save_file

    base, lora, exact = tmp_path / "base.gguf", tmp_path / "lora.gguf", tmp_path / "exact.gguf"
    export_gguf(reference_base, base, template="gramlite")
    export_adapter(PACKAGED, PACKAGED / "hf", lora)
    wide = Path(shutil.copytree(reference_base, tmp_path / "wide"))
    weights = load_file(wide / "model.safetensors")
    save_file({name: tensor.float() for name, tensor in weights.items()}, wide / "model.safetensors")
    merge_adapter(wide, PACKAGED, tmp_path / "sum")
    export_gguf(tmp_path / "sum", exact, dtype="f32", template="gramlite")
    pairs = read_pairs(shared, 20)
    adapted = margins(base, pairs, lora)
    for name, model, limit in (("float32 sum", exact, 0.05), ("merged checkpoint", exported, 0.2)):
        difference = numpy.abs(margins(model, pairs) - adapted)
        print(f"|adapted - {name}| of {len(pairs)} rows: mean {difference.mean():.4f}, largest {difference.max():.4f}")
        assert difference.mean() < 0.05 and difference.max() < limit, name
    assert numpy.abs(margins(base, pairs[:5]) - adapted[:5]).max() > 0.5  # the adapter is what was compared
