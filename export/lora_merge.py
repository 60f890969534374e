"""Merges a LoRA adapter into a checkpoint: the same folder with W + scale * B @ A in place of each adapted W.

The sum is computed in float32 and rounded once to the checkpoint's own dtype, so the result does not depend on the
runtime that merges. Tensors that are not adapted, the configuration and the tokenizer are copied as they are.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy

from gramlite.console import Advance, progress_bar
from gramlite.errors import ModelError
from gramlite.formats.architecture import expected_tensors, read_architecture
from gramlite.formats.artifact import Manifest, hash_files
from gramlite.formats.carried import notices_of
from gramlite.formats.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from gramlite.formats.hashed_output import HashedOutput
from gramlite.formats.publish import describe_source, publish_folder, tool_versions
from gramlite.formats.tensor_stream import (
    SourceHash,
    convert_checked,
    encode,
    is_finite,
    read_ahead,
    read_float,
    read_pieces,
)
from gramlite.judging.template import judge_template
from gramlite.storage import FOLDER_MANIFEST, check_output, sha256_file

from .peft import LowRank, match_modules, open_adapter
from .plan import match_tensors

COPIED = (".json", ".txt", ".model", ".jinja", ".md")
SPARE_BYTES = 64 << 20


def merge_adapter(
    folder: Path, peft_folder: Path, destination: Path, *, template: str | None = None, force: bool = False
) -> Manifest:
    """Write a checkpoint folder with a LoRA merged in, and return its manifest.

    Raises ModelError, which names it, for a checkpoint or adapter that is refused, InputError when `destination`
    exists and `force` is not set or lies in the checkpoint, ResourceError when the disk is full.
    """
    folder, peft_folder, destination = Path(folder), Path(peft_folder), Path(destination)
    destination = check_output(destination, [folder, peft_folder], force=force, inputs=[template])
    checkpoint, adapter = open_checkpoint(folder), open_adapter(peft_folder)
    architecture = read_architecture(checkpoint.config)
    match_tensors(checkpoint, architecture)
    match_modules(adapter, expected_tensors(architecture))
    judge = judge_template(folder, template) or judge_template(peft_folder, None)
    total = sum(file.stat().st_size for file in checkpoint.files)
    modules = {module.weight: module for module in adapter.modules}

    def build(out: Path) -> Manifest:
        out.mkdir()
        files = copy_small_files(folder, peft_folder, out)
        hashes = {}
        with progress_bar(total) as advance:
            for file in checkpoint.files:
                hashes[file.name], files[file.name] = merge_file(checkpoint, file, out / file.name, modules, advance)
        return Manifest(
            format="hf",
            name=destination.name,
            quantization=next(iter(checkpoint.tensors.values())).dtype,
            method="merge of a LoRA",
            source=describe_source(folder, hashes)
            | {"adapter": describe_source(adapter.folder, {adapter.file.name: sha256_file(adapter.file)})},
            settings={"modules": len(modules), "notes": []},
            tools=tool_versions("numpy"),
            template=judge,
            bits_per_weight=round(8 * checkpoint.stored_bytes / checkpoint.weights, 4),
            files=files,
        )

    return publish_folder(destination, build, force=force, need_bytes=total + SPARE_BYTES)


def copy_small_files(folder: Path, peft_folder: Path, out: Path) -> dict[str, str]:
    """Copy configuration, tokenizer, model card, and the notices of both folders; return their sha256 by name."""
    small = {path.name: path for path in folder.iterdir() if path.is_file() and path.suffix in COPIED}
    small.pop(FOLDER_MANIFEST, None)
    for name, path in (small | notices_of(folder, peft_folder)).items():
        shutil.copyfile(path, out / name)
    return hash_files(out)


def merge_file(
    checkpoint: Checkpoint, file: Path, destination: Path, modules: dict[str, LowRank], advance: Advance
) -> tuple[str, str]:
    """Write one safetensors file with its adapted tensors merged; return the sha256 of the old and the new one."""
    tensors = [tensor for tensor in checkpoint.tensors.values() if tensor.file == file]
    source_hash = SourceHash(file)
    with ThreadPoolExecutor(max_workers=1) as reader, file.open("rb", buffering=0) as source:
        header = source.read(tensors[0].start if tensors else file.stat().st_size)
        source_hash.update(header)
        destination.write_bytes(header)
        with HashedOutput(destination) as output:
            for tensor in tensors:
                pieces = read_ahead(source_hash.over(read_pieces(source, tensor)), reader)
                if tensor.name in modules:
                    pieces = iter([merged(b"".join(pieces), tensor, modules[tensor.name])])
                for piece in pieces:
                    output.put(piece)
                    advance(tensor.name, len(piece))
            return source_hash.hexdigest(), output.finish()


def merged(data: bytes, tensor: StoredTensor, module: LowRank) -> bytes:
    """The bytes of W + scale * B @ A, summed in float32 and rounded once to the dtype of W."""
    change = read_float(module.b) @ read_float(module.a)
    if module.scale != 1:
        change *= numpy.float32(module.scale)
    change += convert_checked(data, tensor, "F32").reshape(tensor.shape)
    result = encode(change, tensor.dtype)
    if not is_finite(change, "F32") or not is_finite(result, tensor.dtype):
        raise ModelError(f"Merging {module.module} gives values that {tensor.dtype} cannot hold. Check the adapter.")
    return bytes(result.tobytes())
