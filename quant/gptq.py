"""Quantize a checkpoint with GPTQ, layer by layer on judge transcripts, into the standard GPTQ folder.

Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, 2210.17323.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import click
from gramlite.export.options import ArtifactOptions, artifact_options
from gramlite.export.smoke import smoke_judge

from gramlite.errors import InputError, ModelError
from gramlite.formats.architecture import family_of
from gramlite.formats.artifact import Manifest, hash_files, read_manifest
from gramlite.formats.checkpoint import Checkpoint, open_checkpoint
from gramlite.formats.gptq_folder import GptqWriter, open_gptq
from gramlite.formats.publish import describe_source, manifest_text, tool_versions, write_durably
from gramlite.formats.quantized_linear import QuantizedLinear
from gramlite.judging.template import judge_template
from gramlite.storage import FOLDER_MANIFEST, Inputs, atomic_output, check_output, sha256_cached

from .batches import lay_out
from .calibration import Transcript, calibration_options, load_calibration
from .decoder import STAGES, has_own_head, read_tensor
from .memory import PeakMemory, RunPrediction, check_memory, pick_device, predict_bytes
from .packages import need_packages
from .report import LayerReport, Progress, QuantizationReport, layer_bar, print_report
from .sensitivity import verdict_weights, weighing_room
from .solve import ORDERS, GptqSettings, factorize, output_energy, relative_error, round_to_nearest, solve
from .stream import Stage, Weigh, stream_decoder


def quantize_gptq(
    source: Path,
    output: Path,
    transcripts: Sequence[Transcript],
    settings: GptqSettings,
    *,
    calibration: dict[str, Any],
    device: str = "cpu",
    weigh: Weigh | None = None,
    template: str | None = None,
    force: bool = False,
    progress: Progress = lambda stage, done, total: None,
    checked: tuple[Checkpoint, list[str]] | None = None,
) -> QuantizationReport:
    """Quantize every linear layer of the decoder in `source` and write the GPTQ folder `output` with its manifest.

    `calibration` is what the manifest says of the transcripts (see `describe`). `weigh` gives the weight of each
    token where it shall not be the one of `settings.focus`. `checked` is what `preflight` gave, where it was asked
    before. Embedding, norms and head become float16.
    Raises InputError for settings that do not fit the layers, ModelError for a broken checkpoint.
    """
    started = time.monotonic()
    checkpoint, names = checked or preflight(source, output, settings, template=template, force=force)
    predicted = predict(checkpoint, transcripts, settings, device)
    check_memory(predicted, device)
    room = room_for(checkpoint, names, settings)
    with PeakMemory(device) as memory, atomic_output(output, force=force, need_bytes=room) as folder:
        folder.mkdir()
        reports = _write_layers(folder, checkpoint, names, transcripts, settings, device, weigh, progress)
        bits = _bits_per_weight(folder, checkpoint)
        manifest = Manifest(
            format="gptq",
            name=output.name,
            quantization=f"gptq:{settings.bits}x{settings.group_size}",
            method="gptq",
            source=describe_source(source, {file.name: sha256_cached(file) for file in checkpoint.files}),
            settings=asdict(settings) | {"layer_errors": {report.name: report.error for report in reports}},
            calibration=calibration,
            tools=tool_versions("torch", "transformers", "safetensors"),
            template=judge_template(source, template),
            bits_per_weight=bits,
            files=hash_files(folder),
        )
        write_durably(folder / FOLDER_MANIFEST, manifest_text(manifest))
    return QuantizationReport(
        output=output,
        layers=tuple(reports),
        seconds=time.monotonic() - started,
        peak_bytes=memory.peak,
        predicted_bytes=predicted.total,
        size_bytes=sum(file.stat().st_size for file in output.iterdir()),
        bits_per_weight=bits,
    )


def _write_layers(
    folder: Path,
    checkpoint: Checkpoint,
    names: Sequence[str],
    transcripts: Sequence[Transcript],
    settings: GptqSettings,
    device: str,
    weigh: Weigh | None,
    progress: Progress,
) -> list[LayerReport]:
    """Quantize the linear layers into the files of a GPTQ folder, with everything else that goes there."""
    writer = GptqWriter(folder)
    reports: list[LayerReport] = []
    digests: dict[str, str] = {}

    def visit(stage: Stage) -> None:
        for name, linear, report in quantize_stage(stage, settings):
            writer.add_linear(name, linear)
            digests[name] = digest(linear)
            reports.append(report)

    def after_layer(index: int) -> None:
        progress("Quantizing layers", index + 1, len(names) // sum(map(len, STAGES)))

    if weigh is None and settings.focus:
        told = partial(progress, "Reading gradients")
        weigh = verdict_weights(checkpoint, transcripts, device=device, after_layer=told)
    stream_decoder(checkpoint, transcripts, visit, device=device, weigh=weigh, after_layer=after_layer)
    _add_unquantized(checkpoint, names, writer)
    writer.finish(checkpoint.config, quantization_config(settings), checkpoint.folder)
    _check_written(folder, digests)
    return reports


def preflight(
    source: Path, output: Path, settings: GptqSettings, *, template: str | None, force: bool, inputs: Inputs = ()
) -> tuple[Checkpoint, list[str]]:
    """The checkpoint and its linears' names, when all that can be refused before anything is computed was looked at."""
    checkpoint = open_checkpoint(source)
    family_of(checkpoint.config)
    names = linear_names(checkpoint)
    for name in names:
        settings.of(name).check(name, *checkpoint.tensors[f"{name}.weight"].shape)
    for part, _ in settings.exceptions:
        if not any(part in name for name in names):
            raise InputError(f"--bits-for {part} fits no layer. Layers are called as {names[0]} is.")
    has_own_head(checkpoint)
    judge_template(source, template)
    check_output(output, [source], force=force, inputs=[template, *inputs])
    return checkpoint, names


def quantize_stage(stage: Stage, settings: GptqSettings) -> list[tuple[str, QuantizedLinear, LayerReport]]:
    """Quantize the linears that read one input, and put the quantized weights in their place where it is sequential."""
    import torch

    factor = factorize(stage.moment, settings)
    done = []
    for name, module in stage.linears.items():
        weight, own = module.weight, settings.of(name)
        linear = solve(weight, factor, own)
        energy = output_energy(weight, stage.moment)
        report = LayerReport(
            name=name,
            bits=linear.bits,
            error=relative_error(weight, linear, stage.moment, energy=energy),
            plain_error=relative_error(weight, round_to_nearest(weight, own), stage.moment, energy=energy),
        )
        if settings.sequential:
            weight.copy_(torch.from_numpy(linear.dequantize()))
        done.append((name, linear, report))
    return done


def linear_names(checkpoint: Checkpoint) -> list[str]:
    """The decoder's linear modules, in order; raises ModelError where a layer misses one."""
    layers = checkpoint.config.get("num_hidden_layers")
    if type(layers) is not int or layers < 1:
        raise ModelError(f"{checkpoint.folder / 'config.json'} has num_hidden_layers {layers!r}.")
    names = [f"model.layers.{index}.{name}" for index in range(layers) for stage in STAGES for name in stage]
    for name in names:
        stored = checkpoint.tensors.get(f"{name}.weight")
        if stored is None or len(stored.shape) != 2:
            raise ModelError(f"{checkpoint.folder} lacks the matrix '{name}.weight'. Download the checkpoint again.")
    return names


def quantization_config(settings: GptqSettings) -> dict[str, Any]:
    """What config.json and quantize_config.json say, in the words of AutoGPTQ and, for exceptions, gptqmodel."""
    dynamic = {f"+:.*{re.escape(part)}.*": {"bits": bits} for part, bits in reversed(settings.exceptions)}
    return {
        "quant_method": "gptq",
        "bits": settings.bits,
        "group_size": settings.group_size,
        "desc_act": settings.order == "full",
        "static_groups": settings.order == "static",
        "sym": settings.symmetric,
        "true_sequential": settings.sequential,
        "damp_percent": settings.damping,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {"quantizer": [f"gramlite:{version('gramlite')}"]},
    }


def _add_unquantized(checkpoint: Checkpoint, linears: Sequence[str], writer: GptqWriter) -> None:
    quantized = {f"{name}.weight" for name in linears}
    for name in checkpoint.tensors:
        if name not in quantized:
            half = read_tensor(checkpoint, name).half()
            if not bool(half.isfinite().all()):
                raise ModelError(f"{name!r} has values that float16, the type of GPTQ files, cannot hold.")
            writer.add(name, half.numpy())


def digest(linear: QuantizedLinear) -> str:
    """A hash of all that a quantized layer is."""
    state = hashlib.sha256(f"{linear.bits} {linear.group_size}".encode())
    for array in (linear.codes, linear.scales, linear.zeros, linear.group_index):
        state.update(array.tobytes())
    return state.hexdigest()


def _check_written(folder: Path, digests: dict[str, str]) -> None:
    """Read the folder back and compare; a difference is a fault of this program or of the disk."""
    written = open_gptq(folder)
    for name, expected in digests.items():
        if digest(written.read_linear(name)) != expected:
            raise ModelError(f"{name} did not come back from the disk as it was written. Check the disk and try again.")


def room_for(checkpoint: Checkpoint, linears: Sequence[str], settings: GptqSettings) -> int:
    """About the bytes that the folder takes: codes with their scales and zero points, and all else in 16 bits."""
    sizes = {name: prod(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    quantized = {f"{name}.weight": settings.of(name) for name in linears}
    bits = sum(
        sizes[name] * (own.bits + (16 + own.bits) / own.group_of(checkpoint.tensors[name].shape[1]))
        for name, own in quantized.items()
    )
    return int(bits / 8) + sum(2 * size for name, size in sizes.items() if name not in quantized)


def predict(
    checkpoint: Checkpoint, transcripts: Sequence[Transcript], settings: GptqSettings, device: str
) -> RunPrediction:
    """What `predict_bytes` says of these transcripts, padding and shared prefix as they are."""
    sizes = [prod(batch.shape) for batch in lay_out(transcripts)]
    batch = max(sizes) + (sizes[0] if len(sizes) > 1 else 0)
    return predict_bytes(
        checkpoint.config,
        sum(sizes),
        batch=batch,
        room=weighing_room(checkpoint, device),
        bits=settings.bits,
        focus=settings.focus,
        device=device,
    )


def _bits_per_weight(folder: Path, checkpoint: Checkpoint) -> float:
    weights = sum(prod(tensor.shape) for tensor in checkpoint.tensors.values())
    return 8 * sum(tensor.bytes for tensor in open_gptq(folder).tensors.values()) / weights


def parse_exception(text: str) -> tuple[str, int]:
    """`v_proj=8` as a part of a layer's name and its bits; raises InputError for anything else."""
    part, equals, bits = text.rpartition("=")
    if not part or not equals or not bits.isdigit():
        raise InputError(f"--bits-for {text} is not PART=BITS, such as v_proj=8 or layers.0.mlp.down_proj=8.")
    return part, int(bits)


@click.command("gptq", short_help="checkpoint -> GPTQ, calibrated on judge transcripts")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--bits", type=click.Choice(["2", "3", "4", "8"]), default="4", show_default=True)
@click.option("--bits-for", "exceptions", multiple=True, metavar="PART=BITS", help="Other bits for some layers.")
@click.option(
    "--group-size", type=int, default=64, show_default=True, help="Weights that share a scale; -1 for a whole row."
)
@click.option("--symmetric/--asymmetric", default=True, show_default=True, help="Without or with zero points.")
@click.option(
    "--act-order",
    "order",
    type=click.Choice(ORDERS),
    default="static",
    show_default=True,
    help="Columns of high activation first: not at all, within groups of neighbours, or groups and all.",
)
@click.option("--damping", type=float, default=0.01, show_default=True, help="Share of the mean diagonal added to it.")
@click.option(
    "--sequential/--no-sequential",
    default=True,
    show_default=True,
    help="Calibrate each layer on what the quantized ones before it put out.",
)
@click.option("--search/--no-search", default=True, show_default=True, help="Search scales that clip extremes.")
@click.option("--focus/--no-focus", default=True, show_default=True, help="Weigh tokens by the verdict's gradient.")
@click.option("--calibration", required=True, type=click.Path(path_type=Path), help="Pairs or transcripts, JSONL.")
@click.option("--judge", metavar="MODEL", help="Who judges the pairs for calibration; by default SOURCE itself.")
@calibration_options
@artifact_options("The folder to write.")
def command(source: Path, calibration: Path, judge: str | None, options: ArtifactOptions, **given: Any) -> None:
    """Quantize the SOURCE checkpoint's linear layers with GPTQ into a folder that vLLM and transformers load."""
    need_packages("gptq", "torch", "transformers")
    same = ("group_size", "symmetric", "order", "damping", "search", "sequential", "focus")
    settings = GptqSettings(
        bits=int(given["bits"]),
        exceptions=tuple(map(parse_exception, given["exceptions"])),
        **{name: given[name] for name in same},
    )
    checked = preflight(source, options.output, settings, **options.writing, inputs=[calibration, judge])
    device = pick_device(given["device"])
    how = {name: given[name] for name in ("tokens", "seed", "device", "mode")}
    transcripts, described = load_calibration(
        calibration, judge=judge or source, template=options.template, chat=options.chat, **how
    )
    with layer_bar() as progress:
        report = quantize_gptq(
            source,
            options.output,
            transcripts,
            settings,
            calibration=described,
            device=device,
            progress=progress,
            checked=checked,
            **options.writing,
        )
    manifest = read_manifest(options.output)
    assert manifest is not None  # it was written just now
    if options.smoke:
        manifest = smoke_judge(options.output, manifest, source, chat=options.chat, **options.writing)
    print_report(report, manifest, as_json=options.as_json)
