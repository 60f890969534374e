"""Official scores from published figures: judged rows whose counts are a published result's give that result."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from gramlite.bench.suites import open_suite

from gramlite.judging.pair import Pair

Row = dict[str, Any]
Said = tuple[str | None, str | None]  # what the orders ab and ba say, un-swapped
OTHER = {"A": "B", "B": "A", "tie": "A"}


def pair_of(identifier: str, subset: str, label: str | None = "A", **meta: Any) -> Pair:
    return Pair("q", "x", "y", id=identifier, label=label, meta={"subset": subset, **meta})  # type: ignore[arg-type]


def row_of(identifier: str, said: Said, verdict: str | None = None) -> Row:
    both = said[0] if said[0] == said[1] else None
    orders = [{"order": order, "verdict": one} for order, one in zip(("ab", "ba"), said, strict=True)]
    return {"id": identifier, "verdict": verdict or both, "orders": orders}


def judged(parts: Mapping[str, Iterable[Said]], label: str = "A") -> tuple[list[Row], list[Pair]]:
    """Rows and pairs of each subset, one for what the orders said of it."""
    pairs = [pair_of(f"{name}/{i}", name, label) for name, said in parts.items() for i, _ in enumerate(said)]
    rows = [row_of(f"{name}/{i}", one) for name, said in parts.items() for i, one in enumerate(said)]
    return rows, pairs


def score(suite: str, rows: list[Row], pairs: list[Pair], tmp_path: Any) -> dict[str, Any]:
    (tmp_path / "any.jsonl").touch()
    found: dict[str, Any] = open_suite(f"{suite}:{tmp_path / 'any.jsonl'}")[1].score(rows, pairs)
    return found


def percent(value: float, digits: int = 2) -> float:
    return round(100 * value, digits)


RIGHT: Said = ("A", "A")
WRONG: Said = ("B", "B")
SPLIT: Said = ("A", "B")
NOTHING: Said = (None, None)

CLAUDE_3_OPUS = {
    "alpacaeval-easy": (100, 0.99), "alpacaeval-hard": (95, 0.9895), "alpacaeval-length": (95, 0.8421),
    "mt-bench-easy": (28, 0.9643), "mt-bench-med": (40, 0.975), "mt-bench-hard": (37, 0.7838),
    "llmbar-natural": (100, 0.90), "llmbar-adver-neighbor": (134, 0.3284), "llmbar-adver-GPTInst": (92, 0.5543),
    "llmbar-adver-GPTOut": (47, 0.7660), "llmbar-adver-manual": (46, 0.5435), "refusals-dangerous": (100, 0.955),
    "refusals-offensive": (100, 0.995), "xstest-should-refuse": (154, 0.9675), "xstest-should-respond": (250, 0.78),
    "donotanswer": (136, 0.75), "math-prm": (447, 0.6107), "hep-cpp": (164, 0.9451), "hep-go": (164, 0.9573),
    "hep-java": (164, 0.9817), "hep-js": (164, 0.9665), "hep-python": (164, 0.9695), "hep-rust": (164, 0.9573),
}  # fmt: skip


def with_accuracy(count: int, accuracy: float) -> list[Said]:
    """As many right rows as an accuracy needs, and a tie where it needs half a point."""
    halves = round(2 * count * accuracy)
    return [RIGHT] * (halves // 2) + [("tie", "tie")] * (halves % 2) + [WRONG] * (count - halves // 2 - halves % 2)


@pytest.mark.fault("official-scores")
def test_rewardbench_gives_the_published_scores_of_claude_3_opus(tmp_path: Any) -> None:
    rows, pairs = judged({name: with_accuracy(*figures) for name, figures in CLAUDE_3_OPUS.items()})
    result = score("rewardbench", rows, pairs, tmp_path)
    scores = result["scores"]
    for name, (_, accuracy) in CLAUDE_3_OPUS.items():
        assert scores[f"subset_{name}"] == pytest.approx(accuracy, abs=1e-4)
    published = {"chat": 94.7, "chat_hard": 60.3, "safety": 86.6, "reasoning": 78.7, "overall": 80.1}
    assert {name: percent(scores[name], 1) for name in published} == published
    assert (result["headline"], result["n"], result["notes"]) == ("overall", 2985, [])


@pytest.mark.parametrize(
    ("verdict", "points"), [("A", 1.0), ("B", 0.0), ("tie", 0.5), (None, 0.5)]
)  # fmt: skip
def test_rewardbench_gives_half_a_point_for_a_tie_and_for_nothing(
    verdict: str | None, points: float, tmp_path: Any
) -> None:
    rows, pairs = judged({name: [(verdict, verdict)] for name in CLAUDE_3_OPUS})
    assert score("rewardbench", rows, pairs, tmp_path)["scores"]["overall"] == points


@pytest.mark.fault("official-scores")
def test_rewardbench_names_the_reading_of_one_order(tmp_path: Any) -> None:
    pairs = [pair_of(name, name) for name in CLAUDE_3_OPUS]
    rows = [row_of(name, ("B", "A"), "A") for name in CLAUDE_3_OPUS]
    scores = score("rewardbench", rows, pairs, tmp_path)["scores"]
    assert (scores["overall"], scores["one_order_overall"]) == (1.0, 0.0)
    single = [{**row, "orders": row["orders"][:1]} for row in rows]
    assert "one_order_overall" not in score("rewardbench", single, pairs, tmp_path)["scores"]


def rmbench_rows(wins: Mapping[str, tuple[int, int, int, int]]) -> tuple[list[Row], list[Pair]]:
    """Of each part its items and how many wins in the cells below, on and above the diagonal together."""
    rows, pairs = [], []
    for part, (items, *levels) in wins.items():
        cells = [[(i, j) for i in range(3) for j in range(3) if (i > j) - (i < j) == side] for side in (1, 0, -1)]
        for level, count in zip(cells, levels, strict=True):
            for number in range(3 * items):
                (i, j), item = level[number % 3], number // 3
                name = f"{part}/{item}:{i}:{j}"
                pairs.append(pair_of(name, part, cell=[i, j], item=f"{part}/{item}"))
                rows.append(row_of(name, RIGHT if number < count else WRONG))
    return rows, pairs


@pytest.mark.fault("official-scores")
def test_rmbench_pools_the_items_of_both_safety_parts(tmp_path: Any) -> None:
    wins = {"chat": (129, 387, 0, 0), "math": (529, 0, 1587, 0), "code": (228, 0, 0, 684),
            "safety-refuse": (284, 852, 852, 852), "safety-response": (157, 471, 0, 0)}  # fmt: skip
    rows, pairs = rmbench_rows(wins)
    result = score("rmbench", rows, pairs, tmp_path)
    scores = result["scores"]
    assert scores["safety_easy"] == 1.0
    assert scores["safety_normal"] == scores["safety_hard"] == pytest.approx(284 / 441)
    safety = (1 + 2 * 284 / 441) / 3
    assert scores["safety"] == pytest.approx(safety)
    assert (scores["safety-refuse"], scores["safety-response"]) == pytest.approx((1, 1 / 3))
    assert scores["overall"] == pytest.approx((1 + safety) / 4)
    assert scores["overall"] == pytest.approx((scores["easy"] + scores["normal"] + scores["hard"]) / 3)
    assert scores["hard"] == pytest.approx((1 + 284 / 441) / 4)
    assert (result["headline"], result["n"], result["notes"]) == ("overall", 11943, [])


@pytest.mark.fault("official-scores")
def test_rmbench_gives_the_published_scores_of_rm_r1(tmp_path: Any) -> None:
    """RM-R1-DeepSeek-Distill-Qwen-32B: the four domains, three levels and the overall score all fit together."""
    domains = {"chat": 0.7416, "math": 0.9181, "code": 0.7412}
    items = {"chat": 129, "math": 529, "code": 228, "safety-refuse": 284, "safety-response": 157}
    share = {**domains, "safety-refuse": 1.0, "safety-response": 1 - (1 - 0.9544) * 441 / 157}
    rows, pairs = rmbench_rows({part: (n, *[round(3 * n * share[part])] * 3) for part, n in items.items()})
    scores = score("rmbench", rows, pairs, tmp_path)["scores"]
    for name, published in {**domains, "safety": 0.9544, "overall": 0.8388}.items():
        assert scores[name] == pytest.approx(published, abs=0.0015), name


def test_rmbench_counts_a_tie_as_lost(tmp_path: Any) -> None:
    rows, pairs = rmbench_rows({"chat": (1, 3, 3, 3)})
    for row in rows[:3]:
        row["verdict"] = "tie"
    scores = score("rmbench", rows, pairs, tmp_path)["scores"]
    assert (scores["chat_easy"], scores["chat_normal"], scores["chat_hard"]) == (0, 1, 1)


@pytest.mark.fault("official-scores")
def test_rmbench_refuses_a_pair_that_has_no_cell(tmp_path: Any) -> None:
    from gramlite.errors import InputError

    file = tmp_path / "plain.jsonl"
    file.write_text('{"id": "1", "prompt": "q", "response_a": "x", "response_b": "y", "label": "A", "subset": "chat"}')
    with pytest.raises(InputError, match=r"record 1.*cell"):
        list(open_suite(f"rmbench:{file}")[1].load(file))


@pytest.mark.fault("official-scores")
def test_rmbench_items_of_two_parts_may_have_one_id(tmp_path: Any) -> None:
    sides = {"prompt": "q", "chosen": ["c"] * 3, "rejected": ["r"] * 3}
    file = tmp_path / "total_dataset.json"
    file.write_text(json.dumps([{"id": 10, "domain": part, **sides} for part in ("chat", "code")]))
    pairs = list(open_suite(f"rmbench:{file}")[1].load(file))
    assert len({pair.id for pair in pairs}) == 18
    rows = [row_of(str(pair.id), RIGHT if (pair.meta or {})["subset"] == "chat" else WRONG) for pair in pairs]
    scores = score("rmbench", rows, pairs, tmp_path)["scores"]
    assert (scores["chat"], scores["code"]) == (1.0, 0.0)


JUDGEBENCH = {
    "o1-mini": ((154, 98, 56, 42), (58.44, 62.24, 82.14, 78.57), 65.71),
    "Skywork-Reward-Gemma-2-27B": ((154, 98, 56, 42), (59.74, 66.33, 83.93, 50.0), 64.29),
    "Skywork-Reward-Llama-3.1-8B": ((154, 98, 56, 42), (59.09, 64.29, 76.79, 50.0), 62.29),
    "InternLM2-20B-reward": ((154, 98, 56, 42), (62.34, 69.39, 66.07, 50.0), 63.43),
    "Claude-3-haiku": ((154, 51, 34, 31), (37.66, 29.41, 32.35, 9.68), 32.22),
    "GPT-4o": ((154, 98, 56, 42), (50.6, 54.1, 75.0, 59.5), 56.57),
}
SOURCES = ("mmlu-pro-law", "livebench-reasoning", "livebench-math", "livecodebench")


@pytest.mark.fault("official-scores")
@pytest.mark.parametrize("model", JUDGEBENCH)
def test_judgebench_gives_published_scores_and_names_the_other_readings(model: str, tmp_path: Any) -> None:
    sizes, shares, overall = JUDGEBENCH[model]
    parts = {}
    for source, size, share in zip(SOURCES, sizes, shares, strict=True):
        right = round(size * share / 100)
        with_tie: list[Said] = [("A", "tie")] * 5 + [(None, "A")] * (right % 2)
        rest: list[Said] = [SPLIT, ("tie", "tie"), NOTHING]
        parts[source] = with_tie + [RIGHT] * (right - len(with_tie)) + rest + [WRONG] * (size - right - 3)
        if right < len(with_tie):
            parts[source] = [RIGHT] * right + rest + [WRONG] * (size - right - 3)
    rows, pairs = judged(parts)
    result = score("judgebench", rows, pairs, tmp_path)
    scores = result["scores"]
    assert percent(scores["official"]) == overall
    for name, share in zip(("knowledge", "reasoning", "math", "coding"), shares, strict=True):
        assert percent(scores[f"official_{name}"]) == pytest.approx(share, abs=0.06)
    assert percent(scores["group_mean"], 1) == pytest.approx(sum(shares) / 4, abs=0.06)  # GPT-4o: 59.8
    both = sum(said == RIGHT for part in parts.values() for said in part)
    assert scores["both_orders_right"] == both / sum(sizes) < scores["official"]
    assert (result["headline"], result["n"], result["notes"]) == ("official", sum(sizes), [])


def test_judgebench_of_one_order_is_its_single_game(tmp_path: Any) -> None:
    rows, pairs = judged({"mmlu-pro-law": [SPLIT, RIGHT, WRONG, ("tie", "A"), NOTHING]})
    single = [{**row, "orders": row["orders"][:1]} for row in rows]
    result = score("judgebench", single, pairs, tmp_path)
    assert result["scores"]["official"] == 2 / 5
    assert "both_orders_right" not in result["scores"] and "--single_game" in " ".join(result["notes"])


GPT_4_LLMBAR = {
    "Natural": (100, 95.5, 93), "Adversarial/GPTInst": (92, 86.41, 83.70), "Adversarial/GPTOut": (47, 77.66, 74.47),
    "Adversarial/Manual": (46, 80.43, 71.74), "Adversarial/Neighbor": (134, 78.73, 75.37),
}  # fmt: skip


@pytest.mark.fault("official-scores")
def test_llmbar_gives_the_published_scores_of_gpt_4(tmp_path: Any) -> None:
    parts = {}
    for name, (count, accuracy, both) in GPT_4_LLMBAR.items():
        right = round(count * both / 100)
        once = round(2 * count * accuracy / 100) - 2 * right
        lost = count - right - once
        parts[name] = [RIGHT] * right + [("A", None), ("tie", "A")][: once % 2] + [SPLIT] * (once - once % 2)
        parts[name] += [NOTHING] * (lost // 2) + [WRONG] * (lost - lost // 2)
    rows, pairs = judged(parts)
    result = score("llmbar", rows, pairs, tmp_path)
    scores = result["scores"]
    for name, (_, accuracy, both) in GPT_4_LLMBAR.items():
        assert percent(scores[f"{name} accuracy"]) == accuracy
        assert percent(scores[f"{name} both_orders_right"]) == both
        equal = sum(said[0] == said[1] for said in parts[name])  # nothing in both orders is the same
        assert scores[f"{name} agreement"] == equal / len(parts[name])
    assert percent(scores["adversarial_average"], 1) == 80.8
    assert percent(scores["average"], 1) == 83.7
    assert (result["headline"], result["notes"]) == ("average", [])


@pytest.mark.fault("official-scores")
def test_llmbar_weighs_every_instance_alike_in_one_order(tmp_path: Any) -> None:
    """Equal responses are a tie without orders: that row is one instance too."""
    pairs = [pair_of("0", "Natural"), pair_of("1", "Natural")]
    rows = [
        {"id": "0", "verdict": "tie", "orders": []},
        {**row_of("1", RIGHT), "orders": [{"order": "ab", "verdict": "A"}]},
    ]
    result = score("llmbar", rows, pairs, tmp_path)
    assert result["scores"]["accuracy"] == 0.5
    assert result["headline"] == "accuracy" and result["scores"]["average"] is None


AUTO_J = {"GPT-4": (62.28, 86.28), "Auto-J": (54.96, 83.41), "ChatGPT": (42.74, 62.43), "PandaLM": (39.44, 66.88)}


@pytest.mark.parametrize("model", AUTO_J)
def test_autoj_gives_published_agreement_and_consistency(model: str, tmp_path: Any) -> None:
    from gramlite.bench.suites import autoj

    agreement, consistency = AUTO_J[model]
    sizes = {group: 24 * len(scenarios.split()) for group, scenarios in autoj.GROUPS.items()}
    total = sum(sizes.values())
    assert total == 1392
    right, agreed = round(total * agreement / 100), round(total * consistency / 100)
    labels = ["A"] * 520 + ["B"] * 499 + ["tie"] * 373
    groups = [group for group, size in sizes.items() for _ in range(size)]
    pairs = [pair_of(str(i), group, label) for i, (group, label) in enumerate(zip(groups, labels, strict=True))]
    rows = [
        row_of(str(i), (label, label) if i < right else (OTHER[label],) * 2 if i < agreed else (label, OTHER[label]))  # type: ignore[arg-type]
        for i, label in enumerate(labels)
    ]
    result = score("autoj", rows, pairs, tmp_path)
    assert percent(result["scores"]["agreement"]) == agreement
    assert percent(result["scores"]["consistency"]) == consistency
    single = [{**row, "orders": row["orders"][:1]} for row in rows]
    one = score("autoj", single, pairs, tmp_path)
    assert one["scores"]["agreement"] == pytest.approx((right + total - agreed) / total)
    assert "consistency" not in one["scores"]


# Truth (tie, first, second) by what is said (tie, first, second, nothing); the published ratios follow from these.
PANDALM_7B = ((32, 53, 20, 0), (19, 298, 105, 0), (56, 79, 337, 0))
GPT_35 = ((5, 27, 60, 13), (26, 332, 55, 9), (7, 102, 360, 3))


def confused(matrix: Iterable[Iterable[int]]) -> tuple[list[Row], list[Pair]]:
    names = ("tie", "A", "B", None)
    cells = [
        (label, said)
        for label, counts in zip(names, matrix, strict=False)
        for said, count in zip(names, counts, strict=True)
        for _ in range(count)
    ]
    pairs = [pair_of(str(i), "m", label) for i, (label, _) in enumerate(cells)]
    return [row_of(str(i), (said, said)) for i, (_, said) in enumerate(cells)], pairs


def test_pandalm_gives_the_published_ratios_of_its_own_judge(tmp_path: Any) -> None:
    rows, pairs = confused(PANDALM_7B)
    result = score("pandalm", rows, pairs, tmp_path)
    found = [percent(result["scores"][name]) for name in ("accuracy", "precision", "recall", "f1")]
    assert found == [66.77, 57.38, 57.50, 57.43]
    assert result["n"] == 999 and result["notes"] == []


@pytest.mark.fault("official-scores")
def test_pandalm_takes_what_cannot_be_read_as_wrong(tmp_path: Any) -> None:
    rows, pairs = confused(GPT_35)
    scores = score("pandalm", rows, pairs, tmp_path)["scores"]
    assert (percent(scores["accuracy"]), percent(scores["f1"])) == (69.77, 52.74)
    as_tie = [percent(scores[f"{name}_unreadable_as_tie"]) for name in ("accuracy", "precision", "recall", "f1")]
    assert as_tie == [71.07, 58.79, 57.36, 57.55]
    assert scores["one_order_accuracy"] == scores["m accuracy"] == scores["accuracy"]


def test_mtbench_drops_a_pair_with_an_error_in_one_order(tmp_path: Any) -> None:
    pairs = [pair_of(str(i), "turn 1", "A", votes=["A", "tie"]) for i in range(3)]
    rows = [row_of("0", RIGHT), row_of("1", ("A", None), "A"), row_of("2", SPLIT, "A")]
    scores = score("mtbench", rows, pairs, tmp_path)["scores"]
    assert scores["turn 1 with ties"] == 2 / 4  # right and one vote, then a tie for unequal games and the other
    assert scores["turn 1 without ties"] == 1.0


def test_hhh_gives_categories_and_both_means(tmp_path: Any) -> None:
    sizes = {"harmless": 58, "helpful": 59, "honest": 61, "other": 43}
    wins = {"harmless": 50, "helpful": 40, "honest": 30, "other": 20}
    rows, pairs = judged({name: [RIGHT] * wins[name] + [NOTHING] * (sizes[name] - wins[name]) for name in sizes})
    result = score("hhh", rows, pairs, tmp_path)
    assert result["scores"]["micro"] == 140 / 221
    assert result["scores"]["macro"] == pytest.approx(sum(wins[name] / sizes[name] for name in sizes) / 4)
    assert (result["headline"], result["notes"]) == ("micro", [])


@pytest.mark.fault("official-scores")
@pytest.mark.parametrize("suite", ["rewardbench", "judgebench", "llmbar", "autoj", "pandalm", "mtbench", "hhh"])
def test_a_pair_without_a_label_is_in_no_denominator(suite: str, tmp_path: Any) -> None:
    pairs = [pair_of("0", "any"), pair_of("1", "any", None), pair_of("2", "any", None)]
    rows = [row_of("0", RIGHT), row_of("1", NOTHING), row_of("2", RIGHT)]
    with_them, without = (score(suite, rows, chosen, tmp_path) for chosen in (pairs, pairs[:1]))
    assert with_them["scores"] == without["scores"] and with_them["n"] == 1
    assert "2 pairs have no label and don't count." in with_them["notes"]


@pytest.mark.fault("official-scores")
def test_an_order_that_a_row_lacks_is_no_verdict(tmp_path: Any) -> None:
    rows, pairs = judged({"all": [RIGHT, RIGHT]})
    rows[1]["orders"].pop()
    result = score("autoj", rows, pairs, tmp_path)
    assert (result["scores"]["agreement"], result["scores"]["consistency"]) == (0.5, 0.5)
    assert "1 rows hold one order only" in result["notes"][0]


@pytest.mark.fault("official-scores")
@pytest.mark.parametrize(
    ("suite", "subset"),
    [("rewardbench", "hep-cpp"), ("judgebench", "livecodebench"), ("llmbar", "Natural"), ("hhh", "other")],
)
def test_a_part_of_a_suite_is_called_a_part(suite: str, subset: str, tmp_path: Any) -> None:
    rows, pairs = judged({subset: [RIGHT] * 7})
    notes = score(suite, rows, pairs, tmp_path)["notes"]
    assert any("Not the whole official set" in note and "7 of" in note for note in notes)
