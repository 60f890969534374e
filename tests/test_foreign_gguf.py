"""GGUF files from elsewhere: what they lack is refused by name, or can be given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import broken_gguf
import pytest

from gramlite.cli import run

QUESTION = "{question}|{response_a}|{response_b}"


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    """A judge's prompt that fits into a tiny model."""
    path = tmp_path / "prompt.txt"
    path.write_text(QUESTION)
    return path


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Writes the tiny model without what is named, or with other text values."""

    def made(*without: str, architecture: str = "llama", **values: str) -> Path:
        pieces = broken_gguf.model_pieces(architecture)
        for key in without:
            pieces.drop(key)
        for key, value in values.items():
            pieces.put(f"tokenizer.{key.replace('__', '.')}", broken_gguf.STRING, value)
        path = tmp_path / "elsewhere.gguf"
        path.write_bytes(pieces.file())
        return path

    return made


def judge(model: Path, prompt: Path, *more: str) -> int:
    pair = ["--prompt", "q", "--a", "x", "--b", "y"]
    return run(["judge", *pair, "-m", str(model), "--template", str(prompt), "--mode", "direct", "--json", *more])


@pytest.mark.fault("foreign-gguf")
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("empty", [False, True])
def test_byte_pairs_without_the_name_of_their_pre_tokenizer_are_refused(
    architecture: str, empty: bool, make: Callable[..., Path], prompt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make(
        *([] if empty else ["tokenizer.ggml.pre"]), architecture=architecture, **({"ggml__pre": ""} if empty else {})
    )
    assert judge(model, prompt, "--chat-template", "chatml") == 3
    said = capsys.readouterr().err
    assert "tokenizer.ggml.pre" in said and str(model) in said
    for command in (["inspect", str(model)], ["quantize", "gguf", str(model), "-o", str(model.with_name("q.gguf"))]):
        assert run(command) == 3
        assert "tokenizer.ggml.pre" in capsys.readouterr().err


def test_sentencepiece_needs_no_pre_tokenizer(tmp_path: Path) -> None:
    from gramlite.formats.gguf_header import read_header

    pieces = broken_gguf.model_pieces("llama", "llama")
    pieces.drop("tokenizer.ggml.pre")
    path = tmp_path / "model.gguf"
    path.write_bytes(pieces.file())
    assert read_header(path).architecture == "llama"


@pytest.mark.fault("foreign-gguf")
def test_the_first_cause_of_a_failed_load_is_shown(
    make: Callable[..., Path], prompt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gramlite.backends.gguf.vocabulary import LlamaVocabulary
    from gramlite.errors import ModelError

    model = make(ggml__pre="mystery-bpe", chat_template="an error that failed")
    assert judge(model, prompt, "--chat-template", "chatml") == 3
    said = capsys.readouterr().err
    assert "unknown pre-tokenizer type: 'mystery-bpe'" in said and str(model) in said
    with pytest.raises(ModelError, match="mystery-bpe") as refused:
        LlamaVocabulary.of_file(model, normalize=False)
    assert str(model) in str(refused.value)


@pytest.mark.fault("foreign-gguf")
def test_a_file_without_a_chat_template_can_be_given_one(
    make: Callable[..., Path], prompt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make()
    assert judge(model, prompt) == 3
    assert "--chat-template" in capsys.readouterr().err
    assert judge(model, prompt, "--chat-template", "chatml") == 0
    by_name = json.loads(capsys.readouterr().out)
    jinja = tmp_path / "chat.jinja"
    jinja.write_text("\ufeff<|im_start|>user\n{{ messages[0].content }}<|im_end|>\n<|im_start|>assistant\n\n")
    assert judge(model, prompt, "--chat-template", str(jinja)) == 3
    assert "--trust-template" in capsys.readouterr().err
    assert judge(model, prompt, "--chat-template", str(jinja), "--trust-template") == 0
    by_file = json.loads(capsys.readouterr().out)
    assert by_file["margin"] == by_name["margin"] and by_file["settings"] != by_name["settings"]


@pytest.mark.fault("foreign-gguf")
def test_a_chat_template_of_another_family_is_told(
    make: Callable[..., Path], prompt: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert judge(make(), prompt, "--chat-template", "chatml") == 0
    assert not caplog.records
    assert judge(make(), prompt, "--chat-template", "llama-3") == 0
    assert "<|eot_id|>" in caplog.text and "llama-3" in caplog.text


@pytest.mark.fault("foreign-gguf")
@pytest.mark.parametrize(
    ("key", "kind", "value"), [("tokenizer.chat_template", "UINT32", 7), ("gramlite.template.text", "BOOL", 1)]
)
def test_templates_that_are_no_text_are_refused_by_name(
    key: str, kind: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = broken_gguf.model_pieces()
    pieces.put(key, getattr(broken_gguf, kind), value)
    path = tmp_path / "model.gguf"
    path.write_bytes(pieces.file())
    assert run(["inspect", str(path)]) == 3
    assert key in capsys.readouterr().err


# ------------------------------------------------------------------ --chat-template with every command
@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A scripted judge that has no chat template."""
    path = tmp_path / "bare.json"
    path.write_text(json.dumps({"format": "scripted", "name": "bare", "metadata": {"template": {"name": "gramlite"}}}))
    return path


@pytest.mark.fault("foreign-gguf")
def test_resuming_with_another_chat_template_is_noticed(
    bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs, rows = tmp_path / "pairs.jsonl", tmp_path / "rows.jsonl"
    pairs.write_text(
        "".join(json.dumps({"prompt": f"q{n}", "response_a": "x", "response_b": "y"}) + "\n" for n in range(3))
    )
    judging = ["judge", str(pairs), "-m", str(bare), "-o", str(rows)]
    assert run([*judging, "--chat-template", "chatml"]) == 0
    assert run([*judging, "--chat-template", "chatml", "--resume"]) == 0
    capsys.readouterr()
    assert run([*judging, "--chat-template", "llama-3", "--resume"]) == 6
    assert "scaffold" in capsys.readouterr().err
    assert run(["judge", str(pairs), "-m", str(bare), "--chat-template", "nothing"]) == 3
    assert "chatml" in capsys.readouterr().err


@pytest.mark.fault("foreign-gguf")
def test_every_command_that_opens_a_model_takes_a_chat_template(
    bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text(json.dumps({"prompt": "q", "completions": ["x", "y", "z"]}) + "\n")
    assert run(["rank", str(items), "-m", str(bare), "--chat-template", "qwen3"]) == 0
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"q{n}", "response_a": "x", "response_b": f"y{n}", "label": "AB"[n % 2]} for n in range(60)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(["calibrate", str(pairs), "-m", str(bare), "--chat-template", "smollm2", "--mode", "direct"]) == 0
    run_folder = tmp_path / "run"
    assert (
        run(["bench", "run", f"pairs:{pairs}", "-m", str(bare), "-o", str(run_folder), "--chat-template", "chatml"])
        == 0
    )
    record = json.loads((run_folder / "run.json").read_text())
    assert record["settings"]["scaffold"]["name"] == "chatml"


@pytest.mark.fault("templates")
@pytest.mark.parametrize(
    "command",
    [
        "judge",
        "rank",
        "calibrate",
        "pack",
        "export gguf",
        "export adapter",
        "export merge",
        "export onnx",
        "quantize gguf",
        "quantize gptq",
        "quantize onnx",
        "quantize bnb",
        "bench run",
        "bench sweep",
        "bench speed",
    ],
)
def test_every_command_that_opens_a_model_lets_its_template_be_trusted(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command.split(), "--help"]) == 0
    said = capsys.readouterr().out
    assert "--trust-template" in said and "--chat-template" in said
