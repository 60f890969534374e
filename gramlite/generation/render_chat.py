"""Renders a chat template that is not ours; a program of its own, which `scaffold` runs under limits of time and memory.

It renders what transformers' `apply_chat_template` renders (transformers/utils/chat_template_utils.py), in jinja2's
sandbox, but for the clock: it always stands at the date that Llama 3.1's template falls back to, since verdicts must
not change from day to day. On standard input it takes JSON: `template`, `contents` (of the one user message, each
rendered), `variables` and `limit` (most characters of a text); on standard output it puts the list of texts.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 1 << 30
CLOCK = datetime(2024, 7, 26)


class GenerationTag(Extension):
    """The tag around what an assistant says, which marks it for training and changes nothing here."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Callable[[], str]) -> str:
        return caller()


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """jinja2's own filter of the name escapes what HTML needs escaped."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def refuse(message: str) -> None:
    raise TemplateError(message)


def render(asked: dict[str, Any]) -> list[str]:
    """The texts of a template for each of the contents; whatever it raises is the template's."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": CLOCK.strftime}
    template = environment.from_string(asked["template"])
    texts = []
    for content in asked["contents"]:
        messages = [{"role": "user", "content": content}]
        variables = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        text = template.render(variables | asked["variables"])
        text.encode("utf-8")  # half a character may be written in a template
        if len(text) > asked["limit"]:
            raise ValueError(f"it wrote {len(text):,} characters")
        texts.append(text)
    return texts


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print(json.dumps(render(json.load(sys.stdin))))
