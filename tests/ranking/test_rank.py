from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import read_jsonl
from fakes import generation
from rich.console import Console

import gramlite
from gramlite import InputError, Settings
from gramlite.backends.scripted import ScriptedBackend
from gramlite.cli import run
from gramlite.commands.rank import ranking_table
from gramlite.generation.decoder import Generation
from gramlite.generation.request import Request
from gramlite.generation.scaffold import SMOLLM2
from gramlite.judging.judge import Judge
from gramlite.judging.template import packaged_template
from gramlite.ranking.bradley_terry import bradley_terry, cycles
from gramlite.ranking.plans import Plan, knockout, merge_sort, round_robin, swiss
from gramlite.ranking.rank import KnownComparisons, compare, rank

GAMES = [(0, 1, 1.0), (1, 2, 0.8), (2, 3, 0.9), (3, 0, 0.4), (0, 2, 0.7), (1, 3, 0.3), (0, 1, 0.0), (2, 1, 0.5)]


class Strengths(ScriptedBackend):
    """Prefers the completion with the larger number, by the difference of the numbers, plus a lean to the first."""

    def __init__(self, lean: float = 0.0, beats: set[tuple[str, str]] | None = None) -> None:
        super().__init__({})
        self.lean = lean
        self.beats = beats or set()
        self.asked: list[tuple[str, str, tuple[int, ...]]] = []

    def _run(self, request: Request) -> Generation:
        text = bytes(token for token in request.prompt if token < 256).decode()
        first, second = (
            text.split(f"[The Start of Assistant {side}'s Response]\n")[1].split("\n[The End")[0] for side in "AB"
        )
        self.asked.append((first, second, request.splits))
        margin = float(first.split()[0]) - float(second.split()[0])
        if (first, second) in self.beats or (second, first) in self.beats:
            margin = 1.0 if (first, second) in self.beats else -1.0
        return generation(margin + self.lean)


def judge_on(backend: ScriptedBackend, **settings: object) -> Judge:
    return Judge(
        backend, packaged_template(), SMOLLM2, Settings(mode="direct", **settings), {"name": "fake"}, rank=rank
    )  # type: ignore[arg-type]


def played(plan: Plan, strengths: Sequence[float]) -> tuple[list[int] | None, list[tuple[int, int]]]:
    """Run a plan on completions of known strength; its order and every pair it asked for."""
    asked: list[tuple[int, int]] = []
    try:
        batch = next(plan)
        while True:
            asked += batch
            batch = plan.send([strengths[first] - strengths[second] for first, second in batch])
    except StopIteration as end:
        return end.value, asked


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 17, 32])
def test_plans_find_what_they_promise(count: int) -> None:
    random = np.random.default_rng(count)
    for _ in range(20):
        strengths = list(random.permutation(count).astype(float))
        truth = sorted(range(count), key=lambda index: -strengths[index])
        order, asked = played(knockout(count), strengths)
        assert order and order[0] == truth[0] and len(asked) == count - 1 and sorted(order) == sorted(truth)
        order, asked = played(merge_sort(count), strengths)
        assert order == truth and len(asked) <= count * math.ceil(math.log2(count)) and len(set(asked)) == len(asked)
        order, asked = played(round_robin(count), strengths)
        assert order is None and len(asked) == count * (count - 1) // 2


def test_swiss_rounds_never_repeat_a_pair_and_come_close() -> None:
    random = np.random.default_rng(0)
    for count in (33, 50):
        strengths = list(random.permutation(count).astype(float))
        order, asked = played(swiss(count), strengths)
        assert order is None and len(asked) == len({frozenset(pair) for pair in asked})
        assert len(asked) <= (math.ceil(math.log2(count)) + 1) * count // 2 < count * (count - 1) / 4
        scores, _ = bradley_terry(count, [(a, b, float(strengths[a] > strengths[b])) for a, b in asked])
        assert np.corrcoef(scores, strengths)[0, 1] > 0.9 and int(np.argmax(scores)) == int(np.argmax(strengths))


def test_each_method_ranks_completions() -> None:
    texts = [f"{number} points" for number in (3, 9, 1, 7, 5)]
    for method, comparisons in (("best", 4), ("tournament", 8), ("full", 10)):
        backend = Strengths(lean=0.3)
        ranking = judge_on(backend).rank(prompt="q", completions=texts, method=method)  # type: ignore[arg-type]
        assert ranking.best == 1 and sorted(ranking.ranking or ()) == list(range(5))
        assert len(ranking.comparisons) <= comparisons and len(backend.asked) == 2 * len(ranking.comparisons)
        if method != "best":
            assert ranking.ranking == (1, 3, 4, 0, 2)
        assert (ranking.scores is not None) == (method == "full") and not ranking.cycles


def test_a_comparison_is_what_the_judge_would_say_of_the_pair() -> None:
    judge = judge_on(Strengths(lean=0.7))
    texts = ["3", "4", "1"]
    pairs = [(0, 1), (0, 2), (1, 2)]
    for (first, second), verdict in zip(pairs, compare(judge, "q", texts, pairs), strict=True):
        assert verdict == judge(prompt="q", response_a=texts[first], response_b=texts[second])
    one_order = judge.with_settings(orders="ab")
    assert compare(one_order, "q", texts, [(0, 1)]) == [one_order(prompt="q", response_a="3", response_b="4")]


def test_comparisons_by_votes_are_the_judges_too() -> None:
    judge = Judge(ScriptedBackend({}), packaged_template(), SMOLLM2, Settings(votes=5), {"name": "fake"})
    (verdict,) = compare(judge, "q", ["x", "y"], [(0, 1)])
    alone = judge(prompt="q", response_a="x", response_b="y")
    assert verdict == alone and {order.order for order in verdict.orders} == {"ab", "ba"}


def test_prompts_that_share_a_beginning_stand_together() -> None:
    backend = Strengths()
    judge_on(backend).rank(prompt="q", completions=["1", "2", "3", "4"], method="full")
    firsts = [first for first, _, _ in backend.asked]
    assert len(firsts) == 12 and [key for key, _ in itertools.groupby(firsts)] == ["1", "2", "3", "4"]
    assert all(len(splits) == 3 for _, _, splits in backend.asked), "instructions, question and first response"


def test_known_comparisons_are_not_made_again() -> None:
    backend = Strengths(lean=0.4)
    judge = judge_on(backend)
    known = KnownComparisons()
    first = judge.rank(prompt="q", completions=["1", "2", "3", "2"], method="full", known=known)
    assert len(backend.asked) == 6 and "identical:1,3" in first.flags
    assert first.ranking == (2, 1, 3, 0) and first.scores and first.scores[1] == first.scores[3]
    again = judge.rank(prompt="q", completions=["3", "2", "1"], method="full", known=known)
    assert len(backend.asked) == 6 and again.ranking == (0, 1, 2) and all(made.known for made in again.comparisons)
    assert again.tokens["prompt"] == 0
    assert again.comparisons[0].verdict == judge(prompt="q", response_a="3", response_b="2")
    judge.rank(prompt="another", completions=["1", "2"], known=known)
    judge.with_settings(orders="ab").rank(prompt="q", completions=["1", "2"], known=known)
    assert len(backend.asked) == 6 + 2 + 2 + 1


def test_what_a_judge_was_loaded_as_is_part_of_who_was_asked() -> None:
    backend, known = Strengths(), KnownComparisons()
    plain = judge_on(backend)
    for name in ("BF16", "NF4", "NF4"):
        model = {"sha256": "1" * 64, "quantization": name}
        judge = Judge(backend, plain.template, plain.scaffold, plain.settings, model, rank=rank)
        judge.rank(prompt="q", completions=["1", "2"], known=known)
    assert len(backend.asked) == 2 + 2


def test_a_missing_verdict_is_nobodys_win() -> None:
    judge = judge_on(Strengths())
    bad = ["1", "2\0", "3"]
    for method in ("best", "tournament", "full"):
        ranking = judge.rank(prompt="q", completions=bad, method=method)  # type: ignore[arg-type]
        assert ranking.ranking is None and ranking.best is None and "NUL" in (ranking.reason or "")
        assert "completion_1" in (ranking.reason or "") and "no-verdict:0,1" in ranking.flags
    empties = judge.rank(prompt="q", completions=["", " "], method="full")
    assert empties.ranking == (0, 1) and not empties.comparisons
    assert judge.rank(prompt="q", completions=["only"]).ranking == (0,)


def test_what_cannot_be_ranked_is_refused() -> None:
    judge = judge_on(Strengths())
    for completions in ([], "text", ["a", 1]):
        with pytest.raises(InputError, match="list of completions"):
            judge.rank(prompt="q", completions=completions)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no ranking method"):
        judge.rank(prompt="q", completions=["a"], method="worst")  # type: ignore[arg-type]


def by_minorization(count: int, games: list[tuple[int, int, float]]) -> np.ndarray:
    """Plain Bradley-Terry by Hunter's MM algorithm (2004), which shares nothing with Newton's method."""
    wins = np.zeros(count)
    strengths = np.ones(count)
    for first, second, outcome in games:
        wins[first] += outcome
        wins[second] += 1 - outcome
    for _ in range(20_000):
        weight = np.zeros(count)
        for first, second, _ in games:
            shared = 1 / (strengths[first] + strengths[second])
            weight[first] += shared
            weight[second] += shared
        strengths = wins / weight
    scores = np.log(strengths)
    return np.asarray(scores - scores.mean())


def test_scores_equal_independent_implementations() -> None:
    plain, _ = bradley_terry(4, GAMES, spread=math.inf)
    assert np.abs(plain - by_minorization(4, GAMES)).max() < 1e-6

    from scipy.optimize import minimize

    def loss(scores: np.ndarray) -> float:
        chances = [1 / (1 + math.exp(scores[second] - scores[first])) for first, second, _ in GAMES]
        terms = [y * math.log(p) + (1 - y) * math.log(1 - p) for p, (_, _, y) in zip(chances, GAMES, strict=True)]
        return float(np.sum(scores**2) / 8 - sum(terms))

    regularised, _ = bradley_terry(4, GAMES)
    found = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-10}).x
    assert np.abs(regularised - found).max() < 1e-6 and abs(regularised.sum()) < 1e-9


def test_standard_errors_equal_a_generalised_linear_models() -> None:
    statsmodels = pytest.importorskip("statsmodels.api")
    games = [(first, second, float(outcome >= 0.5)) for first, second, outcome in GAMES * 3] + [
        (1, 0, 1.0),
        (3, 2, 1.0),
    ]
    design = np.zeros((len(games), 4))
    for row, (first, second, _) in enumerate(games):
        design[row, first], design[row, second] = 1, -1
    contrast = np.eye(4) - 1 / 4  # scores with mean zero, from three free ones
    basis = np.linalg.svd(contrast)[0][:, :3]
    family = statsmodels.families.Binomial()
    fitted = statsmodels.GLM([outcome for *_, outcome in games], design @ basis, family=family).fit(tol=1e-12)
    scores, errors = bradley_terry(4, games, spread=math.inf)
    assert np.abs(scores - basis @ fitted.params).max() < 1e-6
    assert np.abs(errors - np.sqrt(np.diag(basis @ fitted.cov_params() @ basis.T))).max() < 1e-6


def test_scores_stay_finite_after_a_perfect_record() -> None:
    scores, errors = bradley_terry(3, [(0, 1, 1.0), (0, 2, 1.0), (1, 2, 1.0)])
    assert np.isfinite(scores).all() and np.isfinite(errors).all() and scores[0] > scores[1] > scores[2]
    scores, errors = bradley_terry(3, [])
    assert scores.tolist() == [0, 0, 0] and np.isfinite(errors).all()


def test_planted_cycles_are_found() -> None:
    transitive = {first: set(range(first + 1, 7)) for first in range(7)}
    assert cycles(transitive) == []
    planted = {first: set(losers) for first, losers in transitive.items()}
    for winner, loser in ((2, 0), (6, 4)):
        planted[loser].discard(winner)
        planted[winner].add(loser)
    assert cycles(planted) == [(0, 1, 2), (4, 5, 6)]
    assert cycles({0: {1}, 1: {2}, 2: {3}, 3: {0}, 5: {6}}) == [(0, 1, 2, 3)], "no triangle: comparisons are missing"
    everything = {first: {(first + step) % 9 for step in range(1, 5)} for first in range(9)}
    triangles = {
        (a, b, c) if b in everything[a] else (a, c, b)
        for a, b, c in itertools.combinations(range(9), 3)
        if (b in everything[a]) == (c in everything[b]) == (a in everything[c])
    }
    assert set(cycles(everything)) == triangles and len(cycles(everything, limit=5)) == 5


def test_a_judges_cycle_is_reported() -> None:
    backend = Strengths(beats={("1", "3")})
    ranking = judge_on(backend).rank(prompt="q", completions=["3", "2", "1", "0"], method="full")
    assert ranking.cycles == ((0, 1, 2),) and "intransitive:1" in ranking.flags


def items_file(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_of_completions(scripted: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    messages = [[{"role": "assistant", "content": text}] for text in "ba"]
    items = items_file(
        tmp_path,
        {"id": "one", "prompt": "q", "completions": ["a", "b", "c"]},
        {"prompt": [{"role": "user", "content": "q"}], "completions": messages},
        {"prompt": "q", "completions": []},
        {"prompt": "q", "completions": ["a", 5]},
        {"prompt": "q", "response_a": "a", "response_b": "b"},
    )
    assert run(["rank", str(items), "-m", str(scripted), "--mode", "direct", "--method", "full"]) == 5
    first, second, *bad = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert first["id"] == "one" and first["verdict"] == first["ranking"][0] and len(first["scores"]) == 3
    assert len(first["comparisons"]) == 3 and len(first["settings"]) == 12 and first["line"] == 1
    assert second["id"] == "2" and all(made["known"] for made in second["comparisons"]), "the same pair as in line 1"
    assert [row["verdict"] for row in bad] == [None] * 3 and all("line" in row["reason"] for row in bad)


def test_ranked_rows_resume(scripted: Path, tmp_path: Path) -> None:
    items = items_file(tmp_path, *({"prompt": f"q{n}", "completions": ["a", "b", "c"]} for n in range(4)))
    output = tmp_path / "out.jsonl"
    command = ["rank", str(items), "-m", str(scripted), "--mode", "direct", "-o", str(output)]
    assert run(command) == 0
    whole = output.read_bytes()
    output.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]) + b'{"torn')
    assert run([*command, "--resume"]) == 0 and output.read_bytes() == whole
    assert run([*command, "--resume", "--method", "full"]) == 6


def test_a_person_sees_a_table() -> None:
    completions = ["3 is\na number", "2 [red]", "1 \x1b[2J"]
    backend = Strengths(beats={("1 \x1b[2J", "3 is\na number")})
    row = judge_on(backend).rank(prompt="q", completions=completions, method="full").to_json()
    console = Console(file=io.StringIO(), width=80)
    console.print(ranking_table(row | {"id": "[bold]x"}, completions))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[bold]x" in shown and "3 is a number" in shown and "2 [red]" in shown and "\x1b" not in shown
    assert "Circles: 0 > 1 > 2 > 0" in shown and shown.index("3 is") < shown.index("2 [")
    console.print(ranking_table(row | {"id": "y", "ranking": None, "reason": "line 4: nothing"}, completions))
    assert "line 4: nothing" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def reference(reference_q8: Path) -> Any:
    with gramlite.load(reference_q8, settings=Settings(mode="direct")) as judge:
        yield judge


def factor(tokens: dict[str, int]) -> float:
    """How many times fewer tokens were computed than the prompts hold."""
    return tokens["prompt"] / (tokens["prompt"] - tokens["cached"])


def test_all_pairs_share_their_prefixes(reference: Judge) -> None:
    completions = [
        f"{n} is a number. {'It comes after others and before more. ' * 3}" for n in ("Two", "Ten", "A", "Six")
    ]
    ranking = reference.rank(prompt="Name a number and explain it.", completions=completions, method="full")
    assert len(ranking.comparisons) == 6 and ranking.scores
    made = ranking.comparisons[3]
    first, second = completions[made.first], completions[made.second]
    alone = reference(prompt="Name a number and explain it.", response_a=first, response_b=second)
    assert made.verdict.margin == pytest.approx(alone.margin, abs=0.1)
    shown = [order.tokens for made in ranking.comparisons for order in made.verdict.orders]
    assert sorted(tokens["cached"] > 240 for tokens in shown).count(True) >= 8, "all but the first of each group of 3"
    assert factor(ranking.tokens) > 3


@pytest.mark.slow
def test_eight_real_responses_share_their_prefixes(reference: Judge, shared: Path) -> None:
    rows = list(read_jsonl(shared / "benchmarks/autoj.jsonl.gz"))
    prompt = sorted((row["prompt"] for row in rows), key=len)[len(rows) // 2]
    completions = sorted((row["response_a"] for row in rows), key=len)[len(rows) // 2 - 4 : len(rows) // 2 + 4]
    ranking = reference.rank(prompt=prompt, completions=completions, method="full")
    assert len(ranking.comparisons) == 28 and ranking.scores
    assert factor(ranking.tokens) >= 2.2
