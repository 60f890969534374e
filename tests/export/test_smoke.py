"""New artifacts judge a dozen pairs: figures in the manifest, and no broken file is left."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from gramlite.export import smoke
from gramlite.export.smoke import Smoke, recorded_margins, smoke_judge, summary

from gramlite.errors import CannotRunHere, ModelError, ResourceError
from gramlite.formats.artifact import Manifest, manifest_path, read_manifest, write_manifest

EXPECTED = [1.0, -2.0, 0.5, -0.01, 3.0, -1.5, 0.8, -0.9]


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Manifest]:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    template = {"name": "gramlite", "sha256": "…"}
    manifest = Manifest(format="gguf", name="model", template=template)
    write_manifest(path, manifest)
    return path, manifest


def judging(monkeypatch: pytest.MonkeyPatch, found: list[float] | Exception) -> None:
    def margins(model: Path, template: str | None = None) -> list[float]:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(smoke, "judge_margins", margins)


def test_the_figures_are_recorded(made: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    path, manifest = made
    judging(monkeypatch, [1.2, -2.0, -0.1, 0.01, 3.0, -1.0, 0.8, -0.9])
    told = smoke_judge(path, manifest, EXPECTED).smoke
    assert told == read_manifest(path).smoke  # type: ignore[union-attr]
    assert told is not None
    # the fourth is too close to be a verdict; the third is a flip
    assert (told["pairs"], told["clear_verdicts"], told["flips"]) == (4, 7, 1)
    assert told["agreement"] == pytest.approx(6 / 7)
    assert told["mean_margin_difference"] == pytest.approx((0.2 + 0.6 + 0.02 + 0.5) / 8)
    assert told["max_margin_difference"] == pytest.approx(0.6)
    assert recorded_margins(read_manifest(path)) == EXPECTED
    assert "1 of 7 clear verdicts flipped" in summary(told)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([1.0, -2.0, 0.5, 0.0, math.nan, -1.5, 0.8, -0.9], "1 of 8 margins are no numbers"),
        ([-margin for margin in EXPECTED], "agrees with its source in 0%"),
        (ModelError("no tokenizer"), "no tokenizer"),
    ],
)
def test_a_broken_artifact_is_not_kept(
    made: tuple[Path, Manifest],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    found: list[float] | Exception,
    words: str,
) -> None:
    path, manifest = made
    judging(monkeypatch, found)
    kept = smoke_judge(path, manifest, EXPECTED, force=True)
    assert path.exists() and words in kept.smoke["collapse"] and words in capsys.readouterr().err  # type: ignore[index]
    with pytest.raises(ModelError, match="was not kept"):
        smoke_judge(path, manifest, EXPECTED)
    assert not list(path.parent.iterdir())


def test_what_cannot_run_here_is_said_and_kept(made: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    path, manifest = made
    judging(monkeypatch, ResourceError("no CUDA device was found"))
    assert "no CUDA device" in summary(smoke_judge(path, manifest, EXPECTED).smoke)
    assert "source could not be judged" in summary(smoke_judge(path, manifest, Path("checkpoint")).smoke)
    assert recorded_margins(read_manifest(path)) is None
    assert path.exists() and manifest_path(path).exists()


def test_a_sound_artifact_that_cannot_run_here_is_kept(
    made: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, manifest = made
    judging(monkeypatch, CannotRunHere("groups of 16"))
    assert "does not run here: groups of 16" in summary(smoke_judge(path, manifest, EXPECTED).smoke)
    assert path.exists()


def test_a_source_that_is_refused_is_said_aloud(
    made: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, manifest = made
    judging(monkeypatch, ModelError("lm_head.weight is missing"))
    assert "could not be judged" in summary(smoke_judge(path, manifest, Path("checkpoint")).smoke)
    assert "its source is refused: lm_head.weight is missing" in capsys.readouterr().err


def test_margins_of_another_template_are_not_compared(
    made: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, manifest = made
    judging(monkeypatch, EXPECTED)
    kept = smoke_judge(path, manifest, EXPECTED)
    assert kept.smoke is not None and kept.smoke["template_sha256"] == "…"
    assert recorded_margins(kept, {"name": "gramlite", "sha256": "…"}) == EXPECTED
    assert recorded_margins(kept, {"name": "other", "sha256": "another"}) is None


def test_a_judge_without_clear_verdicts_has_no_agreement() -> None:
    assert Smoke((0.01,) * 24, (-0.01,) * 24).collapse is None
    assert Smoke((), ()).describe()["mean_margin_difference"] is None


@pytest.mark.slow
def test_real_pairs_of_the_reference_judge(reference_q8: Path) -> None:
    margins = smoke.judge_margins(reference_q8)
    assert len(margins) == 24 and all(math.isfinite(margin) for margin in margins)


@pytest.mark.fault("templates")
def test_an_unknown_chat_template_is_judged_with_where_it_is_trusted(
    checkpoint_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gramlite.cli import run

    folder = checkpoint_of("llama-tied", max_position_embeddings=4096)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{question}|{response_a}|{response_b}")
    export = ["export", "gguf", str(folder), "--template", str(prompt), "--json"]
    assert run([*export, "-o", str(tmp_path / "a.gguf")]) == 0
    assert "--trust-template" in capsys.readouterr().err
    assert run([*export, "-o", str(tmp_path / "b.gguf"), "--trust-template"]) == 0
    said = capsys.readouterr()
    assert "--trust-template" not in said.err
    smoke = json.loads(said.out)["smoke"]
    assert smoke["pairs"] == 12 and smoke["mean_margin_difference"] < 0.05
