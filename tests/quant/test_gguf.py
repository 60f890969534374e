"""llama.cpp's quantizer through us writes what it writes by itself, and what it cannot do is refused in words."""

from __future__ import annotations

import ctypes
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gramlite.export.gguf import export_gguf
from gramlite.quant import ggml, gguf, gguf_file
from gramlite.quant.calibration import Transcript, write_transcripts
from gramlite.quant.ggml import Job, QuantizerError, dequantize_rows, quantize_file, quantize_rows, rounded
from gramlite.quant.gguf import command, quantize_gguf
from gramlite.quant.imatrix import ImportanceMatrix, collect_importance, read_imatrix, write_imatrix
from gramlite.quant.mixed import CANDIDATES
from gramlite.quant.tensor_types import file_type, parse_override

from gramlite.errors import GramliteError, InputError, ModelError, ResourceError
from gramlite.formats.artifact import read_manifest, verify_files
from gramlite.formats.gguf_header import read_header

from ..export.conftest import checkpoint_of, last_logits  # noqa: F401

WIDE = {"hidden_size": 256, "intermediate_size": 288, "num_attention_heads": 4, "initializer_range": 0.1}
TRANSCRIPTS = [Transcript(tuple(range(3 + n, 60 + n)), (7 if n % 2 else 9,), str(n)) for n in range(4)]


@pytest.fixture(scope="session")
def checkpoint(checkpoint_of: Callable[..., Path]) -> Path:  # noqa: F811
    """Two layers whose rows are 256 and, in ffn_down, 288 wide: no multiple of a K type's blocks."""
    return checkpoint_of("llama-tied", **WIDE)


@pytest.fixture(scope="session")
def exact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exact") / "judge.f16.gguf"
    export_gguf(checkpoint, path, dtype="f16", template="gramlite")
    return path


@pytest.fixture(scope="session")
def importance(checkpoint: Path) -> ImportanceMatrix:
    return collect_importance(checkpoint, TRANSCRIPTS, dataset="made up")


def by_llama_cpp(source: Path, output: Path, kind: int, matrix: dict[str, Any]) -> bytes:
    """What llama_model_quantize writes when it is called and nothing else is done."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = kind, 1
    entries = [
        (name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), len(values))
        for name, values in matrix.items()
    ]
    kept = (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))(*entries)
    if entries:
        parameters.imatrix = kept
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), ctypes.byref(parameters)) == 0
    return output.read_bytes()


def types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.type for tensor in read_header(path).tensors if len(tensor.shape) > 1}


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K_M", "IQ4_XS", "Q8_0", "Q2_K", "F16"])
def test_a_plain_file_is_llama_cpps_own(kind: str, exact: Path, tmp_path: Path) -> None:
    manifest = quantize_gguf(exact, tmp_path / "model.gguf", kind=kind.lower())
    expected = by_llama_cpp(exact, tmp_path / "other.gguf", ggml.FILE_TYPE_NUMBERS[kind], {})
    assert (tmp_path / "model.gguf").read_bytes() == expected
    assert (manifest.quantization, manifest.method) == (kind, "llama.cpp")


@pytest.mark.parametrize("kind", ["Q4_0", pytest.param("IQ2_XS", marks=pytest.mark.slow)])
def test_so_is_one_with_an_importance_matrix(
    kind: str, exact: Path, importance: ImportanceMatrix, tmp_path: Path
) -> None:
    manifest = quantize_gguf(exact, tmp_path / "model.gguf", kind=kind, imatrix=importance)
    means = importance.means()
    expected = by_llama_cpp(exact, tmp_path / "other.gguf", ggml.FILE_TYPE_NUMBERS[kind], means)
    assert (tmp_path / "model.gguf").read_bytes() == expected
    assert manifest.calibration is not None
    assert manifest.calibration["transcripts"] == 4
    assert len(manifest.calibration["imatrix_sha256"]) == 64


def test_manifest_says_where_it_came_from_and_what_fell_back(exact: Path, tmp_path: Path) -> None:
    quantize_gguf(exact, tmp_path / "model.gguf", kind="Q4_K_M")
    manifest = read_manifest(tmp_path / "model.gguf")
    assert manifest is not None
    verify_files(tmp_path / "model.gguf", manifest)
    origin = read_manifest(exact)
    assert origin is not None
    assert manifest.source["sha256"] == origin.files[exact.name]
    assert manifest.source["source"] == origin.source
    assert manifest.template == origin.template
    found = types(tmp_path / "model.gguf")
    fallbacks = manifest.settings["fallbacks"]
    assert set(fallbacks) == {"blk.0.ffn_down.weight", "blk.1.ffn_down.weight"}
    assert all(found[name] == taken != meant for name, (meant, taken) in fallbacks.items())
    assert "no multiple" in manifest.settings["notes"][0]
    payload = sum(tensor.bytes for tensor in read_header(tmp_path / "model.gguf").tensors)
    weights = sum(int(np.prod(tensor.shape)) for tensor in read_header(exact).tensors)
    assert manifest.bits_per_weight == pytest.approx(8 * payload / weights, abs=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_checkpoint_loses_nothing_on_the_way(
    dtype: str,
    checkpoint_of: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    folder = checkpoint_of("qwen2", dtype=dtype)
    kind = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype]
    export_gguf(folder, tmp_path / "model.gguf", dtype=kind)
    expected = by_llama_cpp(tmp_path / "model.gguf", tmp_path / "other.gguf", 7, {})
    out = tmp_path / "new"
    manifest = quantize_gguf(folder, out / "model.gguf", kind="Q8_0", template="gramlite")
    assert sorted(path.name for path in out.iterdir()) == ["model.gguf", "model.gguf.json"]
    assert set(manifest.source["files"]) >= {"model.safetensors", "config.json"}
    assert manifest.template is not None
    assert manifest.template["name"] == "gramlite"
    header, other = read_header(out / "model.gguf"), read_header(tmp_path / "other.gguf")
    assert header.metadata["gramlite.template.name"] == "gramlite"
    assert len(expected) > other.data_offset
    assert (out / "model.gguf").read_bytes()[header.data_offset :] == expected[other.data_offset :]


def test_single_tensors_take_other_types(exact: Path, tmp_path: Path) -> None:
    overrides = [(r"blk\.1\..*attn_v", "q8_0"), ("attn_v", "F16"), ("token_embd", "Q6_K")]
    manifest = quantize_gguf(exact, tmp_path / "model.gguf", kind="Q4_0", overrides=overrides)
    found = types(tmp_path / "model.gguf")
    assert found["blk.1.attn_v.weight"] == "Q8_0"
    assert found["blk.0.attn_v.weight"] == "F16"
    assert found["token_embd.weight"] == "Q6_K"
    assert found["blk.0.attn_q.weight"] == "Q4_0"
    assert manifest.settings["types"] == {"Q4_0": 12, "F16": 1, "Q8_0": 1, "Q6_K": 1}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"kind": "Q4_7"}, InputError, "There is no type 'Q4_7'"),
        ({"kind": "IQ2_XXS"}, InputError, "needs an importance matrix"),
        ({"kind": "Q4_0", "overrides": [("attn_q", "IQ2_XXS")]}, InputError, "needs an importance matrix"),
        ({"kind": "Q4_0", "overrides": [("attn_z", "Q8_0")]}, InputError, "has a name with 'attn_z' in it"),
        ({"kind": "Q4_0", "overrides": [("attn_(", "Q8_0")]}, InputError, "no regular expression"),
        ({"kind": "Q4_0", "overrides": [("attn_q", "Q8_1")]}, InputError, "cannot be of type"),
        ({"kind": "F16", "overrides": [("attn_q", "Q8_0")]}, InputError, "no types for single tensors"),
        ({"kind": "Q4_0", "template": "nowhere.txt"}, ModelError, "nowhere.txt"),
    ],
)
def test_refusals_leave_nothing(
    options: dict[str, Any], error: type[Exception], words: str, exact: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        quantize_gguf(exact, tmp_path / "model.gguf", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_type_that_llama_cpp_aborts_on_is_an_error(exact: Path, tmp_path: Path) -> None:
    """For the embedding llama.cpp does not ask for a matrix, and then ends the process."""
    with pytest.raises(QuantizerError, match="could not quantize"):
        quantize_gguf(exact, tmp_path / "model.gguf", kind="Q4_0", overrides=[("token_embd", "IQ2_XXS")])
    assert list(tmp_path.iterdir()) == []


def test_sources_that_are_refused(exact: Path, importance: ImportanceMatrix, tmp_path: Path) -> None:
    quantize_gguf(exact, tmp_path / "model.gguf", kind="Q8_0")
    before = (tmp_path / "model.gguf").read_bytes()
    with pytest.raises(ModelError, match="quantized already"):
        quantize_gguf(tmp_path / "model.gguf", tmp_path / "again.gguf", kind="Q4_0")
    with pytest.raises(InputError, match="already exists"):
        quantize_gguf(exact, tmp_path / "model.gguf", kind="Q4_0")
    with pytest.raises(InputError, match="no model at"):
        quantize_gguf(tmp_path / "none.gguf", tmp_path / "again.gguf", kind="Q4_0")
    wrong = ImportanceMatrix({"blk.0.attn_q.weight": np.ones(32, np.float32)}, 1, 1, ())
    with pytest.raises(ModelError, match="another model: 'blk.0.attn_q.weight' has 32 inputs there and 256 here"):
        quantize_gguf(exact, tmp_path / "model.gguf", kind="Q4_0", imatrix=wrong, force=True)
    assert (tmp_path / "model.gguf").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "model.gguf.json"]


def test_what_cannot_be_is_refused_before_anything_is_calibrated(
    exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "load_calibration", lambda *arguments, **options: pytest.fail("pairs were judged"))
    wrong = ImportanceMatrix({"blk.0.attn_q.weight": np.ones(32, np.float32)}, 1, 1, ())
    write_imatrix(tmp_path / "other.imatrix", wrong)
    (tmp_path / "there").write_text("before")
    out, pairs = tmp_path / "model.gguf", str(tmp_path / "pairs.jsonl")
    faults = {
        "belongs to another model": [str(exact), "-o", str(out), "--imatrix", str(tmp_path / "other.imatrix")],
        "there already exists": [str(exact), "-o", str(out), "--save-imatrix", str(tmp_path / "there")],
        "lie in one another": [str(exact), "-o", str(exact), "--force"],
    }
    for message, words in faults.items():
        error = CliRunner().invoke(command, [*words, "--calibration", pairs]).exception
        assert isinstance(error, GramliteError) and message in str(error)
    error = CliRunner().invoke(command, [str(exact), "-o", str(out), "--save-imatrix", str(tmp_path / "new")]).exception
    assert isinstance(error, InputError) and "Add --calibration" in str(error)
    assert (tmp_path / "there").read_text() == "before" and not out.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_what_was_there(exact: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small_disk / "model.gguf").write_bytes(b"old")
    (small_disk / "other").write_bytes(bytes(700_000))
    with pytest.raises(ResourceError, match="MB free"):
        quantize_gguf(exact, small_disk / "model.gguf", kind="Q8_0", force=True)
    monkeypatch.setattr(gguf_file, "_room", lambda header, kind: -(1 << 20))
    with pytest.raises(ResourceError, match="is full"):
        quantize_gguf(exact, small_disk / "model.gguf", kind="Q8_0", force=True)
    assert {path.name for path in small_disk.iterdir()} == {"model.gguf", "other"}
    assert (small_disk / "model.gguf").read_bytes() == b"old"


def test_the_child_says_what_it_is_at_and_how_it_ended(exact: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    job = Job(source=str(exact), output=str(tmp_path / "model.gguf"), kind="Q4_0")
    quantize_file(job, {}, advance=lambda done, total: seen.append((done, total)))
    count = len(read_header(exact).tensors)
    assert seen == [(number, count) for number in range(1, count + 1)]
    with pytest.raises(QuantizerError, match="failed to load|no such file|No such file|open"):
        quantize_file(Job(source="nowhere", output=str(tmp_path / "x"), kind="Q4_0"), {}, advance=lambda *_: None)


@pytest.mark.parametrize("kind", CANDIDATES)
def test_rows_are_what_the_gguf_package_reads(kind: str) -> None:
    import gguf as package

    weight = np.random.default_rng(3).standard_normal((5, 512)).astype(np.float32)
    blocks = quantize_rows(weight, kind)
    back = dequantize_rows(blocks, kind, 512)
    assert np.array_equal(back, package.dequantize(blocks, package.GGMLQuantizationType[kind]))
    assert np.array_equal(back, rounded(weight, kind))
    assert 0 < np.square(back - weight).mean() < 0.1
    weights = np.linspace(0.01, 1, 512).astype(np.float32) ** 4
    careful = rounded(weight, kind, weights)
    if kind == "Q8_0":  # which has no use for them
        assert np.array_equal(careful, back)
    elif kind != "Q4_K":  # whose search does not always find the better scales
        assert (np.square(careful - weight) @ weights).sum() < (np.square(back - weight) @ weights).sum()
    with pytest.raises(ModelError, match="blocks of"):
        quantize_rows(weight[:, :48], kind)


def test_rows_that_llama_cpp_would_abort_on_are_refused() -> None:
    with pytest.raises(ModelError, match="without an importance matrix"):
        rounded(np.ones((1, 256), np.float32), "IQ2_XXS")
    assert rounded(np.ones((1, 256), np.float32), "IQ2_XXS", np.ones(256, np.float32)).shape == (1, 256)


def test_names_of_types() -> None:
    assert (file_type("q4_k"), file_type("iq4_xs"), file_type("Q3_K_S")) == ("Q4_K_M", "IQ4_XS", "Q3_K_S")
    assert parse_override("attn_v=q8_0") == ("attn_v", "Q8_0")
    with pytest.raises(InputError, match="PATTERN=TYPE"):
        parse_override("attn_v")


def test_command_calibrates_saves_and_reads_a_matrix(checkpoint: Path, exact: Path, tmp_path: Path) -> None:
    calibration, saved = tmp_path / "transcripts.jsonl", tmp_path / "matrix.gguf"
    write_transcripts(calibration, TRANSCRIPTS)
    words = ["--type", "Q4_0", "--template", "gramlite"]
    first = CliRunner().invoke(
        command,
        [str(checkpoint), "-o", str(tmp_path / "a.gguf"), *words, "--calibration", str(calibration),
         "--save-imatrix", str(saved), "--embedding-type", "q8_0"],
        catch_exceptions=False,
    )  # fmt: skip
    shown = json.loads(first.stdout)
    assert (shown["quantization"], shown["path"]) == ("Q4_0", str(tmp_path / "a.gguf"))
    manifest = read_manifest(tmp_path / "a.gguf")
    assert manifest is not None
    assert manifest.calibration is not None
    assert (manifest.calibration["source"], manifest.calibration["transcripts"]) == ("transcripts.jsonl", 4)
    assert read_imatrix(saved).chunks == 4
    plain = quantize_gguf(exact, tmp_path / "plain.gguf", kind="Q4_0", overrides=[("token_embd", "Q8_0")])
    assert types(tmp_path / "a.gguf") == types(tmp_path / "plain.gguf")
    assert len(manifest.settings["written_with_imatrix"]) <= 14
    assert plain.settings["types"] == manifest.settings["types"]
    assert types(tmp_path / "a.gguf")["token_embd.weight"] == "Q8_0"
    arguments = [str(exact), "-o", str(tmp_path / "b.gguf"), *words, "--imatrix", str(saved), "--output-type", "Q8_0"]
    CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert types(tmp_path / "b.gguf")["token_embd.weight"] == "Q8_0"
    with pytest.raises(InputError, match="is a file"):
        CliRunner().invoke(
            command,
            [str(exact), "-o", str(tmp_path / "c.gguf"), "--calibration", str(calibration)],
            catch_exceptions=False,
        )


def test_saved_matrix_is_the_one_that_was_used(tmp_path: Path, importance: ImportanceMatrix) -> None:
    write_imatrix(tmp_path / "matrix.gguf", importance)
    back = read_imatrix(tmp_path / "matrix.gguf").means()
    assert all(np.array_equal(values, back[name]) for name, values in importance.means().items())


def test_llama_cpp_computes_with_it(exact: Path, tmp_path: Path, last_logits: Callable[..., Any]) -> None:  # noqa: F811
    quantize_gguf(exact, tmp_path / "model.gguf", kind="Q8_0")
    tokens = list(range(5, 60))
    whole, eight = last_logits(exact, tokens), last_logits(tmp_path / "model.gguf", tokens)
    assert 0 < np.linalg.norm(whole - eight) < 0.1 * np.linalg.norm(whole)
