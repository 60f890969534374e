"""How many cores are there to compute with: the affinity mask, and the quota of control groups of both versions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gramlite.runtime.machine import control_groups, free_memory, thread_count

quota = pytest.mark.fault("quota")
MANY = 12
GiB = 1 << 30


class Groups:
    """Control groups as files: what /proc/self/cgroup says, and the files under /sys/fs/cgroup."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.said = folder, ""
        read = Path.read_text

        def faked(path: Path, *arguments: Any, **options: Any) -> str:
            if str(path) == "/proc/self/cgroup":
                return self.said
            if str(path).startswith("/sys/fs/cgroup"):
                path = folder / path.relative_to("/sys/fs/cgroup")
            return read(path, *arguments, **options)

        monkeypatch.setattr(Path, "read_text", faked)
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(MANY)), raising=False)
        monkeypatch.setattr("psutil.cpu_count", lambda logical=True: MANY)

    def put(self, path: str, content: str) -> None:
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(content)


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Groups:
    return Groups(tmp_path, monkeypatch)


@quota
@pytest.mark.parametrize(
    "limit, cores",
    [
        ("200000 100000\n", 2),
        ("150000 100000", 2),
        ("10000 100000", 1),
        ("50000 25000", 2),
        ("900000 100000", 9),
    ],
)
def test_version_2(limit: str, cores: int, groups: Groups) -> None:
    groups.said = "0::/\n"
    groups.put("cpu.max", limit)
    assert thread_count(None) == cores and thread_count(5) == 5


@pytest.mark.parametrize("limit", ["max 100000\n", "400000", "", "text", "-1 100000", "100000 0", "\0"])
def test_no_limit(limit: str, groups: Groups) -> None:
    groups.said = "0::/\n1:cpu:/\n"
    groups.put("cpu.max", limit)
    groups.put("cpu/cpu.cfs_quota_us", "-1\n")
    groups.put("cpu/cpu.cfs_period_us", "100000\n")
    assert thread_count(None) == MANY


@quota
def test_the_least_of_all_groups_above(groups: Groups) -> None:
    groups.said = "0::/user.slice/app.scope/inner\n"
    groups.put("user.slice/app.scope/inner/cpu.max", "800000 100000")
    groups.put("user.slice/app.scope/cpu.max", "max 100000")
    groups.put("user.slice/cpu.max", "300000 100000")
    assert thread_count(None) == 3
    groups.put("user.slice/other/cpu.max", "100000 100000")  # of somebody else
    assert thread_count(None) == 3


@quota
@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
@pytest.mark.parametrize("inner", ["/", "/docker/0123abc", "/../.."])
def test_version_1(mount: str, inner: str, groups: Groups) -> None:
    groups.said = f"12:memory:/elsewhere\n4:cpu,cpuacct:{inner}\n1:name=systemd:/\n"
    place = f"{mount}/docker" if inner.startswith("/docker") else mount
    groups.put(f"{place}/cpu.cfs_quota_us", "250000\n")
    groups.put(f"{place}/cpu.cfs_period_us", "100000\n")
    assert thread_count(None) == 3


@quota
def test_in_a_container_the_root_is_its_own_group(groups: Groups) -> None:
    groups.said = "0::/kubepods/pod1/container\n"
    groups.put("cpu.max", "400000 100000")
    assert thread_count(None) == 4


@quota
def test_the_least_of_mask_quota_and_cores(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    groups.said = "0::/\n"
    groups.put("cpu.max", "500000 100000")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 7, 9}, raising=False)
    assert thread_count(None) == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(MANY)), raising=False)
    assert thread_count(None) == 5
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 2)
    assert thread_count(None) == 2
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: None)
    assert thread_count(None) == 5


@quota
def test_what_is_recorded_of_the_machine(groups: Groups) -> None:
    from gramlite.bench.environment import hardware

    from gramlite.commands.doctor import check_machine

    groups.said = "0::/\n"
    groups.put("cpu.max", "300000 100000")
    assert (hardware()["cores"], hardware()["threads"]) == (3, 3)
    assert "3 threads" in check_machine().says


@quota
def test_quantizing_keeps_to_them_too(groups: Groups) -> None:
    torch = pytest.importorskip("torch")
    from gramlite.quant.memory import pick_device

    before = torch.get_num_threads()
    groups.said = "0::/\n"
    groups.put("cpu.max", "300000 100000")
    try:
        assert pick_device("cpu") == "cpu" and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@quota
@pytest.mark.parametrize("inner, limit", [("/a/b", "a/memory.max"), ("/a/b", "a/b/memory.max")])
def test_memory_is_limited_by_the_groups_above_too(inner: str, limit: str, groups: Groups) -> None:
    groups.said = f"0::{inner}\n"
    groups.put("memory.max", "max")
    groups.put(limit, str(GiB))
    groups.put(limit.replace("memory.max", "memory.current"), str(GiB - (1 << 20)))
    assert free_memory() == 1 << 20


def test_without_control_groups(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path, *arguments: Any, **options: Any) -> str:
        raise FileNotFoundError(str(path))

    monkeypatch.setattr(Path, "read_text", missing)
    assert thread_count(None) == MANY and free_memory() > 0
    assert [*control_groups("cpu")] == []


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs an affinity mask")
def test_the_mask_of_a_real_process() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from gramlite.runtime.machine import thread_count; print(thread_count(None))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"
