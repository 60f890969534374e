"""PEFT LoRA folder -> GGUF adapter, a small file that llama.cpp lays over any GGUF of the same base.

Each adapted weight gets two tensors, `<name>.lora_a` and `<name>.lora_b`; llama.cpp computes the scale alpha / rank from
`adapter.lora.alpha`, and where a module's own scale differs, the difference is put into its B.
Format: llama.cpp's src/llama-adapter.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy
from numpy.typing import NDArray

from gramlite.errors import ModelError
from gramlite.formats.architecture import Architecture, ExpectedTensor, expected_tensors, read_architecture
from gramlite.formats.artifact import Manifest
from gramlite.formats.checkpoint import read_config
from gramlite.formats.gguf_data import GgufData
from gramlite.formats.publish import add_template, describe_source, publish_file, tool_versions, unicode_name
from gramlite.formats.tensor_stream import is_finite, permute_heads, to_half
from gramlite.generation.scaffold import ChatTemplate
from gramlite.judging.template import judge_template
from gramlite.options import chat_options
from gramlite.storage import check_output, sha256_cached

from .gguf import ALIGNMENT
from .peft import Adapter, LowRank, match_modules, open_adapter, read_factor
from .report import Advance, judge_command, print_artifact, progress_bar
from .smoke import smoke_option

DTYPES = ("f16", "q8_0", "f32")
BLOCK = 32
ITEM_BYTES = {"F32": 4.0, "F16": 2.0, "Q8_0": 34 / BLOCK}
HEADER_BYTES = 4 << 20


def export_adapter(
    folder: Path, base: Path, destination: Path, *, dtype: str = "f16", template: str | None = None, force: bool = False
) -> Manifest:
    """Write a PEFT LoRA folder as a GGUF adapter with its manifest, and return the manifest.

    `base` is the folder of the checkpoint it was trained on, of which only config.json is read. `dtype` is f16, q8_0
    (factors whose rows are no multiple of 32 stay f16) or f32. Raises ModelError, which names it, for an adapter that
    is refused, InputError when `destination` exists and `force` is not set, ResourceError when the disk is full.
    """
    folder, base, destination = Path(folder), Path(base), Path(destination)
    destination = check_output(destination, [folder, base], force=force, file=True, inputs=[template])
    adapter, architecture = open_adapter(folder), read_architecture(read_config(base))
    expected = expected_tensors(architecture)
    match_modules(adapter, expected)
    judge = judge_template(folder, template) or judge_template(base, None)
    plan = plan_factors(adapter, expected, dtype.upper())
    payload = sum(size for _, _, size in plan.values())
    weights = sum(int(numpy.prod(shape)) for shape, _, _ in plan.values())
    with progress_bar(payload) as advance:

        def build(temporary: Path) -> Manifest:
            write_header(temporary, architecture.family, adapter, plan, judge, destination.stem)
            sha256 = write_factors(temporary, architecture, adapter, expected, plan, advance)
            check_written(temporary)
            return Manifest(
                format="gguf",
                name=destination.stem,
                quantization=dtype.upper(),
                method="lora adapter",
                source=describe_source(folder, {adapter.file.name: sha256_cached(adapter.file)})
                | {"base": describe_source(base, {}), "base_name": adapter.base_name},
                settings={"dtype": dtype, "alpha": adapter.alpha, "modules": len(adapter.modules), "notes": []},
                tools=tool_versions("gguf", "numpy"),
                template={key: judge[key] for key in ("name", "sha256")} if judge else None,
                bits_per_weight=round(8 * payload / weights, 4),
                files={destination.name: sha256},
            )

        return publish_file(destination, build, base, folder, force=force, need_bytes=payload + HEADER_BYTES)


Plan = dict[str, tuple[tuple[int, ...], str, int]]  # GGUF tensor name -> shape, type, bytes


def plan_factors(adapter: Adapter, expected: Mapping[str, ExpectedTensor], dtype: str) -> Plan:
    """The tensors of the file in order; rows that do not fill Q8_0's blocks stay F16."""
    plan: Plan = {}
    for module in adapter.modules:
        target = expected[module.weight].target
        for letter, shape in (("a", module.a.shape), ("b", module.b.shape)):
            kind = "F16" if dtype == "Q8_0" and shape[-1] % BLOCK else dtype
            plan[f"{target}.lora_{letter}"] = (shape, kind, int(numpy.prod(shape) * ITEM_BYTES[kind]))
    return plan


def write_header(
    path: Path, family: str, adapter: Adapter, plan: Plan, template: dict[str, Any] | None, name: str
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, family)
    try:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", adapter.alpha)
        writer.add_name(unicode_name(name))
        if adapter.base_name:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, unicode_name(adapter.base_name))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_template(writer, template)
        for tensor, (shape, kind, size) in plan.items():
            raw = gguf.GGMLQuantizationType[kind]
            writer.add_tensor_info(tensor, shape, numpy.dtype(numpy.float32), size, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def write_factors(
    path: Path,
    architecture: Architecture,
    adapter: Adapter,
    expected: Mapping[str, ExpectedTensor],
    plan: Plan,
    advance: Advance,
) -> str:
    """Append the factors one by one; return the file's sha256."""
    with GgufData(path) as output:
        output.pad(ALIGNMENT)
        for module in adapter.modules:
            target = expected[module.weight]
            for letter, values in zip("ab", factors(module, target, adapter.alpha, architecture), strict=True):
                name = f"{target.target}.lora_{letter}"
                data = encode(values, plan[name][1], module)
                output.put(data)
                output.pad(ALIGNMENT)
                advance(name, len(data))
        return output.finish()


def factors(
    module: LowRank, target: ExpectedTensor, alpha: float, architecture: Architecture
) -> tuple[NDArray[numpy.float32], NDArray[numpy.float32]]:
    """A and B as llama.cpp wants them: rows of B in its rope order, a scale other than alpha / rank put into B."""
    a, b = read_factor(module.a), read_factor(module.b)
    implied = alpha / module.rank
    if module.scale != implied:
        b = b * numpy.float32(module.scale / implied)
    if target.heads:
        b = permute_heads(b, target.heads, architecture.head_size)
    return a, b


def encode(values: NDArray[numpy.float32], kind: str, module: LowRank) -> bytes:
    if kind == "F32":
        return values.tobytes()
    if kind == "Q8_0":
        import gguf

        return bytes(gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0).tobytes())
    half = to_half(values)
    if not is_finite(half, "F16"):
        raise ModelError(f"The adapter of {module.module} has values that F16 cannot hold. Export with --dtype f32.")
    return bytes(half.tobytes())


def check_written(path: Path) -> None:
    from gramlite.formats.gguf_header import read_header

    read_header(path, expect="adapter")


@click.command("adapter", short_help="PEFT LoRA -> GGUF adapter")
@click.argument("peft_folder", type=click.Path(path_type=Path))
@click.option(
    "--base",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of the checkpoint the adapter was trained on.",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The GGUF file to write.")
@click.option("--dtype", type=click.Choice(DTYPES, case_sensitive=False), default="f16", show_default=True)
@click.option("--template", metavar="NAME|FILE", help="The judge's template; by default that of the model card.")
@chat_options
@smoke_option
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    peft_folder: Path,
    base: Path,
    output: Path,
    dtype: str,
    template: str | None,
    chat: ChatTemplate,
    smoke: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write a LoRA adapter (PEFT_FOLDER) as a GGUF file that goes with any GGUF of its base: -m BASE --adapter OUT."""
    from .smoke_lora import smoke_adapter

    manifest = export_adapter(peft_folder, base, output, dtype=dtype, template=template, force=force)
    if smoke:
        manifest = smoke_adapter(output, manifest, peft_folder, base, template=template, chat=chat, force=force)
    print_artifact(output, manifest, command=judge_command(output, manifest, adapter=True), as_json=as_json)
