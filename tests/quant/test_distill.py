"""Tuning scales: what is learnt, what stays, what survives a stop, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from filelock import FileLock
from gramlite.export.checkpoint import open_checkpoint
from gramlite.quant import distill as distill_module
from gramlite.quant import lessons as lessons_module
from gramlite.quant import syllabus as syllabus_module
from gramlite.quant.calibration import Transcript, describe, write_transcripts
from gramlite.quant.distill import command, distill
from gramlite.quant.gptq import quantize_gptq
from gramlite.quant.gptq_folder import open_gptq
from gramlite.quant.lessons import Answer, Lesson, ask_teacher, divergence, hold_back, make_lessons, read, sheets
from gramlite.quant.pack import pack_gguf
from gramlite.quant.solve import GptqSettings
from gramlite.quant.syllabus import Syllabus, load_syllabus
from gramlite.quant.trainable import Student, load_teacher
from gramlite.quant.training import TrainingSettings

from gramlite.artifact import read_manifest, verify_files
from gramlite.errors import InputError, IntegrityError, ModelError, ResourceError

from .test_pack import assert_same_weights

Make = Callable[..., Path]
CHOICES = (7, 9)
DIRECT = (11, 12, 13)
REFERENCE = Path(__file__).parents[2] / "gramlite/data/reference"
SETTINGS = TrainingSettings(epochs=3, rate=5e-3, batch=3, held_back=0.25)


@pytest.fixture(autouse=True)
def small_sheets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few lessons of a made-up transcript's length, so that there are several sheets."""
    monkeypatch.setattr(lessons_module, "SHEET_TOKENS", 150)


@pytest.fixture
def syllabus(transcripts: list[Transcript]) -> Syllabus:
    described = describe(transcripts, tokens=10_000, seed=0, source="made up")
    return Syllabus(tuple(make_lessons(transcripts, DIRECT)), CHOICES, described)


@pytest.fixture
def pair(make_checkpoint: Make, transcripts: list[Transcript], tmp_path: Path) -> tuple[Path, Path]:
    """A GPTQ folder of three bits, which leaves something to be learnt, and the checkpoint that it is of."""
    return quantize(make_checkpoint(), tmp_path / "gptq", transcripts), tmp_path / "llama-checkpoint"


def quantize(source: Path, output: Path, transcripts: list[Transcript], **options: Any) -> Path:
    settings = GptqSettings(**({"bits": 3, "group_size": 32, "focus": False} | options))
    calibration = describe(transcripts, tokens=10_000, seed=0, source="made up")
    quantize_gptq(source, output, transcripts, settings, calibration=calibration)
    return output


def student_of(folder: Path, teacher: Path, **options: Any) -> Student:
    return Student(load_teacher(open_checkpoint(teacher), "cpu"), open_gptq(folder), **options)


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def test_lessons_in_one_sequence_do_not_see_each_other(make_checkpoint: Make) -> None:
    model = load_teacher(open_checkpoint(make_checkpoint()), "cpu")
    answers = (Answer(DIRECT, spoken=False), Answer((20, 21, 22, 23), spoken=True), Answer((), spoken=False))
    prompts = [(1, 2, 3, 4, 5), (1, 2, 3, 6, 7, 8), (1, 2, 3, 6, 9), (1, 2, 3, 6, 9), (1, 2), (4, 5, 6)]
    together = [Lesson(str(number), prompt, answers) for number, prompt in enumerate(prompts)]
    with torch.no_grad():
        for lesson, reading in zip(together, read(model, together, CHOICES), strict=True):
            margins, logits, states = reading.margins, reading.logits, reading.states
            assert len(states) == lesson.tokens - 1
            prompt = len(lesson.prompt_ids) - 1
            for number, answer in enumerate(answers):
                (alone,) = read(model, [Lesson("one", lesson.prompt_ids, (answer,))], CHOICES)
                assert torch.allclose(margins[number], alone.margins[0], atol=1e-5)
                assert len(alone.logits) == (4 if answer.spoken else 0)
                if answer.spoken:
                    assert torch.allclose(logits, alone.logits, atol=1e-5)
                start = prompt + sum(len(other.ids) for other in answers[:number])
                own = torch.cat([states[:prompt], states[start : start + len(answer.ids)]])
                assert torch.allclose(own, alone.states, atol=1e-5)
            full = model(torch.tensor([[*lesson.prompt_ids, *answers[1].ids]])).logits[0]
            assert torch.allclose(logits, full[-5:-1], atol=1e-5)  # the logits that foretell the answer's four tokens
            assert torch.allclose(margins[1], full[-1, 7] - full[-1, 9], atol=1e-5)


def test_sheets_hold_what_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lessons_module, "SHEET_TOKENS", 10)
    answers = (Answer((20,), spoken=False),)
    prompts = [(1, 2, 3, 4), (1, 2, 3, 5, 6), (1, 2, 3, 5, 7), tuple(range(30)), (1, 2)]
    lessons = [Lesson(str(number), prompt, answers) for number, prompt in enumerate(prompts)]
    assert [[lesson.id for lesson in sheet] for sheet in sheets(lessons)] == [["0", "1", "2"], ["3"], ["4"]]


def test_divergence_is_that_of_the_whole_distribution_but_for_rare_tokens(make_checkpoint: Make) -> None:
    teacher = load_teacher(open_checkpoint(make_checkpoint()), "cpu")
    lesson = Lesson("one", (1, 2, 3), (Answer((20, 21, 22), spoken=True),))
    (target,) = ask_teacher(teacher, [lesson], CHOICES)
    with torch.no_grad():
        logits = read(teacher, [lesson], CHOICES)[0].logits
        assert float(divergence(logits, target)) == pytest.approx(0, abs=1e-6)
        other = logits + torch.linspace(0, 0.5, logits.shape[-1])
        log_p, log_q = logits.log_softmax(-1), other.log_softmax(-1)
        whole = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert 0.6 * whole < float(divergence(other, target)) <= whole  # tokens that count as one can only hide some


@pytest.mark.parametrize("options", [{}, {"symmetric": False, "bits": 4}, {"order": "full"}, {"bits": 8}])
def test_the_gradient_is_that_of_the_scales(
    options: dict[str, Any], make_checkpoint: Make, transcripts: list[Transcript], tmp_path: Path
) -> None:
    """Against autograd through weights that are written as scales times codes; norms too."""
    source = make_checkpoint("qwen3")
    folder = open_gptq(quantize(source, tmp_path / "gptq", transcripts, **options))
    student = student_of(folder.folder, source, norms=True)
    name = "model.layers.1.mlp.down_proj"
    linear = folder.read_linear(name)
    assert np.array_equal(student.model.get_parameter(f"{name}.weight").detach().numpy(), linear.dequantize())
    lesson = make_lessons(transcripts, DIRECT)[0]
    read(student.model, [lesson], CHOICES)[0].margins.sum().backward()
    found = student.logarithms.grad
    assert found is not None

    model = load_teacher(open_checkpoint(source), "cpu")
    Student(model, folder)
    scales = torch.from_numpy(linear.scales.astype(np.float32)).requires_grad_()
    offsets = torch.from_numpy(linear.codes.astype(np.float32) - linear.zeros[:, linear.group_index])
    norm = model.model.norm.weight.detach().clone().requires_grad_()
    placed = {f"{name}.weight": offsets * scales[:, linear.group_index], "model.norm.weight": norm}

    class Through(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self) -> torch.Tensor:
            return read(self.inner, [lesson], CHOICES)[0].margins.sum()

    torch.func.functional_call(Through(), {f"inner.{key}": value for key, value in placed.items()}).backward()
    assert scales.grad is not None
    assert norm.grad is not None
    where = student._where
    wanted = (scales.grad * scales).detach().flatten()
    assert torch.allclose(found[where[name]], wanted, atol=1e-6 * float(wanted.abs().max()) + 1e-9, rtol=1e-3)
    assert torch.allclose(found[where["model.norm.weight"]], (norm.grad * norm).detach(), rtol=1e-3, atol=1e-6)


def test_rounding_follows_moves_that_are_smaller_than_its_steps(pair: tuple[Path, Path]) -> None:
    student = student_of(*pair)
    before = np.concatenate([linear.scales.ravel() for _, linear in student.linears()]).astype(np.float64)
    folder = open_gptq(pair[0])
    assert np.array_equal(before, np.concatenate([folder.read_linear(name).scales.ravel() for name in folder.linears]))
    for move in (1e-4, -3e-4):
        student.logarithms.fill_(move)
        after = np.concatenate([linear.scales.ravel() for _, linear in student.linears()]).astype(np.float64)
        assert 0.05 < np.mean(after != before) < 0.6  # steps are 5e-4 to 1e-3 of a scale
        assert np.mean(after / before - 1) == pytest.approx(move, rel=0.15)


def test_computing_activations_twice_changes_nothing(pair: tuple[Path, Path], syllabus: Syllabus) -> None:
    folder, teacher = pair
    gradients = []
    for recompute in (False, True):
        model = load_teacher(open_checkpoint(teacher), "cpu", recompute=recompute)
        student = Student(model, open_gptq(folder))
        for lesson in syllabus.lessons[:2]:
            read(student.model, [lesson], CHOICES)[0].margins.sum().backward()
        assert student.logarithms.grad is not None
        gradients.append(student.logarithms.grad.clone())
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)
    assert float(gradients[0].abs().max()) > 0


def test_training_brings_unseen_verdicts_nearer(pair: tuple[Path, Path], syllabus: Syllabus, tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    report = distill(*pair, tmp_path / "out", syllabus, SETTINGS, progress=lambda *step: heard.append(step))
    before, after = report.outcome.before, report.outcome.after
    assert after.loss < before.loss
    assert (report.lessons, report.held_back) == (9, 3)
    assert report.outcome.finished
    assert {step[0] for step in heard} == {"Asking the teacher", "Training", "Testing"}
    assert [step for step in heard if step[0] == "Training"] == [("Training", step, 9) for step in range(1, 10)]
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    verify_files(tmp_path / "out", manifest)
    assert (manifest.method, manifest.quantization) == ("distill", "gptq:3x32")
    assert manifest.settings["group_size"] == 32
    noted = manifest.settings["distill"]
    assert noted["after"]["loss"] == after.loss == min(epoch["held_back"]["loss"] for epoch in noted["history"])
    assert len(noted["history"]) == 4
    assert manifest.calibration == syllabus.described
    assert not (tmp_path / "out.distill").exists()


@pytest.mark.parametrize("norms", [True, False])
def test_only_scales_and_norms_differ_and_the_folder_packs(
    norms: bool, make_checkpoint: Make, transcripts: list[Transcript], syllabus: Syllabus, tmp_path: Path
) -> None:
    from ..export.conftest import write_tokenizer

    source = make_checkpoint(vocab_size=720)
    write_tokenizer(source, "smollm")
    folder = quantize(source, tmp_path / "gptq", transcripts, symmetric=False)
    distill(folder, source, tmp_path / "out", syllabus, replace(SETTINGS, norms=norms))
    old, new = weights(folder), weights(tmp_path / "out")
    assert {name: (a.dtype, a.shape) for name, a in old.items()} == {
        name: (a.dtype, a.shape) for name, a in new.items()
    }
    changed = {name.rpartition("norm.weight" if name.endswith("norm.weight") else ".")[2] or "norm"
               for name in old if not np.array_equal(old[name], new[name])}  # fmt: skip
    assert changed == ({"scales", "norm"} if norms else {"scales"})
    pack_gguf(tmp_path / "out", tmp_path / "out.gguf")
    assert assert_same_weights(tmp_path / "out", tmp_path / "out.gguf", "Q4_1") == 14


class Stop:
    """Progress that interrupts at its n-th word on a stage, as Ctrl-C does."""

    def __init__(self, stage: str, after: int) -> None:
        self.stage, self.left = stage, after

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.left -= stage == self.stage
        if stage == self.stage and self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [("Training", 1), ("Training", 4), ("Testing", 4), ("Asking the teacher", 5)])
def test_an_interrupted_run_ends_as_one_that_was_not(
    stop: tuple[str, int], pair: tuple[Path, Path], syllabus: Syllabus, tmp_path: Path
) -> None:
    whole = distill(*pair, tmp_path / "whole", syllabus, SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        distill(*pair, tmp_path / "cut", syllabus, SETTINGS, progress=Stop(*stop))
    assert not (tmp_path / "cut").exists()
    heard: list[str] = []
    report = distill(*pair, tmp_path / "cut", syllabus, SETTINGS, progress=lambda stage, *_: heard.append(stage))
    assert heard.count("Training") == 9 - (stop[1] if stop[0] == "Training" else 3 if stop[0] == "Testing" else 0)
    assert ("Asking the teacher" in heard) == (stop[0] == "Asking the teacher")
    assert report.outcome.history == whole.outcome.history
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert written[0] == written[1]


def test_time_runs_out_and_the_same_command_goes_on(
    pair: tuple[Path, Path], syllabus: Syllabus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = distill(*pair, tmp_path / "whole", syllabus, SETTINGS)
    clock = iter(range(10_000))  # every look at the clock takes a second
    with monkeypatch.context() as patch:
        patch.setattr(distill_module.time, "monotonic", lambda: float(next(clock)))
        report = distill(*pair, tmp_path / "out", syllabus, SETTINGS, minutes=0.2)
    assert not report.outcome.finished
    assert 0 < report.outcome.steps < 9
    assert read_manifest(tmp_path / "out")
    with pytest.raises(InputError, match="already exists"):
        distill(*pair, tmp_path / "out", syllabus, SETTINGS)
    report = distill(*pair, tmp_path / "out", syllabus, SETTINGS, force=True)
    assert report.outcome.history == whole.outcome.history
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_training_that_only_harms_is_stopped_and_undone(
    pair: tuple[Path, Path], syllabus: Syllabus, tmp_path: Path
) -> None:
    wild = replace(SETTINGS, epochs=9, rate=0.5, patience=2)
    report = distill(*pair, tmp_path / "out", syllabus, wild)
    assert report.outcome.best_epoch == 0
    assert len(report.outcome.history) == 3
    old, new = weights(pair[0]), weights(tmp_path / "out")
    assert all(np.array_equal(old[name], new[name]) for name in old)


def test_other_training_left_behind_is_refused(pair: tuple[Path, Path], syllabus: Syllabus, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        distill(*pair, tmp_path / "out", syllabus, SETTINGS, progress=Stop("Training", 2))
    with pytest.raises(IntegrityError, match=r"other settings.*Delete .*out\.distill"):
        distill(*pair, tmp_path / "out", syllabus, replace(SETTINGS, rate=1e-3))
    with FileLock(str(tmp_path / "out.distill/lock")), pytest.raises(IntegrityError, match="in use by another"):
        distill(*pair, tmp_path / "out", syllabus, SETTINGS)
    state = tmp_path / "out.distill/state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(IntegrityError, match="cannot be read"):
        distill(*pair, tmp_path / "out", syllabus, SETTINGS)


def test_a_teacher_of_another_shape_is_refused(
    pair: tuple[Path, Path], make_checkpoint: Make, syllabus: Syllabus, tmp_path: Path
) -> None:
    shutil.rmtree(pair[1])
    other = make_checkpoint(intermediate_size=96)
    with pytest.raises(ModelError, match=r"down_proj is \(64, 128\) in the GPTQ folder and \(64, 96\)"):
        distill(pair[0], other, tmp_path / "out", syllabus, SETTINGS)
    shutil.rmtree(other)
    with pytest.raises(ModelError, match=r"holds 'model.layers.1"):
        distill(pair[0], make_checkpoint(num_hidden_layers=1), tmp_path / "out", syllabus, SETTINGS)
    assert not list(tmp_path.glob("out*"))


def test_memory_that_is_not_there_is_refused_before_anything_is_loaded(
    pair: tuple[Path, Path], syllabus: Syllabus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, checkpoint = open_gptq(pair[0]), open_checkpoint(pair[1])
    plenty, recompute = distill_module.check_memory(checkpoint, folder, syllabus.lessons, "cpu")
    assert not recompute
    monkeypatch.setattr(distill_module, "free_bytes", lambda device: plenty - 1)
    less, recompute = distill_module.check_memory(checkpoint, folder, syllabus.lessons, "cpu")
    assert recompute
    assert less < plenty
    monkeypatch.setattr(distill_module, "free_bytes", lambda device: 1000)
    with pytest.raises(ResourceError, match="are free"):
        distill(*pair, tmp_path / "out", syllabus, SETTINGS)


def test_both_orders_of_a_pair_are_held_back_together() -> None:
    lessons = [
        Lesson(f"{number}:{order}", (1,), (Answer((2,), False),)) for number in range(10) for order in ("ab", "ba")
    ]
    learnt, tested = hold_back(lessons, 0.2, seed=3)
    assert (len(learnt), len(tested)) == (16, 4)
    assert not {one.id[:-3] for one in learnt} & {one.id[:-3] for one in tested}
    with pytest.raises(InputError, match="two pairs"):
        hold_back(lessons[:2], 0.2, seed=3)


def test_a_transcript_of_direct_mode_is_one_answer() -> None:
    said = Transcript((1, 2), (*DIRECT, 7), "direct")
    assert make_lessons([said], DIRECT)[0].answers == (Answer(DIRECT, spoken=False),)
    assert make_lessons([said], None)[0].answers == (Answer(DIRECT, spoken=True),)
    with pytest.raises(InputError, match="nothing to learn"):
        make_lessons([Transcript((1, 2), (), "empty")], None)


@pytest.fixture
def judge_checkpoint(make_checkpoint: Make) -> Path:
    """A tiny model of random weights that has the reference judge's tokenizer and chat template."""
    folder = make_checkpoint(vocab_size=49_152, max_position_embeddings=2048)
    for file in (REFERENCE / "hf").iterdir():
        if file.name not in ("config.json", "generation_config.json"):
            shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    rows = [
        {"id": str(n), "prompt": f"Add {n} and 1.", "response_a": str(n + 1), "response_b": "No."} for n in range(6)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_pairs_in_direct_mode_are_what_the_judge_would_see(judge_checkpoint: Path, pairs_file: Path) -> None:
    from gramlite.judge import Settings
    from gramlite.loading import load

    found = load_syllabus(
        pairs_file, judge_checkpoint, template={"name": "gramlite"}, mode="direct", tokens=100_000, seed=0
    )
    assert sorted(lesson.id for lesson in found.lessons) == [f"{n}:{order}" for n in range(6) for order in ("ab", "ba")]
    model = load_teacher(open_checkpoint(judge_checkpoint), "cpu")
    lessons = {lesson.id: lesson for lesson in found.lessons}
    with load(judge_checkpoint, template="gramlite", settings=Settings(mode="direct")) as judge:
        verdict = judge(prompt="Add 2 and 1.", response_a="3", response_b="No.")
    for order, sign in zip(verdict.orders, (1, -1), strict=True):
        margin = float(ask_teacher(model, [lessons[f"2:{order.order}"]], found.choices)[0].margins[0])
        assert sign * margin == pytest.approx(order.margin, abs=1e-4)
    few = load_syllabus(pairs_file, judge_checkpoint, template={"name": "gramlite"}, mode="direct", tokens=500, seed=0)
    assert 0 < len(few.lessons) < 12
    with pytest.raises(InputError, match="--tokens 10"):
        load_syllabus(pairs_file, judge_checkpoint, template={"name": "gramlite"}, mode="direct", tokens=10)


def test_transcripts_are_learnt_with_direct_mode_beside_them(
    judge_checkpoint: Path, transcripts: list[Transcript], tmp_path: Path
) -> None:
    file = tmp_path / "transcripts.jsonl"
    write_transcripts(file, [replace(one, generated_ids=(*one.generated_ids[:-1], 49)) for one in transcripts])
    found = load_syllabus(file, judge_checkpoint, template={"name": "gramlite"}, tokens=10_000)
    assert found.choices == (49, 50)
    assert [answer.spoken for answer in found.lessons[0].answers] == [False, True]
    write_transcripts(file, transcripts)
    with pytest.raises(InputError, match="none of the template's verdicts"):
        load_syllabus(file, judge_checkpoint, template={"name": "gramlite"}, tokens=10_000)
    plain = load_syllabus(file, judge_checkpoint, template=None, tokens=10_000)
    assert plain.choices == CHOICES
    assert [len(lesson.answers) for lesson in plain.lessons] == [1] * 12


def test_rationales_are_written_once(
    judge_checkpoint: Path,
    pairs_file: Path,
    transcripts: list[Transcript],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def judge(calibration: Path, **options: Any) -> tuple[list[Transcript], dict[str, Any]]:
        asked.append(options["judge"])
        return [replace(one, generated_ids=(*one.generated_ids[:-1], 50)) for one in transcripts], {}

    monkeypatch.setattr(syllabus_module, "load_calibration", judge)
    options: dict[str, Any] = {"template": {"name": "gramlite"}, "tokens": 1000, "keep": tmp_path / "out.distill"}
    first = load_syllabus(pairs_file, judge_checkpoint, **options)
    assert load_syllabus(pairs_file, judge_checkpoint, **options) == first
    assert asked == [judge_checkpoint]
    load_syllabus(pairs_file, judge_checkpoint, **(options | {"tokens": 2000}))
    assert len(asked) == 2


def test_command_prints_one_object(
    judge_checkpoint: Path, pairs_file: Path, transcripts: list[Transcript], tmp_path: Path
) -> None:
    folder = quantize(judge_checkpoint, tmp_path / "gptq", transcripts)
    arguments = [str(folder), "--teacher", str(judge_checkpoint), "--calibration", str(pairs_file), "--mode", "direct",
                 "--template", "gramlite", "--epochs", "1", "--device", "cpu", "-o", str(tmp_path / "out"), "--json"]  # fmt: skip
    figures = json.loads(CliRunner().invoke(command, arguments, catch_exceptions=False).stdout)
    assert figures["lessons"] + figures["held_back"] == 12
    assert figures["after"]["loss"] <= figures["before"]["loss"]
    assert figures["command"] == f"gramlite judge PAIRS.jsonl -m {tmp_path / 'out'}"
    weights = sum(file.stat().st_size for file in open_checkpoint(judge_checkpoint).files)
    assert figures["compression"] == pytest.approx(weights / figures["bytes"], abs=0.001)
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.template is not None
    assert manifest.template["name"] == "gramlite"
    assert manifest.calibration is not None
    assert (manifest.calibration["mode"], manifest.calibration["direct"]) == ("direct", True)
    with pytest.raises(InputError, match="already exists"):
        CliRunner().invoke(command, arguments, catch_exceptions=False)


def test_a_missing_package_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gramlite.quant.packages.find_spec", lambda name: None)
    arguments = ["folder", "--teacher", "teacher", "--calibration", "pairs.jsonl", "-o", str(tmp_path / "out")]
    with pytest.raises(InputError, match=r"needs the package 'torch'.*gramlite\[gptq\]"):
        CliRunner().invoke(command, arguments, catch_exceptions=False)
