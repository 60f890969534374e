"""The pages on benchmarks and on continuous integration: every snippet on them is run as it stands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from . import sweep_fakes

DOCS = Path(__file__).resolve().parents[2] / "docs"
SHIM = """\
#!{python}
import sys
import sweep_fakes
from gramlite.bench import variants
from gramlite.cli import main
variants.artifact_target = sweep_fakes.artifact_target
if __name__ == "__main__":
    main(sys.argv[1:])
"""


def snippets(language: str, page: str = "ci") -> list[str]:
    text = (DOCS / f"{page}.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project as the page assumes it: pairs, models (scripted ones), a checkpoint, and the command on the path."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("ci", "models", "bin", "checkpoint"):
        (folder / name).mkdir()
    pairs = [
        {"id": str(i), "prompt": f"question {i}", "response_a": f"a{i}", "response_b": f"b{i}", "label": "AB"[i % 2]}
        for i in range(60)
    ]
    (folder / "ci/pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for name in ("judge.F16", "judge"):
        sweep_fakes.build_scripted(folder / f"models/{name}.gguf", name=name, kind="F16", seconds=0)
    (folder / "checkpoint/config.json").write_text("{}")
    shim = folder / "bin/gramlite"
    shim.write_text(SHIM.format(python=sys.executable))
    shim.chmod(0o755)
    return folder


def shell(project: Path, script: str) -> subprocess.CompletedProcess[str]:
    search = os.pathsep.join([str(project / "bin"), os.environ["PATH"]])
    environment = {**os.environ, "PATH": search, "PYTHONPATH": str(Path(sweep_fakes.__file__).parent)}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_snippet_runs(project: Path) -> None:
    scripts = snippets("sh")
    assert len(scripts) == 5
    said = [shell(project, script) for script in scripts]
    assert [one.returncode for one in said] == [0] * 5, "\n".join(one.stderr for one in said)
    assert said[1].stderr.count("::notice") == 2
    gate = ElementTree.parse(project / "gate.xml").getroot()
    assert {suite.get("name") for suite in gate} == {"Q8_0", "Q4_K_M"}  # the last snippet's, a suite a type
    assert (project / "report.html").is_file() and (project / "sweep/report.html").is_file()
    assert '"1"' in (project / "need.jsonl").read_text()
    assert said[3].stdout == "the gate holds\n"
    assert len((project / "sweep.jsonl").read_text().splitlines()) == 3 + 4  # types, and clauses of two


def test_the_job_runs(project: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    (text,) = snippets("yaml")
    job = yaml.safe_load(text)["jobs"]["gate"]
    commands = [step["run"] for step in job["steps"] if step.get("run", "").startswith("gramlite")]
    assert len(commands) == 2
    if not (project / "ci/base").exists():
        assert shell(project, snippets("sh")[0]).returncode == 0
    shell(project, "rm -rf runs gate.xml report.*")
    for command in commands:
        done = shell(project, command)
        assert done.returncode == 0, done.stderr
    kept = job["steps"][-1]["with"]["path"].split()
    assert kept[0] == "gate.xml" and all(list(project.glob(pattern)) for pattern in kept)


def test_the_gate_breaks_the_build(project: Path) -> None:
    """A candidate whose verdicts all changed fails, and the page's last script tells that from other failures."""
    run = project / "turned"
    run.mkdir()
    if not (project / "ci/base").exists():
        assert shell(project, snippets("sh")[0]).returncode == 0
    rows = [json.loads(line) for line in (project / "ci/base/rows.jsonl").read_text().splitlines()]
    turned = [{**row, "verdict": {"A": "B", "B": "A"}[row["verdict"]]} for row in rows]
    (run / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turned))
    script = snippets("sh")[3].replace("runs/candidate", "turned")
    done = shell(project, script)
    assert (done.returncode, done.stdout) == (0, "the gate failed\n") and "fail for turned" in done.stderr
    assert shell(project, script.replace("turned", "nowhere")).returncode == 2
    command = snippets("sh")[1].splitlines()[1].rstrip("\\ ").replace("runs/candidate", "turned")
    done = shell(project, f"{command} --github")
    assert done.returncode == 7 and "::error title=gramlite gate" in done.stderr


def test_the_page_on_benchmarks(project: Path) -> None:
    shell(project, "rm -rf runs sweep report.*")
    said = [shell(project, script) for script in snippets("sh", "benchmarks")]
    assert [one.returncode for one in said] == [0] * 3, "\n".join(one.stderr for one in said)
    rows = [json.loads(line) for line in said[2].stdout.splitlines()]
    assert [row["type"] for row in rows[:4]] == ["F16", "Q8_0", "Q4_K_M", "judge"]
    assert {row["suite"]: row["pairs"] for row in rows} == {"all suites": 60, "pairs": 40, "pairs-all": 20}
    assert "What quantization cost" in (project / "results.md").read_text()
    for page in ("benchmarks", "ci"):
        for linked in re.findall(r"\]\(([\w.]+)\)", (DOCS / f"{page}.md").read_text()):
            assert (DOCS / linked).is_file()
