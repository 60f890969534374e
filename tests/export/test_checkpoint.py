"""Checkpoints that are refused, each by name and with nothing written, and disks that run full."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from gramlite.export.gguf import export_gguf

from gramlite.errors import GramliteError, InputError, ModelError, ResourceError
from gramlite.formats.checkpoint import open_checkpoint, read_safetensors_header


@pytest.fixture
def checkpoint(checkpoint_of: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(checkpoint_of("qwen2"), tmp_path / "checkpoint"))


@pytest.fixture
def sharded(checkpoint_of: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint_of("qwen2", shards=2), tmp_path / "checkpoint"))


def refuse(folder: Path, message: str, kind: type[GramliteError] = ModelError) -> None:
    """Export must raise, and leave nothing where the file would have been."""
    output = folder.parent / "out" / "model.gguf"
    with pytest.raises(kind, match=message) as caught:
        export_gguf(folder, output)
    assert caught.value.exit_code == {ModelError: 3, InputError: 2, ResourceError: 4}[kind]  # type: ignore[index]
    assert not output.parent.exists() or not list(output.parent.iterdir())


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def rename(old: str, new: str) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header.update({new: header.pop(old)})


def test_pickles_are_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    refuse(checkpoint, r"pytorch_model\.bin, a pickle")


def test_no_weights_no_config_no_folder(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    refuse(checkpoint, "no model.safetensors")
    (checkpoint / "config.json").unlink()
    refuse(checkpoint, "no config.json")
    refuse(checkpoint / "nowhere", "is no folder", InputError)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refuse(sharded, f"shard .*{shard.name} is missing")
    (sharded / "model.safetensors.index.json").unlink()
    refuse(sharded, f"shard .*{shard.name} is missing")


def test_an_index_that_disagrees_is_refused(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra.weight"] = sorted(content["weight_map"].values())[0]
    index.write_text(json.dumps(content))
    refuse(sharded, r"'model\.extra\.weight' is missing from")
    content["weight_map"]["model.extra.weight"] = "../other.safetensors"
    index.write_text(json.dumps(content))
    refuse(sharded, r"'\.\./other\.safetensors', which is no safetensors file of this folder")


@pytest.mark.parametrize("kept", [0, 4, 8, 200])
def test_a_truncated_header_is_refused(checkpoint: Path, kept: int) -> None:
    os.truncate(checkpoint / "model.safetensors", kept)
    refuse(checkpoint, r"model\.safetensors is refused.*cut short")


@pytest.mark.parametrize("missing", [1, 1000])
def test_truncated_data_are_refused(checkpoint: Path, missing: int) -> None:
    file = checkpoint / "model.safetensors"
    os.truncate(file, file.stat().st_size - missing)
    refuse(checkpoint, rf"model\.safetensors is refused: it is cut short.*the file has {file.stat().st_size:,}")


def test_damaged_headers_are_refused(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    name = "model.norm.weight"
    faults: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
        (lambda header: header[name].update(shape=[65]), "do not fit"),
        (lambda header: header[name].update(shape=[-64]), "unusable shape"),
        (lambda header: header[name].update(dtype="F12"), "unknown dtype 'F12'"),
        (lambda header: header[name].update(data_offsets=[0]), "unusable data_offsets"),
        (lambda header: header.update({name: 7}), "unknown dtype None"),
        (lambda header: header.pop(name), "belong to no tensor|is due"),
    ]
    for change, message in faults:
        file.write_bytes(whole)
        edit_header(file, change)
        refuse(checkpoint, message)
    for start, message in (
        (b"\xff" * 8, "length is unusable"),
        (struct.pack("<Q", 9) + b"{not json", "cannot be read"),
    ):
        file.write_bytes(start + whole[len(start) :])
        refuse(checkpoint, message)
    file.write_bytes(whole + b"\0")
    refuse(checkpoint, "bytes that belong to no tensor")
    twice = b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "a": 1}'
    file.write_bytes(struct.pack("<Q", len(twice)) + twice)
    refuse(checkpoint, "appears twice")


def test_missing_unexpected_and_misshapen_tensors_are_named(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    edit_header(file, rename("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.bias"))
    refuse(checkpoint, r"unexpected tensor 'model\.layers\.1\.mlp\.up_proj\.bias'")
    file.write_bytes(whole)
    edit_header(file, rename("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"))
    refuse(checkpoint, r"'model\.layers\.1\.mlp\.up_proj\.weight' is missing")
    file.write_bytes(whole)
    edit_header(file, lambda header: header["model.layers.0.mlp.up_proj.weight"].update(shape=[64, 96]))
    refuse(checkpoint, r"'model\.layers\.0\.mlp\.up_proj\.weight' .* has the shape \[64, 96\].*\[96, 64\]")
    file.write_bytes(whole)
    edit_header(file, lambda header: header["model.norm.weight"].update(dtype="I32"))
    refuse(checkpoint, r"'model\.norm\.weight' .* is I32")


MISTRAL = pytest.mark.fault("mistral")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "'GemmaForCausalLM' is unknown.*LlamaForCausalLM"),
        ({"architectures": None}, "None is unknown"),
        pytest.param({"model_type": "gemma2"}, "says '.*ForCausalLM' and model_type 'gemma2'", marks=MISTRAL),
        pytest.param({"model_type": "mistral"}, "says '.*ForCausalLM' and model_type 'mistral'", marks=MISTRAL),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized already"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "not all positive"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' is not supported for qwen2"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'"),
    ],
)  # fmt: skip
def test_configs_that_cannot_be_expressed_are_refused(checkpoint: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(checkpoint, **changes)
    refuse(checkpoint, message)


def test_a_tied_head_of_its_own_is_refused_and_a_copy_left_out(
    checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint_of("llama-untied", attention_bias=False, mlp_bias=False), tmp_path / "c"))
    edit_config(folder, tie_word_embeddings=True)
    refuse(folder, r"ties lm_head\.weight to the embedding, but the two differ")
    tensors = read_safetensors_header(folder / "model.safetensors")
    head, embedding = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[head.start : head.start + head.bytes] = data[embedding.start : embedding.start + embedding.bytes]
    (folder / "model.safetensors").write_bytes(data)
    manifest = export_gguf(folder, tmp_path / "model.gguf")
    assert "left out" in manifest.settings["notes"][0]


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (b"\xff\xff\xff\x7f", "f32", "no number"),
        (b"\xff\xff\xff\x7f", "bf16", "no number"),  # rounding would carry it over into a zero
        (struct.pack("<f", -numpy.inf), "f16", "infinite"),
        (struct.pack("<f", 1e6), "f16", "F16 cannot hold.*--dtype bf16"),
        (struct.pack("<f", 3.4e38), "bf16", "BF16 cannot hold"),
    ],
)
def test_values_that_would_be_lost_are_refused(checkpoint: Path, value: bytes, dtype: str, message: str) -> None:
    tensor = open_checkpoint(checkpoint).tensors["model.layers.1.mlp.down_proj.weight"]
    data = bytearray((checkpoint / "model.safetensors").read_bytes())
    data[tensor.start + 4 : tensor.start + 8] = value
    (checkpoint / "model.safetensors").write_bytes(data)
    output = checkpoint.parent / "model.gguf"
    with pytest.raises(ModelError, match=rf"'model\.layers\.1\.mlp\.down_proj\.weight'.*{message}"):
        export_gguf(checkpoint, output, dtype=dtype)
    assert [path.name for path in output.parent.iterdir()] == ["checkpoint"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB; skipped where mounting is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a small tmpfs is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def old_artifact(folder: Path) -> dict[str, bytes]:
    (folder / "model.gguf").write_bytes(b"older artifact")
    (folder / "model.gguf.json").write_bytes(b'{"format": "gguf", "name": "older", "manifest_version": 1}')
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_disk_without_room_is_refused_before_writing(checkpoint: Path, small_disk: Path) -> None:
    before = old_artifact(small_disk)
    with pytest.raises(ResourceError, match="MB free and .* MB are needed"):
        export_gguf(checkpoint, small_disk / "model.gguf", force=True)
    assert {path.name: path.read_bytes() for path in small_disk.iterdir()} == before


def test_a_disk_that_fills_up_leaves_the_older_artifact(
    checkpoint: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else takes the space after the check: the file system itself says no in the middle of a tensor."""
    monkeypatch.setattr("gramlite.storage.check_free_space", lambda folder, need: None)
    before = old_artifact(small_disk)
    (small_disk / "other").write_bytes(bytes(900_000))
    with pytest.raises(ResourceError, match="disk of .* is full; model.gguf was not written"):
        export_gguf(checkpoint, small_disk / "model.gguf", force=True)
    (small_disk / "other").unlink()
    assert {path.name: path.read_bytes() for path in small_disk.iterdir()} == before


def test_a_full_disk_at_the_manifest_leaves_the_older_artifact(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    before = old_artifact(folder)

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gramlite.formats.publish.write_durably", full)
    with pytest.raises(ResourceError, match="full"):
        export_gguf(checkpoint, folder / "model.gguf", force=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_existing_file_is_kept_without_force(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    before = old_artifact(folder)
    with pytest.raises(InputError, match="--force"):
        export_gguf(checkpoint, folder / "model.gguf")
    with pytest.raises(InputError, match="is a folder"):
        export_gguf(checkpoint, folder, force=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
