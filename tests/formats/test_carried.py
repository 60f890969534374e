"""Licences and notices travel with every artifact, from folder to file to file, and overwrite nobody's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gramlite.cli import run
from gramlite.errors import InputError
from gramlite.formats.artifact import read_manifest, verify_files
from gramlite.storage import sha256_file

from ..export.conftest import checkpoint_of, make_adapter  # noqa: F401

pytest.importorskip("torch")
pytest.importorskip("transformers")
notices = pytest.mark.fault("notices")

TEXTS = {"LICENSE.txt": "the licence", "Notice": "the notice", "use_policy.md": "what not to do", "COPYING": "copies"}
Make = Callable[..., Path]


@pytest.fixture
def checkpoint(checkpoint_of: Make, tmp_path: Path) -> Path:  # noqa: F811
    folder = Path(shutil.copytree(checkpoint_of("llama-tied"), tmp_path / "checkpoint"))
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    (folder / "licensed_by_nobody.py").write_text("no notice")
    return folder


@pytest.fixture
def adapter(checkpoint: Path, make_adapter: Make, tmp_path: Path) -> Path:  # noqa: F811
    folder = make_adapter(tmp_path / "peft", checkpoint, ["model.layers.0.mlp.up_proj"])
    (folder / "NOTICE").write_text("the adapter's own")
    (folder / "LICENSE.txt").write_text(TEXTS["LICENSE.txt"])
    return folder


def assert_inside(folder: Path, texts: dict[str, str] = TEXTS) -> None:
    assert {name: (folder / name).read_text() for name in texts} == texts
    assert not (folder / "licensed_by_nobody.py").exists()
    manifest = read_manifest(folder)
    assert manifest is not None and manifest.files.keys() >= texts.keys()
    verify_files(folder, manifest)


def assert_beside(file: Path, texts: dict[str, str] = TEXTS) -> None:
    found = {path.name.removeprefix(f"{file.name}."): path for path in file.parent.glob(f"{file.name}.*")}
    found.pop("json")
    found.pop("lock", None)
    assert {name: path.read_text() for name, path in found.items()} == texts
    manifest = read_manifest(file)
    assert manifest is not None and manifest.files.keys() == {file.name}
    assert manifest.notices == {path.name: sha256_file(path) for path in found.values()}


@notices
def test_files_made_of_a_folder_and_of_files(checkpoint: Path, tmp_path: Path) -> None:
    exact, small, smaller = (tmp_path / name / "judge.gguf" for name in ("one", "two", "three"))
    assert run(["export", "gguf", str(checkpoint), "-o", str(exact), "--no-smoke"]) == 0
    assert_beside(exact)
    assert run(["quantize", "gguf", str(checkpoint), "-o", str(small), "--type", "Q8_0", "--no-smoke"]) == 0
    assert_beside(small)
    (exact.parent / "LICENSE").write_text("of something else that lies there")
    assert run(["quantize", "gguf", str(exact), "-o", str(smaller), "--type", "Q8_0", "--no-smoke"]) == 0
    assert_beside(smaller)


@notices
def test_a_file_from_elsewhere_has_the_notices_of_its_folder(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "pulled").mkdir()
    foreign = tmp_path / "pulled" / "judge.gguf"
    assert run(["export", "gguf", str(checkpoint), "-o", str(foreign), "--no-smoke"]) == 0
    for path in foreign.parent.glob("judge.gguf.*"):
        path.unlink()
    (foreign.parent / "LICENSE").write_text("the repository's")
    output = tmp_path / "small.gguf"
    assert run(["quantize", "gguf", str(foreign), "-o", str(output), "--type", "Q8_0", "--no-smoke"]) == 0
    assert_beside(output, {"LICENSE": "the repository's"})


@notices
def test_adapters_and_merges_have_those_of_both(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    output, merged, again = tmp_path / "lora.gguf", tmp_path / "merged", tmp_path / "again"
    both = TEXTS | {"NOTICE.2": "the adapter's own"}
    words = ["export", "adapter", str(adapter), "--base", str(checkpoint), "-o", str(output), "--no-smoke"]
    assert run(words) == 0
    assert_beside(output, both)
    (adapter / "NOTICE").rename(adapter / "Notice")
    assert run(["export", "merge", str(checkpoint), str(adapter), "-o", str(merged), "--no-smoke"]) == 0
    assert_inside(merged, TEXTS | {"Notice.2": "the adapter's own"})
    (adapter / "Notice").write_text("a third one")
    assert run(["export", "merge", str(merged), str(adapter), "-o", str(again), "--no-smoke"]) == 0
    assert_inside(again, TEXTS | {"Notice.2": "the adapter's own", "Notice.3": "a third one"})


@pytest.mark.parametrize(
    "words",
    [
        ["export", "onnx"],
        pytest.param(["quantize", "onnx"], marks=pytest.mark.slow),
        pytest.param(["quantize", "bnb"], marks=pytest.mark.slow),
    ],
)
@notices
def test_folders_made_of_a_folder(words: list[str], checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai" if "onnx" in words else "bitsandbytes")
    assert run([*words, str(checkpoint), "-o", str(tmp_path / "out"), "--no-smoke"]) == 0
    assert_inside(tmp_path / "out")


@pytest.mark.parametrize("target", ["gguf", pytest.param("onnx", marks=pytest.mark.slow)])
@notices
def test_gptq_and_what_is_packed_of_it(target: str, checkpoint: Path, tmp_path: Path) -> None:
    from ..quant.test_pack import GptqSettings, quantize

    folder = quantize(checkpoint, tmp_path / "gptq", GptqSettings(group_size=32))
    assert_inside(folder)
    assert run(["pack", str(folder), "--to", target, "-o", str(tmp_path / "packed"), "--no-smoke"]) == 0
    (assert_inside if target == "onnx" else assert_beside)(tmp_path / "packed")


@pytest.mark.slow
@notices
def test_the_reference_judge_says_that_it_is_not_for_commerce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gramlite.reference.files import cached_gguf
    from gramlite.reference.weights import DATA

    texts = {"NOTICE": (DATA / "NOTICE").read_text()}
    assert "non-commercial" in texts["NOTICE"]
    file, folder, lora = tmp_path / "judge.gguf", tmp_path / "judge", tmp_path / "lora.gguf"
    assert run(["reference", "-o", str(file), "--dtype", "f16"]) == 0
    assert_beside(file, texts)
    assert run(["quantize", "gguf", str(file), "-o", str(tmp_path / "small.gguf"), "--type", "Q4_0", "--no-smoke"]) == 0
    assert_beside(tmp_path / "small.gguf", texts)
    assert run(["reference", "checkpoint", "-o", str(folder)]) == 0
    assert_inside(folder, texts)
    assert run(["export", "adapter", str(DATA), "--base", str(folder), "-o", str(lora), "--no-smoke"]) == 0
    assert_beside(lora, texts)
    monkeypatch.setenv("GRAMLITE_CACHE", str(tmp_path / "cache"))
    assert_beside(cached_gguf(), texts)


@notices
def test_somebody_elses_file_is_in_the_way_and_stays(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "judge.gguf"
    theirs = tmp_path / "judge.gguf.LICENSE.txt"
    theirs.write_text("theirs")
    words = ["export", "gguf", str(checkpoint), "-o", str(output), "--no-smoke", "--force"]
    assert run(words) == InputError.exit_code
    assert "judge.gguf.LICENSE.txt is in the way" in capsys.readouterr().err
    quantize = ["quantize", "gguf", str(checkpoint), "-o", str(output), "--calibration", "there-is-none", "--force"]
    assert run(quantize) == InputError.exit_code, "before a calibration"
    assert "judge.gguf.LICENSE.txt is in the way" in capsys.readouterr().err
    assert theirs.read_text() == "theirs" and not output.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", theirs.name]
    theirs.write_text(TEXTS["LICENSE.txt"])
    assert run(words) == 0, "the same text is no harm"
    assert_beside(output)


@notices
def test_notices_of_the_artifact_before_give_way_to_the_new_ones(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "judge.gguf"
    words = ["export", "gguf", str(checkpoint), "-o", str(output), "--no-smoke", "--force"]
    assert run(words) == 0
    (tmp_path / "judge.gguf.Notice").write_text("changed by its user")
    manifest = json.loads((tmp_path / "judge.gguf.json").read_text())
    (tmp_path / "precious.LICENSE").write_text("theirs")
    manifest["notices"]["precious.LICENSE"] = sha256_file(tmp_path / "precious.LICENSE")
    manifest["notices"]["../LICENSE"] = manifest["notices"]["judge.gguf.json"] = "0" * 64
    (tmp_path / "judge.gguf.json").write_text(json.dumps(manifest))
    for name in TEXTS:
        (checkpoint / name).unlink()
    (checkpoint / "LICENSE").write_text("another")
    assert run(words) == 0
    assert (tmp_path / "judge.gguf.Notice").read_text() == "changed by its user"
    (tmp_path / "judge.gguf.Notice").unlink()
    assert (tmp_path / "precious.LICENSE").exists()
    assert_beside(output, {"LICENSE": "another"})


def test_a_withdrawn_artifact_takes_its_notices_along(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gramlite.export.smoke.judge_margins", lambda *arguments: [float("nan")] * 24)
    words = ["export", "gguf", str(checkpoint), "-o", str(tmp_path / "judge.gguf"), "--template", "gramlite"]
    assert run(words) != 0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@notices
def test_pull_fetches_them() -> None:
    from gramlite.commands.pull import select

    names = ["model.safetensors", "LICENSE", "NOTICE", "license-gemma", "pytorch_model.bin", "deep/LICENSE", "notes"]
    selection = select("owner/name", "0", dict.fromkeys(names, 1), ())
    assert set(selection.files) == {"model.safetensors", "LICENSE", "NOTICE", "license-gemma"}
