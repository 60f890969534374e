"""Chat scaffolds: the fixed text around the one user message, recognised by the hash of the model's chat template.

A model's own Jinja template is code from somebody else. It is never run unless the user trusts it; the templates of
the models that judges are made of are recognised by hash and their scaffold, one user message and the generation
prompt, is written down here. With `trust` a template is rendered in jinja2's sandbox, in a process of its own that is
ended when it takes too long (see render_chat.py), and what it does to a message is learnt from a few examples.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gramlite.errors import ModelError

from .prompt import Segment

RENDER_SECONDS = 5.0
RENDER_LIMIT = 1_000_000  # characters
OPENS_THINKING = re.compile(r"<think>\s*(?:</think>\s*)?\Z")
ODD_TEXT = (
    '\n\n\t <b>&amp;</b> "it\'s" {{ x }} {% y %} \\n [INST] é 中 😀 ' + "and so on, " * 10_000
)  # what a message may hold


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """Which chat template a model is asked with: `choice` is a built-in scaffold's name or a file, None the model's own.

    `trust` allows one that is not built in to be run, in a sandbox.
    """

    choice: str | None = None
    trust: bool = False


OWN_TEMPLATE = ChatTemplate()


@dataclass(frozen=True)
class Scaffold:
    """The text before and after the user message; `trims` says where the template strips white space around it."""

    name: str
    before: str
    after: str
    trims: bool | Literal["start", "end"] = False

    @property
    def marks(self) -> set[str]:
        """The literals in it that should be special tokens of the model."""
        return set(re.findall(r"<\|\w+\|>", self.before + self.after))

    def wrap(self, message: Sequence[Segment]) -> list[Segment]:
        """The whole prompt: the user message's segments between the scaffold's own."""
        parts = list(message)
        if self.trims in (True, "start"):
            parts = _stripped(parts, str.lstrip)
        if self.trims in (True, "end"):
            parts = _stripped(parts[::-1], str.rstrip)[::-1]
        return [Segment(self.before), *parts, Segment(self.after)]


def _stripped(parts: list[Segment], strip: Callable[[str], str]) -> list[Segment]:
    """Segments without the white space that they begin with, over as many of them as it takes."""
    blank = next((index for index, part in enumerate(parts) if strip(part.text)), len(parts))
    return [Segment(strip(part.text) if index <= blank else part.text, part.field) for index, part in enumerate(parts)]


_CHATML_AFTER = "<|im_end|>\n<|im_start|>assistant\n"
_LLAMA3_AFTER = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
_LLAMA3_USER = "<|start_header_id|>user<|end_header_id|>\n\n"
# Llama-3.2's template writes today's date where the renderer offers a clock, which would change verdicts from day to
# day; both 3.1 and 3.2 fall back to this date, and it is always used here.
_LLAMA31_SYSTEM = (
    "<|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
)

SMOLLM2 = Scaffold(
    "smollm2",
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\n",
    _CHATML_AFTER,
)
LLAMA3 = Scaffold("llama-3", "<|begin_of_text|>" + _LLAMA3_USER, _LLAMA3_AFTER, trims=True)
LLAMA31 = Scaffold("llama-3.1", "<|begin_of_text|>" + _LLAMA31_SYSTEM + _LLAMA3_USER, _LLAMA3_AFTER, trims=True)
QWEN25 = Scaffold(
    "qwen2.5",
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
    _CHATML_AFTER,
)
CHATML = Scaffold("chatml", "<|im_start|>user\n", _CHATML_AFTER)
QWEN3 = Scaffold("qwen3", "<|im_start|>user\n", _CHATML_AFTER)
QWEN3_NO_THINK = Scaffold("qwen3-no-think", "<|im_start|>user\n", _CHATML_AFTER + "<think>\n\n</think>\n\n")

BUILT_IN = {each.name: each for each in (CHATML, SMOLLM2, LLAMA3, LLAMA31, QWEN25, QWEN3, QWEN3_NO_THINK)}

# sha256 of the chat template without trailing white space → its scaffold. Files of the models' own repositories.
KNOWN_TEMPLATES = {
    "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788": SMOLLM2,  # SmolLM2-Instruct
    "ba03a121d097859c7b5b9cd03af99aafe95275210d2876f642ad9929a150f122": LLAMA3,  # Meta-Llama-3-Instruct
    "93c0e9aa3629bbd77e68dbc0f5621f6e6b23aa8d74b932595cdb8d64684526d7": LLAMA31,  # Llama-3.1-Instruct
    "d82792f95932f1c9cef5c4bd992f171225e3bf8c7b609b4557c9e1ec96be819f": LLAMA31,  # Llama-3.2-Instruct
    "55b2f4a26ac9ee719330a61a0c39d9e538b0e9322212f048326318cff4f8674a": QWEN25,  # Qwen2.5-Instruct
    "87a2728cb8dc9fe424d624542f6060ec05a1d285ebbec578bb078900e33396b5": QWEN3,  # Qwen3, first revision
    "a55ee1b1660128b7098723e0abcd92caa0788061051c62d51cbe87d9cf1974d8": QWEN3,  # Qwen3, later revision
}


def template_hash(chat_template: str) -> str:
    """The hash that known chat templates are recognised by: line feeds only, no byte order mark, no trailing white space."""
    text = chat_template.removeprefix("\ufeff").replace("\r\n", "\n").rstrip()
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def scaffold_for(
    chat_template: object,
    *,
    thinks: bool,
    trust: bool = False,
    bos: str = "",
    eos: str = "",
    special: Mapping[str, str] | None = None,
    choice: str | None = None,
) -> Scaffold:
    """The scaffold of a model, by the hash of its chat template or as `choice` names it (see ChatTemplate).

    `thinks` is false for a verdict-only judge, which is answered after an empty think block where the template would
    open one. `special` holds the literals that templates may ask for beside `bos` and `eos`, such as `pad_token`.
    Raises ModelError for an unknown or a missing template.
    """
    if choice is not None and choice not in BUILT_IN:
        chat_template = _read_file(choice)
    if not chat_template and choice is None:
        raise ModelError(
            "The model has no chat template. Say which one it was trained with: --chat-template "
            f"{'|'.join(BUILT_IN)}, or a Jinja file."
        )
    if not isinstance(chat_template, str) and choice not in BUILT_IN:
        raise ModelError("The model's chat template is no text. Export or download it again, or add --chat-template.")
    known = BUILT_IN.get(choice or "") or KNOWN_TEMPLATES.get(template_hash(str(chat_template)))
    if known is QWEN3 and not thinks:
        return QWEN3_NO_THINK
    if known:
        return known
    whose = f"The chat template {choice}" if choice else "The model's chat template"
    if not trust:
        raise ModelError(
            f"{whose} is unknown (sha256 {template_hash(str(chat_template))[:12]}…) and was not run: it is code from "
            "somebody else. If you trust its origin, add --trust-template."
        )
    tokens = {"bos_token": bos, "eos_token": eos, **(special or {})}
    variables = {name: literal for name, literal in tokens.items() if literal}
    return _learn(whose, str(chat_template), thinks, variables)


def _read_file(choice: str) -> str:
    try:
        return Path(choice).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The chat template {choice!r} is neither built in ({', '.join(BUILT_IN)}) nor a readable text file ({error})."
        ) from error


def _learn(whose: str, chat_template: str, thinks: bool, variables: Mapping[str, str]) -> Scaffold:
    """What an unknown template writes around a message, and that it leaves the message itself alone."""
    sentinel = "gramlite-sentinel-" + template_hash(chat_template)
    odd = f"{sentinel}{ODD_TEXT}{sentinel}"
    asked = variables if thinks else {**variables, "enable_thinking": False}
    plain, padded, long = _render(whose, chat_template, [sentinel, f"\n {sentinel} \n", odd], asked)
    if plain.count(sentinel) != 1:
        raise ModelError(f"{whose} does not show the user message exactly once; it cannot be used.")
    before, after = plain.split(sentinel)
    cuts: dict[str, bool | Literal["start", "end"]] = {
        f"{before}\n {sentinel} \n{after}": False,
        f"{before}{sentinel}{after}": True,
        f"{before}{sentinel} \n{after}": "start",
        f"{before}\n {sentinel}{after}": "end",
    }
    if padded not in cuts or long != before + odd + after:
        raise ModelError(f"{whose} changes the text of the user message; it cannot be used.")
    if not thinks and after.rstrip().endswith("<think>"):
        after = after.rstrip() + "\n\n</think>\n\n"
    elif thinks:  # the answer begins with an opening of its own
        after = OPENS_THINKING.sub("", after)
        if "<think>" in after and "</think>" not in after:
            raise ModelError(f"{whose} writes the beginning of the judge's thinking; it cannot be used.")
    return Scaffold("custom", before, after, cuts[padded])


def _render(whose: str, template: str, contents: list[str], variables: Mapping[str, object]) -> list[str]:
    """Render an unknown template for each content, in a process that is bounded in time and memory."""
    asked = {
        "template": template.removeprefix("\ufeff"), "contents": contents, "variables": variables, "limit": RENDER_LIMIT,
    }  # fmt: skip
    command = [sys.executable, "-I", "-X", "utf8", str(Path(__file__).with_name("render_chat.py"))]
    try:
        finished = subprocess.run(
            command, input=json.dumps(asked), capture_output=True, encoding="utf-8", errors="replace",
            timeout=RENDER_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ModelError(f"{whose} ran for more than {RENDER_SECONDS:g} s and was stopped.") from None
    if finished.returncode:
        last = (finished.stderr.strip().splitlines() or ["no message"])[-1][:200]
        said = "".join(character if character.isprintable() else " " for character in last)
        raise ModelError(f"{whose} could not be rendered: {said}")
    rendered: list[str] = json.loads(finished.stdout)
    return rendered
