"""One pass of the calibration transcripts through a decoder, one layer in memory at a time.

Inside a layer the pass halts at every linear input: once the second moment of what the linears read is known, they
may be quantized, and what follows sees the quantized ones. So the order is truly sequential (2210.17323, section 5)
at the cost of one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gramlite.errors import InputError
from gramlite.formats.checkpoint import Checkpoint

from .batches import Batch, SharedPrefix, lay_out
from .calibration import Transcript
from .decoder import STAGES, CheckpointDecoder, layer_prefix

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
    for, that [in].
    """

    linears: dict[str, nn.Linear]
    moment: torch.Tensor


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
    batches = lay_out(transcripts)
    with torch.inference_mode():
        decoder = CheckpointDecoder(checkpoint, device)
        hidden = decoder.embed(batches)
        for index in range(len(decoder)):
            with decoder.layer(index) as layer:
                LayerPass(decoder, layer, layer_prefix(index), visit, TokenWeights(batches, weigh), diagonal).run(
                    hidden
                )
            if after_layer is not None:
                after_layer(index)
    return _apart(batches, hidden)


def _apart(batches: Sequence[Batch], hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each transcript's own states, [tokens, width], the prefix with them."""
    import torch

    before = [hidden[0][0]] if batches[0].is_prefix else []
    rows: dict[int, torch.Tensor] = {}
    for batch, states in zip(batches, hidden, strict=True):
        for row, (number, length) in enumerate(zip(batch.numbers, batch.lengths, strict=True)):
            if number is not None:
                rows[number] = torch.cat([*before, states[row, :length]])
    return [rows[number] for number in range(len(rows))]


class TokenWeights:
    """How much each token of a batch counts; one of the prefix as much as in all transcripts together."""

    def __init__(self, batches: Sequence[Batch], weigh: Weigh | None) -> None:
        self.batches, self.weigh = batches, weigh
        self.count = sum(len(batch.numbers) for batch in batches if not batch.is_prefix)

    def of(self, name: str, batch: Batch) -> torch.Tensor | None:
        """The weights [tokens] of a linear layer's inputs, None where all are 1."""
        import torch

        if self.weigh is None:
            return torch.full(batch.lengths, float(self.count)) if batch.is_prefix else None
        if batch.is_prefix:
            return sum((self.weigh(name, number)[: batch.lengths[0]] for number in range(self.count)), torch.zeros(1))
        return torch.cat([self.weigh(name, number)[batch.start :] for number in batch.numbers if number is not None])


class LayerPass:
    """Runs one decoder layer over all transcripts, halting at the four inputs that its linears read."""

    def __init__(
        self,
        decoder: CheckpointDecoder,
        layer: Any,
        prefix: str,
        visit: Callable[[Stage], None],
        weights: TokenWeights,
        diagonal: bool,
    ) -> None:
        self.decoder, self.layer, self.prefix = decoder, layer, prefix
        self.visit, self.weights, self.diagonal = visit, weights, diagonal
        self.batches = weights.batches

    def run(self, hidden: list[torch.Tensor]) -> None:
        """Replace each batch's hidden states by the layer's output."""
        layer, shared = self.layer, SharedPrefix()
        self._halt(STAGES[0], (layer.input_layernorm(states) for states in hidden))
        mixed = [
            self.decoder.attend(layer, batch, states, shared)
            for batch, states in zip(self.batches, hidden, strict=True)
        ]
        self._halt(STAGES[1], mixed)
        for states, out in zip(hidden, mixed, strict=True):
            states += layer.self_attn.o_proj(out)
        del mixed
        self._halt(STAGES[2], (layer.post_attention_layernorm(states) for states in hidden))
        gated = [self.decoder.gate(layer, states) for states in hidden]
        self._halt(STAGES[3], gated)
        for states, out in zip(hidden, gated, strict=True):
            states += layer.mlp.down_proj(out)

    def _halt(self, names: Sequence[str], inputs: Iterable[torch.Tensor]) -> None:
        linears = {self.prefix + name: self.layer.get_submodule(name) for name in names}
        shared = [linears] if self.weights.weigh is None else [{name: linear} for name, linear in linears.items()]
        moments = [SecondMoment(group, self.decoder.device, self.diagonal) for group in shared]
        for batch, states in zip(self.batches, inputs, strict=True):
            x = batch.tokens(states)
            for moment in moments:
                moment.add(x, self.weights.of(next(iter(moment.linears)), batch))
        for moment in moments:
            self.visit(moment.stage())


class SecondMoment:
    """The second moment of one input as it is summed."""

    def __init__(self, linears: dict[str, nn.Linear], device: str, diagonal: bool) -> None:
        import torch

        width = next(iter(linears.values())).in_features
        self.linears, self.diagonal = linears, diagonal
        self.sum = torch.zeros((width,) if diagonal else (width, width), device=device)

    def add(self, x: torch.Tensor, weights: torch.Tensor | None) -> None:
        x = x.float()
        weighted = x if weights is None else x * weights.to(x).unsqueeze(-1)
        if self.diagonal:
            self.sum += (weighted * x).sum(0)
        else:
            _add_products(self.sum, weighted, x)

    def stage(self) -> Stage:
        if not self.diagonal:
            self.sum.triu_()
            self.sum += self.sum.triu(1).T
        return Stage(self.linears, self.sum)


def _add_products(moment: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left^T right, which is symmetric, to the upper triangle, in panels: little more than half of the work."""
    for start in range(0, len(moment), PANEL_ROWS):
        stop = start + PANEL_ROWS
        moment[start:stop, start:].addmm_(left[:, start:stop].T, right[:, start:])
