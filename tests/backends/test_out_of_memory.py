"""A GPU that runs out of memory, played by a fake one: every backend goes on where it fits, with the CPU's own results."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import request_for

from gramlite import Judge, Pair, ResourceError, RuntimeOptions
from gramlite.backends.gguf import backend as gguf
from gramlite.backends.gguf import context as gguf_context
from gramlite.backends.gguf import library as gguf_library
from gramlite.backends.gguf.context import LlamaContext
from gramlite.backends.protocol import Backend
from gramlite.errors import GramliteError, ModelError, OutOfMemory
from gramlite.formats.artifact import Artifact
from gramlite.runtime.machine import Gpu, Machine
from gramlite.runtime.placement import Offload, Placement

from .conftest import Probe, run_probes, tiny_backend, tiny_judge

GPU = Gpu("Fake GPU", 8 << 30, 24 << 30)
MACHINE = Machine(8 << 30, (GPU,))
REASON = "cudaMalloc failed: out of memory"
PAIRS = [Pair(f"Is {n} even?", "Yes." + "!" * n, "No.") for n in range(3)]
AUTO = RuntimeOptions(device="auto", threads=1)
ALL, ONE = "cuda (3 of 3 layers on Fake GPU)", "cuda (1 of 3 layers on Fake GPU)"


@dataclass
class FakeGpu:
    """Where memory runs out: in the first `loads` places at once, in the first `runs` after them at batch `after`."""

    loads: int = 0
    runs: int = 0
    after: int = 3
    places: list[str] = field(default_factory=list)
    batches: int = 0

    def load(self, device: str) -> None:
        self.places.append(device)
        self.batches = 0
        if device != "cpu" and len(self.places) <= self.loads:
            raise OutOfMemory(REASON)

    @property
    def is_full(self) -> bool:
        self.batches += 1
        return self.places[-1] != "cpu" and len(self.places) <= self.loads + self.runs and self.batches >= self.after


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ---------------------------------------------------------------- llama.cpp
@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """llama.cpp on a GPU that isn't there: everything is computed on the CPU."""
    gpu = FakeGpu()

    class Context(LlamaContext):
        def __init__(self, path: Path, plan: Offload, *, threads: int | None) -> None:
            gpu.load(plan.device)
            super().__init__(path, replace(plan, gpu_layers=0), threads=threads)

        def decode(self) -> None:
            if gpu.is_full:
                raise OutOfMemory(REASON)
            super().decode()

    monkeypatch.setattr(gguf, "LlamaContext", Context)
    monkeypatch.setattr(gguf, "machine", lambda: MACHINE)
    return gpu


def generations(judge: Judge, **settings: Any) -> list[Any]:
    with closing(judge.with_settings(**settings).many(PAIRS)) as verdicts:
        return [(order.order, order.rationale, order.margin) for verdict in verdicts for order in verdict.orders]


@pytest.mark.parametrize(
    ("loads", "runs", "after", "places"),
    [
        (0, 0, 1, [ALL]),
        (1, 0, 1, [ALL, ONE]),
        (2, 0, 1, [ALL, ONE, "cpu"]),
        (0, 1, 1, [ALL, ONE]),
        (0, 1, 7, [ALL, ONE]),
        (0, 2, 5, [ALL, ONE, "cpu"]),
        (1, 1, 4, [ALL, ONE, "cpu"]),
    ],
)
def test_verdicts_are_those_of_the_place_it_ends_at(
    loads: int, runs: int, after: int, places: list[str], fake: FakeGpu, tiny: Path, adapters: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    thinking = {"mode": "think", "budget": 10, "votes": 2, "seed": 5, "early_stop": False}
    fake.loads, fake.runs, fake.after = loads, runs, after
    with tiny_judge(tiny, device="cpu", deterministic=True, adapter=adapters[0]) as on_cpu:
        direct, rationales = generations(on_cpu), generations(on_cpu, **thinking)
    fake.places.clear()
    with tiny_judge(tiny, device="auto", deterministic=True).with_adapter(adapters[0]) as judge:
        assert generations(judge) == direct, "the adapter is in force there, too"
        assert generations(judge, **thinking) == rationales
        assert fake.places == places and judge.backend.device == places[-1]
    assert len(said(caplog)) == len(places) - 1
    for line, place, lower in zip(said(caplog), places, places[1:], strict=False):
        assert line.startswith(f"Out of memory on {place} while ") and REASON in line
        assert f"Stepping down to {lower}" in line


def test_rationales_that_run_together_start_again_and_are_heard_once(
    fake: FakeGpu, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake.runs, fake.after = 1, 6
    with tiny_judge(tiny, device="auto", parallel=2) as judge:
        heard: dict[str, str] = {"ab": "", "ba": ""}
        thinking = judge.with_settings(mode="think", budget=12)
        verdict = thinking(
            prompt="q", response_a="x", response_b="y",
            on_text=lambda order, text: heard.update({order: heard[order] + text}),
        )  # fmt: skip
        assert verdict.winner and [order.tokens["generated"] for order in verdict.orders] == [12, 12]
        for order in verdict.orders:
            assert len(heard[order.order]) <= len(order.rationale or "") + 12, "not once more from the beginning"
    (line,) = said(caplog)
    assert "while judging" in line and line.endswith("2 running requests start again.")


def test_cuda_never_falls_back(fake: FakeGpu, tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    fake.loads = 1
    with pytest.raises(ResourceError, match=r"^Out of memory on cuda \(3 of 3.*--device cuda never falls back"):
        tiny_backend(tiny, device="cuda")
    fake.loads, fake.runs = 0, 1
    fake.places.clear()
    with tiny_judge(tiny, device="cuda") as judge:
        with pytest.raises(ResourceError, match="while judging: cudaMalloc"):
            generations(judge)
        fake.runs = 0
        assert len(generations(judge)) == 6, "the model is still there, for what is smaller"
    assert fake.places == [ALL] and not said(caplog)


def test_where_a_step_down_failed_nothing_is_asked_of_a_model_that_is_gone(
    fake: FakeGpu, tiny: Path, adapters: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.runs = 1
    with tiny_judge(tiny, device="auto") as judge:

        def refuse(path: Path, plan: Offload, *, threads: int | None) -> None:
            raise ModelError("the file is gone")

        monkeypatch.setattr(gguf, "LlamaContext", refuse)
        with pytest.raises(ModelError, match="the file is gone"):
            generations(judge)
        for use in (lambda: generations(judge), lambda: judge.with_adapter(adapters[0])):
            with pytest.raises(ResourceError, match="not loaded any more"):
                use()
        judge.abort()


def test_what_llama_cpp_says_of_memory_is_understood(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = tiny_backend(tiny)
    plan = replace(backend._fallback.place, gpu_layers=3)

    def fail_to_load(path: bytes, params: Any) -> None:
        gguf_library._log_tail.append("llama_model_load: error loading model: unable to allocate CUDA0 buffer\n")

    def fail_to_decode(context: Any, batch: Any) -> int:
        gguf_library._log_tail.append("ggml_gallocr_reserve_n: failed to allocate CUDA0 buffer of size 99\n")
        return -3

    context = backend._llama
    backend._llama.begin()
    backend._llama.add([1], [0], 0)
    monkeypatch.setattr(gguf_context.llama_cpp, "llama_decode", lambda context, batch: -2)
    with pytest.raises(GramliteError, match=r"failed \(-2\)"):
        context.decode()
    context._on_gpu = True
    with pytest.raises(OutOfMemory, match="could not allocate what a batch needs"):
        context.decode()
    monkeypatch.setattr(gguf_context.llama_cpp, "llama_decode", fail_to_decode)
    with pytest.raises(OutOfMemory, match="failed to allocate CUDA0 buffer of size 99"):
        context.decode()
    backend.close()
    monkeypatch.setattr(gguf_context.llama_cpp, "llama_model_load_from_file", fail_to_load)
    with pytest.raises(OutOfMemory, match="unable to allocate CUDA0 buffer"):
        LlamaContext(tiny, plan, threads=1)
    with pytest.raises(ModelError, match="could not load"):
        LlamaContext(tiny, replace(plan, gpu_layers=0), threads=1)


# ---------------------------------------------------------------- whole models: torch and onnxruntime
def tokens(count: int, seed: int = 1) -> tuple[int, ...]:
    return tuple(int(token) for token in np.random.default_rng(seed).integers(0, 600, count))


def logits_of_three(backend: Backend) -> list[Any]:
    """The last logits of three prompts, each read once."""
    probes = [Probe() for _ in range(3)]
    asked = [(request_for(key, tokens(40, key), (20,)), probe) for key, probe in enumerate(probes)]
    while True:
        try:
            assert sorted(key for key, _ in run_probes(backend, asked)) == [0, 1, 2]
            break
        except OutOfMemory:
            assert backend.step_down()
    assert [len(probe.seen) for probe in probes] == [1, 1, 1]
    return [probe.seen[0] for probe in probes]


def check_whole_model(
    gpu: FakeGpu, open_on: Callable[[RuntimeOptions], Backend], caplog: pytest.LogCaptureFixture, where: str
) -> None:
    cpu = open_on(replace(AUTO, device="cpu"))
    wanted = logits_of_three(cpu)
    for loads, runs, lines in ((0, 0, 0), (1, 0, 1), (0, 1, 1)):
        gpu.loads, gpu.runs = loads, runs
        gpu.places.clear()
        caplog.clear()
        backend = open_on(AUTO)
        assert all(np.array_equal(one, two) for one, two in zip(logits_of_three(backend), wanted, strict=True))
        assert gpu.places == [where, "cpu"][: 1 + lines] and len(said(caplog)) == lines
        assert backend.device.startswith("cpu" if lines else "cuda (Fake GPU)")
        for line in said(caplog):
            assert line.startswith(f"Out of memory on {where} while ") and "Stepping down to cpu" in line
        gpu.loads, gpu.runs = loads, runs
        gpu.places.clear()
        if lines:
            with pytest.raises(ResourceError, match="--device cuda never falls back"):
                logits_of_three(open_on(replace(AUTO, device="cuda")))
            assert gpu.places == [where]


def test_torch(
    checkpoint_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch = pytest.importorskip("torch", reason="the hf backend needs torch")
    pytest.importorskip("transformers", reason="the hf backend needs transformers")
    from gramlite.backends import hf

    gpu, load_model = FakeGpu(), hf.load_model
    failures: list[RuntimeError] = []

    class OnFakeGpu:
        def __init__(self, model: Any) -> None:
            self._model = model

        def __getattr__(self, name: str) -> Any:
            return getattr(self._model, name)

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            if gpu.is_full:
                raise failures[0]
            return self._model(*arguments, **options)

    def load(folder: Any, placement: Placement, dtype: Any, **options: Any) -> Any:
        gpu.load(placement.device)
        return OnFakeGpu(load_model(folder, Placement(None, placement.context), torch.float32))

    monkeypatch.setattr(hf, "load_model", load)
    monkeypatch.setattr(hf, "machine", lambda: MACHINE)
    folder = checkpoint_of("llama-tied")

    def open_on(options: RuntimeOptions) -> Backend:
        return hf.open_artifact(Artifact(folder, "hf", None), options)

    for failure in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
    ):
        failures[:] = [failure]
        check_whole_model(gpu, open_on, caplog, "cuda (Fake GPU)")
    failures[:] = [RuntimeError("CUDA error: an illegal memory access was encountered")]
    gpu.runs = 1
    gpu.places.clear()
    with pytest.raises(GramliteError, match=r"torch failed at \d+ tokens: CUDA error: an illegal") as caught:
        logits_of_three(open_on(AUTO))
    assert not isinstance(caught.value, ResourceError)


def test_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("onnxruntime", reason="the onnx backend needs onnxruntime")
    pytest.importorskip("onnx", reason="the onnx backend needs onnx")
    pytest.importorskip("tokenizers", reason="the onnx backend needs tokenizers")
    from onnx_decoder import random_weights, write_decoder

    from gramlite.backends import onnx

    from ..export.conftest import write_tokenizer

    gpu, open_session = FakeGpu(), onnx.open_session

    class OnFakeGpu:
        def __init__(self, session: Any) -> None:
            self._session = session

        def __getattr__(self, name: str) -> Any:
            return getattr(self._session, name)

        def get_providers(self) -> list[str]:
            return [onnx.CUDA, onnx.CPU]

        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            if gpu.is_full:
                raise RuntimeError("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer")
            self._session.run_with_iobinding(binding, options)

    def open_it(graph: Any, placement: Placement, options: RuntimeOptions) -> Any:
        gpu.load(placement.device)
        return OnFakeGpu(open_session(graph, Placement(None, placement.context), options))

    def place(name: str, trained: int, options: RuntimeOptions, machine: Machine, **footprints: Any) -> Placement:
        return Placement(None if options.device == "cpu" else GPU, 512)

    monkeypatch.setattr(onnx, "open_session", open_it)
    monkeypatch.setattr(onnx, "place", place)
    monkeypatch.setattr(onnx, "machine", lambda: MACHINE)
    monkeypatch.setattr(onnx.OnnxBackend, "_where", ("cpu", 0))
    folder = tmp_path / "model"
    write_decoder(folder, random_weights(write_tokenizer(folder, "smollm")))
    check_whole_model(
        gpu, lambda options: onnx.open_artifact(Artifact(folder, "onnx", None), options), caplog, "cuda (Fake GPU)"
    )


def test_a_decoder_starts_again_behind_its_prompt(tiny: Path) -> None:
    from gramlite.generation.decoder import AnswerForm, Decoder, encode_answer

    backend = tiny_backend(tiny)
    answer = encode_answer(backend.vocabulary, AnswerForm(opening="<t>", closing="</t>", answer="\n"), "think")
    draw = np.random.default_rng(1)
    logits = [draw.normal(size=backend.vocabulary.size).astype(np.float32) for _ in range(9)]
    for temperature in (0.0, 1.0):
        heard: dict[int, str] = {}
        whole, torn = (
            Decoder(backend.vocabulary, answer, budget=6, temperature=temperature, seed=4, on_text=heard.__setitem__)
            for _ in range(2)
        )
        wanted = [list(whole.advance(row)) for row in logits]
        spoken = dict(heard)
        for row in logits[:4]:
            torn.advance(row)
        torn.restart()
        assert torn.generated == 0 and [list(torn.advance(row)) for row in logits] == wanted
        assert torn.result() == whole.result() and heard == spoken, "the same text in the same places"
    backend.close()
