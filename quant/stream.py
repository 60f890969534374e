"""One pass of the calibration transcripts through a decoder, one layer in memory at a time.

Inside a layer the pass halts at every linear input: once the second moment of what the linears read is known, they
may be quantized, and what follows sees the quantized ones. So the order is truly sequential (2210.17323, section 5)
at the cost of one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gramlite.export.checkpoint import Checkpoint

from gramlite.errors import InputError

from .calibration import Transcript
from .decoder import STAGES, Decoder, layer_prefix

if TYPE_CHECKING:
    import torch
    from torch import nn

PANEL_ROWS = 256

# the weights [tokens] with which a linear layer's inputs count, by the layer's name and the transcript's number
Weigh = Callable[[str, int], "torch.Tensor"]


@dataclass(frozen=True)
class Stage:
    """Linear layers that read one and the same input, by name, and that input's second moment.

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

    `weigh` gives each token its share in the moments (1 where absent), for each linear layer apart; with `diagonal`
    only the moments' diagonals are summed, at a third of the cost. Returns each transcript's hidden states
    [tokens, width] behind the last layer, before the final norm.
    Raises ModelError for an architecture the pass doesn't know, InputError where there is no transcript.
    """
    import torch

    if not transcripts:
        raise InputError("There is no calibration transcript; give --calibration PAIRS.jsonl with at least one row.")
    with torch.inference_mode():
        decoder = Decoder(checkpoint, device)
        hidden = decoder.embed(transcripts)
        for index in range(len(decoder)):
            with decoder.layer(index) as layer:
                _LayerPass(decoder, layer, layer_prefix(index), visit, weigh, diagonal).run(hidden)
            if after_layer is not None:
                after_layer(index)
    return hidden


class _LayerPass:
    """Runs one decoder layer over all transcripts, halting at the four inputs that its linears read."""

    def __init__(
        self,
        decoder: Decoder,
        layer: Any,
        prefix: str,
        visit: Callable[[Stage], None],
        weigh: Weigh | None,
        diagonal: bool,
    ) -> None:
        self.decoder, self.layer, self.prefix = decoder, layer, prefix
        self.visit, self.weigh, self.diagonal = visit, weigh, diagonal

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
        batch = self.layer.input_layernorm(states).unsqueeze(0)
        mixed: torch.Tensor = self.layer.self_attn(
            batch, position_embeddings=self.decoder.positions(batch), attention_mask=None
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

    def _halt(self, names: Sequence[str], inputs: Iterable[torch.Tensor]) -> None:
        linears = {self.prefix + name: self.layer.get_submodule(name) for name in names}
        shared = [linears] if self.weigh is None else [{name: linear} for name, linear in linears.items()]
        moments = [_Moment(group, self.decoder.device, self.diagonal) for group in shared]
        for number, x in enumerate(inputs):
            for moment in moments:
                weights = None if self.weigh is None else self.weigh(next(iter(moment.linears)), number)
                moment.add(x, weights)
        for moment in moments:
            self.visit(moment.stage())


class _Moment:
    """The second moment of one input as it is summed."""

    def __init__(self, linears: dict[str, nn.Linear], device: str, diagonal: bool) -> None:
        import torch

        width = next(iter(linears.values())).in_features
        self.linears, self.diagonal, self.mass = linears, diagonal, 0.0
        self.sum = torch.zeros((width,) if diagonal else (width, width), device=device)

    def add(self, x: torch.Tensor, weights: torch.Tensor | None) -> None:
        x = x.float()
        weighted = x if weights is None else x * weights.to(x).unsqueeze(-1)
        self.mass += len(x) if weights is None else float(weights.sum())
        if self.diagonal:
            self.sum += (weighted * x).sum(0)
        else:
            _add_products(self.sum, weighted, x)

    def stage(self) -> Stage:
        moment = self.sum if self.diagonal else self.sum.triu() + self.sum.triu(1).T
        return Stage(self.linears, moment, self.mass)


def _add_products(moment: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left^T right, which is symmetric, to the upper triangle, in panels: little more than half of the work."""
    for start in range(0, len(moment), PANEL_ROWS):
        stop = start + PANEL_ROWS
        moment[start:stop, start:].addmm_(left[:, start:stop].T, right[:, start:])
