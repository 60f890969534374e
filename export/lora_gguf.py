"""PEFT LoRA folder -> GGUF adapter, a small file that llama.cpp lays over any GGUF of the same base.

Each adapted weight gets two tensors, `<name>.lora_a` and `<name>.lora_b`; llama.cpp computes the scale alpha / rank from
`adapter.lora.alpha`, and where a module's own scale differs, the difference is put into its B.
Format: llama.cpp's src/llama-adapter.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from gramlite.console import progress_bar
from gramlite.errors import ModelError
from gramlite.formats.architecture import Architecture, ExpectedTensor, expected_tensors, read_architecture
from gramlite.formats.artifact import Manifest
from gramlite.formats.checkpoint import read_config
from gramlite.formats.gguf_header import read_header
from gramlite.formats.gguf_writer import Data, PlannedTensor, add_template, write_gguf
from gramlite.formats.publish import describe_source, publish_file, template_record, tool_versions, unicode_name
from gramlite.formats.tensor_stream import encode, is_finite, permute_heads, read_float
from gramlite.judging.template import judge_template
from gramlite.storage import check_output, sha256_cached

from .peft import Adapter, LowRank, match_modules, open_adapter

BLOCK = 32
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
    tensors = plan_factors(adapter, expected, dtype.upper())
    payload = sum(tensor.bytes for tensor in tensors)
    weights = sum(math.prod(tensor.shape) for tensor in tensors)

    def describe(writer: Any) -> None:
        describe_adapter(writer, adapter, destination.stem)
        add_template(writer, judge)

    def build(temporary: Path) -> Manifest:
        with progress_bar(payload) as advance:
            data = encoded_factors(adapter, architecture, expected, {tensor.name: tensor.kind for tensor in tensors})
            sha256 = write_gguf(temporary, architecture.family, describe, tensors, data, advance=advance)
        read_header(temporary, expect="adapter")
        return Manifest(
            format="gguf",
            name=destination.stem,
            quantization=dtype.upper(),
            method="lora adapter",
            source=describe_source(folder, {adapter.file.name: sha256_cached(adapter.file)})
            | {"base": describe_source(base, {}), "base_name": adapter.base_name},
            settings={"dtype": dtype, "alpha": adapter.alpha, "modules": len(adapter.modules), "notes": []},
            tools=tool_versions("gguf", "numpy"),
            template=template_record(judge),
            bits_per_weight=round(8 * payload / weights, 4),
            files={destination.name: sha256},
        )

    return publish_file(destination, build, base, folder, force=force, need_bytes=payload + HEADER_BYTES)


def plan_factors(adapter: Adapter, expected: Mapping[str, ExpectedTensor], dtype: str) -> list[PlannedTensor]:
    """The tensors of the file in order; rows that do not fill Q8_0's blocks stay F16."""
    return [
        PlannedTensor(
            f"{expected[module.weight].target}.lora_{letter}",
            factor.shape,
            "F16" if dtype == "Q8_0" and factor.shape[-1] % BLOCK else dtype,
        )
        for module in adapter.modules
        for letter, factor in (("a", module.a), ("b", module.b))
    ]


def describe_adapter(writer: Any, adapter: Adapter, name: str) -> None:
    """The metadata by which llama.cpp knows an adapter."""
    import gguf

    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", adapter.alpha)
    writer.add_name(unicode_name(name))
    if adapter.base_name:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, unicode_name(adapter.base_name))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def encoded_factors(
    adapter: Adapter, architecture: Architecture, expected: Mapping[str, ExpectedTensor], kinds: Mapping[str, str]
) -> Data:
    """The factors one by one, in the types that `kinds` gives them by name."""
    for module in adapter.modules:
        target = expected[module.weight]
        for letter, values in zip("ab", factors(module, target, adapter.alpha, architecture), strict=True):
            name = f"{target.target}.lora_{letter}"
            data = encode(values, kinds[name])
            if kinds[name] == "F16" and not is_finite(data, "F16"):
                raise ModelError(
                    f"The adapter of {module.module} has values that F16 cannot hold. Export with --dtype f32."
                )
            yield name, [data]


def factors(
    module: LowRank, target: ExpectedTensor, alpha: float, architecture: Architecture
) -> tuple[NDArray[numpy.float32], NDArray[numpy.float32]]:
    """A and B as llama.cpp wants them: rows of B in its rope order, a scale other than alpha / rank put into B."""
    a, b = read_float(module.a), read_float(module.b)
    implied = alpha / module.rank
    if module.scale != implied:
        b = b * numpy.float32(module.scale / implied)
    if target.heads:
        b = permute_heads(b, target.heads, architecture.head_size)
    return a, b
