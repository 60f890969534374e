"""MT-Bench's human judgments (Zheng et al., NeurIPS 2023): expert votes on answers of one or two turns.

Official rule (FastChat's `compute_agreement.py`): a judge's verdict on a pair is the response that both
orders name, else a tie; it is compared with every expert vote. Setup 1 counts all votes and ties; setup 2
drops every comparison in which either side says tie. Both are given for each turn; pairs without a verdict in
one of the orders are left out, as in the script.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gramlite.bench import records, scoring

from gramlite.errors import InputError
from gramlite.judging.pair import Pair, Winner

from . import llmbar

SOURCE = (
    "Get the split `human` of the Hub's lmsys/mt_bench_human_judgments and save it as JSON lines "
    "(datasets.load_dataset(...)['human'].to_json('mtbench.jsonl')): objects with question_id, model_a, model_b, "
    "winner, judge, conversation_a, conversation_b and turn. LLMBar's Processed/MT-Bench/dataset.json works too."
)
FILES = ("mtbench.jsonl", "human.jsonl", "MT-Bench/dataset.json", "llmbar_processed.jsonl")
LABELS: dict[str, Winner] = {
    '"model_a"': "A", '"model_b"': "B", '"tie"': "tie", '"tie (inconsistent)"': "tie", '"tie (bothbad)"': "tie",
}  # fmt: skip
REVERSED: dict[Winner, Winner] = {"A": "B", "B": "A", "tie": "tie"}


def load(path: Path) -> Iterator[Pair]:
    """A pair for each question, turn and two models; its label is the majority of the expert votes."""
    first = next(iter(records.read_records(path)), None)
    if first and "conversation_a" in first[1]:
        yield from _grouped(path)
        return
    if first and not records.is_plain(first[1]) and "output_1" not in first[1]:
        raise InputError(f"{path}: no MT-Bench judgments. {SOURCE}")
    for pair in llmbar.file_pairs(path, "MT-Bench"):
        if (pair.meta or {}).get("subset") == "MT-Bench":
            yield pair


def _grouped(path: Path) -> Iterator[Pair]:
    votes: dict[tuple[str, int, str, str], list[Winner]] = {}
    shown: dict[tuple[str, int, str, str], tuple[list[Any], list[Any]]] = {}
    for number, record in records.read_records(path):
        where = f"{path.name}, record {number}"
        if not records.text(record, "judge", where).startswith("expert"):
            continue
        models = records.text(record, "model_a", where), records.text(record, "model_b", where)
        winner = records.label(record, "winner", LABELS, where, SOURCE)
        sides = record["conversation_a"], record["conversation_b"]
        if models[0] > models[1]:
            models, sides, winner = models[::-1], sides[::-1], REVERSED[winner]
        key = str(record.get("question_id")), int(record.get("turn", 1)), *models
        votes.setdefault(key, []).append(winner)
        shown[key] = sides
    for key, said in votes.items():
        yield _pair(key, shown[key], said, path)


def _pair(key: tuple[str, int, str, str], sides: tuple[list[Any], list[Any]], votes: list[Winner], path: Path) -> Pair:
    question, turn, first, second = key
    try:
        prompt, response_a = _turns(sides[0], turn)
        _, response_b = _turns(sides[1], turn)
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path.name}, question {question}: a conversation is not whole. {SOURCE}") from error
    ranked = Counter(votes).most_common(2)
    tied = len(ranked) > 1 and ranked[0][1] == ranked[1][1]
    return records.make_pair(
        identifier=f"mtbench:{question}:{turn}:{first}:{second}",
        prompt=prompt,
        response_a=response_a,
        response_b=response_b,
        label="tie" if tied else ranked[0][0],
        meta={"subset": f"turn {turn}", "turn": turn, "votes": votes, "models": [first, second]},
    )


def _turns(conversation: list[Any], turn: int) -> tuple[str, str]:
    """The question and the answer up to a turn; the turns of a longer one are numbered."""
    asked = [message["content"] for message in conversation if message["role"] == "user"][:turn]
    answered = [message["content"] for message in conversation if message["role"] == "assistant"][:turn]
    if len(asked) < turn or len(answered) < turn:
        raise IndexError(turn)
    if turn == 1:
        return asked[0], answered[0]
    return _numbered(asked), _numbered(answered)


def _numbered(texts: list[str]) -> str:
    return "\n\n".join(f"Turn {number}:\n{content}" for number, content in enumerate(texts, 1))


def agreement(items: Iterable[scoring.Judged], *, with_ties: bool) -> float | None:
    """Share of expert votes that the judge's verdict equals."""
    same = []
    for item in items:
        if item.verdict is None or None in item.orders.values():
            continue
        said = item.agreed or "tie"
        votes = item.meta.get("votes") or [item.label]
        for vote in votes:
            if with_ties or "tie" not in (said, vote):
                same.append(said == vote)
    return scoring.mean(same)


def score(rows: Iterable[Any], pairs: Sequence[Pair]) -> dict[str, Any]:
    """Agreement with the experts by turn, with ties and without, and the accuracy against the majority."""
    matched = scoring.match(rows, pairs)
    scores: dict[str, float | None] = {}
    for name, items in [("all", list(matched.judged)), *sorted(matched.by_subset().items())]:
        scores[f"{name} with ties"] = agreement(items, with_ties=True)
        scores[f"{name} without ties"] = agreement(items, with_ties=False)
    scores["accuracy_without_ties"] = scoring.accuracy(matched.judged)
    one = "FastChat's verdict is what both orders say."
    return scoring.result(matched, headline="all without ties", scores=scores, one_order=one)
