"""No home folder, no entry among the users, a cache that cannot be written: a named model is judged with all the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

no_home = pytest.mark.fault("no-home")
NOBODY = 12345  # who has no entry
PLACE = "PLACE"  # stands for the folder where a command is run
PAIR = {"id": "p", "prompt": "q", "response_a": "a", "response_b": "b", "label": "A"}
BECOME = [
    "setpriv",
    f"--reuid={NOBODY}",
    f"--regid={NOBODY}",
    "--clear-groups",
    "--inh-caps=+dac_read_search",
    "--ambient-caps=+dac_read_search",  # Python itself may lie in somebody's home
]


def can_become() -> bool:
    try:
        return subprocess.run([*BECOME, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


nobody = pytest.mark.skipif(not can_become(), reason="only root with setpriv can become somebody else")


@pytest.fixture
def place(tmp_path: Path, scripted: Path) -> Path:
    """A folder that anybody may write to, as its parents let anybody pass."""
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n")
    manifest = {"format": "scripted", "name": "judge", "files": {}, "template": {"name": "gramlite"}}
    from gramlite.formats.artifact import hash_files

    manifest["files"] = hash_files(scripted)  # so that a hash is to be remembered
    (tmp_path / "scripted.json.json").write_text(json.dumps(manifest))
    for path in (tmp_path, *tmp_path.iterdir()):
        path.chmod(0o777)
    for parent in tmp_path.parents:
        if parent.owner() == "root" and parent.stat().st_mode & 0o007 == 0:
            parent.chmod(parent.stat().st_mode | 0o005)
    (tmp_path / "closed").mkdir(mode=0o700)
    return tmp_path


def as_nobody(place: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user without a home, an entry or a name."""
    own = ("HOME", "USER", "LOGNAME", "GRAMLITE_CACHE", "XDG_CACHE_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in own}
    environment = {name: value.replace(PLACE, str(place)) for name, value in environment.items()}
    words = [*BECOME, sys.executable, "-W", "ignore", "-m", "gramlite", *arguments]
    return subprocess.run(words, cwd=place, env=kept | environment, capture_output=True, text=True, timeout=300)


ENVIRONMENTS = {
    "no home": {},
    "a home that is closed": {"HOME": f"{PLACE}/closed"},
    "a home that is none": {"HOME": "/nonexistent"},
    "an unwritable cache": {"GRAMLITE_CACHE": "/proc/1/cache"},
    "a cache that is a file": {"GRAMLITE_CACHE": "/etc/passwd"},
}
NAMES = [pytest.param(name, marks=no_home if name == "no home" else ()) for name in ENVIRONMENTS]


@nobody
@pytest.mark.parametrize("name", NAMES)
def test_a_named_model_is_judged_with(name: str, place: Path) -> None:
    judge = ["judge", "pairs.jsonl", "-m", "scripted.json", "--mode", "direct"]
    bench = ["bench", "run", "pairs:pairs.jsonl", *judge[2:], "-o", "run"]
    for arguments in (judge, [*judge, "-o", "rows.jsonl"], ["inspect", "scripted.json"], bench):
        finished = as_nobody(place, *arguments, **ENVIRONMENTS[name])
        assert finished.returncode == 0, finished.stderr
    assert json.loads((place / "rows.jsonl").read_text())["verdict"] in ("A", "B")
    assert not (place / "~").exists()


@nobody
@pytest.mark.parametrize("name", NAMES)
def test_what_needs_the_cache_says_what_to_set(name: str, place: Path) -> None:
    for arguments in (["judge", "pairs.jsonl"], ["bench", "run", "rewardbench", "-m", "scripted.json", "-o", "run"]):
        finished = as_nobody(place, *arguments, **ENVIRONMENTS[name])
        if arguments[0] == "judge":
            assert finished.returncode == 4 and "GRAMLITE_CACHE" in finished.stderr, finished.stderr
        assert finished.returncode in (2, 4) and "Traceback" not in finished.stderr, finished.stderr
    assert not (place / "~").exists()


@nobody
@no_home
def test_a_gguf_file_is_judged_with(place: Path, reference_q8: Path) -> None:
    for source in (reference_q8, reference_q8.with_name(reference_q8.name + ".json")):
        shutil.copy(source, place / source.name)
        (place / source.name).chmod(0o644)
    finished = as_nobody(place, "judge", "pairs.jsonl", "-m", reference_q8.name, "--mode", "direct", "--device", "cpu")
    assert finished.returncode == 0 and json.loads(finished.stdout)["verdict"], finished.stderr


@pytest.mark.slow
@nobody
@no_home
def test_a_checkpoint_is_judged_with_and_exported(place: Path) -> None:
    pytest.importorskip("transformers")
    from gramlite.reference.files import build_checkpoint

    folder = build_checkpoint(place / "checkpoint")
    folder.chmod(0o755)
    finished = as_nobody(place, "judge", "pairs.jsonl", "-m", "checkpoint", "--mode", "direct", "--device", "cpu")
    assert finished.returncode == 0 and json.loads(finished.stdout)["verdict"], finished.stderr
    finished = as_nobody(place, "export", "gguf", "checkpoint", "-o", "judge.gguf", "--no-smoke")
    assert finished.returncode == 0, finished.stderr


@no_home
def test_a_process_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import pwd

    from gramlite.errors import ResourceError
    from gramlite.storage import cache_folder, sha256_cached

    def unknown(user: object) -> None:
        raise KeyError(user)

    for name in ("HOME", "GRAMLITE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ResourceError, match="GRAMLITE_CACHE"):
        cache_folder()
    (tmp_path / "file").write_text("x")
    assert sha256_cached(tmp_path / "file") and [path.name for path in tmp_path.iterdir()] == ["file"]
