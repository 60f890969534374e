"""Calibration data: reading, drawing, hashing, and recording a judge at work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gramlite.quant.calibration import (
    Transcript,
    choose_transcripts,
    describe,
    load_calibration,
    read_transcripts,
    record_transcripts,
    write_transcripts,
)

from gramlite.errors import InputError
from gramlite.judging.judge import Settings
from gramlite.judging.pair import Pair
from gramlite.loading import load

PAIRS = [Pair(f"What is {n} + 1?", f"It is {n + 1}.", f"It is {n}, I think.", id=f"sum-{n}") for n in range(8)]


def test_transcripts_round_trip(tmp_path: Path, transcripts: list[Transcript]) -> None:
    write_transcripts(tmp_path / "t.jsonl", transcripts)
    assert read_transcripts(tmp_path / "t.jsonl") == transcripts


@pytest.mark.parametrize(
    "line",
    ["{}", "[1]", "not json", '{"prompt_ids": [], "generated_ids": []}', '{"prompt_ids": [1.5], "generated_ids": []}',
     '{"prompt_ids": [-1], "generated_ids": []}', '{"prompt_ids": "abc", "generated_ids": []}'],
)  # fmt: skip
def test_a_line_that_is_no_transcript_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"version": 2, "prompt_ids": [1], "generated_ids": [2]}\n\n' + line + "\n")
    with pytest.raises(InputError, match=r"t\.jsonl line 3"):
        read_transcripts(tmp_path / "t.jsonl")


@pytest.mark.fault("transcripts")
@pytest.mark.parametrize("version", ["", '"version": 1, '])
def test_transcripts_of_the_version_that_tokenized_text_again_are_refused(version: str, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(f'{{{version}"prompt_ids": [1], "generated_ids": [2]}}\n')
    with pytest.raises(InputError, match=r"t\.jsonl line 1 is a transcript of version 1.*again"):
        load_calibration(tmp_path / "t.jsonl", judge="none")


@pytest.mark.fault("transcripts")
def test_recorded_ids_are_those_of_the_first_vote(scripted: Path) -> None:
    """Also where the votes' mean, or a calibration, says something else than that vote."""
    with load(scripted, settings=Settings(orders="ab", votes=3, temperature=0.5)) as judge:
        vocabulary = judge.backend.vocabulary
        recorded = list(record_transcripts(judge, PAIRS[:2]))
    assert all(vocabulary.piece(t.generated_ids[-1]) in (b"A", b"B") for t in recorded)
    assert {b"".join(map(vocabulary.piece, t.generated_ids[:-1])) for t in recorded} == {
        b"<think>\nFeedback:\nfine\n\nConclusion:\nscripted\n</think>\n<answer>\n"
    }


def test_budget_is_kept_and_nothing_is_cut(transcripts: list[Transcript]) -> None:
    chosen = choose_transcripts(transcripts, tokens=300, seed=1)
    assert 200 < sum(len(transcript.ids) for transcript in chosen) <= 300
    assert all(transcript in transcripts for transcript in chosen)
    assert chosen == choose_transcripts(transcripts, tokens=300, seed=1)
    assert chosen != choose_transcripts(transcripts, tokens=300, seed=2)
    with pytest.raises(InputError, match="--tokens 10"):
        choose_transcripts(transcripts, tokens=10)


def test_hash_changes_with_any_token(transcripts: list[Transcript]) -> None:
    first = describe(transcripts, tokens=1, seed=0, source="x")
    changed = [*transcripts[:-1], Transcript(transcripts[-1].prompt_ids, (*transcripts[-1].generated_ids, 1), "x")]
    moved = Transcript(transcripts[0].prompt_ids + transcripts[0].generated_ids, (), "0")
    hashes = {describe(t, tokens=1, seed=0, source="x")["sha256"] for t in (changed, [moved, *transcripts[1:]])}
    assert len(hashes | {first["sha256"]}) == 3
    assert first["transcripts"] == 12


@pytest.mark.fault("transcripts")
def test_recorded_tokens_are_what_the_judge_read_and_said(scripted: Path) -> None:
    with load(scripted, settings=Settings(orders="both")) as judge:
        recorded = list(record_transcripts(judge, PAIRS))
        verdicts = list(judge.many(PAIRS))
        vocabulary = judge.backend.vocabulary
        texts = {t.id: b"".join(map(vocabulary.piece, t.generated_ids)).decode() for t in recorded}
        prompts = {t.id: b"".join(map(vocabulary.piece, t.prompt_ids)).decode() for t in recorded}
    assert len(recorded) == 16
    for pair, verdict in zip(PAIRS, verdicts, strict=True):
        for order in verdict.orders:
            name = f"{pair.id}:{order.order}"
            said = order.verdict if order.order == "ab" else {"A": "B", "B": "A"}[str(order.verdict)]
            assert texts[name] == f"<think>\n{order.rationale}\n</think>\n<answer>\n{said}"
            first, second = (prompts[name].index(text) for text in (pair.response_a, pair.response_b))
            assert (first < second) == (order.order == "ab")


def test_pairs_are_judged_until_the_budget_is_used(scripted: Path, tmp_path: Path) -> None:
    rows = [{"prompt": p.prompt, "response_a": p.response_a, "response_b": p.response_b, "id": p.id} for p in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen, described = load_calibration(tmp_path / "pairs.jsonl", judge=scripted, tokens=6000, seed=3)
    assert 1 < len(chosen) < 8
    assert described["tokens"] == sum(len(t.ids) for t in chosen) <= 6000
    assert [t.id for t in chosen] != [f"{pair.id}:ab" for pair in PAIRS[: len(chosen)]]
    assert described["mode"] == "think"
    short, described = load_calibration(tmp_path / "pairs.jsonl", judge=scripted, tokens=6000, seed=3, mode="direct")
    assert described["mode"] == "direct" and [t.prompt_ids for t in short[: len(chosen)]] == [
        t.prompt_ids for t in chosen
    ]
    scaffolds = {t.generated_ids[:-1] for t in short}
    assert len(scaffolds) == 1, "no rationale is written"
    assert len(scaffolds.pop()) < min(len(t.generated_ids) - 1 for t in chosen)
    write_transcripts(tmp_path / "transcripts.jsonl", short)
    assert "mode" not in load_calibration(tmp_path / "transcripts.jsonl", judge=scripted)[1]
    (tmp_path / "pairs.jsonl").write_text(json.dumps(rows[0]) + "\n{}\n")
    with pytest.raises(InputError, match="line 2"):
        load_calibration(tmp_path / "pairs.jsonl", judge=scripted)
    with pytest.raises(InputError, match="no file"):
        load_calibration(tmp_path / "absent.jsonl", judge=scripted)
