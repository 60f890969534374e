"""What was removed: its commands and names say what there is instead, and what it left behind is refused, not misread."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import broken_gguf
import pytest
from judging.test_confidence import overconfident
from judging.test_judge import Recording
from ranking.test_rank import judge_on

from gramlite.cli import run
from gramlite.errors import GramliteError, ModelError
from gramlite.formats.artifact import Manifest, hash_files, manifest_path, read_manifest, write_manifest
from gramlite.formats.gguf_header import read_header
from gramlite.formats.sidecar import sidecar_path
from gramlite.integrations import trl
from gramlite.judging.budget import settings_without_budget, stored_budget
from gramlite.judging.confidence import calibrate, order_settings, stored_calibration
from gramlite.judging.confidence import store as store_calibration

removed = pytest.mark.fault("removals")
WITH_COMPANION = broken_gguf.put("gramlite.companion", 8, "judge.low-rank.gguf")


@removed
@pytest.mark.parametrize(
    ("words", "instead"),
    [
        (["quantize", "distill", "folder", "--teacher", "checkpoint", "-o", "out"], "quantize gptq"),
        (["quantize", "distill", "--help"], "quantize gptq"),
        (
            ["bench", "quality", "a.gguf", "--pairs", "autoj:FILE", "--gold", "GOLD", "-o", "runs"],
            "bench compare RUN RUN... --gold",
        ),
        (["bench", "gptq-layers", "--help"], "bench/claims/gptq_layers.py"),
        (["quantize", "gguf", "checkpoint", "-o", "out.gguf", "--type", "Q4_1", "--low-rank", "32"], "auto:4.5bpw"),
        (["quantize", "gguf", "checkpoint", "-o", "out.gguf", "--low_rank=64", "--calibration", "p"], "--type Q4_K_M"),
        (["quantize", "gguf", "--low-rank"], "--calibration"),
        (
            ["bench", "sweep", "folder", "-o", "out", "--suite", "pairs", "--types", "F16,Q4_1+low-rank32"],
            "Q4_1+imatrix",
        ),
        (["bench", "sweep", "folder", "-o", "out", "--suite", "pairs", "--types", "q4_0+low-rank"], "auto:4.5bpw"),
    ],
)
def test_a_removed_command_or_option_names_its_successor(
    words: list[str], instead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert run(words) == 2
    told = capsys.readouterr().err
    assert "was removed" in told and instead in told
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("words", [["export", "distill"], ["distill"], ["quantize", "tune"]])
def test_another_unknown_command_is_just_unknown(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words) == 2
    assert "No such command" in capsys.readouterr().err


@removed
@pytest.mark.parametrize(
    "words", [["quantize", "--help"], ["quantize", "gguf", "--help"], ["bench", "sweep", "--help"]]
)
def test_no_help_offers_what_was_removed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words) == 0
    said = capsys.readouterr().out
    assert "low-rank" not in said and "distill" not in said


@removed
def test_the_pairwise_judge_names_the_reward_function() -> None:
    with pytest.raises(ImportError, match="win_rate_reward"):
        from gramlite.integrations.trl import PairwiseJudge  # type: ignore[attr-defined]  # noqa: F401
    with pytest.raises(GramliteError, match="win_rate_reward"):
        _ = trl.PairwiseJudge
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = trl.Other


def gguf_with_companion_key(folder: Path) -> Path:
    path = folder / "judge.gguf"
    path.write_bytes(broken_gguf.build(broken_gguf.model_pieces(), WITH_COMPANION))
    return path


def scripted_with_companion_field(folder: Path) -> Path:
    """An artifact that would judge, were its manifest not to ask for an adapter, which lies there, too."""
    path = folder / "judge.json"
    script = {"format": "scripted", "name": "judge", "metadata": {"template": {"name": "gramlite"}}}
    path.write_text(json.dumps(script))
    (folder / "judge.low-rank.gguf").write_bytes(broken_gguf.valid_adapter())
    return with_field(path, "judge.low-rank.gguf")


def with_field(path: Path, companion: object) -> Path:
    """A manifest as version 0.1 wrote it, with its field `companion`."""
    files = hash_files(path)
    if companion and isinstance(companion, str):
        files |= hash_files(path.with_name(companion))
    manifest = asdict(Manifest(format="scripted" if path.suffix == ".json" else "gguf", name="judge", files=files))
    manifest_path(path).write_text(json.dumps(manifest | {"companion": companion}))
    return path


@removed
@pytest.mark.parametrize("made", [gguf_with_companion_key, scripted_with_companion_field])
@pytest.mark.parametrize(
    "words", [["judge", "--prompt", "q", "--a", "x", "--b", "y", "--device", "cpu", "-m"], ["inspect"]]
)
def test_what_needs_a_companion_is_refused(
    words: list[str], made: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made(tmp_path)
    assert run([*words, str(path)]) == 3
    said = capsys.readouterr()
    assert not said.out and str(path) in said.err
    assert "'judge.low-rank.gguf', its companion" in said.err and "quantize gguf" in said.err


@removed
@pytest.mark.parametrize("companion", ["judge.low-rank.gguf", 7, ["x"], "\x1b[31m"])
def test_every_reader_of_manifests_refuses_a_companion(companion: object, tmp_path: Path) -> None:
    path = tmp_path / "judge.gguf"
    path.write_bytes(broken_gguf.valid_model())
    (tmp_path / "judge.low-rank.gguf").write_bytes(broken_gguf.valid_adapter())
    write_manifest(path, Manifest(format="gguf", name="judge"))
    raw = json.loads(manifest_path(path).read_text())
    manifest_path(path).write_text(json.dumps(raw | {"companion": companion}))
    with pytest.raises(ModelError, match="companion") as refused:
        read_manifest(path)
    assert "\x1b" not in str(refused.value)


def test_a_manifest_of_version_0_1_without_companion_still_opens(tmp_path: Path) -> None:
    path = tmp_path / "judge.gguf"
    path.write_bytes(broken_gguf.valid_model())
    opened = read_manifest(with_field(path, None))
    assert opened is not None and opened.name == "judge" and read_header(path).architecture == "llama"


@removed
def test_the_header_key_is_refused_whatever_it_holds(tmp_path: Path) -> None:
    for number, (kind, value) in enumerate([(8, ""), (4, 0), (7, True)]):
        path = tmp_path / f"{number}.gguf"
        pieces = broken_gguf.put("gramlite.companion", kind, value)
        path.write_bytes(broken_gguf.build(broken_gguf.model_pieces(), pieces))
        with pytest.raises(ModelError, match="companion"):
            read_header(path)


@pytest.mark.parametrize("companion", [None, pytest.param("2" * 64, marks=removed)])
def test_a_calibration_or_budget_of_version_0_1(companion: str | None, tmp_path: Path) -> None:
    """Without a companion it still stands; with one it is refused in words, and a new measurement takes its place."""
    settings = judge_on(Recording()).settings_record
    model = {"sha256": "1" * 64, "quantization": "Q8_0", "format": "gguf"}
    fitted = calibrate(overconfident(100, temperature=2.0, bias=0.1), model, settings)
    artifact = tmp_path / "judge"
    budget = {
        "chosen": 64,
        "pairs": 20,
        "rows": [],
        "model": "1" * 64,
        "adapter": None,
        "quantization": "Q8_0",
        "settings": settings_without_budget(settings),
        "companion": companion,
    }
    calibration = asdict(fitted) | {"companion": companion}
    sidecar_path(artifact).write_text(json.dumps({"calibrations": [calibration], "budgets": [budget]}))
    if companion is None:
        assert stored_calibration(artifact, model, settings).temperature == fitted.temperature
        assert stored_budget(artifact, model, settings) == 64
        return
    with pytest.raises(ModelError, match="companion.*gramlite calibrate"):
        stored_calibration(artifact, model, settings)
    with pytest.raises(ModelError, match="companion.*gramlite calibrate"):
        stored_budget(artifact, model, settings)
    store_calibration(artifact, fitted)
    assert stored_calibration(artifact, model, settings).settings == order_settings(settings)
    assert len(json.loads(sidecar_path(artifact).read_text())["calibrations"]) == 1
