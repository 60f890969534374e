"""The scales of a GPTQ folder as parameters: codes and zero points stay, and the weights follow their scales.

weight[o, i] = scale[o, g] * (code[o, i] - zero[o, g])   with scale = float16(first scale * exp(logarithm))

The logarithms are what is trained, so that one step means the same share of every scale and none changes its sign.
Rounding to float16 is passed straight through. A verdict hangs on so many scales that each needs to move by less than
float16's step; as all of them begin on that grid, plain rounding would let none move and then many at once. So each
has a threshold of its own, drawn at random: the share of scales that take a step is as large as their move is of one.
A layer's weights are computed once a step; a scale's gradient is
summed from its weights' as soon as the backward pass has them, so that they are in memory for one layer only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from gramlite.export.checkpoint import Checkpoint

from gramlite.errors import ModelError

from .decoder import ARCHITECTURES
from .gptq_folder import GptqFolder
from .grid import HALF_MANTISSA_BITS, SMALLEST_SCALE, half_scale, kept_bits
from .linear import QuantizedLinear

if TYPE_CHECKING:
    import torch

NORM = "norm.weight"
LARGEST_LOGARITHM = 1.0  # scales stay within a factor of e


@dataclass
class _Scales:
    """One linear layer: its weight in the model, codes less zero points [out, in], and the scales it began with."""

    weight: torch.Tensor
    offsets: torch.Tensor
    first: torch.Tensor  # [out, groups] float32
    dither: torch.Tensor  # [out, groups], what is added before rounding
    zeros: torch.Tensor | None  # [out, groups] where scale * zero point must be a float16 too
    bits: int
    group_index: torch.Tensor | None  # [in]; None where groups are runs of neighbours

    def rounded(self, logarithms: torch.Tensor) -> torch.Tensor:
        """The scales [out, groups] as files hold them, in float32."""
        return half_scale(self.first * logarithms.view_as(self.first).exp() + self.dither, self.zeros, self.bits)

    def place(self, logarithms: torch.Tensor) -> None:
        """Write the weights that the codes stand for."""
        import torch

        scales = self.rounded(logarithms)
        if self.group_index is None:
            shape = (*scales.shape, -1)
            torch.mul(self.offsets.view(shape), scales.unsqueeze(-1), out=self.weight.data.view(shape))
        else:
            torch.mul(self.offsets, scales[:, self.group_index], out=self.weight.data)

    def gradient(self, logarithms: torch.Tensor) -> torch.Tensor:
        """The gradient of the logarithms [out, groups], from the weight's."""
        import torch

        assert self.weight.grad is not None
        products = self.weight.grad.mul_(self.offsets)
        scales = self.rounded(logarithms)
        if self.group_index is None:
            return products.view(*scales.shape, -1).sum(-1).mul_(scales)
        return torch.zeros_like(scales).index_add_(1, self.group_index, products).mul_(scales)


@dataclass
class _Norm:
    """A norm's weight in the model, and what it began as."""

    weight: torch.Tensor
    first: torch.Tensor
    dither: torch.Tensor

    def rounded(self, logarithms: torch.Tensor) -> torch.Tensor:
        return (self.first * logarithms.exp() + self.dither).half().float()

    def place(self, logarithms: torch.Tensor) -> None:
        self.weight.data.copy_(self.rounded(logarithms))

    def gradient(self, logarithms: torch.Tensor) -> torch.Tensor:
        assert self.weight.grad is not None
        return self.weight.grad * self.rounded(logarithms)


class Student:
    """A model of transformers that computes what a GPTQ folder does, with `logarithms` as its only parameter.

    `logarithms` holds, in one float32 vector, those of all scales and, with `norms`, of the norms' weights; `seed`
    draws the thresholds of their rounding, at which nothing changes while the logarithms are zero. After a
    change of them `refresh` makes the model follow. `model` is changed in place; its weights become float32.
    Their linear layers must fit (see `check_shapes`); raises ModelError where other tensors don't.
    """

    def __init__(self, model: Any, folder: GptqFolder, *, norms: bool = False, seed: int = 0) -> None:
        import torch

        self.model, self.folder = model, folder
        self._parts: dict[str, _Scales | _Norm] = {}
        _load_floats(model, folder)
        model.requires_grad_(False)
        draw = torch.Generator().manual_seed(seed)
        for name in folder.linears:
            weight = _parameter(model, f"{name}.weight", folder)
            self._parts[name] = _scales(weight, folder.read_linear(name), draw)
        for name in folder.tensors if norms else ():
            if name.endswith(NORM):
                weight = _parameter(model, name, folder)
                first = weight.detach().clone()
                self._parts[name] = _Norm(weight, first, _dither(first, None, draw))
        self._where: dict[str, slice] = {}
        count = 0
        for name, part in self._parts.items():
            self._where[name] = slice(count, count + part.first.numel())
            count += part.first.numel()
        self.logarithms = torch.zeros(count, device=model.device)
        self.logarithms.grad = torch.zeros_like(self.logarithms)
        for name, part in self._parts.items():
            part.weight.requires_grad_(True).register_post_accumulate_grad_hook(self._collect(name))
        self.refresh()

    def refresh(self) -> None:
        """Make the model's weights follow the logarithms, which are kept within bounds."""
        self.logarithms.clamp_(-LARGEST_LOGARITHM, LARGEST_LOGARITHM)
        for name, part in self._parts.items():
            part.place(self.logarithms[self._where[name]])

    def linears(self) -> Iterator[tuple[str, QuantizedLinear]]:
        """The quantized layers with their scales of now, in the folder's order."""
        for name in self.folder.linears:
            part = self._parts[name]
            scales = part.rounded(self.logarithms[self._where[name]]).cpu().numpy().astype(np.float16)
            yield name, replace(self.folder.read_linear(name), scales=scales)

    def norms(self) -> dict[str, Any]:
        """The trained norms' weights, float16."""
        return {
            name: part.rounded(self.logarithms[self._where[name]]).cpu().numpy().astype(np.float16)
            for name, part in self._parts.items()
            if isinstance(part, _Norm)
        }

    def _collect(self, name: str) -> Any:
        part, where = self._parts[name], self._where[name]

        def collect(weight: torch.Tensor) -> None:
            assert self.logarithms.grad is not None
            self.logarithms.grad[where] += part.gradient(self.logarithms[where]).flatten()
            weight.grad = None

        return collect


def _scales(weight: torch.Tensor, linear: QuantizedLinear, draw: torch.Generator) -> _Scales:
    import torch

    offsets = linear.codes.astype(np.int16) - linear.zeros[:, linear.group_index].astype(np.int16)
    kind = np.int8 if -128 <= offsets.min() and offsets.max() <= 127 else np.int16
    on = weight.device
    first = torch.from_numpy(linear.scales.astype(np.float32))
    zeros = None if linear.symmetric or linear.bits > 4 else torch.from_numpy(linear.zeros.astype(np.float32))
    return _Scales(
        weight=weight,
        offsets=torch.from_numpy(offsets.astype(kind)).to(on),
        first=first.to(on),
        dither=_dither(first, zeros, draw).to(on),
        zeros=None if zeros is None else zeros.to(on),
        bits=linear.bits,
        group_index=None if linear.ordered else torch.from_numpy(linear.group_index).long().to(on),
    )


def _dither(first: torch.Tensor, zeros: torch.Tensor | None, draw: torch.Generator) -> torch.Tensor:
    """Numbers drawn from just less than half a step of the grid around each value on it, to either side."""
    import torch

    mantissa, exponent = torch.frexp(first.cpu())
    bits = torch.tensor(float(HALF_MANTISSA_BITS)) if zeros is None else kept_bits(zeros)
    step = torch.exp2(exponent - bits).clamp_(min=SMALLEST_SCALE)
    step = torch.where(mantissa.abs() == 0.5, step / 2, step)  # at a power of two the grid is finer on one side
    return ((torch.rand(first.shape, generator=draw) - 0.5) * (0.99 * step)).to(first.device)


def _load_floats(model: Any, folder: GptqFolder) -> None:
    """Put the folder's own embedding, norms, biases and head into the model."""
    import torch

    for name in folder.tensors:
        if name.rpartition(".")[0] in folder.linears and not name.endswith(".bias"):
            continue
        target = _parameter(model, name, folder)
        values = torch.from_numpy(folder.read_float(name).copy())
        if values.shape != target.shape:
            raise ModelError(
                f"{name!r} is {tuple(values.shape)} in {folder.folder}; its teacher has {tuple(target.shape)}."
            )
        target.data.copy_(values)


def _parameter(model: Any, name: str, folder: GptqFolder) -> Any:
    try:
        return model.get_parameter(name)
    except AttributeError as error:
        raise _missing(name, folder) from error


def _missing(name: str, folder: GptqFolder) -> ModelError:
    return ModelError(
        f"{folder.folder} holds {name!r}, which its teacher does not have. Give the checkpoint that was quantized."
    )


def check_shapes(folder: GptqFolder, checkpoint: Checkpoint) -> None:
    """Raise ModelError where a quantized layer is not one of the checkpoint's, by the files' headers alone."""
    for name in folder.linears:
        if f"{name}.weight" not in checkpoint.tensors:
            raise _missing(f"{name}.weight", folder)
        shape, words = checkpoint.tensors[f"{name}.weight"].shape, folder.tensors[f"{name}.qweight"].shape
        own = (int(words[1]), int(words[0]) * 32 // bits_of(folder, name))
        if own != tuple(shape):
            raise ModelError(f"{name} is {own} in the GPTQ folder and {tuple(shape)} in its teacher.")


def load_teacher(checkpoint: Checkpoint, device: str, *, recompute: bool = False) -> Any:
    """A checkpoint as a model of transformers in float32, on a device; raises ModelError for an unknown architecture.

    On CUDA products are computed in TF32, whose 11 bits of mantissa hold a 4-bit weight exactly as float16 does.
    With `recompute` the backward pass computes each layer again instead of keeping its activations.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from gramlite.backends.hf import quiet

    kind = checkpoint.config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ModelError(f"{checkpoint.folder} is a {kind!r} model; scales can be tuned of {', '.join(ARCHITECTURES)}.")
    if device != "cpu":
        torch.set_float32_matmul_precision("high")
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            str(checkpoint.folder),
            dtype=torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
        ).to(device)
    model.eval()
    if recompute:
        # the older name goes away with transformers 6
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.train()  # without which transformers keeps activations all the same; these models have no dropout
    return model


def predict_bytes(config: dict[str, Any], folder: GptqFolder, longest: int, spoken: int, *, recompute: bool) -> int:
    """The memory that training takes, in bytes: float32 weights, one byte a code, eight vectors of scales, two layers'
    gradients, the activations that the longest lesson (tokens) keeps, and its `spoken` rows of logits."""
    hidden, wide, vocabulary = (int(config[key]) for key in ("hidden_size", "intermediate_size", "vocab_size"))
    layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
    queries = heads * int(config.get("head_dim") or hidden // heads)
    codes = {name: folder.tensors[f"{name}.qweight"] for name in folder.linears}
    sizes = [8 * stored.bytes // bits_of(folder, name) for name, stored in codes.items()]
    scales = sum(folder.tensors[f"{name}.scales"].bytes // 2 for name in folder.linears)
    tables = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
    kept = longest * (12 * hidden + 6 * queries + 5 * wide)
    activations = layers * longest * hidden + kept if recompute else layers * kept
    return 4 * (sum(sizes) + tables + 8 * scales + 2 * max(sizes) + activations + 5 * spoken * vocabulary) + sum(sizes)


def bits_of(folder: GptqFolder, name: str) -> int:
    """The bits of a layer's codes, from the shapes of its tensors."""
    zeros, scales = folder.tensors[f"{name}.qzeros"].shape, folder.tensors[f"{name}.scales"].shape
    return max(1, int(zeros[-1]) * 32 // int(scales[-1]))
