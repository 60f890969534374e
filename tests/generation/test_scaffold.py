from __future__ import annotations

import time
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gramlite.errors import ModelError
from gramlite.generation.prompt import Segment
from gramlite.generation.scaffold import (
    KNOWN_TEMPLATES,
    LLAMA31,
    QWEN3,
    QWEN3_NO_THINK,
    SMOLLM2,
    scaffold_for,
    template_hash,
)

PACKAGED = (Path(__file__).parents[2] / "gramlite/data/reference/hf/chat_template.jinja").read_text()


def test_the_packaged_template_is_recognised_and_rendered_as_written() -> None:
    scaffold = scaffold_for(PACKAGED, thinks=True)
    assert scaffold == SMOLLM2
    messages = [{"role": "user", "content": "hello"}]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    rendered = environment.from_string(PACKAGED).render(messages=messages, add_generation_prompt=True)
    assert "".join(segment.text for segment in scaffold.wrap([Segment("hello")])) == rendered


def test_white_space_at_the_end_does_not_change_a_templates_hash() -> None:
    assert template_hash(PACKAGED + "\r\n\n") == template_hash(PACKAGED.rstrip())


def test_llama_3_trims_its_message_and_keeps_one_date() -> None:
    text = "".join(
        segment.text for segment in LLAMA31.wrap([Segment("\n judge "), Segment("x", "prompt"), Segment(" \n")])
    )
    assert text.startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    )
    assert "Today Date: 26 Jul 2024" in text
    assert text.endswith("user<|end_header_id|>\n\njudge x<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")


def test_qwen3_answers_after_an_empty_think_block_when_the_judge_does_not_think(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template = "a stand-in whose hash is taken for Qwen3's"
    monkeypatch.setitem(KNOWN_TEMPLATES, template_hash(template), QWEN3)
    assert scaffold_for(template, thinks=True) == QWEN3
    assert scaffold_for(template, thinks=False) == QWEN3_NO_THINK
    assert QWEN3_NO_THINK.after.endswith("<think>\n\n</think>\n\n")


def test_an_unknown_template_is_not_run() -> None:
    with pytest.raises(ModelError, match="--trust-template"):
        scaffold_for("{{ messages[0].content }}", thinks=True)
    with pytest.raises(ModelError, match="no chat template"):
        scaffold_for(None, thinks=True)


def test_a_trusted_template_is_rendered_in_the_sandbox() -> None:
    template = "{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]{% if add_generation_prompt %}>{% endif %}"
    scaffold = scaffold_for(template, thinks=True, trust=True, bos="<s>")
    assert (scaffold.before, scaffold.after) == ("<s>[INST] ", " [/INST]>")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "could not be rendered"),
        ("no message at all", "exactly once"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "exactly once"),
        ("{{ raise_exception('no') }}", "could not be rendered"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "was stopped"),
        ("{{ 'x' * 9999999999 }}{{ messages[0].content }}", "could not be rendered"),
    ],
)
def test_a_trusted_template_that_misbehaves(template: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gramlite.generation.scaffold.RENDER_SECONDS", 3.0)
    began = time.monotonic()
    with pytest.raises(ModelError, match=says):
        scaffold_for(template, thinks=True, trust=True)
    assert time.monotonic() - began < 20
