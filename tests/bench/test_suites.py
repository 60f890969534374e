"""Official scores: ours against an independent computation of each published rule, on synthetic verdicts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gramlite.bench.suites import open_suite, suite_names

from gramlite.errors import InputError

BENCHMARKS = Path(__file__).resolve().parents[2] / "../shared/benchmarks"
EXACT = 1e-9
Record = dict[str, Any]


def judge(generator: np.random.Generator, identifier: str, *, allow_none: bool = True) -> Record:
    """A judged row with verdicts of both orders drawn at random: A, B, tie, or none at all."""
    kinds = ["A", "B", "tie", None] if allow_none else ["A", "B", "tie"]
    share = [0.45, 0.35, 0.1, 0.1] if allow_none else [0.5, 0.4, 0.1]
    both = [kinds[int(generator.choice(len(kinds), p=share))] for _ in range(2)]
    row: str | None = None
    if None not in both:
        row = both[0] if both[0] == both[1] else ["A", "B"][int(generator.integers(2))]
    orders = [{"order": order, "verdict": said} for order, said in zip(("ab", "ba"), both, strict=True)]
    return {"id": identifier, "verdict": row, "orders": orders, "reason": None if row else "no answer"}


def said(row: Record, order: int) -> str | None:
    value: str | None = row["orders"][order]["verdict"]
    return value


def write(path: Path, records: list[Record], *, lines: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(map(json.dumps, records)) if lines else json.dumps(records))
    return path


def check(scores: Record, expected: dict[str, float | None]) -> None:
    for name, value in expected.items():
        if value is None:
            assert scores[name] is None, name
        else:
            assert scores[name] == pytest.approx(value, abs=EXACT), name


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(20)


def test_judgebench(tmp_path: Path, generator: np.random.Generator) -> None:
    sources = ["mmlu-pro-law", "mmlu-pro-math", "livebench-reasoning", "livebench-math", "livecodebench"]
    records = [
        {
            "pair_id": f"p{i}", "source": sources[i % 5], "question": f"q{i}", "response_model": "m",
            "response_A": "x", "response_B": "y", "label": ["A>B", "B>A"][i % 3 == 0],
        }
        for i in range(150)
    ]  # fmt: skip
    _, suite, path = open_suite(f"judgebench:{write(tmp_path / 'jb.jsonl', records)}")
    pairs = list(suite.load(path))
    rows = {record["pair_id"]: judge(generator, record["pair_id"]) for record in records}
    del rows["p7"], rows["p8"]

    def decide(verdict: str | None) -> str:
        return {"A": "A>B", "B": "B>A"}.get(str(verdict), "neither")

    wins: dict[str, list[bool]] = {}
    right: dict[str, list[bool]] = {}
    group = {"livebench-reasoning": "reasoning", "livebench-math": "math", "livecodebench": "coding"}
    for record in records:
        if record["pair_id"] not in rows:
            continue
        row = rows[record["pair_id"]]
        counter = 0
        for order in (0, 1):
            decision = decide(said(row, order))
            counter += 1 if decision == record["label"] else -1 if decision != "neither" else 0
        name = group.get(str(record["source"]), "knowledge")
        for key in ("all", name):
            wins.setdefault(key, []).append(counter > 0)
        right.setdefault(name, []).append(decide(row["verdict"]) == record["label"])
    result = suite.score(rows.values(), pairs)
    expected: dict[str, float | None] = {"official": float(np.mean(wins["all"]))}
    for name in ("knowledge", "reasoning", "math", "coding"):
        expected[f"official_{name}"] = float(np.mean(wins[name]))
        expected[f"gram_{name}"] = float(np.mean(right[name]))
    expected["gram_macro"] = float(np.mean([np.mean(values) for values in right.values()]))
    check(result["scores"], expected)
    assert (result["n"], result["missing"]) == (148, 2)
    assert result["no_verdict"] == sum(row["verdict"] is None for row in rows.values()) > 0


def rmbench_items(domains: list[str], count: int) -> list[Record]:
    return [
        {
            "id": f"{domain}/{i}", "domain": domain, "prompt": f"{domain} {i}",
            "chosen": [f"c{s}" for s in "012"], "rejected": [f"r{s}" for s in "012"], "error": "planted",
        }
        for domain in domains
        for i in range(count)
    ]  # fmt: skip


def test_rmbench_matrix(tmp_path: Path, generator: np.random.Generator) -> None:
    parts = ["chat", "math", "code", "safety-refuse", "safety-response"]
    items = rmbench_items(parts, 12)
    _, suite, path = open_suite(f"rmbench:{write(tmp_path / 'total_dataset.json', items, lines=False)}")
    pairs = list(suite.load(path))
    assert len(pairs) == 9 * len(items)
    rows = {pair.id: judge(generator, str(pair.id)) for pair in pairs}

    def levels(domain: str) -> dict[str, float]:
        wins = np.zeros((3, 3))
        chosen = [item for item in items if item["domain"].startswith(domain)]
        for item in chosen:
            for i in range(3):
                for j in range(3):
                    wins[i][j] += rows[f"{item['id']}:{i}:{j}"]["verdict"] == "A"
        wins /= len(chosen)
        return {
            "hard": float(np.triu(wins, 1).sum() / 3),
            "normal": float(np.diag(wins).mean()),
            "easy": float(np.tril(wins, -1).sum() / 3),
        }

    found = {part: levels(part) for part in parts}
    found["safety"] = levels("safety")
    expected: dict[str, float | None] = {}
    for part, values in found.items():
        expected[part] = float(np.mean(list(values.values())))
        expected |= {f"{part}_{level}": value for level, value in values.items()}
    domains = ("chat", "math", "code", "safety")
    for level in ("easy", "normal", "hard"):
        expected[level] = float(np.mean([found[domain][level] for domain in domains]))
    expected["overall"] = float(np.mean([expected[domain] for domain in domains]))
    result = suite.score(rows.values(), pairs)
    check(result["scores"], expected)
    assert result["headline"] == "overall"
    assert result["matrices"]["chat"][0][2] == pytest.approx(
        np.mean([rows[f"chat/{i}:0:2"]["verdict"] == "A" for i in range(12)]), abs=EXACT
    )
    assert "error" not in (pairs[0].meta or {})

    rows.pop(pairs[0].id)
    incomplete = suite.score(rows.values(), pairs)
    assert incomplete["scores"]["overall"] is None and incomplete["missing"] == 1
    assert any("1 pairs were not judged" in note for note in incomplete["notes"])


def test_rmbench_without_math_has_no_overall(tmp_path: Path, generator: np.random.Generator) -> None:
    items = rmbench_items(["chat", "safety-refuse"], 3)
    _, suite, path = open_suite(f"rmbench:{write(tmp_path / 'rm.jsonl.gz', items)}")
    pairs = list(suite.load(path))
    result = suite.score([judge(generator, str(pair.id)) for pair in pairs], pairs)
    check(result["scores"], {"overall": None, "hard": None})
    assert not {"safety", "math"} & result["scores"].keys()
    assert result["scores"]["chat"] is not None
    assert result["headline"] == "accuracy"
    assert any("math" in note for note in result["notes"])


def test_rmbench_limit_keeps_items_whole(tmp_path: Path) -> None:
    _, suite, path = open_suite(f"rmbench:{write(tmp_path / 'rm.jsonl', rmbench_items(['chat'], 5))}")
    assert [len(list(suite.load(path, limit=limit))) for limit in (1, 9, 20, 27, 500)] == [9, 9, 18, 27, 45]


def test_rewardbench(tmp_path: Path, generator: np.random.Generator) -> None:
    sections = {
        "chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28,
                 "mt-bench-med": 40},
        "chat_hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134,
                      "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
        "safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
                   "xstest-should-respond": 250, "donotanswer": 136},
        "reasoning": {"math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164,
                      "hep-python": 164, "hep-rust": 164},
    }  # fmt: skip
    records = [
        {"prompt": f"{subset} {i}", "chosen": "good", "rejected": "bad", "subset": subset, "id": i}
        for weights in sections.values()
        for subset in weights
        for i in range(7)
    ]
    _, suite, path = open_suite(f"rewardbench:{write(tmp_path / 'rewardbench.jsonl', records)}")
    pairs = list(suite.load(path))
    assert {pair.label for pair in pairs} == {"A", "B"}  # neither side is the usual one
    assert all((pair.response_a == "good") == (pair.label == "A") for pair in pairs)
    rows = [judge(generator, str(pair.id)) for pair in pairs]
    points: dict[str, list[float]] = {}
    for pair, row in zip(pairs, rows, strict=True):
        value = 0.5 if row["verdict"] in (None, "tie") else float(row["verdict"] == pair.label)
        points.setdefault(str((pair.meta or {})["subset"]), []).append(value)
    expected: dict[str, float | None] = {}
    for section, weights in sections.items():
        expected[section] = float(sum(np.mean(points[s]) * w for s, w in weights.items()) / sum(weights.values()))
    expected["overall"] = float(np.mean([expected[section] for section in sections]))
    check(suite.score(rows, pairs)["scores"], expected)

    kept = [pair for pair in pairs if (pair.meta or {})["subset"] != "mt-bench-hard"]
    partial = suite.score(rows, kept)["scores"]
    rest = {s: w for s, w in sections["chat_hard"].items() if s != "mt-bench-hard"}
    weighted = sum(np.mean(points[s]) * w for s, w in rest.items()) / sum(rest.values())
    check(partial, {"overall": None, "chat_hard": float(weighted)})


def test_llmbar(tmp_path: Path, generator: np.random.Generator) -> None:
    names = ["Natural", *(f"Adversarial/{n}" for n in ("Neighbor", "GPTInst", "GPTOut", "Manual"))]
    labels: dict[str, list[str]] = {}
    for size, name in enumerate(names, 8):
        records = [{"input": f"{name}{i}", "output_1": "x", "output_2": "y", "label": i % 2 + 1} for i in range(size)]
        labels[name] = ["AB"[i % 2] for i in range(size)]
        write(tmp_path / "LLMBar" / name / "dataset.json", records, lines=False)
    _, suite, path = open_suite(f"llmbar:{tmp_path}")
    pairs = list(suite.load(path))
    rows = {pair.id: judge(generator, str(pair.id)) for pair in pairs}
    accuracy, expected = {}, {}
    for name in names:
        judged = [rows[f"llmbar:{name}:{i:04d}"] for i in range(len(labels[name]))]
        first = np.mean([said(row, 0) == label for row, label in zip(judged, labels[name], strict=True)])
        second = np.mean([said(row, 1) == label for row, label in zip(judged, labels[name], strict=True)])
        accuracy[name] = (first + second) / 2
        expected[f"{name} accuracy"] = accuracy[name]
        expected[f"{name} agreement"] = np.mean([said(r, 0) == said(r, 1) for r in judged])
    expected["adversarial_average"] = np.mean([accuracy[name] for name in names[1:]])
    expected["average"] = np.mean(list(accuracy.values()))
    check(suite.score(rows.values(), pairs)["scores"], {name: float(value) for name, value in expected.items()})


def test_autoj_with_ties(tmp_path: Path, generator: np.random.Generator) -> None:
    scenarios = ["post_summarization", "math_reasoning", "code_generation", "planning"]
    groups = ["Summarization", "Exam Questions", "Code", "General Communication"]
    records = [
        {"scenario": scenarios[i % 4], "label": i % 3, "prompt": f"p{i}", "response 1": "x", "response 2": "y"}
        for i in range(120)
    ]
    _, suite, path = open_suite(f"autoj:{write(tmp_path / 'testdata_pairwise.jsonl', records)}")
    pairs = list(suite.load(path))
    rows = [judge(generator, str(pair.id), allow_none=False) for pair in pairs]
    number = {"A": 0, "B": 1, "tie": 2}
    both, agree = np.zeros(120), np.zeros(120)
    for i, row in enumerate(rows):
        predicted, exchanged = number[str(said(row, 0))], number[str(said(row, 1))]
        agree[i] = predicted == exchanged
        both[i] = predicted == exchanged == records[i]["label"]
    where = np.arange(120)
    expected = {
        "agreement": both.mean(),
        "consistency": agree.mean(),
        "agreement_without_ties": both[where % 3 < 2].mean(),
    }
    for position, group in enumerate(groups):
        expected[f"{group} agreement"] = both[where % 4 == position].mean()
        expected[f"{group} consistency"] = agree[where % 4 == position].mean()
    result = suite.score(rows, pairs)
    check(result["scores"], {name: float(value) for name, value in expected.items()})
    assert any("40 pairs are labelled a tie" in note for note in result["notes"])


def test_pandalm(tmp_path: Path, generator: np.random.Generator) -> None:
    votes = [[int(v) for v in generator.integers(0, 3, size=3)] for _ in range(150)]
    records = [
        {
            "idx": i, "motivation_app": "a", "cmp_key": f"m{i % 2}", "annotator1": vote[0], "annotator2": vote[1],
            "annotator3": vote[2], "response1": "x", "response2": "y", "input": ["", "more"][i % 2],
            "instruction": f"do {i}",
        }
        for i, vote in enumerate(votes)
    ]  # fmt: skip
    _, suite, path = open_suite(f"pandalm:{write(tmp_path / 'testset-v1.json', records, lines=False)}")
    pairs = list(suite.load(path))
    assert (pairs[0].prompt, pairs[1].prompt) == ("do 0", "do 1\n\nmore")
    rows = [judge(generator, str(pair.id)) for pair in pairs]
    confusion = np.zeros((3, 4))
    for vote, row in zip(votes, rows, strict=True):
        truth = max(vote, key=vote.count)  # the first of equals
        confusion[truth, {"tie": 0, "A": 1, "B": 2, None: 3}[row["verdict"]]] += 1
    diagonal = np.diag(confusion[:, :3])
    precision, recall = diagonal / confusion.sum(axis=0)[:3], diagonal / confusion.sum(axis=1)
    expected = {
        "accuracy": diagonal.sum() / 150,
        "precision": precision.mean(),
        "recall": recall.mean(),
        "f1": (2 * precision * recall / (precision + recall)).mean(),
    }
    check(suite.score(rows, pairs)["scores"], {name: float(value) for name, value in expected.items()})


def test_mtbench_human_votes(tmp_path: Path, generator: np.random.Generator) -> None:
    def conversation(name: str) -> list[Record]:
        turns = [("user", "q1"), ("assistant", f"{name}1"), ("user", "q2"), ("assistant", f"{name}2")]
        return [{"role": role, "content": content} for role, content in turns]

    records: list[Record] = []
    votes: dict[str, list[str]] = {}
    for question in range(40):
        for turn in (1, 2):
            for voter in range(3):
                swap = bool(generator.integers(2))
                winner = ["model_a", "model_b", "tie"][int(generator.integers(3))]
                models = ("zephyr", "alpaca") if swap else ("alpaca", "zephyr")
                records.append({
                    "question_id": question, "model_a": models[0], "model_b": models[1], "winner": winner,
                    "judge": "author_1" if voter == 2 and question == 0 else f"expert_{voter}", "turn": turn,
                    "conversation_a": conversation(models[0]), "conversation_b": conversation(models[1]),
                })  # fmt: skip
                if records[-1]["judge"].startswith("expert"):
                    vote = {"model_a": "BA"[not swap], "model_b": "AB"[not swap]}.get(winner, "tie")
                    votes.setdefault(f"mtbench:{question}:{turn}:alpaca:zephyr", []).append(vote)
    _, suite, path = open_suite(f"mtbench:{write(tmp_path / 'mtbench.jsonl', records)}")
    pairs = list(suite.load(path))
    assert {pair.id for pair in pairs} == set(votes)
    assert pairs[0].response_a == "alpaca1"
    assert pairs[1].prompt == "Turn 1:\nq1\n\nTurn 2:\nq2"
    rows = {pair.id: judge(generator, str(pair.id)) for pair in pairs}
    expected: dict[str, float | None] = {}
    for turn in (1, 2):
        for ties in (True, False):
            same = []
            for identifier, row in rows.items():
                if row["verdict"] is None or not str(identifier).endswith(f":{turn}:alpaca:zephyr"):
                    continue
                verdict = said(row, 0) if said(row, 0) == said(row, 1) else "tie"
                for vote in votes[str(identifier)]:
                    if ties or "tie" not in (verdict, vote):
                        same.append(verdict == vote)
            expected[f"turn {turn} {'with' if ties else 'without'} ties"] = float(np.mean(same))
    check(suite.score(rows.values(), pairs)["scores"], expected)


def test_mtbench_from_llmbar_file(tmp_path: Path) -> None:
    records = [{"input": "q", "output_1": "x", "output_2": "y", "label": 2}]
    path = write(tmp_path / "MT-Bench" / "dataset.json", records, lines=False)
    _, suite, _ = open_suite(f"mtbench:{path}")
    pairs = list(suite.load(path))
    assert [pair.label for pair in pairs] == ["B"]
    row = {
        "id": pairs[0].id,
        "verdict": "B",
        "orders": [{"order": "ab", "verdict": "B"}, {"order": "ba", "verdict": "A"}],
    }
    scores = suite.score([row], pairs)["scores"]
    check(scores, {"all with ties": 0.0, "all without ties": None, "accuracy_without_ties": 1.0})


def test_hhh_formats_agree(tmp_path: Path, generator: np.random.Generator) -> None:
    categories = ["harmless", "helpful", "honest", "other"]
    sizes = dict(zip(categories, (9, 12, 7, 5), strict=True))
    prompt = "###Task Description:\nDo.\n\n###The instruction to evaluate:\n{q}\n\n###Response to evaluate:\n{a}\n\n"
    flat: list[Record] = []
    for category, size in sizes.items():
        examples = []
        for i in range(size):
            question, better, worse = f"{category} {i}?", f"good {i}", f"bad {i}"
            examples.append({"input": question, "target_scores": {worse: 0, better: 1}})
            flat.append({
                "source": category,
                "chosen_instruction": prompt.format(q=question, a=better) + "###Feedback: ",
                "rejected_instruction": prompt.format(q=question, a=worse) + "###Feedback: ",
            })  # fmt: skip
        write(tmp_path / "hhh_alignment" / category / "task.json", [{"examples": examples}], lines=False)
        hub = [
            {"input": e["input"], "targets": {"choices": list(e["target_scores"]), "labels": [0, 1]}} for e in examples
        ]
        write(tmp_path / "hub" / f"{category}.jsonl", hub)
    loaded = {}
    for name in ("hhh_alignment", "hub", "hhh_alignment_eval.json"):
        if name.endswith(".json"):
            write(tmp_path / name, flat, lines=False)
        _, suite, path = open_suite(f"hhh:{tmp_path / name}")
        loaded[name] = list(suite.load(path))
    assert loaded["hhh_alignment"] == loaded["hhh_alignment_eval.json"] == loaded["hub"]
    pairs = loaded["hhh_alignment"]
    rows = [judge(generator, str(pair.id)) for pair in pairs]
    right = {name: [] for name in categories}  # type: dict[str, list[bool]]
    for pair, row in zip(pairs, rows, strict=True):
        chosen = {"A": pair.response_a, "B": pair.response_b}.get(str(row["verdict"]), "neither")
        right[str((pair.meta or {})["subset"])].append(chosen.startswith("good"))
    expected = {name: float(np.mean(values)) for name, values in right.items()}
    expected["macro"] = float(np.mean(list(expected.values())))
    expected["micro"] = float(np.mean([value for values in right.values() for value in values]))
    check(suite.score(rows, pairs)["scores"], dict(expected))


def test_own_pairs(tmp_path: Path, generator: np.random.Generator) -> None:
    records: list[Record] = [
        {
            "prompt": f"p{i}",
            "response_a": "x",
            "response_b": "y",
            "label": ["A", "B", "tie", None][i % 4],
            "subset": "s",
        }
        for i in range(60)
    ]
    records += [{"prompt": f"c{i}", "chosen": "good", "rejected": "bad"} for i in range(40)]
    _, suite, path = open_suite(f"pairs:{write(tmp_path / 'mine.jsonl', records)}")
    pairs = list(suite.load(path))
    assert {pair.label for pair in pairs[60:]} == {"A", "B"}
    assert all((pair.response_a == "good") == (pair.label == "A") for pair in pairs[60:])
    rows = [judge(generator, str(pair.id)) for pair in pairs]
    right = [row["verdict"] == pair.label for pair, row in zip(pairs, rows, strict=True) if pair.label in ("A", "B")]
    shown_first = [
        verdict == "AB"[order] for row in rows for order in (0, 1) if (verdict := said(row, order)) in ("A", "B")
    ]
    agree = [said(row, 0) == said(row, 1) is not None and said(row, 0) is not None for row in rows]
    expected = {"accuracy": np.mean(right), "first_position": np.mean(shown_first), "consistency": np.mean(agree)}
    check(suite.score(rows, pairs)["scores"], {name: float(value) for name, value in expected.items()})
    single = [{**row, "orders": row["orders"][:1]} for row in rows]
    result = suite.score(single, pairs)
    assert "consistency" not in result["scores"] and "position bias" in result["notes"][0]


@pytest.mark.parametrize("name", suite_names())
def test_a_missing_file_says_where_to_get_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAMLITE_BENCHMARKS", str(tmp_path))
    for specification in (name, f"{name}:{tmp_path / 'absent.jsonl'}", f"{name}:{tmp_path}"):
        with pytest.raises(InputError) as caught:
            _, suite, path = open_suite(specification)
            list(suite.load(path))
        message = str(caught.value)
        assert str(tmp_path) in message
        assert "Get " in message or "Give a file" in message


@pytest.mark.parametrize("name", suite_names())
def test_a_wrong_file_is_refused_with_its_line(name: str, tmp_path: Path) -> None:
    wrong = write(tmp_path / "wrong.jsonl", [{"what": "is this"}])
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"prompt": "a"')
    for path in (wrong, torn):
        _, suite, found = open_suite(f"{name}:{path}")
        with pytest.raises(InputError, match=r"record 1|line 1|JSON|judgments"):
            list(suite.load(found))


def test_an_unknown_suite_is_refused() -> None:
    with pytest.raises(InputError, match="judgebench"):
        open_suite("gsm8k:x.jsonl")


def test_every_suite_has_the_same_few_names() -> None:
    assert suite_names() == [
        "autoj", "hhh", "judgebench", "llmbar", "mtbench", "pairs", "pandalm", "rewardbench", "rmbench",
    ]  # fmt: skip


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="../shared/benchmarks is not there")
@pytest.mark.parametrize(
    ("specification", "count", "labels"),
    [
        ("judgebench:judgebench_gpt.jsonl", 282, {"A", "B"}),
        ("rmbench:rmbench.items.jsonl.gz", 636 * 9, {"A"}),
        ("llmbar:llmbar.jsonl", 327, {"A", "B"}),
        ("mtbench:llmbar_processed.jsonl", 159, {"A", "B"}),
        ("autoj:autoj.jsonl", 1069, {"A", "B", "tie"}),  # finds the .gz
        ("pandalm:pandalm.jsonl", 738, {"A", "B", "tie"}),
        ("hhh:hhh.jsonl", 166, {"A", "B"}),
        ("pairs:autoj.small.jsonl", 80, {"A", "B", "tie"}),
    ],
)
def test_real_files_load(specification: str, count: int, labels: set[str]) -> None:
    name, _, file = specification.partition(":")
    _, suite, path = open_suite(f"{name}:{BENCHMARKS / file}")
    pairs = list(suite.load(path))
    assert len(pairs) == len({pair.id for pair in pairs}) == count
    assert {pair.label for pair in pairs} == labels
    for pair in pairs:
        pair.check()
        assert pair.meta and pair.meta["subset"] and pair.meta["prompt_sha"]
        assert not {"error", "error_key"} & set(pair.meta)


def test_the_better_response_stands_on_either_side_of_own_pairs(tmp_path: Path) -> None:
    records = [{"id": n, "prompt": "q", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(20)]
    _, suite, path = open_suite(f"pairs:{write(tmp_path / 'pairs.jsonl', records)}")
    pairs = list(suite.load(path))
    assert {pair.label for pair in pairs} == {"A", "B"}
    assert all((pair.response_a if pair.label == "A" else pair.response_b) == f"good {pair.id}" for pair in pairs)


def test_the_meta_of_a_plain_row_stays(tmp_path: Path) -> None:
    record = {"id": "p", "prompt": "q", "response_a": "x", "response_b": "y", "label": "A", "meta": {"source": "here"}}
    _, suite, path = open_suite(f"autoj:{write(tmp_path / 'autoj.jsonl', [record | {'subset': 'brainstorming'}])}")
    (pair,) = suite.load(path)
    assert pair.meta is not None and (pair.meta["source"], pair.meta["scenario"]) == ("here", "brainstorming")


def test_a_class_that_was_never_hit_has_no_recall() -> None:
    from gramlite.bench.suites.pandalm import class_ratios

    assert class_ratios(["A", "A", None], ["A", "B", "B"], "B") == (0.0, 0.0, 0.0)
    assert class_ratios(["A", "A", None], ["A", "B", "B"], "A") == (0.5, 1.0, pytest.approx(2 / 3))


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ([{"role": "user", "content": "q"}], "q"),
        ("q", "q"),
        ([], None),
        ([{"role": "user"}], None),
        (["q"], None),
        ({"role": "user", "content": "q"}, None),
        (7, None),
    ],
)
def test_rewardbench_takes_texts_and_messages(prompt: Any, text: str | None, tmp_path: Path) -> None:
    record = {"id": 1, "prompt": prompt, "chosen": "good", "rejected": "bad", "subset": "hep-rust"}
    _, suite, path = open_suite(f"rewardbench:{write(tmp_path / 'rb.jsonl', [record])}")
    if text is None:
        with pytest.raises(InputError, match="record 1: prompt, chosen and rejected must be text or messages"):
            list(suite.load(path))
    else:
        assert [pair.prompt for pair in suite.load(path)] == [text]


def test_a_tie_is_right_where_the_label_is_one() -> None:
    from gramlite.bench.scoring import match

    from gramlite.judging.pair import Pair

    row = json.loads('{"id": "p", "verdict": "tie", "orders": []}')
    (item,) = match([row], [Pair("q", "x", "y", id="p", label="tie")]).judged
    assert item.correct and item.agreed == "tie"


def test_the_share_of_responses_that_were_shown_first(tmp_path: Path) -> None:
    """Three orders of four say what stands first in them."""
    records = [{"id": f"p{n}", "prompt": "q", "response_a": "x", "response_b": "y", "label": "A"} for n in (0, 1)]
    _, suite, path = open_suite(f"pairs:{write(tmp_path / 'pairs.jsonl', records)}")
    says = {"p0": ("A", "B"), "p1": ("A", "A")}
    rows = [
        {"id": name, "verdict": "A", "orders": [{"order": "ab", "verdict": ab}, {"order": "ba", "verdict": ba}]}
        for name, (ab, ba) in says.items()
    ]
    check(suite.score(rows, list(suite.load(path)))["scores"], {"first_position": 0.75, "consistency": 0.5})


def test_agreement_with_ties_counts_the_labelled_pairs(tmp_path: Path) -> None:
    labels = ["A", "tie", None]
    records = [
        {"id": f"p{n}", "prompt": "q", "response_a": "x", "response_b": "y", "label": label, "meta": {"subset": "own"}}
        for n, label in enumerate(labels)
    ]
    _, suite, path = open_suite(f"pairs:{write(tmp_path / 'pairs.jsonl', records)}")
    pairs = list(suite.load(path))
    assert [pair.meta["subset"] for pair in pairs if pair.meta] == ["own"] * 3
    rows = [{"id": pair.id, "verdict": "A", "orders": []} for pair in pairs]
    check(suite.score(rows, pairs)["scores"], {"accuracy": 1.0, "agreement_with_ties": 0.5, "own accuracy": 1.0})


@pytest.mark.parametrize(("name", "size"), [("FairEval", 66), ("LLMEval^2", 200), ("MT-Bench", 200)])
def test_sizes_of_llmbars_processed_sets(name: str, size: int) -> None:
    from gramlite.bench.suites.llmbar import PROCESSED

    assert PROCESSED[name] == size


SIDES = {"prompt": "q", "chosen": "good", "rejected": "bad"}


def test_what_older_run_folders_rely_on_stays(tmp_path: Path) -> None:
    """Digests and the sides that hashes draw are compared with those of rows on disk."""
    from gramlite.bench import records

    assert records.digest("q") == "8e35c2cd3bf6641b"
    assert [records.chosen_side(name) for name in ("1", "2", "3", "4")] == ["B", "A", "A", "B"]
    _, suite, path = open_suite(
        f"pairs:{write(tmp_path / 'pairs.jsonl', [{'id': '1', **SIDES}, {'id': '2', **SIDES}])}"
    )
    assert [pair.label for pair in suite.load(path)] == ["B", "A"]
