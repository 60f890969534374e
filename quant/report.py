"""What a quantization shows: a progress bar over layers, and its figures when it is done."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gramlite.export.report import compression, judge_command
from gramlite.export.smoke import figures_only, summary

from gramlite.console import progress, show_facts
from gramlite.formats.artifact import Manifest
from gramlite.terminal import say_json

Progress = Callable[[str, int, int], None]
WORST_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer's share of output energy lost to quantization, and to plain rounding onto a grid of the same size."""

    name: str
    bits: int
    error: float
    plain_error: float


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """What a run did: a report a layer, wall time in seconds, peak and predicted memory in bytes, the artifact's size."""

    output: Path
    layers: tuple[LayerReport, ...]
    seconds: float
    peak_bytes: int
    predicted_bytes: int
    size_bytes: int
    bits_per_weight: float

    def to_json(self) -> dict[str, Any]:
        """The figures over all layers; `worse_than_plain` counts layers that plain rounding would have served better."""
        return {
            "path": str(self.output),
            "format": "gptq",
            "bytes": self.size_bytes,
            "bits_per_weight": round(self.bits_per_weight, 3),
            "layers": len(self.layers),
            "mean_error": float(np.mean([layer.error for layer in self.layers])),
            "mean_plain_error": float(np.mean([layer.plain_error for layer in self.layers])),
            "worse_than_plain": sum(layer.error >= layer.plain_error for layer in self.layers),
            "seconds": round(self.seconds, 1),
            "peak_bytes": self.peak_bytes,
            "predicted_bytes": self.predicted_bytes,
        }


@contextmanager
def layer_bar() -> Iterator[Progress]:
    """A bar on stderr, on a terminal only; the yielded function takes what is being done, the steps done and all."""
    with progress() as bar:
        task = bar.add_task("", total=None)
        shown = ""

        def advance(stage: str, done: int, total: int) -> None:
            nonlocal shown
            if stage != shown:
                bar.reset(task, description=stage, total=total)
                shown = stage
            bar.update(task, completed=done)

        yield advance


def print_report(report: QuantizationReport, manifest: Manifest, *, as_json: bool) -> None:
    """Print a run's figures to stdout and what to type next: in columns on a terminal, else one JSON object."""
    smaller = compression(report.output, manifest)
    figures = report.to_json() | {"compression": None if smaller is None else round(smaller, 3)}
    command = judge_command(report.output, manifest)
    if as_json or not sys.stdout.isatty():
        say_json(figures | {"smoke": figures_only(manifest.smoke), "command": command})
        return
    rows = [
        ("folder", str(report.output)),
        ("size", f"{report.size_bytes / 1e6:,.1f} MB, {report.bits_per_weight:.2f} bits per weight"),
        *([("compression", f"{smaller:.2f} times smaller than its source")] if smaller is not None else []),
        ("mean layer error", f"{figures['mean_error']:.5f} (plain rounding {figures['mean_plain_error']:.5f})"),
    ]
    for layer in sorted(report.layers, key=lambda layer: -layer.error)[:WORST_SHOWN]:
        rows.append(("largest", f"{layer.error:.5f} (plain {layer.plain_error:.5f}) {layer.name}"))
    rows += [("time", f"{report.seconds:,.0f} s"), ("peak memory", f"{report.peak_bytes / 1e6:,.0f} MB")]
    if manifest.smoke:
        rows.append(("first pairs", summary(manifest.smoke)))
    show_facts([*rows, ("next", command)])
