"""GPTQ folder -> GGUF: the same codes and scales in llama.cpp's blocks, so that nothing further is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from gramlite.console import Advance
from gramlite.errors import CannotRunHere, ModelError
from gramlite.storage import check_output, sha256_cached

from .architecture import Architecture, ExpectedTensor, expected_tensors, read_architecture
from .artifact import Manifest, read_manifest, verify_files
from .gguf_blocks import gguf_blocks, gguf_type
from .gguf_writer import HEADER_BYTES, Data, ModelPlan, check_written, write_model
from .gptq_folder import GptqFolder, open_gptq
from .publish import describe_source, publish_file, template_record, tool_versions
from .quantized_linear import QuantizedLinear
from .tensor_stream import encode, permute_heads
from .tokenizer import read_vocabulary


def pack_gguf(
    source: Path,
    destination: Path,
    *,
    embedding: str = "f16",
    template: dict[str, Any] | None = None,
    force: bool = False,
    progress: Callable[[int], AbstractContextManager[Advance]] = lambda total: nullcontext(lambda name, done: None),
) -> Manifest:
    """Write a GPTQ folder as one GGUF file whose dequantized weights are the folder's own, bit for bit.

    `embedding` (f16 or q8_0) is the type of the embedding and the head, the only tensors that may lose anything;
    `template` is the judge's (name, sha256, text). `progress`, given the bytes of all tensors, yields what is told of each.
    Raises CannotRunHere for a sound folder that GGUF cannot hold (groups in activation order or of no multiple of 32,
    an unknown tokenizer), ModelError for one that is damaged.
    """
    source, destination = Path(source), Path(destination)
    destination = check_output(destination, [source], force=force, file=True)
    folder = open_gptq(source)
    plan = plan_pack(folder, embedding)
    origin = read_manifest(source)
    if origin:
        verify_files(source, origin)

    def build(temporary: Path) -> Manifest:
        data = packed_tensors(folder, plan)
        with progress(plan.payload) as advance:
            sha256 = write_model(temporary, plan, data, name=destination.stem, template=template, advance=advance)
        with cannot_run_here():
            check_written(temporary, source)
        return Manifest(
            format="gguf",
            name=destination.stem,
            quantization=plan.file_type,
            method="gptq",
            source=describe_source(source, {file.name: sha256_cached(file) for file in folder.files})
            | ({"source": origin.source} if origin else {}),
            settings={"embedding": embedding} | (origin.settings if origin else {}),
            calibration=origin.calibration if origin else None,
            tools=tool_versions("gguf", "numpy"),
            template=template_record(template),
            bits_per_weight=plan.bits_per_weight,
            files={destination.name: sha256},
        )

    return publish_file(destination, build, source, force=force, need_bytes=plan.payload + HEADER_BYTES)


@contextmanager
def cannot_run_here() -> Iterator[None]:
    """What GGUF or llama.cpp refuse says nothing against the folder itself."""
    try:
        yield
    except ModelError as error:
        raise CannotRunHere(str(error)) from error


def plan_pack(folder: GptqFolder, embedding: str) -> ModelPlan:
    """Match every tensor of the architecture to the folder's and settle its type, before anything is written."""
    with cannot_run_here():
        architecture = read_architecture(folder.config)
        vocabulary = read_vocabulary(folder.folder, folder.config, architecture.vocabulary)
    tensors, quantized = [], []
    for name, expected in expected_tensors(architecture).items():
        module = name.removesuffix(".weight")
        if module in folder.linears:
            kind = packed_type(folder, module, expected)
            quantized.append(kind)
        elif name not in folder.tensors:
            raise ModelError(f"{folder.folder} lacks the tensor {name!r}. Quantize or download it again.")
        elif folder.tensors[name].shape != expected.shape:
            raise ModelError(f"{name!r} is {folder.tensors[name].shape} in {folder.folder}; {expected.shape} is due.")
        else:
            kind = "F32" if len(expected.shape) == 1 else embedding.upper()
        tensors.append((expected, kind))
    return ModelPlan(architecture, vocabulary, max(set(quantized), key=quantized.count), tuple(tensors))


def packed_type(folder: GptqFolder, module: str, expected: ExpectedTensor) -> str:
    """The GGUF type of a quantized layer, of the shape that the architecture asks for."""
    linear = folder.read_linear(module)
    if linear.codes.shape != expected.shape:
        raise ModelError(f"{module} is {linear.codes.shape} in {folder.folder}; config.json asks for {expected.shape}.")
    with cannot_run_here():
        return gguf_type(module, linear)


def packed_tensors(folder: GptqFolder, plan: ModelPlan) -> Data:
    """Every tensor's bytes, one in memory at a time."""
    for tensor, kind in plan.tensors:
        yield tensor.target, [packed_tensor(folder, plan.architecture, tensor, kind)]


def packed_tensor(folder: GptqFolder, architecture: Architecture, tensor: ExpectedTensor, kind: str) -> NDArray[Any]:
    """A tensor as the file holds it, its rows in llama.cpp's rope order where that differs."""
    module = tensor.name.removesuffix(".weight")
    if module in folder.linears:
        linear = folder.read_linear(module)
        if tensor.heads:
            linear = permute_rows(linear, tensor.heads, architecture.head_size)
        return gguf_blocks(linear, kind)
    values = folder.read_float(tensor.name)
    if tensor.heads:
        values = permute_heads(values, tensor.heads, architecture.head_size)
    return encode(values, kind)


def permute_rows(linear: QuantizedLinear, heads: int, head_size: int) -> QuantizedLinear:
    """A query or key projection with its rows in llama.cpp's order; codes, scales and zero points go together."""
    codes, scales, zeros = (
        permute_heads(each, heads, head_size) for each in (linear.codes, linear.scales, linear.zeros)
    )
    return replace(linear, codes=codes, scales=scales, zeros=zeros)
