"""Judges with different LoRA adapters over one open model: each judges as if it were alone."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from broken_gguf import adapter_pieces, valid_adapter
from conftest import read_jsonl

import gramlite
from gramlite import InputError, Judge, ModelError, Pair, ResourceError, RuntimeOptions, Settings
from gramlite.judging.confidence import Calibration, order_settings
from gramlite.rows import pair_from_json

from .conftest import tiny_judge

DIRECT = Settings(mode="direct")
PAIRS = [Pair(f"Is {n} even?", "Yes." + "!" * n, "No.") for n in range(4)]

Orders = list[tuple[float | None, int]]


def orders_of(judge: Judge, pair: Pair) -> Orders:
    verdict = judge(prompt=pair.prompt, response_a=pair.response_a, response_b=pair.response_b)
    return [(order.margin, order.tokens["cached"]) for order in verdict.orders]


def margins_alone(tiny: Path, adapter: str | None, **options: Any) -> list[list[float | None]]:
    """Each pair's margins from a judge opened with that adapter alone."""
    with tiny_judge(tiny, adapter=adapter, **options) as alone:
        return [[margin for margin, _ in orders_of(alone, pair)] for pair in PAIRS]


def test_each_judges_as_if_it_were_alone_and_reads_the_instructions_once(tiny: Path, adapters: list[str]) -> None:
    chosen = [None, *adapters[:3]]
    wanted = {adapter: margins_alone(tiny, adapter) for adapter in chosen}
    assert len({str(margins) for margins in wanted.values()}) == len(chosen), "the adapters do differ"
    with tiny_judge(tiny) as base:
        judges = {adapter: base.with_adapter(adapter) for adapter in chosen}
        known = set()
        for turn in range(100):
            adapter, number = chosen[(turn * 7) % 4 - turn % 3], turn % len(PAIRS)
            found = orders_of(judges[adapter], PAIRS[number])
            assert [margin for margin, _ in found] == wanted[adapter][number], "bit for bit"
            assert found[0][1] > 600 or adapter not in known, "the instructions are there already"
            known.add(adapter)
        assert known == set(chosen)


def test_more_adapters_than_are_parked_cost_a_prefill_and_no_more(tiny: Path, adapters: list[str]) -> None:
    wanted = {adapter: margins_alone(tiny, adapter) for adapter in adapters}
    with tiny_judge(tiny) as base:
        judges = {adapter: base.with_adapter(adapter) for adapter in adapters}
        for adapter, again in itertools.product(adapters, range(2)):
            assert [margin for margin, _ in orders_of(judges[adapter], PAIRS[again])] == wanted[adapter][again]
        cached = [orders_of(judges[adapter], PAIRS[0])[0][1] for adapter in adapters[:2]]
        assert cached == [0, 0], "the oldest ones made way"
        assert orders_of(judges[adapters[-1]], PAIRS[0])[0][1] > 600


def test_thinking_takes_turns_too(tiny: Path, adapters: list[str]) -> None:
    def rationale(judge: Judge, pair: Pair) -> list[tuple[str | None, float | None]]:
        with closing(judge.with_settings(mode="think", budget=12, orders="ab").many([pair])) as verdicts:
            return [(order.rationale, order.margin) for order in next(verdicts).orders]

    wanted = {}
    for adapter in adapters[:2]:
        with tiny_judge(tiny, adapter=adapter, deterministic=True) as alone:
            wanted[adapter] = [rationale(alone, pair) for pair in PAIRS]
    with tiny_judge(tiny, deterministic=True) as base:
        judges = {adapter: base.with_adapter(adapter) for adapter in adapters[:2]}
        for number, adapter in itertools.product(range(len(PAIRS)), adapters[:2]):
            assert rationale(judges[adapter], PAIRS[number]) == wanted[adapter][number]


def test_several_threads_with_an_adapter_each(tiny: Path, adapters: list[str]) -> None:
    wanted = {adapter: margins_alone(tiny, adapter) for adapter in adapters[:3]}
    found: dict[str, list[Any]] = {adapter: [] for adapter in wanted}
    with tiny_judge(tiny) as base:

        def work(adapter: str) -> None:
            own = base.with_adapter(adapter)
            for _ in range(3):
                found[adapter].append([[margin for margin, _ in orders_of(own, pair)] for pair in PAIRS])

        threads = [threading.Thread(target=work, args=(adapter,)) for adapter in wanted]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {adapter: [margins] * 3 for adapter, margins in wanted.items()}


def test_what_was_half_way_is_forgotten_and_the_parked_stay(tiny: Path, adapters: list[str]) -> None:
    wanted = margins_alone(tiny, adapters[0])
    with tiny_judge(tiny, parallel=2) as base:
        one, two = base.with_adapter(adapters[0]), base.with_adapter(adapters[1])
        orders_of(one, PAIRS[0])
        with closing(two.with_settings(mode="think", budget=8).many(PAIRS)) as verdicts:
            next(verdicts)
        found = orders_of(one, PAIRS[1])
        assert [margin for margin, _ in found] == wanted[1] and found[0][1] > 600
        running = two.many(PAIRS)
        next(running)
        assert orders_of(two.with_adapter(adapters[0]), PAIRS[2])[0][0] == wanted[2][0], "in the middle of another call"
        running.close()


def test_the_record_names_the_adapter_and_calibrations_stay_behind(tiny: Path, adapters: list[str]) -> None:
    with tiny_judge(tiny) as base:
        settings = order_settings(base.settings_record)
        calibration = Calibration(temperature=2.0, bias=0.1, model="0" * 64, adapter=None, settings=settings, report={})
        one = base.with_adapter(adapters[0])
        assert len(one.model["adapter"]) == 64 and "adapter" not in one.with_adapter(None).model
        verdict = one(prompt="q", response_a="x", response_b="y")
        assert verdict.model["adapter"] == one.model["adapter"] == one.with_settings(seed=1).model["adapter"]
        assert base.calibrated(calibration).with_adapter(None).calibration is None


def test_refusals_change_nothing(
    tiny: Path, adapters: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scripted: Path
) -> None:
    stranger = adapter_pieces()
    stranger.tensor("blk.0.attn_q.weight.lora_a").shape[0] = 16
    (tmp_path / "stranger.gguf").write_bytes(stranger.file())
    with tiny_judge(tiny) as base:
        one = base.with_adapter(adapters[0])
        before = orders_of(one, PAIRS[0])[0][0]
        with pytest.raises(InputError, match="no adapter at"):
            base.with_adapter(tmp_path / "nothing.gguf")
        with pytest.raises(ModelError, match=r"stranger\.gguf"):
            base.with_adapter(tmp_path / "stranger.gguf")
        monkeypatch.setattr("gramlite.backends.gguf.backend.room_in_memory", lambda: 10)
        with tiny_judge(tiny) as short, pytest.raises(ResourceError, match="and 10 are free"):
            short.with_adapter(adapters[2])
        again = orders_of(one, PAIRS[0])
        assert again[0][0] == before and again[0][1] > 600
        changing = tmp_path / "changing.gguf"
        changing.write_bytes(valid_adapter())
        held = base.with_adapter(changing)
        wanted = orders_of(held, PAIRS[0])[0][0]
        changing.write_bytes(Path(adapters[3]).read_bytes())
        with pytest.raises(ModelError, match="changed since it was loaded"):
            base.with_adapter(changing)
        assert orders_of(held, PAIRS[0])[0][0] == wanted, "what is loaded stays what it was"
    with gramlite.load(scripted) as other:
        assert other.with_adapter(None)(prompt="q", response_a="x", response_b="y").winner
        with pytest.raises(InputError, match=r"scripted.*takes no adapter while it is open"):
            other.with_adapter(adapters[0])


# ---------------------------------------------------------------- the reference judge's own adapter over its base
@pytest.fixture(scope="module")
def reference_adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The packaged adapter, and the same at seven tenths of its strength."""
    pytest.importorskip("torch", reason="safetensors' torch side scales the adapter")
    import shutil

    from gramlite.export.adapter import export_adapter
    from safetensors.torch import load_file, save_file

    packaged = Path(gramlite.__file__).parent / "data/reference"
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "weaker").mkdir()
    shutil.copy(packaged / "adapter_config.json", folder / "weaker")
    factors = load_file(packaged / "adapter_model.safetensors")
    weaker = {name: tensor * 0.7 if "lora_B" in name else tensor for name, tensor in factors.items()}
    save_file(weaker, folder / "weaker/adapter_model.safetensors")
    for source, name in ((packaged, "full"), (folder / "weaker", "weak")):
        export_adapter(source, packaged / "hf", folder / f"{name}.gguf", template="gramlite")
    return [folder / "full.gguf", folder / "weak.gguf"]


@pytest.fixture(scope="module")
def open_base() -> Callable[..., Judge]:
    from gramlite.reference.files import base_path

    def open_base(**options: Any) -> Judge:
        runtime = RuntimeOptions(device="cpu", context=2048, **options)
        return gramlite.load(base_path(), template="gramlite", settings=DIRECT, runtime=runtime)

    return open_base


@pytest.fixture(scope="module")
def short_pairs(shared: Path) -> Iterator[list[Pair]]:
    pairs = [pair_from_json(row) for row in read_jsonl(shared / "benchmarks/pandalm.small.jsonl")]
    yield sorted(pairs, key=lambda pair: len(pair.prompt + pair.response_a + pair.response_b))[:4]


def compare_turns(open_base: Callable[..., Judge], adapters: list[Path], pairs: list[Pair], turns: int) -> None:
    """Let two judges take turns; every verdict is that of a judge alone."""
    wanted = {}
    for adapter in adapters:
        with open_base(adapter=str(adapter)) as alone:
            wanted[adapter] = [[order.margin for order in verdict.orders] for verdict in alone.many(pairs)]
    assert wanted[adapters[0]] != wanted[adapters[1]]
    with open_base() as base:
        judges = [base.with_adapter(adapter) for adapter in adapters]
        for turn in range(turns):
            adapter, number = adapters[turn % 2], turn // 2 % len(pairs)
            (verdict,) = judges[turn % 2].many([pairs[number]])
            assert [order.margin for order in verdict.orders] == wanted[adapter][number], "bit for bit"
            assert turn < 2 or verdict.orders[0].tokens["cached"] > 150


@pytest.mark.slow
def test_the_reference_adapter_and_a_weaker_one_take_turns(
    open_base: Callable[..., Judge], reference_adapters: list[Path], short_pairs: list[Pair]
) -> None:
    compare_turns(open_base, reference_adapters, short_pairs[:1], 4)


@pytest.mark.slow
def test_a_hundred_turns(
    open_base: Callable[..., Judge], reference_adapters: list[Path], short_pairs: list[Pair]
) -> None:
    compare_turns(open_base, reference_adapters, short_pairs, 100)


def test_a_backend_that_takes_none_refuses_it(scripted: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.gguf"
    adapter.write_bytes(valid_adapter())
    with pytest.raises(InputError, match="scripted backend takes no --adapter"):
        gramlite.load(scripted, runtime=RuntimeOptions(adapter=str(adapter)))
