"""Where a whole model goes, decided from numbers: every situation and the word that is said of it."""

from __future__ import annotations

import logging

import pytest

from gramlite.errors import InputError, ResourceError
from gramlite.runtime.machine import Gpu, Machine
from gramlite.runtime.memory import Footprint
from gramlite.runtime.options import RuntimeOptions
from gramlite.runtime.placement import place

MB = 1_000_000
SIZE = Footprint(weights=1000 * MB, token=MB // 10, compute=100 * MB)
SMALL, LARGE = Gpu("small", 1200 * MB, 2000 * MB), Gpu("large", 8000 * MB, 9000 * MB, index=1)


@pytest.mark.parametrize(
    ("free", "gpus", "asked", "chosen", "context", "said"),
    [
        (4000, (), "auto", None, 4096, "no driver"),
        (4000, (), "cpu", None, 4096, ""),
        (4000, (LARGE,), "auto", "large", 4096, "Running on cuda (large): it fits the 8,000 MB free on large."),
        (4000, (SMALL, LARGE), "auto", "large", 4096, "free on large, device 1, the freest of 2."),
        (4000, (LARGE,), "cpu", None, 4096, ""),
        (4000, (LARGE,), "cuda", "large", 4096, "Running on cuda (large)"),
        (4000, (SMALL,), "auto", None, 4096, "1,510 MB are needed"),
        (1300, (), "cpu", None, 2000, "A context of 4096"),
    ],
)
def test_choices(
    free: int,
    gpus: tuple[Gpu, ...],
    asked: str,
    chosen: str | None,
    context: int,
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="gramlite")
    machine = Machine(free * MB, gpus, "no driver")
    placement = place("m", 4096, RuntimeOptions(device=asked), machine, cpu=SIZE, gpu=SIZE)  # type: ignore[arg-type]
    assert (placement.gpu.name if placement.gpu else None) == chosen
    assert placement.context == context
    assert said in caplog.text and bool(caplog.text) == bool(said)


@pytest.mark.parametrize(
    ("gpus", "options", "gpu", "error", "message"),
    [
        ((), RuntimeOptions(device="cuda"), SIZE, ResourceError, "asked for, but no driver"),
        ((SMALL,), RuntimeOptions(device="cuda"), SIZE, ResourceError, "free on small"),
        ((LARGE,), RuntimeOptions(device="cuda"), None, ResourceError, "made for the CPU"),
        ((), RuntimeOptions(context=5000), SIZE, InputError, "trained for"),
        ((), RuntimeOptions(device="cpu", context=4000), SIZE, ResourceError, "--context 2000"),
    ],
)
def test_refusals(
    gpus: tuple[Gpu, ...],
    options: RuntimeOptions,
    gpu: Footprint | None,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        place("m", 4096, options, Machine(1300 * MB, gpus, "no driver"), cpu=SIZE, gpu=gpu)


def test_what_does_not_fit_at_all_is_refused_with_bytes() -> None:
    parts = r"\(weights 1,000 MB, KV cache 410 MB, compute 100 MB\)"
    message = f"needs 1,509,600,000 bytes {parts} and 900,000,000 are free. No context fits"
    with pytest.raises(ResourceError, match=message):
        place("m", 4096, RuntimeOptions(), Machine(900 * MB), cpu=SIZE, gpu=SIZE)
