"""One pass of the calibration transcripts through a decoder, one layer in memory at a time.

Inside a layer the pass halts at every linear input: once the second moment of what the linears read is known, they
may be quantized, and what follows sees the quantized ones. So the order is truly sequential (2210.17323, section 5)
at the cost of one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
        moments = MomentPass(decoder, batches, visit, weigh, diagonal)
        for index in range(len(decoder)):
            moments.run(index, hidden)
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


class MomentPass:
    """Runs decoder layers over all transcripts, halting at the four inputs that a layer's linears read."""

    def __init__(
        self,
        decoder: CheckpointDecoder,
        batches: Sequence[Batch],
        visit: Callable[[Stage], None],
        weigh: Weigh | None,
        diagonal: bool,
    ) -> None:
        self.decoder, self.batches, self.visit = decoder, batches, visit
        self.weigh, self.diagonal = weigh, diagonal
        self.count = sum(len(batch.numbers) for batch in batches if not batch.is_prefix)

    def run(self, index: int, hidden: list[torch.Tensor]) -> None:
        """Replace each batch's hidden states by the layer's output."""
        shared = SharedPrefix()
        with self.decoder.layer(index) as layer:

            def halt(names: Sequence[str], inputs: Iterable[torch.Tensor]) -> None:
                self._halt({layer_prefix(index) + name: layer.get_submodule(name) for name in names}, inputs)

            halt(STAGES[0], (layer.input_layernorm(states) for states in hidden))
            mixed = [
                self.decoder.attend(layer, batch, states, shared)
                for batch, states in zip(self.batches, hidden, strict=True)
            ]
            halt(STAGES[1], mixed)
            for states, out in zip(hidden, mixed, strict=True):
                states += layer.self_attn.o_proj(out)
            del mixed
            halt(STAGES[2], (layer.post_attention_layernorm(states) for states in hidden))
            gated = [self.decoder.gate(layer, states) for states in hidden]
            halt(STAGES[3], gated)
            for states, out in zip(hidden, gated, strict=True):
                states += layer.mlp.down_proj(out)

    def _halt(self, linears: dict[str, nn.Linear], inputs: Iterable[torch.Tensor]) -> None:
        """Sum up the inputs' second moment, for each linear apart where each weighs tokens by itself, and show it."""
        import torch

        groups = [linears] if self.weigh is None else [{name: linear} for name, linear in linears.items()]
        width = next(iter(linears.values())).in_features
        shape = (width,) if self.diagonal else (width, width)
        moments = [torch.zeros(shape, device=self.decoder.device) for _ in groups]
        for batch, states in zip(self.batches, inputs, strict=True):
            x = batch.tokens(states).float()
            for group, moment in zip(groups, moments, strict=True):
                weights = self._weights(next(iter(group)), batch)
                weighted = x if weights is None else x * weights.to(x).unsqueeze(-1)
                if self.diagonal:
                    moment += (weighted * x).sum(0)
                else:
                    _add_products(moment, weighted, x)
        for group, moment in zip(groups, moments, strict=True):
            if not self.diagonal:
                moment.triu_()
                moment += moment.triu(1).T
            self.visit(Stage(group, moment))

    def _weights(self, name: str, batch: Batch) -> torch.Tensor | None:
        """How much each token of a batch counts, None where all of them are 1; one of the prefix as in all transcripts."""
        import torch

        if self.weigh is None:
            return torch.full(batch.lengths, float(self.count)) if batch.is_prefix else None
        if batch.is_prefix:
            return sum((self.weigh(name, number)[: batch.lengths[0]] for number in range(self.count)), torch.zeros(1))
        return torch.cat([self.weigh(name, number)[batch.start :] for number in batch.numbers if number is not None])


def _add_products(moment: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left^T right, which is symmetric, to the upper triangle, in panels: little more than half of the work."""
    for start in range(0, len(moment), PANEL_ROWS):
        stop = start + PANEL_ROWS
        moment[start:stop, start:].addmm_(left[:, start:stop].T, right[:, start:])
