"""A PEFT LoRA folder: which modules it adapts, with what factors and at what scale.

W becomes W + scale * B @ A with A of (rank, in), B of (out, rank) and scale = alpha / rank, or alpha / sqrt(rank) with
rslora. Hu et al., 2106.09685; the file layout is PEFT's (adapter_config.json, adapter_model.safetensors).
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gramlite.errors import InputError, ModelError
from gramlite.formats.architecture import ExpectedTensor
from gramlite.formats.artifact import PICKLE_SUFFIXES
from gramlite.formats.checkpoint import StoredTensor, read_safetensors_header
from gramlite.formats.model_folder import read_json_object
from gramlite.formats.tensor_stream import NUMPY_TYPES

WEIGHTS = "adapter_model.safetensors"
FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # that leave the base's weights alone
READ = ("peft_type", "init_lora_weights", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
# settings under which a saved adapter computes what it would without them: they are for training, choose the modules
# (the factors say which), or are not looked at for linear layers or without their init_lora_weights. Of all others,
# whether known to us or not, only values that switch nothing on go through.
WITHOUT_EFFECT = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "runtime_config",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "fan_in_fan_out",
    "ensure_weight_tying", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr",  # the last three are ms-swift's
)  # fmt: skip
OFF: tuple[Any, ...] = (None, False, "", "none", [], {})
MATCH_SECONDS = 5.0
# run in a process of its own that can be ended, for a pattern of somebody else's may take forever
_MATCHER = r"""
import json, re, sys
keys, modules = json.load(sys.stdin)
json.dump({name: next((key for key in keys if re.match(rf"(.*\.)?({key})$", name)), name) for name in modules}, sys.stdout)
"""


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
    config = read_json_object(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder} is an adapter of the type {config.get('peft_type')!r}; only LORA can be exported.")
    check_settings(folder, config)
    if not (folder / WEIGHTS).is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
        found = f"its weights in {pickles[0]}, a pickle, which is refused" if pickles else f"no {WEIGHTS}"
        raise ModelError(f"{folder} has {found}. Save the adapter as safetensors (save_pretrained does).")
    modules = pair_factors(folder / WEIGHTS, config)
    return Adapter(
        folder, checked_alpha(config.get("lora_alpha")), str(config.get("base_model_name_or_path") or ""), modules
    )


def check_settings(folder: Path, config: dict[str, Any]) -> None:
    """Refuse by name what changes the base or cannot be said by two factors and a scale, unknown settings included."""
    start = config.get("init_lora_weights", True)
    if start not in INITIALISATIONS:
        raise ModelError(
            f"{folder} has init_lora_weights = {_shown(start)}, which changes the base's own weights, so that its factors "
            "say nothing of the base as it was published. Save it with PEFT's path_initial_model_for_weight_conversion, "
            "or merge it with PEFT."
        )
    for key, value in config.items():
        if key not in (*READ, *WITHOUT_EFFECT) and value not in OFF:
            raise ModelError(
                f"{folder} uses {key} = {_shown(value)}, which goes beyond plain LoRA. Merge it with PEFT instead."
            )
    if config.get("use_rslora") not in (None, True, False):
        raise ModelError(f"{folder} has use_rslora = {_shown(config['use_rslora'])}; it must be true or false.")


def _shown(value: Any) -> str:
    return repr(value)[:200]


def pair_factors(path: Path, config: dict[str, Any]) -> tuple[LowRank, ...]:
    """Match each A with its B and work out the scale of each pair."""
    factors: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in read_safetensors_header(path).items():
        match = FACTOR.fullmatch(name)
        if not match:
            raise ModelError(
                f"{path} has the tensor {name!r}, which is no LoRA factor of a linear layer. Merge it with PEFT instead."
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
    ranks, alphas = (own_values(config, key, list(factors)) for key in ("rank_pattern", "alpha_pattern"))
    for module, pair in factors.items():
        if len(pair) != 2:
            raise ModelError(
                f"{path} lacks the factor {'B' if 'A' in pair else 'A'} of {module}. Save the adapter again."
            )
        if pair["A"].shape[0] != pair["B"].shape[1] or not pair["A"].shape[0]:
            raise ModelError(
                f"{path} has factors of {module} that do not belong together: A is {list(pair['A'].shape)} and "
                f"B {list(pair['B'].shape)}. Save the adapter again."
            )
        rank = pair["A"].shape[0]
        stated = ranks.get(module, config.get("r"))
        if stated != rank:
            raise ModelError(
                f"adapter_config.json says rank {_shown(stated)} for {module} and its factors have {rank}. Save the adapter again."
            )
        alpha = checked_alpha(alphas.get(module, config.get("lora_alpha")))
        scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        modules.append(LowRank(module, pair["A"], pair["B"], scale))
    return tuple(modules)


def own_values(config: dict[str, Any], key: str, modules: Sequence[str]) -> dict[str, Any]:
    """The ranks or alphas that a pattern gives to modules, by module, resolved as `peft.utils.other.get_pattern_key` does.

    A pattern is a regular expression for a module's whole name or the end of it behind a dot; the first that fits counts.
    """
    patterns = config.get(key)
    if not patterns:
        return {}
    if not isinstance(patterns, dict):
        raise ModelError(f"adapter_config.json has {key} = {_shown(patterns)}; it must be an object.")
    try:
        found = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCHER],
            input=json.dumps([list(patterns), modules]),
            capture_output=True,
            text=True,
            timeout=MATCH_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(
            f"adapter_config.json's {key} takes longer than {MATCH_SECONDS:g} s to match. Spell the modules' names out."
        ) from error
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or ["no message"])[-1][:300]
        raise ModelError(f"adapter_config.json's {key} holds no regular expression ({reason}). Spell the names out.")
    chosen = json.loads(found.stdout)
    return {module: patterns[chosen[module]] for module in modules if chosen[module] in patterns}


def checked_alpha(value: Any) -> float:
    """An alpha as a number that float32, in which GGUF stores it, holds and can be divided by."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1e-30 < value < 1e30:
        raise ModelError(
            f"adapter_config.json has lora_alpha = {_shown(value)}; it must be a number above 0. Save the adapter again."
        )
    return float(value)


def match_modules(adapter: Adapter, expected: Mapping[str, ExpectedTensor]) -> None:
    """Refuse an adapter with a module that the base does not have, or has in another shape."""
    for module in adapter.modules:
        if module.weight not in expected:
            raise ModelError(
                f"{adapter.folder} adapts {module.module}, which the base does not have. Name the base it was trained on."
            )
        shape = (module.b.shape[0], module.a.shape[1])
        if shape != expected[module.weight].shape:
            raise ModelError(
                f"{adapter.folder} adapts {module.module} as {list(shape)} and the base has "
                f"{list(expected[module.weight].shape)}. Name the base it was trained on."
            )
