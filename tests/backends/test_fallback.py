"""Every situation a judge may find on a machine: where it then runs, and what is said of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from broken_gguf import UINT32, model_pieces

from gramlite.backends.fallback import Fallback
from gramlite.errors import OutOfMemory, ResourceError
from gramlite.formats.gguf_header import Header, read_header
from gramlite.runtime.gguf_memory import LayeredFootprint, choose_layout
from gramlite.runtime.machine import Gpu, Machine, has_driver, has_mps
from gramlite.runtime.memory import Footprint
from gramlite.runtime.options import RuntimeOptions
from gramlite.runtime.placement import offload_below, place, placement_below, plan_offload

GiB, MB = 1 << 30, 1_000_000
SIZE = Footprint(weights=1000 * MB, token=MB // 10, compute=100 * MB)
BIG, SECOND = Gpu("GPU 0", 8 * GiB, 24 * GiB), Gpu("GPU 1", 10 * GiB, 24 * GiB, index=1)
FULL = Gpu("GPU 0", 1000, 24 * GiB)
NO_BUILD, NO_ANSWER = "this build has no CUDA", "no CUDA device answers"
AGAIN = "3 running requests start again"


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Header:
    """Two blocks and an output head: three layers."""
    pieces = model_pieces()
    pieces.put("llama.context_length", UINT32, 16384)
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    path.write_bytes(pieces.file())
    return read_header(path)


@dataclass
class FakeDevice:
    """Loading fails in the first `loads` places, and judging in the first `runs` after them."""

    loads: int = 0
    runs: int = 0
    loaded: list[str] = field(default_factory=list)
    held: str | None = None

    def load(self, place: Any) -> None:
        assert self.held is None, "what was there before is freed"
        self.loaded.append(place.device)
        if len(self.loaded) <= self.loads:
            raise OutOfMemory("cudaMalloc failed: out of memory")
        self.held = place.device

    def free(self) -> None:
        self.held = None


@dataclass(frozen=True)
class Situation:
    """What is found and asked for; then where it runs or what is raised, and every line that is said, in order."""

    name: str
    device: str = "auto"
    machine: Machine = field(default_factory=lambda: Machine(8 * GiB, (BIG,)))
    loads: int = 0
    runs: int = 0
    layers: int | None = None  # fit the GPU
    runs_on: str | None = None
    refused: str | None = None
    says: tuple[str, ...] = ()


def no_gpu(reason: str, **also: bool) -> Machine:
    return Machine(8 * GiB, (), reason, **also)


ALL = "cuda (3 of 3 layers on GPU 0)"
ONE = "cuda (1 of 3 layers on GPU 0)"
WHOLE = "cuda (GPU 0)"
FITS = f"Running on {ALL}: it fits the 8,192 MiB free on GPU 0."
FITS_SECOND = (
    "Running on cuda (3 of 3 layers on GPU 1): it fits the 10,240 MiB free on GPU 1, device 1, the freest of 2."
)
WHOLE_FITS = f"Running on {WHOLE}: it fits the 8,590 MB free on GPU 0."
WHOLE_FITS_SECOND = "Running on cuda (GPU 1): it fits the 10,737 MB free on GPU 1, device 1, the freest of 2."
LOADING, JUDGING = "while the model was loaded", "while judging"
REASON = "cudaMalloc failed: out of memory"
DRIVER = "though NVIDIA's driver is installed (gramlite doctor says what to install)"
MPS = "this build has no CUDA; Apple's GPU (MPS) is not used"
ASKED = "--device cuda was asked for, but"
NEVER = "--device cuda never falls back. Type --device auto, a smaller --context, or: gramlite doctor"


def stepped(place: str, when: str, lower: str) -> str:
    return (
        f"Out of memory on {place} {when}: {REASON}. Stepping down to {lower}{'; ' + AGAIN if when == JUDGING else ''}."
    )


LLAMA = [
    Situation("no driver", machine=no_gpu(NO_BUILD), runs_on="cpu", says=(f"Running on the CPU: {NO_BUILD}.",)),
    Situation("no driver, cuda", "cuda", no_gpu(NO_BUILD), refused=f"{ASKED} {NO_BUILD}. Type --device cpu"),
    Situation("no driver, cpu", "cpu", no_gpu(NO_BUILD), runs_on="cpu"),
    Situation("driver without build", machine=no_gpu(NO_BUILD, driver=True), runs_on="cpu",
              says=(f"Running on the CPU: {NO_BUILD}, {DRIVER}.",)),
    Situation("driver without build, cuda", "cuda", no_gpu(NO_BUILD, driver=True), refused=f"{NO_BUILD}, {DRIVER}"),
    Situation("build without device", machine=no_gpu(NO_ANSWER), runs_on="cpu",
              says=(f"Running on the CPU: {NO_ANSWER}.",)),
    Situation("MPS", machine=no_gpu(NO_BUILD, mps=True), runs_on="cpu", says=(f"Running on the CPU: {MPS}.",)),
    Situation("MPS, cuda", "cuda", no_gpu(NO_BUILD, mps=True), refused=f"{ASKED} {MPS}"),
    Situation("MPS, cpu", "cpu", no_gpu(NO_BUILD, mps=True), runs_on="cpu"),
    Situation("all layers fit", runs_on=ALL, says=(FITS,)),
    Situation("all layers fit, cuda", "cuda", runs_on=ALL, says=(FITS,)),
    Situation("all layers fit, cpu", "cpu", runs_on="cpu"),
    Situation("one layer fits", layers=1, runs_on=ONE, says=("1 of 3 layers fit the * MiB free on GPU 0; the rest",)),
    Situation("two layers fit, cuda", "cuda", layers=2, runs_on="cuda (2 of 3 layers on GPU 0)", says=("2 of 3 layers",)),
    Situation("no layer fits", machine=Machine(8 * GiB, (FULL,)), runs_on="cpu",
              says=("Running on the CPU: not one layer fits the 0 MiB free on GPU 0.",)),
    Situation("no layer fits, cuda", "cuda", Machine(8 * GiB, (FULL,)), refused=f"{ASKED} not one layer fits"),
    Situation("two GPUs", machine=Machine(8 * GiB, (BIG, SECOND)), runs_on="cuda (3 of 3 layers on GPU 1)",
              says=(FITS_SECOND,)),
    Situation("two GPUs, one full", machine=Machine(8 * GiB, (FULL, SECOND)), runs_on="cuda (3 of 3 layers on GPU 1)",
              says=(FITS_SECOND,)),
    Situation("two full GPUs", machine=Machine(8 * GiB, (FULL, replace(FULL, name="GPU 1", free=900))), runs_on="cpu",
              says=("Running on the CPU: not one layer fits the 0 MiB free on GPU 0.",)),
    Situation("OOM at load", loads=1, runs_on=ONE, says=(FITS, stepped(ALL, LOADING, ONE),)),
    Situation("OOM at load, twice", loads=2, runs_on="cpu",
              says=(FITS, stepped(ALL, LOADING, ONE), stepped(ONE, LOADING, "cpu"))),
    Situation("OOM at load of the only layer", layers=1, loads=1, runs_on="cpu",
              says=("1 of 3 layers", stepped(ONE, LOADING, "cpu"))),
    Situation("OOM at load, cuda", "cuda", loads=1, refused=f"Out of memory on {ALL} {LOADING}: {REASON}. {NEVER}",
              says=(FITS,)),
    Situation("OOM at load, main memory full too", machine=Machine(1000, (BIG,)), loads=1,
              refused="No context fits", says=(FITS,)),
    Situation("OOM in mid-run", runs=1, runs_on=ONE, says=(FITS, stepped(ALL, JUDGING, ONE),)),
    Situation("OOM in mid-run, twice", runs=2, runs_on="cpu",
              says=(FITS, stepped(ALL, JUDGING, ONE), stepped(ONE, JUDGING, "cpu"))),
    Situation("OOM at load, then in mid-run", loads=1, runs=1, runs_on="cpu",
              says=(FITS, stepped(ALL, LOADING, ONE), stepped(ONE, JUDGING, "cpu"))),
    Situation("OOM in mid-run, cuda", "cuda", runs=1, refused=f"Out of memory on {ALL} {JUDGING}: {REASON}. {NEVER}",
              says=(FITS,)),
]  # fmt: skip

WHOLE_MODEL = [
    Situation("no driver", machine=no_gpu(NO_BUILD), runs_on="cpu", says=(f"Running on the CPU: {NO_BUILD}.",)),
    Situation("no driver, cuda", "cuda", no_gpu(NO_BUILD), refused=f"{ASKED} {NO_BUILD}. Type --device cpu"),
    Situation("driver without build", machine=no_gpu(NO_BUILD, driver=True), runs_on="cpu",
              says=(f"Running on the CPU: {NO_BUILD}, {DRIVER}.",)),
    Situation("MPS", machine=no_gpu(NO_BUILD, mps=True), runs_on="cpu", says=(f"Running on the CPU: {MPS}.",)),
    Situation("MPS, cuda", "cuda", no_gpu(NO_BUILD, mps=True), refused=f"{ASKED} {MPS}"),
    Situation("it fits", runs_on=WHOLE, says=(WHOLE_FITS,)),
    Situation("it fits, cuda", "cuda", runs_on=WHOLE, says=(WHOLE_FITS,)),
    Situation("it fits, cpu", "cpu", runs_on="cpu"),
    Situation("it does not fit", machine=Machine(8 * GiB, (FULL,)), runs_on="cpu",
              says=("Running on the CPU: 1,510 MB are needed and 0 MB are free on GPU 0.",)),
    Situation("it does not fit, cuda", "cuda", Machine(8 * GiB, (FULL,)), refused=f"{ASKED} 1,510 MB are needed"),
    Situation("two GPUs", machine=Machine(8 * GiB, (BIG, SECOND)), runs_on="cuda (GPU 1)",
              says=(WHOLE_FITS_SECOND,)),
    Situation("OOM at load", loads=1, runs_on="cpu", says=(WHOLE_FITS, stepped(WHOLE, LOADING, "cpu"),)),
    Situation("OOM at load, cuda", "cuda", loads=1, refused=f"Out of memory on {WHOLE} {LOADING}: {REASON}. {NEVER}",
              says=(WHOLE_FITS,)),
    Situation("OOM at load, main memory full too", machine=Machine(900 * MB, (BIG,)), loads=1,
              refused="900,000,000 are free. No context fits", says=(WHOLE_FITS,)),
    Situation("OOM in mid-run", runs=1, runs_on="cpu", says=(WHOLE_FITS, stepped(WHOLE, JUDGING, "cpu"),)),
    Situation("OOM in mid-run, cuda", "cuda", runs=1, refused=f"Out of memory on {WHOLE} {JUDGING}: {REASON}. {NEVER}",
              says=(WHOLE_FITS,)),
    Situation("OOM in mid-run, no room for the same context", machine=Machine(1300 * MB, (BIG,)), runs=1,
              refused="with a context of 4,096 needs", says=(WHOLE_FITS,)),
]  # fmt: skip


def judge_three(device: FakeDevice, fallback: Fallback[Any]) -> str:
    """Judge three requests, which start again as often as memory runs out; where they end."""
    while len(device.loaded) <= device.loads + device.runs:
        fallback.step_down(OutOfMemory("cudaMalloc failed: out of memory"), 3)
    fallback.require_loaded()
    return str(fallback.place.device)


def check_said(situation: Situation, caplog: pytest.LogCaptureFixture) -> None:
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(situation.says), said
    for line, wanted in zip(said, situation.says, strict=True):
        start, _, rest = wanted.partition("*")
        assert line.startswith(start) and rest in line
    loud = [record.levelno >= logging.WARNING for record in caplog.records]
    silent = not (situation.machine.gpus or situation.machine.driver or situation.machine.mps)
    assert loud == [not silent and not line.startswith("Running on cuda") for line in said], "what fits is no warning"


@pytest.mark.parametrize("situation", LLAMA, ids=lambda situation: situation.name)
def test_a_model_that_is_offloaded_by_layers(
    situation: Situation, header: Header, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gramlite")
    options = RuntimeOptions(device=situation.device)  # type: ignore[arg-type]
    machine = situation.machine
    if situation.layers is not None:
        machine = Machine(8 * GiB, (replace(BIG, free=free_for(header, situation.layers)),))
    device = FakeDevice(situation.loads, situation.runs)

    def below(plan: Any, context: int | None) -> Any:
        return offload_below(plan, header, replace(options, context=context), machine)

    def run() -> str:
        plan = plan_offload(header, options, machine)
        return judge_three(device, Fallback(plan, load=device.load, free=device.free, below=below))

    check_run(situation, run, device, caplog)


@pytest.mark.parametrize("situation", WHOLE_MODEL, ids=lambda situation: situation.name)
def test_a_model_that_goes_somewhere_as_a_whole(situation: Situation, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gramlite")
    options = RuntimeOptions(device=situation.device)  # type: ignore[arg-type]
    device = FakeDevice(situation.loads, situation.runs)

    def below(placement: Any, context: int | None) -> Any:
        asked = replace(options, context=context)
        return placement_below(placement, "m", 4096, asked, situation.machine, cpu=SIZE)

    def run() -> str:
        placement = place("m", 4096, options, situation.machine, cpu=SIZE, gpu=SIZE)
        return judge_three(device, Fallback(placement, load=device.load, free=device.free, below=below))

    check_run(situation, run, device, caplog)


def check_run(situation: Situation, run: Any, device: FakeDevice, caplog: pytest.LogCaptureFixture) -> None:
    if situation.refused:
        with pytest.raises(ResourceError) as caught:
            run()
        assert situation.refused in str(caught.value) and caught.value.exit_code == 4
        assert situation.device == "auto" or "cpu" not in device.loaded, "cuda never falls back"
    else:
        assert run() == situation.runs_on == device.held
    check_said(situation, caplog)


def free_for(header: Header, layers: int) -> int:
    """The least free memory of a GPU, in bytes, that `layers` fit."""
    size = LayeredFootprint(header, choose_layout(RuntimeOptions()))
    step = 4096
    enough = next(free for free in range(0, size.at(8192).total, step) if size.layers_in(free, 8192) >= layers)
    return int(enough / 0.94) + step


def test_there_are_enough_situations() -> None:
    assert len(LLAMA) + len(WHOLE_MODEL) >= 25
    assert len({situation.name for situation in LLAMA}) == len(LLAMA)


def test_the_context_may_shrink_while_loading_and_never_while_judging(header: Header) -> None:
    options = RuntimeOptions()
    machine = Machine(LayeredFootprint(header, choose_layout(options)).at(2048).total, (BIG,))
    plan = replace(plan_offload(header, options, machine), reduced=True)
    lower = offload_below(plan, header, options, machine)
    assert lower and (plan.context, lower.context, lower.device) == (8192, 2048, "cpu")
    with pytest.raises(ResourceError, match="largest context that fits is 2,048"):
        offload_below(plan, header, replace(options, context=plan.context), machine)


def test_half_of_the_layers_are_passed_over_where_the_others_fit_no_memory(header: Header) -> None:
    options = RuntimeOptions()
    plan = plan_offload(header, options, Machine(8 * GiB, (BIG,)))
    size = LayeredFootprint(header, plan.layout)
    others = size.beside_gpu(plan.gpu_layers // 2, plan.context)
    assert 0 < others < size.at(plan.context).total
    places = [offload_below(plan, header, options, Machine(free, (BIG,))) for free in (others, others - 1)]
    assert [(place.gpu_layers, place.reduced) for place in places if place] == [
        (plan.gpu_layers // 2, True),
        (0, False),
    ]
    assert places[1] and places[1].context < plan.context
    with pytest.raises(ResourceError, match="largest context that fits"):
        offload_below(plan, header, replace(options, context=plan.context), Machine(others - 1, (BIG,)))


def test_a_lost_model_is_not_asked(header: Header) -> None:
    device, machine = FakeDevice(), Machine(8 * GiB, (BIG,))
    fallback = Fallback(
        plan_offload(header, RuntimeOptions(), machine),
        load=device.load,
        free=device.free,
        below=lambda at, context: offload_below(at, header, RuntimeOptions(), machine),
    )

    def refuse(place: Any) -> None:
        raise ResourceError("the disk is gone")

    fallback._load = refuse
    with pytest.raises(ResourceError, match="the disk is gone"):
        fallback.step_down(OutOfMemory("full"), 1)
    with pytest.raises(ResourceError, match="not loaded any more"):
        fallback.require_loaded()


def test_a_driver_is_looked_for_without_failing(tmp_path: Path) -> None:
    assert has_driver() in (True, False) and has_mps() in (True, False)
