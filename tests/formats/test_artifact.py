"""Manifests and configurations of any shape: what is right is used, everything else is refused with exit 3."""

from __future__ import annotations

import json
import os
import shutil
import struct
from math import prod
from pathlib import Path
from typing import Any

import pytest
from broken_gguf import ARRAY, BOOL, FLOAT32, STRING, UINT32, array, model_pieces, scalar
from hypothesis import given, settings
from hypothesis import strategies as st

import gramlite
from gramlite.cli import run

manifests = pytest.mark.fault("manifests")
REFERENCE = Path(gramlite.__file__).with_name("data") / "reference" / "hf"
PAIR = {"prompt": "q", "response_a": "1", "response_b": "2", "label": "A"}
VALID: dict[str, Any] = {
    "format": "scripted", "name": "judge", "quantization": None, "method": None, "source": {}, "settings": {},
    "calibration": None, "tools": {}, "template": {"name": "gramlite"}, "bits_per_weight": 4.5, "files": {}, "smoke": None,
    "manifest_version": 1,
}  # fmt: skip
OBJECTS = {"source", "settings", "tools", "files"}
TEXTS = {"format", "name"}
MAYBE_TEXT, MAYBE_OBJECT = {"quantization", "method"}, {"calibration", "template", "smoke"}

texts = st.text(st.characters(exclude_categories=[]), max_size=8) | st.sampled_from(
    ["gguf", "..", "/", "\ud800", "a\0b"]
)
numbers = st.integers() | st.floats() | st.sampled_from([10**400, -1, 1 << 40])
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def may_be(field: str, value: Any) -> bool:
    """Whether a field of a manifest may have a value, as its types say."""
    is_text, is_object = isinstance(value, str), isinstance(value, dict)
    if field in ("tools", "files"):
        return is_object and all(isinstance(each, str) for each in value.values())
    if field in OBJECTS | MAYBE_OBJECT:
        return is_object or (value is None and field in MAYBE_OBJECT)
    if field in TEXTS | MAYBE_TEXT:
        return is_text or (value is None and field in MAYBE_TEXT)
    if field == "manifest_version":
        return type(value) is int
    return value is None or (type(value) in (int, float) and 0 <= value < 1e6)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scripted judge and a pair beside it; its manifest is written by each test."""
    folder = tmp_path_factory.mktemp("script")
    metadata = {"chat_template": (REFERENCE / "chat_template.jinja").read_text()}
    (folder / "judge.json").write_text(json.dumps({"format": "scripted", "metadata": metadata}))
    (folder / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n")
    return folder / "judge.json"


def codes(model: Path, *commands: str) -> set[int]:
    """The exit codes of commands on a model; a traceback would be raised here."""
    pairs = model.with_name("pairs.jsonl")
    shutil.rmtree(model.with_name("run"), ignore_errors=True)
    arguments = {
        "inspect": ["inspect", str(model)],
        "judge": ["judge", str(pairs), "-m", str(model), "--mode", "direct"],
        "bench": ["bench", "run", f"pairs:{pairs}", "-m", str(model), "-o", str(model.with_name("run")), "--mode", "direct"],
        "pack": ["pack", str(model), "-o", str(model.with_name("packed.gguf"))],
    }  # fmt: skip
    return {run(arguments[name]) for name in commands}


@manifests
@pytest.mark.parametrize("field", VALID)
def test_every_field_of_every_type(field: str, script: Path) -> None:
    note = script.with_name("judge.json.json")

    @given(values)
    @settings(max_examples=40, deadline=None, derandomize=True)
    def check(value: Any) -> None:
        note.write_text(json.dumps(VALID | {field: value}), encoding="utf-8")
        found = codes(script, "inspect", "judge")
        assert found <= {0, 3}
        if not may_be(field, value):
            assert found == {3}, value

    check()
    note.write_text(json.dumps(VALID))
    assert codes(script, "inspect", "judge", "bench") == {0}
    note.unlink()


BAD = [
    True,
    3,
    -1.5,
    "text",
    [],
    {},
    [1],
    {"a": 1},
    {"name": [1]},
    {"text": 3},
    {"sha256": {}},
    {"text": "\ud800"},
    float("nan"),
]


@manifests
@pytest.mark.parametrize("command", ["bench", "pack"])
def test_other_commands_read_the_same_manifests(command: str, script: Path) -> None:
    note = script.with_name("judge.json.json")
    for field in VALID:
        for value in BAD[field in ("format", "files") :: 3]:
            note.write_text(json.dumps(VALID | {field: value}))
            found = codes(script, command)
            assert found <= {0, 2, 3}, (field, value)
            assert may_be(field, value) or command == "pack" or found == {3}, (field, value)
    note.unlink()


CONTENTS: dict[str, bytes] = {
    "nothing": b"", "no JSON": b"{", "a list": b"[]", "a number": b"3", "null": b"null", "no UTF-8": b'{"format": "\xff"}',
    "UTF-16": json.dumps(VALID).encode("utf-16"), "deep": b"[" * 200_000, "deep field": b'{"a":' * 100_000,
    "a long number": b'{"format": "scripted", "name": "j", "bits_per_weight": ' + b"9" * 5000 + b"}",
    "NaN": json.dumps(VALID | {"settings": {"error": float("nan")}}).encode(),
    "infinity": json.dumps(VALID | {"smoke": {"agreement": float("-inf")}}).encode(),
    "no name": b'{"format": "scripted"}', "an object of gramlite's own": b'{"judge": {"prompt": "q"}}',
}  # fmt: skip


@manifests
@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_of_any_bytes(name: str, script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = script.with_name("judge.json.json")
    note.write_bytes(CONTENTS[name])
    assert codes(script, "inspect", "judge", "bench") == {3}
    assert note.name in capsys.readouterr().err
    note.unlink()


@manifests
@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing", "link to itself"])
def test_what_is_no_file(kind: str, script: Path) -> None:
    note = script.with_name("judge.json.json")
    {
        "folder": note.mkdir, "pipe": lambda: os.mkfifo(note), "link to nothing": lambda: note.symlink_to("nowhere"),
        "link to itself": lambda: note.symlink_to(note.name),
    }[kind]()  # fmt: skip
    assert codes(script, "inspect", "judge", "bench") == {3}
    note.rmdir() if kind == "folder" else note.unlink()


NAMES = [
    "../outside",
    "/etc/hostname",
    "a\0b",
    "\ud800",
    "",
    ".",
    "x" * 5000,
    "out",
    "loop",
    "folder",
    "missing",
    "pairs.jsonl/x",
]


@manifests
def test_files_outside_missing_or_impossible(script: Path, tmp_path: Path) -> None:
    folder = script.parent
    (folder.parent / "outside").write_text("")
    (folder / "out").symlink_to(folder.parent / "outside")
    (folder / "loop").symlink_to("loop")
    (folder / "folder").mkdir()
    note = script.with_name("judge.json.json")
    for name in NAMES:
        note.write_text(json.dumps(VALID | {"files": {name: "0" * 64}}))
        assert codes(script, "inspect", "judge", "bench") == {3}, name
    note.unlink()


@manifests
@pytest.mark.parametrize(
    "format", ["gguf", "hf", "onnx", "gptq", "scripted", "gguf_library", "__init__", "../x", "a.b", "", "\0"]
)
@pytest.mark.parametrize("place", ["script", "gguf", "folder"])
def test_any_format_on_any_artifact(format: str, place: str, script: Path, tmp_path: Path) -> None:
    model = tmp_path / "judge"
    match place:
        case "script":
            shutil.copy(script, model)
        case "gguf":
            model.write_bytes(model_pieces().file())
        case "folder":
            model.mkdir()
            (model / "README.md").write_text("")
    note = model / "gramlite.json" if model.is_dir() else tmp_path / "judge.json"
    note.write_text(json.dumps(VALID | {"format": format}))
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n")
    right = {0} if (format, place) == ("scripted", "script") else set()  # the GGUF file has no chat template
    assert codes(model, "judge") <= {3} | right and codes(model, "inspect") <= {0, 3}


@manifests
@pytest.mark.parametrize("field", ["metadata", "rationale", "seconds", "format", "name"])
def test_scripts_of_any_shape(field: str, script: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = tmp_path_factory.mktemp("scripts") / "judge.json"
    shutil.copy(script.with_name("pairs.jsonl"), model.with_name("pairs.jsonl"))
    valid = json.loads(script.read_text())

    @given(values)
    @settings(max_examples=60, deadline=None, derandomize=True)
    def check(value: Any) -> None:
        if field == "seconds" and isinstance(value, int | float) and value > 0.01:
            value = -value
        model.write_text(json.dumps(valid | {field: value}))
        assert codes(model, "judge", "inspect") <= {0, 3}

    check()
    for key in ("chat_template", "template", "bos", "eos", "quantization"):
        for value in BAD:
            model.write_text(json.dumps(valid | {"metadata": valid["metadata"] | {key: value}}))
            assert codes(model, "judge") <= {0, 3}, (key, value)


# --- folders -------------------------------------------------------------------------------------------------


def write_folder(folder: Path) -> Path:
    """A checkpoint in the shape of the reference judge, with few and small weights."""
    from gramlite.formats.architecture import expected_tensors, read_architecture

    shutil.copytree(REFERENCE, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
               "num_key_value_heads": 1, "head_dim": 4}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    header, position = {}, 0
    for tensor in expected_tensors(read_architecture(config)).values():
        size = 2 * prod(tensor.shape)
        header[tensor.name] = {"dtype": "BF16", "shape": [*tensor.shape], "data_offsets": [position, position + size]}
        position += size
    encoded = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(position))
    return folder


CONFIG = ["architectures", "model_type", "quantization_config", "max_position_embeddings", "eos_token_id", "hidden_size",
          "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "num_hidden_layers", "intermediate_size",
          "rope_parameters", "rope_scaling", "rope_theta", "rms_norm_eps", "tie_word_embeddings", "hidden_act",
          "attention_bias", "use_sliding_window", "partial_rotary_factor"]  # fmt: skip
SETTINGS = ["chat_template", "bos_token", "eos_token"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "judge")


@manifests
@pytest.mark.parametrize(
    "file, fields",
    [("config.json", CONFIG), ("generation_config.json", ["eos_token_id"]), ("tokenizer_config.json", SETTINGS),
     ("genai_config.json", ["model"])],
)  # fmt: skip
def test_a_folders_settings_of_any_shape(file: str, fields: list[str], folder: Path) -> None:
    path = folder / file
    valid = json.loads(path.read_text()) if path.is_file() else {}

    @given(st.sampled_from(fields), values)
    @settings(max_examples=100, deadline=None, derandomize=True)
    def check(field: str, value: Any) -> None:
        path.write_text(json.dumps(valid | {field: value}))
        assert codes(folder, "inspect") <= {0, 3}, (field, value)

    check()
    for content in CONTENTS.values():
        path.write_bytes(content)
        assert codes(folder, "inspect") <= {0, 3}, content[:40]
    path.unlink()
    os.mkfifo(path)
    assert codes(folder, "inspect") <= {0, 3}


def test_an_exports_settings_of_any_shape(folder: Path, tmp_path: Path) -> None:
    from gramlite.export.plan import plan_export

    from gramlite.errors import GramliteError
    from gramlite.formats.checkpoint import open_checkpoint

    path = folder / "config.json"
    before = path.read_bytes()

    @given(st.sampled_from(CONFIG), values)
    @settings(max_examples=40, deadline=None, derandomize=True)
    def check(field: str, value: Any) -> None:
        path.write_text(json.dumps(json.loads(before) | {field: value}))
        try:
            plan_export(open_checkpoint(folder), "f16")
        except GramliteError as error:
            assert error.exit_code == 3

    check()


ADAPTER: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "rank_pattern": {},
           "alpha_pattern": {}, "use_rslora": False, "base_model_name_or_path": "base", "bias": "none", "use_dora": False,
           "init_lora_weights": True, "modules_to_save": None, "layers_to_transform": None}  # fmt: skip


@manifests
@pytest.mark.parametrize("field", ADAPTER)
def test_an_adapters_settings_of_any_shape(field: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    from gramlite.export.peft import open_adapter

    from gramlite.errors import GramliteError

    lora = tmp_path_factory.mktemp("lora")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    shapes = {name.format("A"): [2, 8], name.format("B"): [8, 2]}
    header, position = {}, 0
    for key, shape in shapes.items():
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + 64]}
        position += 64
    encoded = json.dumps(header).encode()
    (lora / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(position))

    @given(values)
    @settings(max_examples=50, deadline=None, derandomize=True)
    def check(value: Any) -> None:
        (lora / "adapter_config.json").write_text(json.dumps(ADAPTER | {field: value}))
        try:
            open_adapter(lora)
        except GramliteError as error:
            assert error.exit_code == 3

    check()


# --- GGUF metadata -------------------------------------------------------------------------------------------

RAW: dict[str, tuple[int, bytes]] = {
    "number": (UINT32, scalar(UINT32, 3)), "flag": (BOOL, scalar(BOOL, 1)), "float": (FLOAT32, scalar(FLOAT32, 1.5)),
    "numbers": (ARRAY, array(UINT32, [1, 2])), "texts": (ARRAY, array(STRING, ["a", "b"])), "none": (ARRAY, array(UINT32, [])),
    "text": (STRING, scalar(STRING, "text")), "empty": (STRING, scalar(STRING, "")), "JSON": (STRING, scalar(STRING, '{"a": [')),
}  # fmt: skip
KEYS = ["general.name", "tokenizer.chat_template", "tokenizer.ggml.pre", "gramlite.template.name", "gramlite.template.sha256",
        "gramlite.template.text", "gramlite.companion", "gramlite.tokenizer.normalizer", "general.file_type",
        "general.quantization_version", "tokenizer.ggml.add_space_prefix"]  # fmt: skip


@manifests
@pytest.mark.parametrize("key", KEYS)
def test_metadata_of_any_type(key: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n")
    for kind, (number, raw) in RAW.items():
        pieces = model_pieces()
        pieces.put_raw(key, number, raw)
        model = tmp_path / "judge.gguf"
        model.write_bytes(pieces.file())
        assert codes(model, "inspect", "judge") <= {0, 3}, kind
        quantize = [
            "quantize",
            "gguf",
            str(model),
            "-o",
            str(tmp_path / "out.gguf"),
            "--type",
            "Q8_0",
            "--no-smoke",
            "--force",
        ]
        assert run(quantize) in (0, 1, 2, 3), kind
