"""Chat scaffolds: the fixed text around the one user message, recognised by the hash of the model's chat template.

A model's own Jinja template is code from somebody else. It is never run unless the user trusts it; the templates of
the models that judges are made of are recognised by hash and their scaffold, one user message and the generation
prompt, is written down here. With `trust` a template is rendered once in jinja2's sandbox, in a process of its own
that is ended when it takes too long.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import ModelError
from .prompt import Segment

RENDER_SECONDS = 5.0
RENDER_LIMIT = 100_000


@dataclass(frozen=True)
class Scaffold:
    """The text before and after the user message; `trims` says that the template strips white space around it."""

    name: str
    before: str
    after: str
    trims: bool = False

    def wrap(self, message: Sequence[Segment]) -> list[Segment]:
        """The whole prompt: the user message's segments between the scaffold's own."""
        parts = list(message)
        if self.trims:  # only our own text: a template never begins or ends with an untrusted field
            parts[0] = Segment(parts[0].text.lstrip(), parts[0].field)
            parts[-1] = Segment(parts[-1].text.rstrip(), parts[-1].field)
        return [Segment(self.before), *parts, Segment(self.after)]


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
QWEN3 = Scaffold("qwen3", "<|im_start|>user\n", _CHATML_AFTER)
QWEN3_NO_THINK = Scaffold("qwen3-no-think", "<|im_start|>user\n", _CHATML_AFTER + "<think>\n\n</think>\n\n")

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
    """The hash that known chat templates are recognised by: line feeds only, no trailing white space."""
    return hashlib.sha256(chat_template.replace("\r\n", "\n").rstrip().encode("utf-8")).hexdigest()


def scaffold_for(
    chat_template: str | None, *, thinks: bool, trust: bool = False, bos: str = "", eos: str = ""
) -> Scaffold:
    """The scaffold of a model, by the hash of its chat template.

    `thinks` is false for a verdict-only judge, which Qwen3 answers after its empty think block. `trust` allows an
    unknown template to be rendered in the sandbox. Raises ModelError for an unknown or a missing template.
    """
    if not chat_template:
        raise ModelError("The model has no chat template. Export it again from a checkpoint that has one.")
    known = KNOWN_TEMPLATES.get(template_hash(chat_template))
    if known is QWEN3 and not thinks:
        return QWEN3_NO_THINK
    if known:
        return known
    if not trust:
        raise ModelError(
            f"The model's chat template is unknown (sha256 {template_hash(chat_template)[:12]}…) and was not run: it is "
            "code that came with the model. If you trust its origin, add --trust-template."
        )
    return _render(chat_template, bos=bos, eos=eos)


def _render(chat_template: str, *, bos: str, eos: str) -> Scaffold:
    """Render an unknown template around a sentinel, in a process that is bounded in time and memory."""
    sentinel = "gramlite-sentinel-" + hashlib.sha256(chat_template.encode("utf-8")).hexdigest()
    question = json.dumps({"template": chat_template, "content": sentinel, "bos": bos, "eos": eos})
    try:
        finished = subprocess.run(
            [sys.executable, "-I", "-c", _CHILD], input=question, capture_output=True, text=True, timeout=RENDER_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ModelError(f"The model's chat template ran for more than {RENDER_SECONDS:g} s and was stopped.") from None
    if finished.returncode:
        last = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"The model's chat template could not be rendered: {last[:200]}")
    rendered: str = json.loads(finished.stdout)
    if rendered.count(sentinel) != 1 or len(rendered) > RENDER_LIMIT:
        raise ModelError("The model's chat template does not show the user message exactly once; it cannot be used.")
    before, after = rendered.split(sentinel)
    return Scaffold("custom", before, after)


_CHILD = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
from jinja2.sandbox import ImmutableSandboxedEnvironment
asked = json.load(sys.stdin)
def refuse(message):
    raise ValueError(message)
environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
environment.globals["raise_exception"] = refuse
messages = [{"role": "user", "content": asked["content"]}]
print(json.dumps(environment.from_string(asked["template"]).render(
    messages=messages, add_generation_prompt=True, bos_token=asked["bos"], eos_token=asked["eos"])))
"""
