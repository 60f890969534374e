"""The model builder of onnxruntime-genai, run as a process of its own, offline, on a local checkpoint.

A process keeps its threads, prints and global settings apart, and gives its memory back. What it gets wrong without a
word is checked here: the rotary positions of a scaling that it passes over.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from gramlite.console import Advance
from gramlite.errors import InputError, ModelError, ResourceError
from gramlite.formats.carried import carry_files
from gramlite.formats.onnx_graph import external_extent, external_offset, parse, read_graph, read_values
from gramlite.storage import remove_path

BUILDER = "onnxruntime_genai.models.builder"
PACKAGES = ("onnxruntime_genai", "onnx", "onnx_ir", "torch", "transformers")
LAYER = re.compile(r"^Reading layer (\d+)")
ROPE_CACHES = ("cos_cache", "sin_cache")
GRAPH = "model.onnx"
TARGETS = ("cpu", "cuda")


def require_builder() -> None:
    """Raise InputError where a package that the builder needs is not installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(f"ONNX needs the package {missing[0]!r}. Type: pip install 'gramlite[onnx]'")


def build(
    source: Path, folder: Path, precision: str, target: str, options: Mapping[str, str], advance: Advance, size: int
) -> None:
    """Let the builder write the graph of the checkpoint `source` into the new folder `folder`, and check it.

    `precision` is fp32, fp16, int8 or int4, `target` cpu or cuda, `options` the builder's own; `size` bytes are shared
    among the layers to show progress. Raises ModelError with the builder's last words where it fails.
    """
    require_builder()
    folder.mkdir()
    cache = folder / ".builder"
    cache.mkdir()
    command = [sys.executable, "-m", BUILDER, "-i", str(source.resolve()), "-o", str(folder), "-p", precision]
    command += ["-e", target, "-c", str(cache), "--extra_options", "hf_token=false", "hf_remote=false"]
    command += ["prune_lm_head=true", *(f"{key}={value}" for key, value in options.items())]
    run(command, advance, size)
    remove_path(cache)
    replace_saved(source, folder)
    graph = read_graph(folder / GRAPH)
    check_rope(source, folder / GRAPH, half=graph.half)


def run(command: list[str], advance: Advance, size: int) -> None:
    """Run the builder to its end, following what it prints; ended with us, whatever happens."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    words: deque[str] = deque(maxlen=60)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True, errors="replace"
    ) as process:
        try:
            assert process.stdout
            for line in process.stdout:
                words.append(line.rstrip())
                if match := LAYER.match(line):
                    advance(f"layer {match[1]}", size)
            code = process.wait()
        finally:
            process.kill()
    if code:
        said = [word for word in words if word.strip()]
        text = " ".join(said[-1:])[-400:]
        if any("No space left" in word or "Errno 28" in word for word in said):
            raise ResourceError("The disk is full; nothing was written. Free some space, or choose another -o.")
        if code in (-9, 137):
            raise ResourceError(
                "The model builder was killed, most likely for want of memory. Free some and try again."
            )
        raise ModelError(f"onnxruntime-genai's model builder failed: {text or f'exit code {code}'}")


def replace_saved(source: Path, folder: Path) -> None:
    """Put the checkpoint's own tokenizer and configuration in place of what the builder saved of them."""
    keep = {GRAPH, f"{GRAPH}.data", "genai_config.json"}
    for path in list(folder.iterdir()):
        if path.name not in keep:
            remove_path(path)
    carry_files(source, folder, more=("config.json",))


def check_rope(source: Path, path: Path, *, half: bool) -> None:
    """Compare the graph's rotary caches with transformers' own frequencies; raises ModelError where they differ.

    The builder passes over scalings that its class of a family doesn't know, and its graph would be wrong in silence.
    """
    found = [read_initializer(path, name) for name in ROPE_CACHES]
    angles, scaling = rotary_angles(source, len(found[0]))
    for name, values, wanted in zip(ROPE_CACHES, found, (np.cos(angles), np.sin(angles)), strict=True):
        allowed = 2e-3 if half else 1e-3
        if values.shape != wanted.shape or np.abs(values - wanted * scaling).max() > allowed:
            raise ModelError(
                f"onnxruntime-genai's model builder made a {name} that differs from transformers' for {source}: it does "
                "not know this rope scaling. Type: gramlite export gguf"
            )


def rotary_angles(source: Path, length: int) -> tuple[Any, float]:
    """The angle of each position and frequency, float32 [length, head_size / 2], and what their cosines are scaled by."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    rope = type(model.model.rotary_emb)(config)
    positions = torch.arange(length, dtype=torch.int64).float()
    frequencies = rope.inv_freq.float()
    return torch.outer(positions, frequencies).numpy(), float(rope.attention_scaling)


def initializers(path: Path) -> dict[str, Any]:
    """The graph's weights by name, their data left where they are."""
    return {tensor.name: tensor for tensor in parse(path).graph.initializer}


def read_initializer(path: Path, name: str) -> Any:
    """One weight as a numpy array."""
    tensor = initializers(path).get(name)
    if tensor is None:
        raise ModelError(f"The model builder's graph has no {name}. Is this version of onnxruntime-genai supported?")
    return read_values(path, tensor).astype(np.float32)


def weight_bytes(path: Path) -> int:
    """Bytes of the graph's weights without the rotary caches, which any decoder can compute; shared ones count once."""
    inside, outside = 0, {}
    for name, tensor in initializers(path).items():
        if name in ROPE_CACHES:
            continue
        if tensor.data_location == tensor.EXTERNAL:
            file, size = external_extent(path, tensor)
            outside[file, external_offset(tensor)] = size
        else:
            inside += tensor.ByteSize()
    return inside + sum(outside.values())
