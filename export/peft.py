"""A PEFT LoRA folder: which modules it adapts, with what factors and at what scale.

W becomes W + scale * B @ A with A of (rank, in), B of (out, rank) and scale = alpha / rank, or alpha / sqrt(rank) with
rslora. Hu et al., 2106.09685; the file layout is PEFT's (adapter_config.json, adapter_model.safetensors).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from gramlite.artifact import PICKLE_SUFFIXES
from gramlite.errors import InputError, ModelError

from .architecture import ExpectedTensor
from .checkpoint import StoredTensor, read_json, read_safetensors_header
from .stream import NUMPY_TYPES, convert_checked

WEIGHTS = "adapter_model.safetensors"
FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
# settings that change what an adapter computes, with the values under which they do not
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (None, False),
}


@dataclass(frozen=True)
class LowRank:
    """The two factors of one adapted module (`model.layers.3.mlp.up_proj`) and the scale of their product."""

    module: str
    a: StoredTensor
    b: StoredTensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def weight(self) -> str:
        return f"{self.module}.weight"


@dataclass(frozen=True)
class Adapter:
    """An opened adapter: `alpha` is the configuration's own, `modules` are in the order of the file."""

    folder: Path
    alpha: float
    base_name: str
    modules: tuple[LowRank, ...]

    @property
    def file(self) -> Path:
        return self.folder / WEIGHTS


def open_adapter(folder: Path) -> Adapter:
    """Read a PEFT folder's configuration and the header of its weights.

    Raises InputError where there is no such folder, ModelError, which names it, for pickled weights, a kind of adapter
    other than plain LoRA, a tensor that is no LoRA factor, and factors that do not belong together.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder. Name the adapter's folder, the one with adapter_config.json in it.")
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} has no adapter_config.json, so it is no PEFT adapter. Name the adapter's own folder."
        )
    config = read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder} is an adapter of the type {config.get('peft_type')!r}; only LORA can be exported.")
    for key, neutral in NEUTRAL.items():
        if config.get(key) not in neutral:
            raise ModelError(
                f"{folder} uses {key} = {config[key]!r}, which goes beyond plain LoRA. Merge it with PEFT instead."
            )
    if not (folder / WEIGHTS).is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
        found = f"its weights in {pickles[0]}, a pickle, which is refused" if pickles else f"no {WEIGHTS}"
        raise ModelError(f"{folder} has {found}. Save the adapter as safetensors (save_pretrained does).")
    modules = pair_factors(folder / WEIGHTS, config)
    return Adapter(folder, _positive(config, "lora_alpha"), str(config.get("base_model_name_or_path") or ""), modules)


def pair_factors(path: Path, config: dict[str, Any]) -> tuple[LowRank, ...]:
    """Match each A with its B and work out the scale of each pair."""
    factors: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in read_safetensors_header(path).items():
        match = FACTOR.fullmatch(name)
        if not match:
            raise ModelError(
                f"{path} has the tensor {name!r}, which is no LoRA factor of a linear layer. Merge it with "
                "PEFT instead."
            )
        if tensor.dtype not in NUMPY_TYPES or len(tensor.shape) != 2:
            raise ModelError(
                f"{path} has the factor {name!r} as {tensor.dtype} {list(tensor.shape)}, no matrix of floats."
            )
        if match[2] in factors.setdefault(match[1], {}):
            raise ModelError(f"{path} has the factor {match[2]} of {match[1]} twice. Save the adapter again.")
        factors[match[1]][match[2]] = tensor
    if not factors:
        raise ModelError(f"{path} holds no LoRA factors. Save the adapter again.")
    modules = []
    for module, pair in factors.items():
        if len(pair) != 2:
            raise ModelError(
                f"{path} lacks the factor {'B' if 'A' in pair else 'A'} of {module}. Save the adapter again."
            )
        if pair["A"].shape[0] != pair["B"].shape[1] or not pair["A"].shape[0]:
            raise ModelError(
                f"{path} has factors of {module} that do not belong together: A is {list(pair['A'].shape)} "
                "and "
                f"B {list(pair['B'].shape)}. Save the adapter again."
            )
        modules.append(LowRank(module, pair["A"], pair["B"], scale_of(config, module, pair["A"].shape[0])))
    return tuple(modules)


def scale_of(config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rslora, where a pattern may give a module an alpha of its own."""
    alpha, stated = _positive(config, "lora_alpha"), config.get("r")
    for key, value in (config.get("alpha_pattern") or {}).items():
        if _matches(key, module):
            alpha = _positive({key: value}, key)
    for key, value in (config.get("rank_pattern") or {}).items():
        if _matches(key, module):
            stated = value
    if stated != rank:
        raise ModelError(
            f"adapter_config.json says rank {stated!r} for {module} and its factors have {rank}. Save the "
            "adapter again."
        )
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _matches(key: str, module: str) -> bool:
    """Whether a pattern of adapter_config.json means a module: its whole name or the end of it, taken literally."""
    if not re.fullmatch(r"\^?[\w.]+", key):
        raise ModelError(
            f"adapter_config.json has the pattern {key!r}; only plain module names are supported. Spell them out."
        )
    return module == key.removeprefix("^") or (not key.startswith("^") and module.endswith(f".{key}"))


def _positive(config: dict[str, Any], key: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ModelError(
            f"adapter_config.json has {key} = {value!r}; it must be a number above 0. Save the adapter again."
        )
    return float(value)


def match_modules(adapter: Adapter, expected: Mapping[str, ExpectedTensor]) -> None:
    """Refuse an adapter with a module that the base does not have, or has in another shape."""
    for module in adapter.modules:
        if module.weight not in expected:
            raise ModelError(
                f"{adapter.folder} adapts {module.module}, which the base does not have. Name the base it "
                "was trained on."
            )
        shape = (module.b.shape[0], module.a.shape[1])
        if shape != expected[module.weight].shape:
            raise ModelError(
                f"{adapter.folder} adapts {module.module} as {list(shape)} and the base has "
                f"{list(expected[module.weight].shape)}. Name the base it was trained on."
            )


def read_factor(tensor: StoredTensor) -> NDArray[numpy.float32]:
    """A factor as float32, exactly, in its own shape."""
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        return convert_checked(file.read(tensor.bytes), tensor, "F32").reshape(tensor.shape)
