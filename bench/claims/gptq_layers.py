"""How much of each linear layer's output GPTQ folders lose, against the checkpoint they were made of.

    python bench/claims/gptq_layers.py CHECKPOINT FOLDER... --pairs FILE

A layer's error is |XW - XW'|^2 / |XW|^2 with X what the layer reads in the checkpoint itself, over all tokens of the
transcripts, each counting once. So folders of any quantizer are measured alike, whatever they were calibrated on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from gramlite.quant.calibration import DEFAULT_TOKENS, Transcript, load_calibration
from gramlite.quant.report import layer_bar
from gramlite.quant.solve import output_energy, relative_error
from gramlite.quant.stream import Stage, stream_decoder

from gramlite.errors import InputError
from gramlite.formats.checkpoint import open_checkpoint
from gramlite.formats.gptq_folder import open_gptq
from gramlite.generation.scaffold import ChatTemplate
from gramlite.options import chat_options
from gramlite.terminal import say_json

Errors = dict[str, float]  # by the layer's name


def layer_errors(
    source: Path,
    folders: Sequence[Path],
    transcripts: Sequence[Transcript],
    *,
    after_layer: Callable[[int], None] | None = None,
) -> dict[Path, Errors]:
    """Each folder's errors, layer by layer; raises InputError where a folder holds other layers than the checkpoint."""
    opened = {folder: open_gptq(folder) for folder in folders}
    errors: dict[Path, Errors] = {folder: {} for folder in folders}

    def visit(stage: Stage) -> None:
        for name, module in stage.linears.items():
            energy = output_energy(module.weight, stage.moment)
            for folder, quantized in opened.items():
                if name not in quantized.linears:
                    raise InputError(f"{folder} has no quantized layer {name!r}: it is not of the checkpoint {source}.")
                linear = quantized.read_linear(name)
                if linear.codes.shape != module.weight.shape:
                    raise InputError(f"{name} in {folder} has another shape than in {source}.")
                errors[folder][name] = relative_error(module.weight, linear, stage.moment, energy=energy)

    stream_decoder(open_checkpoint(source), transcripts, visit, after_layer=after_layer)
    return errors


def summary(folder: Path, errors: Errors, first: Errors) -> dict[str, Any]:
    """A folder's figures, and how its mean error relates to the first folder's."""
    mean = float(np.mean(list(errors.values())))
    worst = max(errors, key=errors.__getitem__)
    return {
        "path": str(folder),
        "layers": len(errors),
        "mean_error": mean,
        "of_first": mean / float(np.mean(list(first.values()))),
        "better_than_first": sum(errors[name] < first[name] for name in errors),
        "worst_layer": worst,
        "worst_error": errors[worst],
    }


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--pairs", required=True, type=click.Path(path_type=Path), help="Pairs or transcripts, JSONL.")
@click.option("--tokens", type=int, default=DEFAULT_TOKENS, show_default=True, help="Budget of tokens.")
@click.option("--template", metavar="NAME|FILE", help="The judge's template; by default that of the model card.")
@chat_options
@click.option("--each", is_flag=True, help="Print every layer's errors too.")
def command(
    source: Path,
    folders: tuple[Path, ...],
    pairs: Path,
    tokens: int,
    template: str | None,
    chat: ChatTemplate,
    each: bool,
) -> None:
    """Measure what GPTQ FOLDERS lose of the outputs of the SOURCE checkpoint's layers; one JSON object a folder."""
    transcripts, described = load_calibration(pairs, judge=source, template=template, chat=chat, tokens=tokens)
    total = int(open_checkpoint(source).config["num_hidden_layers"])
    with layer_bar() as progress:
        errors = layer_errors(
            source, folders, transcripts, after_layer=lambda index: progress("Measuring layers", index + 1, total)
        )
    for folder in folders:
        figures = summary(folder, errors[folder], errors[folders[0]]) | {"tokens": described["tokens"]}
        say_json(figures | ({"errors": errors[folder]} if each else {}))


if __name__ == "__main__":
    command()
