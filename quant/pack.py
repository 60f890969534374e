"""GPTQ folder -> GGUF: the same codes and scales in llama.cpp's blocks, so that nothing further is lost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from gramlite.export.gguf import ALIGNMENT, HEADER_BYTES, add_architecture, add_vocabulary, check_written
from gramlite.export.report import Advance, judge_command, print_artifact, progress_bar
from gramlite.export.smoke import CannotRunHere, recorded_margins, smoke_judge, smoke_option

from gramlite.errors import ModelError
from gramlite.formats.architecture import (
    Architecture,
    ExpectedTensor,
    expected_tensors,
    read_architecture,
    rope_factors,
)
from gramlite.formats.artifact import Manifest, read_manifest, verify_files
from gramlite.formats.ggml_types import GGML_TYPES
from gramlite.formats.gguf_blocks import gguf_blocks, gguf_type
from gramlite.formats.gguf_data import GgufData
from gramlite.formats.gptq_folder import GptqFolder, open_gptq
from gramlite.formats.publish import add_template, describe_source, publish_file, tool_versions, unicode_name
from gramlite.formats.quantized_linear import QuantizedLinear
from gramlite.formats.tensor_stream import permute_heads
from gramlite.formats.tokenizer import Vocabulary, read_vocabulary
from gramlite.generation.scaffold import ChatTemplate
from gramlite.judging.template import judge_template
from gramlite.options import chat_options
from gramlite.storage import check_output, sha256_cached

EMBEDDINGS = ("f16", "q8_0")
TYPES = {kind.name: (number, kind) for number, kind in GGML_TYPES.items()}


@dataclass(frozen=True)
class PackPlan:
    """What goes into the file: every tensor with the GGUF type it takes."""

    folder: GptqFolder
    architecture: Architecture
    vocabulary: Vocabulary
    tensors: tuple[tuple[ExpectedTensor, str], ...]

    @property
    def file_type(self) -> str:
        """The type of most weights, as llama.cpp names the file."""
        kinds = [kind for tensor, kind in self.tensors if tensor.name.removesuffix(".weight") in self.folder.linears]
        return max(set(kinds), key=kinds.count)

    @property
    def payload(self) -> int:
        return sum(bytes_of(tensor.shape, kind) for tensor, kind in self.tensors)

    @property
    def weights(self) -> int:
        return sum(math.prod(tensor.shape) for tensor, _ in self.tensors)


def pack_gguf(
    source: Path, destination: Path, *, embedding: str = "f16", template: str | None = None, force: bool = False
) -> Manifest:
    """Write a GPTQ folder as one GGUF file whose dequantized weights are the folder's own, bit for bit.

    `embedding` (f16 or q8_0) is the type of the embedding and the head, the only tensors that may lose anything.
    Raises CannotRunHere for a sound folder that GGUF cannot hold (groups in activation order or of no multiple of 32,
    an unknown tokenizer), ModelError for one that is damaged.
    """
    source, destination = Path(source), Path(destination)
    destination = check_output(destination, [source], force=force, file=True, inputs=[template])
    plan = plan_pack(source, embedding)
    judge = judge_template(source, template)
    origin = read_manifest(source)
    if origin:
        verify_files(source, origin)
    with progress_bar(plan.payload) as advance:

        def build(temporary: Path) -> Manifest:
            write_header(temporary, plan, judge, destination.stem)
            sha256 = write_tensors(temporary, plan, advance)
            with cannot_run_here():
                check_written(temporary, source)
            return Manifest(
                format="gguf",
                name=destination.stem,
                quantization=plan.file_type,
                method="gptq",
                source=describe_source(source, {file.name: sha256_cached(file) for file in plan.folder.files})
                | ({"source": origin.source} if origin else {}),
                settings={"embedding": embedding} | (origin.settings if origin else {}),
                calibration=origin.calibration if origin else None,
                tools=tool_versions("gguf", "numpy"),
                template={key: judge[key] for key in ("name", "sha256")} if judge else None,
                bits_per_weight=round(8 * plan.payload / plan.weights, 4),
                files={destination.name: sha256},
            )

        return publish_file(destination, build, source, force=force, need_bytes=plan.payload + HEADER_BYTES)


def plan_pack(source: Path, embedding: str) -> PackPlan:
    """Match every tensor of the architecture to the folder's and settle its type, before anything is written."""
    folder = open_gptq(source)
    with cannot_run_here():
        architecture = read_architecture(folder.config)
        vocabulary = read_vocabulary(source, folder.config, architecture.vocabulary)
    tensors = []
    for name, expected in expected_tensors(architecture).items():
        module = name.removesuffix(".weight")
        if module in folder.linears:
            linear = folder.read_linear(module)
            if linear.codes.shape != expected.shape:
                raise ModelError(
                    f"{module} is {linear.codes.shape} in {source}; config.json asks for {expected.shape}."
                )
            with cannot_run_here():
                kind = gguf_type(module, linear)
        elif name not in folder.tensors:
            raise ModelError(f"{source} lacks the tensor {name!r}. Quantize or download it again.")
        elif folder.tensors[name].shape != expected.shape:
            raise ModelError(f"{name!r} is {folder.tensors[name].shape} in {source}; {expected.shape} is due.")
        else:
            kind = "F32" if len(expected.shape) == 1 else embedding.upper()
        tensors.append((expected, kind))
    return PackPlan(folder, architecture, vocabulary, tuple(tensors))


@contextmanager
def cannot_run_here() -> Iterator[None]:
    """What GGUF or llama.cpp refuse says nothing against the folder itself."""
    try:
        yield
    except ModelError as error:
        raise CannotRunHere(str(error)) from error


def bytes_of(shape: tuple[int, ...], kind: str) -> int:
    return math.prod(shape) // TYPES[kind][1].block * TYPES[kind][1].block_bytes


def write_header(path: Path, plan: PackPlan, template: dict[str, Any] | None, name: str) -> None:
    """Write everything that stands before the tensors."""
    import gguf

    writer = gguf.GGUFWriter(path, plan.architecture.family)
    try:
        writer.add_type("model")
        writer.add_name(unicode_name(name))
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{plan.file_type}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_architecture(writer, plan.architecture)
        add_vocabulary(writer, plan.vocabulary)
        add_template(writer, template)
        factors = rope_factors(plan.architecture)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        for tensor, kind in plan.tensors:
            writer.add_tensor_info(
                tensor.target,
                tensor.shape,
                np.dtype(np.float32),
                bytes_of(tensor.shape, kind),
                raw_dtype=gguf.GGMLQuantizationType[kind],
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def write_tensors(path: Path, plan: PackPlan, advance: Advance) -> str:
    """Append every tensor, one in memory at a time; return the file's sha256."""
    with GgufData(path) as output:
        output.pad(ALIGNMENT)
        factors = rope_factors(plan.architecture)
        if factors is not None:
            output.put(factors)
            output.pad(ALIGNMENT)
        for tensor, kind in plan.tensors:
            data = tensor_bytes(plan, tensor, kind)
            output.put(data)
            output.pad(ALIGNMENT)
            advance(tensor.target, len(data))
        return output.finish()


def tensor_bytes(plan: PackPlan, tensor: ExpectedTensor, kind: str) -> bytes:
    """A tensor as the file holds it, its rows in llama.cpp's rope order where that differs."""
    module = tensor.name.removesuffix(".weight")
    if module in plan.folder.linears:
        linear = plan.folder.read_linear(module)
        if tensor.heads:
            linear = permute_rows(linear, tensor.heads, plan.architecture.head_size)
        return gguf_blocks(linear, kind).tobytes()
    values: npt.NDArray[Any] = plan.folder.read_float(tensor.name)
    if tensor.heads:
        values = permute_heads(values, tensor.heads, plan.architecture.head_size)
    if kind == "Q8_0":
        import gguf

        values = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    elif kind == "F16":
        values = values.astype(np.float16)
    return values.tobytes()


def permute_rows(linear: QuantizedLinear, heads: int, head_size: int) -> QuantizedLinear:
    """A query or key projection with its rows in llama.cpp's order; codes, scales and zero points go together."""
    return QuantizedLinear(
        codes=permute_heads(linear.codes, heads, head_size),
        scales=permute_heads(linear.scales, heads, head_size),
        zeros=permute_heads(linear.zeros, heads, head_size),
        group_index=linear.group_index,
        bits=linear.bits,
        group_size=linear.group_size,
    )


@click.command("pack", short_help="GPTQ folder -> GGUF or ONNX, bit for bit")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--to", "target", type=click.Choice(["gguf", "onnx"]), default="gguf", show_default=True)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="The file, or for ONNX the folder, to write."
)
@click.option(
    "--embedding",
    metavar="[f16|q8_0]",
    type=click.Choice(EMBEDDINGS, case_sensitive=False),
    default="f16",
    show_default=True,
    help="Type of the embedding and the head.",
)
@click.option("--template", metavar="NAME|FILE", help="The judge's template; by default the one recorded.")
@chat_options
@smoke_option
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    folder: Path,
    target: str,
    output: Path,
    embedding: str,
    template: str | None,
    chat: ChatTemplate,
    smoke: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write a GPTQ FOLDER as a GGUF file or an ONNX folder with the very same weights, which run without CUDA."""
    pack = pack_gguf
    if target == "onnx":
        from .pack_onnx import pack_onnx as pack
    manifest = pack(folder, output, embedding=embedding, template=template, force=force)
    if smoke:
        margins = recorded_margins(read_manifest(folder), manifest.template)
        manifest = smoke_judge(output, manifest, margins, template=template, chat=chat, force=force)
    print_artifact(output, manifest, command=judge_command(output, manifest), as_json=as_json)
