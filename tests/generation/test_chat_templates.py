"""Unknown chat templates: what transformers renders of them is what the model is shown, or they are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeVocabulary
from hypothesis import given, settings
from hypothesis import strategies as st

from gramlite.errors import ModelError
from gramlite.generation.decoder import encode_answer
from gramlite.generation.prompt import Segment, encode_prompt
from gramlite.generation.scaffold import scaffold_for
from gramlite.judging.pair import Pair
from gramlite.judging.template import REASONING, Template, presented

PACKAGED = Path(__file__).parents[2] / "gramlite/data/reference/hf"
HEAD, TAIL = "{% for m in messages %}<|im_start|>{{ m.role }}\n", "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
MESSAGE = '\n Which?\n\n[A]\n<b>"it\'s" {{ x }}</b>\n\n [B] é 中 😀\\n \t\n'

Render = Callable[..., str]


@pytest.fixture(scope="module")
def render() -> Render:
    """A template as transformers renders it for one user message."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(PACKAGED)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", "<|im_end|>", None

    def rendered(template: str, content: str, **variables: Any) -> str:
        messages = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=False, **variables
        )
        return str(text)

    return rendered


def ours(template: str, content: str, *, thinks: bool = True) -> str:
    scaffold = scaffold_for(template, thinks=thinks, trust=True, bos="<|im_start|>", eos="<|im_end|>")
    return "".join(segment.text for segment in scaffold.wrap([Segment(content, "prompt")]))


TEMPLATES = {
    "generation": HEAD + "{% generation %}{{ m.content }}{% endgeneration %}" + TAIL,
    "generation, stripped": HEAD + "{%- generation -%}  {{ m.content }}  {%- endgeneration -%}" + TAIL,
    "break": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}" + HEAD[24:] + "{{ m.content }}" + TAIL,
    "continue": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}" + "{{ m.content }}" + TAIL,
    "tools are none": HEAD + "{{ m.content }}{% if tools is none and documents is none %}!{% endif %}" + TAIL,
    "tojson": "{{ {'a': '<é>', 'b': [1, true]} | tojson }}{{ [1, 2] | tojson(indent=2) }}" + HEAD + "{{ m.content }}" + TAIL,
    "undefined": HEAD + "{{ m.content }}{% if pad_token is defined %}pad{% endif %}{{ nothing }}" + TAIL,
    "bos": "{{ bos_token }}" + HEAD + "{{ m.content + eos_token }}" + TAIL,
    "macro": "{% macro say(m) %}{{ m.role }}: {{ m.content }}{% endmacro %}{{ say(messages[0]) }}\n",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ m['content'] }}{% endfor %}{{ ns.n }}",
    "trim_blocks": "  {% if true %}\n x\n  {% endif %}\n" + HEAD + "{{ m.content }}" + TAIL + "\n\n",
    "trim": HEAD + "{{ m.content | trim }}" + TAIL,
    "strip": HEAD + "{{ m.content.strip() + eos_token }}" + TAIL,
    "lstrip": HEAD + "{{ m['content'].lstrip() }}" + TAIL,
    "rstrip": HEAD + "{{ m['content'].rstrip() }}" + TAIL,
    "exception unless": "{% if messages|length != 1 %}{{ raise_exception('one') }}{% endif %}{{ messages[0].content }}",
    "line feeds": HEAD.replace("\n", "\r\n") + "{{ m.content }}" + TAIL,
    "no line feed at the end": "{{ messages[0].content }}\n\nA:\n",
    "thinking by default": HEAD + "{{ m.content }}" + TAIL + "{% if enable_thinking is not defined %}defined not{% endif %}",
}  # fmt: skip
FAULTY = {
    "generation",
    "generation, stripped",
    "break",
    "continue",
    "tools are none",
    "tojson",
    "trim",
    "strip",
    "lstrip",
    "rstrip",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.fault("templates") if name in FAULTY else ()) for name in TEMPLATES]
)
def test_what_transformers_renders_is_rendered(name: str, render: Render) -> None:
    scaffold = scaffold_for(TEMPLATES[name], thinks=True, trust=True, bos="<|im_start|>", eos="<|im_end|>")
    for content in (MESSAGE, MESSAGE.strip(), "x"):
        wrapped = "".join(segment.text for segment in scaffold.wrap([Segment(content, "prompt")]))
        assert wrapped == render(TEMPLATES[name], content)


@pytest.mark.fault("templates")
@pytest.mark.parametrize("name", ["template-generation-tag.jinja", "template-trims.jinja"])
def test_the_templates_of_files_are_rendered_as_transformers_does(name: str, render: Render, shared: Path) -> None:
    template = (shared / "faults" / name).read_text()
    assert ours(template, MESSAGE) == render(template, MESSAGE)


@pytest.mark.fault("templates")
def test_the_clock_stands_still(shared: Path) -> None:
    template = (shared / "faults/template-date.jinja").read_text()
    assert ours(template, "x").startswith(
        "<|im_start|>system\nToday is 26 July 2024.<|im_end|>\n<|im_start|>user\nx<|im_end|>"
    )
    assert (
        ours("{{ strftime_now('%Y-%m-%d %H:%M, %A') }} {{ messages[0].content }}", "x") == "2024-07-26 00:00, Friday x"
    )


@pytest.mark.fault("templates")
@pytest.mark.parametrize(
    "opening",
    [
        "<think>\n",
        "<think>",
        "<think>\n\n",
        "<think>\n\n</think>\n\n",
        "{% if enable_thinking is not false %}<think>{% endif %}",
    ],
)
def test_thinking_is_opened_once(opening: str) -> None:
    prompt = ours(HEAD + "{{ m.content }}" + TAIL + opening, "Why?")
    vocabulary = FakeVocabulary()
    for mode, follows in (("think", "<think>\n"), ("direct", "<think>\n\n</think>\n<answer>\n")):
        prefix = encode_answer(vocabulary, REASONING, mode).opening  # type: ignore[arg-type]
        shown = prompt + bytes(prefix).decode()
        assert shown == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n" + follows
        assert shown.count("<think>") == 1


@pytest.mark.fault("templates")
def test_a_judge_that_does_not_think_answers_after_an_empty_block(shared: Path, render: Render) -> None:
    template = (shared / "faults/template-opens-think.jinja").read_text()
    assert ours(template, "Why?", thinks=False).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    told = HEAD + "{{ m.content }}" + TAIL + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    assert ours(told, "Why?", thinks=False) == render(told, "Why?", enable_thinking=False)


@pytest.mark.fault("templates")
def test_a_template_that_writes_the_thinking_itself_is_refused() -> None:
    with pytest.raises(ModelError, match="beginning of the judge's thinking"):
        ours("{{ messages[0].content }}<think>\nOkay, ", "x")


@pytest.mark.fault("templates")
def test_a_byte_order_mark_is_no_part_of_a_template(tmp_path: Path) -> None:
    from gramlite.formats.model_folder import read_model_folder
    from gramlite.judging.template import packaged_template, resolve_template

    assert ours("\ufeff{{ messages[0].content }}!", "x") == "x!"
    known = (PACKAGED / "chat_template.jinja").read_text()
    assert scaffold_for("\ufeff" + known, thinks=True).name == "smollm2"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text(known, encoding="utf-8-sig")
    assert read_model_folder(tmp_path).chat_template == known
    (tmp_path / "judge.txt").write_text(packaged_template().text, encoding="utf-8-sig")
    assert resolve_template(str(tmp_path / "judge.txt"), None, tmp_path) == packaged_template()


@pytest.mark.fault("templates")
def test_an_exported_template_has_no_byte_order_mark(tmp_path: Path) -> None:
    from gramlite.formats.tokenizer import read_chat_templates

    (tmp_path / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8-sig")
    assert read_chat_templates(tmp_path, {}) == {"default": "{{ messages }}"}


@pytest.mark.fault("templates")
@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content | tojson }}",
        "{{ messages[0].content | e }}",
        "{{ messages[0].content[:1000] }}",
        "{{ messages[0].content.replace('\\n', ' ') }}",
        "{{ messages[0].content.strip('\\n') }}",
        "{{ messages[0].content.split('\\n')[0] }}",
    ],
)
def test_a_template_that_changes_a_message_is_refused(template: str) -> None:
    with pytest.raises(ModelError, match=r"changes the text|exactly once"):
        ours(template, "x")


@pytest.mark.fault("templates")
@pytest.mark.parametrize(
    "template",
    [
        {"a": 1},
        ["{{ messages[0].content }}"],
        7,
        "{{ messages[0].content }}\ud800",
        "{{ '\\ud800' }}{{ messages[0].content }}",
    ],
)
def test_what_is_no_template_is_refused(template: Any) -> None:
    with pytest.raises(ModelError, match="no text|could not be rendered"):
        scaffold_for(template, thinks=True, trust=True)


@pytest.mark.parametrize(
    "template",
    [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ " + "(" * 5000,
        "{{ " + "[" * 5000 + "}}",
        "{{ ''.join(['x' * 99999999] * 999) }}",
        "{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
        pytest.param("{{ raise_exception('a\\nb\\x1b[31m') }}", marks=pytest.mark.fault("templates")),
        "{% include '/etc/passwd' %}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ dict.mro() }}{{ messages.append(1) }}",
        "{% generation %}",
        "{% break %}",
        "\x00{{",
    ],
)
def test_a_hostile_template_is_refused_in_words(template: str) -> None:
    with pytest.raises(ModelError) as refused:
        scaffold_for(template, thinks=True, trust=True)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 400


@pytest.mark.fault("templates")
@pytest.mark.parametrize("field", ["prompt", "response_a", "response_b"])
def test_white_space_at_a_messages_ends_is_stripped_whoever_wrote_it(field: str) -> None:
    template = Template("custom", "{question}{response_a}\n{response_b}", REASONING)
    pair = Pair(*(" \n" if name == field else f" \t{name}\n " for name in ("prompt", "response_a", "response_b")))
    message = "".join(segment.text for segment in template.segments(presented(pair, "ab")))
    scaffold = scaffold_for(HEAD + "{{ m.content | trim }}" + TAIL, thinks=True, trust=True)
    wrapped = scaffold.wrap(template.segments(presented(pair, "ab")))
    assert "".join(segment.text for segment in wrapped) == scaffold.before + message.strip() + scaffold.after


@pytest.mark.fault("templates")
@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text(alphabet=" \n\tab\u3000", max_size=4), min_size=1, max_size=6),
    st.sampled_from([True, "start", "end", False]),
)
def test_trimming_goes_over_as_many_segments_as_it_takes(texts: list[str], trims: Any) -> None:
    from gramlite.generation.scaffold import Scaffold

    wrapped = Scaffold("x", "<", ">", trims).wrap([Segment(text, "prompt") for text in texts])
    strip = {True: str.strip, "start": str.lstrip, "end": str.rstrip, False: str}[trims]
    assert "".join(segment.text for segment in wrapped) == "<" + strip("".join(texts)) + ">"


def test_the_first_token_stands_there_once() -> None:
    vocabulary = FakeVocabulary(special_tokens={"<s>": 300})
    scaffold = scaffold_for("{{ bos_token }}[INST]{{ messages[0].content }}", thinks=True, trust=True, bos="<s>")
    tokens = encode_prompt(vocabulary, scaffold.wrap([Segment("<s>hello", "prompt")])).tokens
    assert tokens == (300, *b"[INST]<s>hello")
    assert json.dumps(scaffold.before) == '"<s>[INST]"'
