"""Smoke judging: a dozen pairs judged by a new artifact and by its source, before anybody relies on it.

Direct mode, both orders. A twelfth of a benchmark says little of quality; it says whether the file works at all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

import gramlite
from gramlite.errors import CannotRunHere, GramliteError, InputError, ModelError, ResourceError
from gramlite.formats.artifact import Manifest, manifest_path, write_manifest
from gramlite.formats.carried import remove_notices
from gramlite.generation.scaffold import OWN_TEMPLATE, ChatTemplate
from gramlite.storage import remove_path, sha256_file, target_of
from gramlite.terminal import note

PAIRS = Path(gramlite.__file__).with_name("data") / "pairs.jsonl"
DECIDED = 0.05  # nats; below it a verdict may turn without anything being wrong
LEAST_DECIDED = 6  # orders, below which an agreement says nothing
LEAST_AGREEMENT = 0.7
Margins = Callable[[], Sequence[float]]


smoke_option = click.option(
    "--smoke/--no-smoke", default=True, show_default=True, help="Judge a dozen pairs with it and with its source."
)


@dataclass(frozen=True)
class Smoke:
    """What smoke judging found: margins of the source and of the artifact in nats, A over B, by pair and order."""

    expected: tuple[float, ...]
    found: tuple[float, ...]

    @property
    def differences(self) -> list[float]:
        return [abs(new - old) for old, new in zip(self.expected, self.found, strict=True)]

    @property
    def decided(self) -> list[tuple[float, float]]:
        """The orders in which the source prefers one response clearly."""
        return [pair for pair in zip(self.expected, self.found, strict=True) if abs(pair[0]) >= DECIDED]

    @property
    def flips(self) -> int:
        return sum((old > 0) != (new > 0) for old, new in self.decided)

    @property
    def agreement(self) -> float | None:
        """The share of clear verdicts that stayed; None where the source has too few clear ones."""
        return 1 - self.flips / len(self.decided) if len(self.decided) >= LEAST_DECIDED else None

    @property
    def collapse(self) -> str | None:
        """What is wrong beyond what a quantization may cost, or None."""
        broken = sum(not math.isfinite(margin) for margin in self.found)
        if broken:
            return f"{broken} of {len(self.found)} margins are no numbers"
        if self.agreement is not None and self.agreement < LEAST_AGREEMENT:
            return f"it agrees with its source in {self.agreement:.0%} of {len(self.decided)} clear verdicts"
        return None

    def describe(self) -> dict[str, Any]:
        """The figures as a manifest has them; a margin that is no number is None."""
        finite = [value for value in self.differences if math.isfinite(value)]
        return {
            "pairs": len(self.found) // 2,
            "pairs_sha256": sha256_file(PAIRS),
            "mean_margin_difference": round(float(np.mean(finite)), 5) if finite else None,
            "max_margin_difference": round(max(finite), 5) if finite else None,
            "clear_verdicts": len(self.decided),
            "flips": self.flips,
            "agreement": self.agreement,
            "source_margins": [_number(value) for value in self.expected],
            "margins": [_number(value) for value in self.found],
        }


def smoke_judge(
    path: Path,
    manifest: Manifest,
    source: Path | Sequence[float] | Margins | None,
    *,
    found: Margins | None = None,
    template: str | None = None,
    chat: ChatTemplate = OWN_TEMPLATE,
    force: bool = False,
) -> Manifest:
    """Judge with the artifact at `path` and with its `source`, and put the figures into the manifest, which is returned.

    `source` is a model to open, its margins, or what computes them; `found` computes the artifact's own where it cannot
    be opened alone. Where the source or the artifact cannot run on this machine, the manifest says so instead. Raises
    ModelError, and removes the artifact, where it is broken, unless `force`.
    """
    if not manifest.template and template is None:
        return _record(path, manifest, {"skipped": "no judge's template is known"})
    judge: Callable[..., Sequence[float]] = partial(judge_margins, **asked_with(chat))
    try:
        if source is None:
            raise InputError("its margins were not recorded with this template")
        if isinstance(source, Path):
            expected: Sequence[float] = judge(source, template)
        else:
            expected = source() if callable(source) else source
    except GramliteError as error:
        if isinstance(error, ModelError) and not isinstance(error, CannotRunHere):
            note(f"warning: {path} was compared with nothing, for its source is refused: {error}")
        return _record(path, manifest, {"skipped": f"the source could not be judged with: {error}"})
    try:
        smoke = Smoke(tuple(expected), tuple(found() if found else judge(path, template)))
        collapse = smoke.collapse
    except (ResourceError, InputError, CannotRunHere) as error:
        return _record(path, manifest, {"skipped": f"it does not run here: {error}"})
    except ModelError as error:
        smoke, collapse = Smoke((), ()), str(error)
    if collapse and not force:
        _withdraw(path, manifest)
        raise ModelError(
            f"{path} was not kept, for it failed its first pairs: {collapse}. "
            "Take a larger type; or keep it with --force, or leave the pairs out with --no-smoke."
        )
    if collapse:
        note(f"warning: it failed its first pairs ({collapse}); kept because of --force")
    figures = smoke.describe() | {"template_sha256": (manifest.template or {}).get("sha256")}
    return _record(path, manifest, figures | ({"collapse": collapse} if collapse else {}))


def asked_with(chat: ChatTemplate) -> dict[str, Any]:
    """The argument of `judge_margins` that says how models are asked, where that is not as they say themselves."""
    return {} if chat == OWN_TEMPLATE else {"chat": chat}


def judge_margins(
    model: Path, template: str | None = None, *, chat: ChatTemplate = OWN_TEMPLATE, adapter: Path | None = None
) -> list[float]:
    """The margins of the packaged pairs, both orders, in direct mode; NaN where there is no verdict."""
    pairs = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    margins = []
    runtime = gramlite.RuntimeOptions(adapter=str(adapter) if adapter else None)
    with gramlite.load(
        model,
        template=template,
        settings=gramlite.Settings(mode="direct"),
        runtime=runtime,
        chat_template=chat.choice,
        trust_template=chat.trust,
    ) as judge:
        for pair in pairs:
            verdict = judge(prompt=pair["prompt"], response_a=pair["response_a"], response_b=pair["response_b"])
            margins += [math.nan if order.margin is None else order.margin for order in verdict.orders]
    return margins


def recorded_margins(manifest: Manifest | None, template: Mapping[str, Any] | None = None) -> list[float] | None:
    """The source's margins that an artifact's manifest has from its own smoke judging, for what is made of it.

    None where they are of another `template` than the one that what is made of it has.
    """
    smoke = (manifest.smoke if manifest else None) or {}
    recorded = (manifest.template if manifest else None) or {}
    if template and template.get("sha256") != smoke.get("template_sha256", recorded.get("sha256")):
        return None
    margins = smoke.get("source_margins")
    if smoke.get("pairs_sha256") != sha256_file(PAIRS) or not isinstance(margins, list):
        return None
    return margins if all(isinstance(value, int | float) for value in margins) else None


def figures_only(smoke: dict[str, Any] | None) -> dict[str, Any] | None:
    """What a command prints as JSON: all but the single margins."""
    return {key: value for key, value in smoke.items() if not key.endswith("margins")} if smoke else None


def summary(smoke: dict[str, Any] | None) -> str:
    """The figures in a line."""
    if not smoke:
        return "left out"
    if "skipped" in smoke:
        return f"left out: {smoke['skipped']}"
    if smoke["mean_margin_difference"] is None:
        return f"failed: {smoke.get('collapse', 'no margin is a number')}"
    figures = f"margins differ by {smoke['mean_margin_difference']:.3f} on average, {smoke['max_margin_difference']:.3f} at most"
    return f"{smoke['pairs']} pairs, {figures}; {smoke['flips']} of {smoke['clear_verdicts']} clear verdicts flipped"


def _record(path: Path, manifest: Manifest, smoke: dict[str, Any]) -> Manifest:
    manifest = replace(manifest, smoke=smoke)
    write_manifest(path, manifest)
    return manifest


def _withdraw(path: Path, manifest: Manifest) -> None:
    if manifest.format == "gptq" and path.is_dir():
        from gramlite.backends.gptq import twin_path

        _remove(twin_path(path))  # packed to judge with, and of no use to anybody else
    _remove(path)


def _remove(artifact: Path) -> None:
    listed = manifest_path(artifact)
    remove_notices(artifact)
    remove_path(target_of(artifact))
    remove_path(listed)


def _number(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None
