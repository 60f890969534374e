"""Templates: how a pair becomes a prompt's segments, and what a judge's answer looks like.

A template's text holds one placeholder each for the question and the two responses; its form says how the verdict is
read. `gramlite` (the reference judge) is packaged. The texts of `gram-r2` (GRAM-R², arXiv 2509.02492) and `gram`
(GRAM, arXiv 2506.14175) belong to their checkpoints: they are read from the model card beside the weights, from the
artifact's metadata or from a file, and never from here.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from gramlite.errors import InputError, ModelError
from gramlite.formats.artifact import read_manifest
from gramlite.formats.model_folder import is_text
from gramlite.generation.decoder import AnswerForm
from gramlite.generation.prompt import Segment

from .delimiters import Policy, find_delimiters, find_special_tokens, neutralize
from .pair import Order, Pair

REASONING = AnswerForm(opening="<think>\n", closing="</think>", answer="\n<answer>\n")
VERDICT_ONLY = AnswerForm(opening="", closing="", answer="")
BUILT_IN = ("gramlite", "gram-r2", "gram")
GRAM_R2_SHA256 = "3bbed89b057f078e352e480b964a22bd19357bcadf294edbaaf9d9f6bf5c2820"
ANSWER_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
PREFERRED = "#Preferred:"

PLACEHOLDERS = {
    "prompt": ("question", "user_input", "prompt", "instruction", "query", "input"),
    "response_a": ("response_a", "response_1", "response1", "answer_a"),
    "response_b": ("response_b", "response_2", "response2", "answer_b"),
}
_FIELD_OF = {alias: field for field, aliases in PLACEHOLDERS.items() for alias in aliases}
_PLACEHOLDER = re.compile("{(" + "|".join(_FIELD_OF) + ")}")
_SECTION_LINE = re.compile(r"^[ \t]*(\[[^\[\]{}\n]+\])[ \t]*$", re.MULTILINE)
_CARD_LITERAL = re.compile(
    r"""^[ \t]*(\w*prompt\w*)\s*=\s*(\'{3}.*?\'{3}|"{3}.*?"{3})(\.strip\(\))?""", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Template:
    """A judge's prompt: `text` with its placeholders, and the `form` of the answer.

    Raises ModelError unless the text holds each of the three placeholders exactly once.
    """

    name: str
    text: str
    form: AnswerForm

    def __post_init__(self) -> None:
        fields = [_FIELD_OF[alias] for alias in _PLACEHOLDER.findall(self.text)]
        for field, aliases in PLACEHOLDERS.items():
            if fields.count(field) != 1:
                raise ModelError(
                    f"The template {self.name!r} holds {fields.count(field)} placeholders for {field}; it needs "
                    f"exactly one of {', '.join('{' + alias + '}' for alias in aliases[:3])}."
                )

    @cached_property
    def sha256(self) -> str:
        """The hash of the text without the white space around it."""
        return hashlib.sha256(self.text.strip().encode("utf-8")).hexdigest()

    @cached_property
    def delimiters(self) -> tuple[str, ...]:
        """What untrusted text may not contain: the template's section lines and the answer's tags."""
        sections = dict.fromkeys(_SECTION_LINE.findall(self.text))
        return (*sections, *(ANSWER_TAGS if self.form.thinks else (PREFERRED,)))

    def describe(self) -> dict[str, Any]:
        """What a manifest and a GGUF's metadata record of a template."""
        return {"name": self.name, "sha256": self.sha256, "text": self.text}

    def segments(self, fields: Mapping[str, Segment]) -> list[Segment]:
        """The user message: our own text, and the fields' segments in place of their placeholders, filled in once."""
        parts: list[Segment] = []
        done = 0
        for match in _PLACEHOLDER.finditer(self.text):
            field = _FIELD_OF[match.group(1)]
            parts += [Segment(self.text[done : match.start()]), fields[field]]
            done = match.end()
        return [*parts, Segment(self.text[done:])]


def screen(template: Template, pair: Pair, policy: Policy) -> tuple[Pair, tuple[str, ...]]:
    """Treat the template's delimiters inside a pair's text as `policy` says; return the pair to show and the flags.

    Special tokens of any family of models are flagged and stay, for as text they are harmless (see prompt.py).
    Raises InputError for delimiters under the policy "reject".
    """
    texts: dict[str, str] = {}
    flags: dict[str, None] = {}
    special: dict[str, None] = {}
    for field in PLACEHOLDERS:
        text: str = getattr(pair, field)
        hits = find_delimiters(text, template.delimiters)
        special.update(dict.fromkeys(f"special:{field}:{token}" for token in find_special_tokens(text)))
        flags.update(dict.fromkeys(f"delimiter:{field}:{hit.delimiter}" for hit in hits))
        while hits and policy == "neutralize":  # again, where round brackets are part of a delimiter
            text = neutralize(text, hits)
            hits = find_delimiters(text, template.delimiters)
        texts[field] = text
    if flags and policy == "reject":
        raise InputError(
            f"the text holds section delimiters ({', '.join(flags)}); drop --delimiters reject to defuse them."
        )
    shown = replace(pair, prompt=texts["prompt"], response_a=texts["response_a"], response_b=texts["response_b"])
    return shown, (*flags, *special)


def presented(pair: Pair, order: Order) -> dict[str, Segment]:
    """What stands at each placeholder: in order "ba" the pair's response_b stands first. Segments keep their own name."""
    names = ("response_a", "response_b") if order == "ab" else ("response_b", "response_a")
    shown = zip(PLACEHOLDERS, ("prompt", *names), strict=True)
    return {place: Segment(getattr(pair, name), name) for place, name in shown}


def packaged_template() -> Template:
    """The reference judge's own template."""
    text = resources.files("gramlite").joinpath("data/reference/prompt.txt").read_text(encoding="utf-8")
    return Template("gramlite", text.strip(), REASONING)


def template_from_text(text: str, name: str | None = None) -> Template:
    """A template from its text: a text that ends in `#Preferred:` has the first generation's form."""
    text = text.strip("\n")
    if text.rstrip().endswith(PREFERRED):
        return Template(name or "gram", text.rstrip() + " ", VERDICT_ONLY)
    text = text.strip()
    if name is None:
        known = {GRAM_R2_SHA256: "gram-r2", packaged_template().sha256: "gramlite"}
        name = known.get(hashlib.sha256(text.encode("utf-8")).hexdigest(), "custom")
    return Template(name, text, REASONING)


def pairwise_prompt_from_card(card: str) -> str | None:
    """The judge prompt that a model card gives as a Python string literal, or None where it gives none.

    GRAM-R²'s cards assign it to `pairwise_prompt`; any assigned literal with the three placeholders counts.
    The literal is parsed as a literal and nothing of the card is executed.
    """
    candidates = []
    for match in _CARD_LITERAL.finditer(card):
        name, literal, strip = match.groups()
        try:
            text = ast.literal_eval(literal)
        except (SyntaxError, ValueError):
            continue
        if {_FIELD_OF[alias] for alias in _PLACEHOLDER.findall(text)} == set(PLACEHOLDERS):
            candidates.append((name != "pairwise_prompt", text.strip() if strip else text))
    return min(candidates)[1] if candidates else None


def template_beside(folder: Path) -> Template | None:
    """The template given by the model card (README.md) in a folder, or None."""
    card = folder / "README.md"
    try:
        text = card.read_text(encoding="utf-8-sig", errors="replace") if card.is_file() else ""
    except OSError as error:
        raise ModelError(f"The model card {card} cannot be read ({error.strerror}).") from error
    prompt = pairwise_prompt_from_card(text)
    return template_from_text(prompt) if prompt else None


def resolve_template(choice: str | None, recorded: Mapping[str, Any] | None, folder: Path) -> Template:
    """The template to judge with.

    `choice` is a built-in name, a file, or None; `recorded` is what the artifact's manifest or metadata holds
    (name, sha256, text); `folder` is where a model card may lie. Raises ModelError where none is found, where a
    recorded text does not have its recorded hash, or where a text that should be GRAM-R²'s is not.
    """
    if choice and choice not in BUILT_IN:
        return _template_file(Path(choice))
    for key in ("name", "sha256", "text"):
        value = (recorded or {}).get(key)
        if value is not None and not is_text(value):
            raise ModelError(f"The template recorded with the model has a {key} that is no text. Export it again.")
    wanted = choice or (recorded or {}).get("name")
    if wanted == "gramlite" and not (recorded or {}).get("text"):
        return packaged_template()
    template = _recorded_template(recorded) or template_beside(folder)
    if wanted == "gramlite" and (template is None or template.name != "gramlite"):
        return packaged_template()
    if template is None:
        named = f" {wanted!r}" if wanted else ""
        raise ModelError(
            f"No judge template{named} was found: none in the model's metadata and no prompt in {folder / 'README.md'}. "
            "Put the model card beside the weights, or type --template FILE with the prompt's text, or --template gramlite."
        )
    if wanted == "gram-r2" and template.sha256 != GRAM_R2_SHA256:
        raise ModelError(
            f"The prompt found for this model is not GRAM-R²'s (its sha256 begins {template.sha256[:12]}, not "
            f"{GRAM_R2_SHA256[:12]}). To use it all the same, save it to a file and type --template FILE."
        )
    if wanted == "gram" and template.form.thinks:
        raise ModelError("The prompt found for this model does not end in '#Preferred:'. Type --template FILE.")
    return template


def _recorded_template(recorded: Mapping[str, Any] | None) -> Template | None:
    if not recorded or not recorded.get("text"):
        return None
    template = template_from_text(str(recorded["text"]), recorded.get("name"))
    if recorded.get("sha256") not in (None, template.sha256):
        raise ModelError(
            "The template in the model's metadata does not have the sha256 recorded with it. Export it again."
        )
    return template


def _template_file(path: Path) -> Template:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The template {str(path)!r} is neither built in ({', '.join(BUILT_IN)}) nor a readable text file ({error})."
        ) from error
    prompt = pairwise_prompt_from_card(text)
    return template_from_text(prompt or text)


def judge_template(folder: Path, choice: str | None) -> dict[str, Any] | None:
    """The judge's template (name, sha256, text): the one asked for, else the manifest's or the model card's, else None."""
    manifest = read_manifest(folder) if folder.is_dir() else None
    recorded = manifest.template if manifest else None
    if choice is None and not recorded and template_beside(folder) is None:
        return None
    return resolve_template(choice, recorded, folder).describe()
