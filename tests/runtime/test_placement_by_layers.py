from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
from broken_gguf import UINT32, model_pieces

from gramlite.errors import InputError, ResourceError
from gramlite.formats.gguf_header import Header, read_header
from gramlite.runtime.gguf_memory import DRAFT_TOKENS, LayeredFootprint, block_bytes, choose_layout
from gramlite.runtime.machine import Gpu, Machine, thread_count
from gramlite.runtime.options import RuntimeOptions
from gramlite.runtime.placement import plan_offload

GiB = 1 << 30


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Header:
    pieces = model_pieces()
    pieces.put("llama.context_length", UINT32, 16384)
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    path.write_bytes(pieces.file())
    return read_header(path)


def footprint(header: Header, *adapters: Header) -> LayeredFootprint:
    return LayeredFootprint(header, choose_layout(RuntimeOptions()), adapters)


def gpu(free: int) -> Gpu:
    return Gpu("GPU 0", free, 24 * GiB)


def test_without_a_gpu_it_is_the_cpu_with_one_line(header: Header, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gramlite")
    plan = plan_offload(header, RuntimeOptions(), Machine(GiB, (), "the driver is missing"))
    assert (plan.gpu_layers, plan.device, plan.context) == (0, "cpu", 8192)
    assert [record.message for record in caplog.records] == ["Running on the CPU: the driver is missing."]


def test_a_gpu_with_room_takes_every_layer_and_the_head(header: Header) -> None:
    plan = plan_offload(header, RuntimeOptions(), Machine(GiB, (gpu(8 * GiB),)))
    assert plan.gpu_layers == 3 and plan.device == "cuda (3 of 3 layers on GPU 0)"


def test_the_gpu_with_most_free_memory_is_taken(header: Header) -> None:
    other = Gpu("GPU 1", 8 * GiB, 24 * GiB)
    assert "GPU 1" in plan_offload(header, RuntimeOptions(), Machine(GiB, (gpu(1000), other))).device


def test_a_gpu_with_little_room_takes_some_layers(header: Header, caplog: pytest.LogCaptureFixture) -> None:
    size = footprint(header)
    whole = size.at(8192)
    counts = [size.layers_in(free, 8192) for free in range(0, whole.total + 4096, 4096)]
    assert counts == sorted(counts) and set(counts) == {0, 1, 2, 3}
    free = next(free for free in range(0, whole.total, 4096) if size.layers_in(free, 8192) == 1)
    plan = plan_offload(header, RuntimeOptions(), Machine(GiB, (gpu(int(free / 0.94) + 4096),)))
    assert plan.gpu_layers == 1 and "1 of 3 layers fit" in caplog.text


WEIGHTS = 1 << 20  # of an adapter


def adapter(header: Header) -> Header:
    return replace(header, tensors=(replace(header.tensors[0], bytes=WEIGHTS),))


def gpu_for(header: Header, layers: int, *adapters: Header, context: int = 8192) -> Gpu:
    """A GPU with the least room that so many layers fit."""
    size = footprint(header, *adapters)
    fits = (n for n in range(0, 1 << 30, 4096) if size.layers_in(n, context) == layers)
    return gpu(int(next(fits) / 0.94) + 4096)


@pytest.mark.parametrize(
    ("layers", "short", "context", "runs_with", "said"),
    [
        (1, 0, None, 8192, "1 of 3 layers fit"),
        (2, 0, None, 8192, "2 of 3 layers fit"),
        (
            1,
            1,
            8192,
            None,
            r"room for 1 of 3 layers on GPU 0; the rest needs [\d,]+ bytes of main memory and [\d,]+ are",
        ),
        (2, 1, 8192, None, r"room for 2 of 3 layers on GPU 0.*The largest context that fits is [\d,]+: add --context"),
        (
            1,
            1,
            None,
            7936,
            "A context of 8192 tokens needs .* MiB beside the GPU and .* are free; using 7936",
        ),
        (1, 1 << 40, None, 7424, "using 7424"),
        (3, 1 << 40, None, 8192, "Running on cuda"),
    ],
)
def test_the_layers_that_stay_have_to_fit_main_memory(
    header: Header, layers: int, short: int, context: int | None, runs_with: int | None, said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, "gramlite")
    needed = footprint(header).beside_gpu(layers, 8192)
    machine = Machine(max(0, needed - short), (gpu_for(header, layers),))
    for device in ("auto", "cuda"):
        caplog.clear()
        options = RuntimeOptions(device=device, context=context)  # type: ignore[arg-type]
        if runs_with is None:
            with pytest.raises(ResourceError, match=said):
                plan_offload(header, options, machine)
        else:
            plan = plan_offload(header, options, machine)
            assert plan.context == runs_with and plan.gpu_layers >= layers
            assert re.search(said, caplog.text)


def test_layers_lie_on_one_side_and_buffers_on_both(header: Header) -> None:
    size, (blocks, rest) = footprint(header), block_bytes(header)
    whole = size.at(8192)
    assert size.beside_gpu(1, 8192) == whole.total - blocks[-1] - whole.kv_cache // 2
    assert size.beside_gpu(2, 8192) == whole.total - sum(blocks) - whole.kv_cache > rest
    assert size.beside_gpu(3, 8192) == 0


def test_adapters_take_room_beside_the_layers(header: Header) -> None:
    size, adapted = footprint(header), footprint(header, adapter(header))
    free = size.at(8192).total - 4096
    assert size.layers_in(free, 8192) == 2
    assert adapted.layers_in(free + WEIGHTS, 8192) == 2
    room = int(gpu_for(header, 1).free * 0.94)
    assert adapted.layers_in(room, 8192) == 0


def test_a_gpu_without_room_falls_back_loudly_or_not_at_all(header: Header, caplog: pytest.LogCaptureFixture) -> None:
    full = Machine(GiB, (gpu(1000),))
    assert plan_offload(header, RuntimeOptions(), full).gpu_layers == 0
    assert "not one layer fits" in caplog.text
    with pytest.raises(ResourceError, match="--device cuda was asked for, but not one layer fits"):
        plan_offload(header, RuntimeOptions(device="cuda"), full)
    with pytest.raises(ResourceError, match="no CUDA device"):
        plan_offload(header, RuntimeOptions(device="cuda"), Machine(GiB))


def test_cpu_is_cpu_also_beside_a_gpu(header: Header) -> None:
    assert plan_offload(header, RuntimeOptions(device="cpu"), Machine(GiB, (gpu(8 * GiB),))).device == "cpu"


def test_a_context_shrinks_by_itself_but_not_when_it_was_asked_for(
    header: Header, caplog: pytest.LogCaptureFixture
) -> None:
    short = Machine(footprint(header).at(2048).total + 1)
    plan = plan_offload(header, RuntimeOptions(device="cpu"), short)
    assert plan.context == 2048 and "using 2048" in caplog.text
    with pytest.raises(ResourceError, match=r"needs [\d,]+ bytes.*largest context that fits is 2,048"):
        plan_offload(header, RuntimeOptions(device="cpu", context=4096), short)
    with pytest.raises(ResourceError, match="No context fits"):
        plan_offload(header, RuntimeOptions(device="cpu"), Machine(1000))


def test_a_context_beyond_the_models_is_refused(header: Header) -> None:
    with pytest.raises(InputError, match="16,384 tokens the model was trained for"):
        plan_offload(header, RuntimeOptions(context=20000), Machine(GiB))


def test_threads(tmp_path: Path) -> None:
    assert thread_count(3) == 3 and thread_count(None) >= 1


def test_deterministic_judging_keeps_to_one_sequence(header: Header) -> None:
    many = RuntimeOptions(parallel=4)
    assert plan_offload(header, many, Machine(GiB)).layout.parallel == 4
    assert plan_offload(header, replace(many, deterministic=True), Machine(GiB)).layout.parallel == 1


def test_every_sequence_asks_for_its_next_token_and_the_guesses_behind_it() -> None:
    assert choose_layout(RuntimeOptions(parallel=3)).outputs == 3 * (1 + DRAFT_TOKENS) + 1
