"""One pass of the calibration transcripts through a decoder, one layer in memory at a time.

Each decoder layer is built on the meta device, filled from its own tensors, run and dropped. Inside a layer the pass
halts at every linear input: once the second moment of what the linears read is known, they may be quantized, and what
follows sees the quantized ones. So the order is truly sequential (2210.17323, section 5) at the cost of one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gramlite.export.checkpoint import Checkpoint, StoredTensor, damaged

from gramlite.errors import InputError, ModelError

from .calibration import Transcript

if TYPE_CHECKING:
    import torch
    from torch import nn

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")  # pre-norm layers whose linears have these names:
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
PANEL_ROWS = 256

Weigh = Callable[[Transcript], Sequence[float]]


@dataclass(frozen=True)
class Stage:
    """Linear layers that read one and the same input, by tensor prefix, and that input's second moment.

    `moment` [in, in] is the sum over all tokens of weight * x x^T in float32, or where only its diagonal was asked
    for, that [in]; `mass` is the sum of the weights.
    """

    linears: dict[str, nn.Linear]
    moment: torch.Tensor
    mass: float


def stream_decoder(
    checkpoint: Checkpoint,
    transcripts: Sequence[Transcript],
    visit: Callable[[Stage], None],
    *,
    device: str = "cpu",
    weigh: Weigh | None = None,
    diagonal: bool = False,
    after_layer: Callable[[int], None] | None = None,
) -> list[torch.Tensor]:
    """Show `visit` every stage of every layer in order; a weight that it replaces is what the pass goes on with.

    `weigh` gives each token of a transcript its share in the moments (1 where absent); with `diagonal` only the
    moments' diagonals are summed, at a third of the cost. Returns each transcript's
    hidden states [tokens, width] behind the last layer, before the final norm.
    Raises ModelError for an architecture the pass doesn't know, InputError where there is no transcript.
    """
    import torch

    if not transcripts:
        raise InputError("There is no calibration transcript; give --calibration PAIRS.jsonl with at least one row.")
    with torch.inference_mode():
        skeleton = build_skeleton(checkpoint)
        dtype = torch.float32 if device == "cpu" else skeleton.dtype
        weights = None if weigh is None else [torch.tensor(weigh(t), dtype=dtype, device=device) for t in transcripts]
        hidden = _embed(checkpoint, transcripts, device, dtype)
        rotary = type(skeleton.model.rotary_emb)(skeleton.config).to(device)
        for index in range(len(skeleton.model.layers)):
            layer = _fill(skeleton.model.layers[index], checkpoint, f"model.layers.{index}.", device, dtype)
            _LayerPass(layer, f"model.layers.{index}.", rotary, weights, visit, diagonal).run(hidden)
            skeleton.model.layers[index] = torch.nn.Identity()
            if after_layer is not None:
                after_layer(index)
    return hidden


def build_skeleton(checkpoint: Checkpoint) -> Any:
    """The model of transformers on the meta device: structure without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = checkpoint.config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"{checkpoint.folder} is a {kind!r} model; layer by layer quantization knows {', '.join(ARCHITECTURES)}."
        )
    config = AutoConfig.from_pretrained(str(checkpoint.folder), trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
    return model.eval()


def _embed(
    checkpoint: Checkpoint, transcripts: Sequence[Transcript], device: str, dtype: torch.dtype
) -> list[torch.Tensor]:
    import torch

    table = read_tensor(checkpoint, "model.embed_tokens.weight")
    hidden = []
    for transcript in transcripts:
        ids = torch.tensor(transcript.ids)
        if int(ids.max()) >= len(table):
            raise InputError(f"Transcript {transcript.id} holds token {int(ids.max())}; the model has {len(table)}.")
        hidden.append(table[ids].to(device=device, dtype=dtype))
    return hidden


def read_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """One tensor of a checkpoint, in its own dtype and memory; raises ModelError where there is no such tensor."""
    import torch

    stored = checkpoint.tensors.get(name)
    if stored is None:
        raise ModelError(f"{checkpoint.folder} lacks the tensor {name!r}. Download the checkpoint again.")
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if stored.dtype not in types:
        raise ModelError(f"{name!r} is stored as {stored.dtype}; only F32, F16 and BF16 weights can be quantized.")
    return torch.frombuffer(_read_bytes(stored), dtype=types[stored.dtype]).reshape(stored.shape)


def _read_bytes(stored: StoredTensor) -> bytearray:
    # read instead of mapped, so that no page of the file counts as this process's memory
    data = bytearray(stored.bytes)
    with stored.file.open("rb") as file:
        file.seek(stored.start)
        if file.readinto(data) != stored.bytes:
            raise damaged(stored.file, f"it ended while the tensor {stored.name!r} was read")
    return data


def _fill(layer: nn.Module, checkpoint: Checkpoint, prefix: str, device: str, dtype: torch.dtype) -> nn.Module:
    state = {}
    for name, parameter in layer.named_parameters():
        tensor = read_tensor(checkpoint, prefix + name)
        if tensor.shape != parameter.shape:
            raise ModelError(
                f"{prefix}{name} is {tuple(tensor.shape)} where config.json asks for {tuple(parameter.shape)}."
            )
        state[name] = tensor.to(device=device, dtype=dtype)
    layer.load_state_dict(state, assign=True)
    return layer


class _LayerPass:
    """Runs one decoder layer over all transcripts, halting at the four inputs that its linears read."""

    def __init__(
        self,
        layer: Any,
        prefix: str,
        rotary: Any,
        weights: list[torch.Tensor] | None,
        visit: Callable[[Stage], None],
        diagonal: bool,
    ) -> None:
        self.layer, self.prefix, self.rotary, self.weights, self.visit = layer, prefix, rotary, weights, visit
        self.diagonal = diagonal

    def run(self, hidden: list[torch.Tensor]) -> None:
        """Replace each transcript's hidden states by the layer's output."""
        layer = self.layer
        self._halt(STAGES[0], (layer.input_layernorm(states) for states in hidden))
        mixed = self._without(layer.self_attn, "o_proj", self._attend, hidden)
        self._halt(STAGES[1], mixed)
        for states, out in zip(hidden, mixed, strict=True):
            states += layer.self_attn.o_proj(out)
        del mixed
        self._halt(STAGES[2], (layer.post_attention_layernorm(states) for states in hidden))
        gated = self._without(layer.mlp, "down_proj", self._gate, hidden)
        self._halt(STAGES[3], gated)
        for states, out in zip(hidden, gated, strict=True):
            states += layer.mlp.down_proj(out)

    def _attend(self, states: torch.Tensor) -> torch.Tensor:
        import torch

        positions = torch.arange(len(states), device=states.device).unsqueeze(0)
        batch = self.layer.input_layernorm(states).unsqueeze(0)
        mixed: torch.Tensor = self.layer.self_attn(
            batch, position_embeddings=self.rotary(batch, positions), attention_mask=None
        )[0][0]
        return mixed

    def _gate(self, states: torch.Tensor) -> torch.Tensor:
        gated: torch.Tensor = self.layer.mlp(self.layer.post_attention_layernorm(states))
        return gated

    def _without(
        self, module: Any, last: str, forward: Callable[[torch.Tensor], torch.Tensor], hidden: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """A block's output without its last linear: that linear's input."""
        import torch

        linear = getattr(module, last)
        setattr(module, last, torch.nn.Identity())
        try:
            return [forward(states) for states in hidden]
        finally:
            setattr(module, last, linear)

    def _halt(self, names: Sequence[str], inputs: Any) -> None:
        import torch

        linears = {self.prefix + name: self.layer.get_submodule(name) for name in names}
        width = next(iter(linears.values())).in_features
        shape = (width,) if self.diagonal else (width, width)
        moment: torch.Tensor | None = None
        mass = 0.0
        for number, x in enumerate(inputs):
            if moment is None:
                moment = torch.zeros(shape, device=x.device)
            weighted = x if self.weights is None else x * self.weights[number].unsqueeze(-1)
            mass += float(len(x) if self.weights is None else self.weights[number].sum())
            if self.diagonal:
                moment += (weighted.float() * x.float()).sum(0)
            else:
                _add_products(moment, weighted.float(), x.float())
        assert moment is not None
        if not self.diagonal:
            moment = moment.triu() + moment.triu(1).T
        self.visit(Stage(linears, moment, mass))


def _add_products(moment: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left^T right, which is symmetric, to the upper triangle, in panels: little more than half of the work."""
    for start in range(0, len(moment), PANEL_ROWS):
        stop = start + PANEL_ROWS
        moment[start:stop, start:].addmm_(left[:, start:stop].T, right[:, start:])
