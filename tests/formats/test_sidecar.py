"""What is stored beside an artifact: whose it is, and whether it can be stored at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from judging.test_confidence import Pondering, overconfident, pairs_file
from judging.test_judge import Recording
from ranking.test_rank import judge_on

from gramlite import InputError, Pair, ResourceError
from gramlite.cli import run
from gramlite.formats.sidecar import require_writable, sidecar_path
from gramlite.judging.budget import measure, stored_budget
from gramlite.judging.budget import store as store_budget
from gramlite.judging.confidence import calibrate, stored_calibration
from gramlite.judging.confidence import store as store_calibration
from gramlite.judging.judge import Judge

JUDGES: dict[str, list[dict[str, str]]] = {  # of the same weights on disk
    "what a checkpoint became while it was loaded": [
        {"format": "hf", "quantization": "BF16"},
        {"format": "hf", "quantization": "NF4"},
    ],
    "an adapter": [{"format": "gguf"}, {"format": "gguf", "adapter": "4" * 64}],
}


@pytest.mark.parametrize("name", JUDGES)
def test_what_is_measured_belongs_to_one_judge(name: str, tmp_path: Path) -> None:
    plain = judge_on(Pondering()).with_settings(mode="think")
    whole, small = (
        Judge(plain.backend, plain.template, plain.scaffold, plain.settings, {"sha256": "1" * 64, **model})
        for model in JUDGES[name]
    )
    artifact = tmp_path / "judge"
    data = overconfident(100, temperature=2.0, bias=0.1)
    store_calibration(artifact, calibrate(data, whole.model, whole.settings_record))
    assert stored_calibration(artifact, whole.model, whole.settings_record).belongs_to(
        whole.model, whole.settings_record
    )
    with pytest.raises(InputError, match="for another model"):
        stored_calibration(artifact, small.model, small.settings_record)
    store_calibration(artifact, calibrate(data, small.model, small.settings_record))
    assert len(json.loads(sidecar_path(artifact).read_text())["calibrations"]) == 2, (
        "one does not take the other's place"
    )

    pairs = [Pair("10 tokens", *(("good", "bad") if n % 2 else ("bad", "good")), label="BA"[n % 2]) for n in range(20)]
    table, _ = measure(whole, pairs, budgets=(16, 32))
    store_budget(artifact, table)
    assert stored_budget(artifact, whole.model, whole.settings_record) == 16
    with pytest.raises(InputError, match="No think budget"):
        stored_budget(artifact, small.model, small.settings_record)


def test_what_was_stored_before_that_was_recorded_stands_where_it_cannot_differ(tmp_path: Path) -> None:
    judge = judge_on(Recording())
    settings = judge.settings_record
    model = {"sha256": "1" * 64, "quantization": "Q8_0", "format": "gguf"}
    calibration = calibrate(overconfident(100, temperature=2.0, bias=0.1), model, settings)
    store_calibration(tmp_path / "judge", replace(calibration, quantization=None))
    stored = json.loads(sidecar_path(tmp_path / "judge").read_text())
    del stored["calibrations"][0]["quantization"]
    sidecar_path(tmp_path / "judge").write_text(json.dumps(stored))
    assert stored_calibration(tmp_path / "judge", model, settings).quantization is None
    with pytest.raises(InputError, match="for another model"):
        stored_calibration(tmp_path / "judge", model | {"format": "hf"}, settings)
    store_calibration(tmp_path / "judge", calibration)
    assert len(json.loads(sidecar_path(tmp_path / "judge").read_text())["calibrations"]) == 1


def test_a_calibration_that_cannot_be_stored_is_refused_before_judging(
    scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    few = pairs_file(tmp_path / "few.jsonl", 19)
    identical = tmp_path / "identical.jsonl"
    same = {"prompt": "q", "response_a": "x", "response_b": "x", "label": "tie"}
    identical.write_text(few.read_text() + json.dumps(same) + "\n")
    pairs = pairs_file(tmp_path / "pairs.jsonl", 20)
    long_name = scripted.with_name("j" * 228 + ".json")  # no room for the name of the temporary file beside it
    long_name.write_text(scripted.read_text())
    broken = scripted.with_name("broken.json")
    broken.write_text(scripted.read_text())
    sidecar_path(broken).write_text('{"calibrations": [3]}')
    for file, model, code, says in (
        (few, scripted, 2, "19 judged pairs have a label"),
        (identical, scripted, 2, "19 judged pairs have a label"),
        (pairs, long_name, 4, "cannot be written (File name too long)"),
        (pairs, broken, 3, "Delete it"),
    ):
        assert run(["calibrate", str(file), "-m", str(model), "--mode", "direct", "-o", str(rows)]) == code
        assert says in capsys.readouterr().err and not rows.exists()
    assert run(["calibrate", str(pairs), "-m", str(long_name), "--budget", "auto"]) == 4
    with pytest.raises(ResourceError, match="cannot be written"):
        store_calibration(long_name, calibrate(overconfident(20, temperature=1.0, bias=0.0), {}, {}))


def test_a_folder_given_as_a_dot_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "judge" / "inner").mkdir(parents=True)
    for folder, given in (("judge", "."), ("judge/inner", ".."), (".", "judge")):
        monkeypatch.chdir(tmp_path / folder)
        require_writable(Path(given))
        assert Path(sidecar_path(Path(given))).absolute() == tmp_path / "judge.calibration.json"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["judge"], "the trial leaves nothing behind"
    with pytest.raises(InputError, match="Nothing can be stored"):
        sidecar_path(Path("/"))
