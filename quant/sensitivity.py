"""How much a verdict hangs on each token and each layer: gradients of the verdict's margin, layer by layer.

The pass goes forward once and keeps every layer's input states, then backward through one layer in memory at a time.
A layer's error at a token matters by the gradient of the margin with respect to the layer's output there: in a judge's
prompt a few tokens carry most of it. Its square is the weight with which GPTQ's second moments count the token, as in
GuidedQuant (Kim et al., 2505.07004), and its product with a change of the weights is, to first order, what that change
does to the margin.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from gramlite.errors import InputError
from gramlite.formats.checkpoint import Checkpoint

from .batches import Batch, SharedPrefix, lay_out
from .calibration import Transcript
from .decoder import EMBEDDING, HEAD, STAGES, CheckpointDecoder, has_own_head, layer_prefix, read_tensor
from .memory import free_bytes
from .stream import Weigh

if TYPE_CHECKING:
    import torch

STATE_BYTES = 512 << 20  # layer inputs kept at a time at the least; up to a quarter of what is free
WEIGHT_SHARE = 4  # for weights of tokens, which keep memory low: layer inputs as large as this part of the checkpoint
FLOOR = 0.3  # the least weight of a token, where the mean is 1 + this

# is told of a linear layer's inputs and the gradients at its outputs, both [sequences, longest, width], in one batch
Listener = Callable[[str, Batch, "torch.Tensor", "torch.Tensor"], None]
AfterLayer = Callable[[int, int], None]


@dataclass(frozen=True)
class Reading:
    """One linear layer in one transcript: its inputs [tokens, in] and the margin's gradient at its outputs."""

    name: str
    number: int
    inputs: torch.Tensor
    gradients: torch.Tensor


def read_gradients(
    checkpoint: Checkpoint,
    transcripts: Sequence[Transcript],
    visit: Callable[[Reading], None],
    *,
    device: str = "cpu",
    after_layer: AfterLayer | None = None,
) -> list[float]:
    """Show `visit` every linear layer of every transcript; return the margins, log-odds of the first verdict token.

    Transcripts end with their verdict token; the two that occur are the choices, the lower id first. They are taken
    some at a time, so that the layers' inputs that are kept stay within a quarter of the free memory, or 512 MiB.
    Raises InputError where the transcripts' last tokens are not of two kinds.
    """

    def listen(name: str, batch: Batch, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        for row, (number, length) in enumerate(zip(batch.numbers, batch.lengths, strict=True)):
            assert number is not None
            visit(Reading(name, number, inputs[row, :length], gradients[row, :length]))

    choices = verdict_tokens(transcripts)
    decoder = CheckpointDecoder(checkpoint, device)
    batches = lay_out(transcripts, share=False, verdicts=False)
    room = max(STATE_BYTES, free_bytes(device) // 4)
    groups = list(within(decoder, [[batch] for batch in batches], room))
    found = BackwardPass(decoder, choices, listen, after_layer).run(groups)
    return [found[number] for number in range(len(transcripts))]


def verdict_weights(
    checkpoint: Checkpoint,
    transcripts: Sequence[Transcript],
    *,
    floor: float = FLOOR,
    device: str = "cpu",
    after_layer: AfterLayer | None = None,
) -> Weigh:
    """The weights of tokens for GPTQ: the squared gradient norm at each layer's outputs, mean 1, plus `floor`.

    The floor keeps the tokens that no verdict hangs on from being given up: they may matter to another. Of a prefix that
    all transcripts share the mean over transcripts is estimated: margins of random signs are added up, and the square
    of the sum's gradient is on average the sum of the squares (Hutchinson's estimator), one draw a batch.
    """
    import torch

    squares: dict[str, SquaredGradients] = {}

    def listen(name: str, batch: Batch, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        squares.setdefault(name, SquaredGradients()).add(batch, gradients.float().square().sum(-1).cpu())

    choices = verdict_tokens(transcripts)
    decoder = CheckpointDecoder(checkpoint, device)
    batches = lay_out(transcripts, verdicts=False)
    prefix = [batch for batch in batches if batch.is_prefix]
    units = [[*prefix, batch] for batch in batches if not batch.is_prefix]
    groups = list(within(decoder, units, weighing_room(checkpoint, device)))
    BackwardPass(decoder, choices, listen, after_layer).run(groups)
    means = {name: max(found.mean(), torch.finfo(torch.float32).tiny) for name, found in squares.items()}

    def weigh(name: str, number: int) -> torch.Tensor:
        # the verdict token itself is read by nobody and has no gradient
        return torch.nn.functional.pad(squares[name].of(number) / means[name], (0, 1)) + floor

    return weigh


class SquaredGradients:
    """Squared gradient norms at one linear layer's outputs: of each transcript's tokens, and the prefix's sums."""

    def __init__(self) -> None:
        self.prefix: torch.Tensor | None = None
        self.rows: dict[int, torch.Tensor] = {}

    def add(self, batch: Batch, squares: torch.Tensor) -> None:
        if batch.is_prefix:
            self.prefix = squares[0] if self.prefix is None else self.prefix + squares[0]
            return
        for number, length, row in zip(batch.numbers, batch.lengths, squares, strict=True):
            assert number is not None
            self.rows[number] = row[:length]

    def of(self, number: int) -> torch.Tensor:
        """Those of one transcript's tokens, of the prefix its equal share."""
        import torch

        if self.prefix is None:
            return self.rows[number]
        return torch.cat([self.prefix / len(self.rows), self.rows[number]])

    def mean(self) -> float:
        import torch

        every = torch.cat([self.of(number) for number in self.rows])
        return float(every.mean())


def verdict_tokens(transcripts: Sequence[Transcript]) -> tuple[int, int]:
    """The two tokens that transcripts end with, the lower id first."""
    last = sorted({transcript.ids[-1] for transcript in transcripts})
    if len(last) != 2:
        raise InputError(
            f"The calibration transcripts end with {len(last)} different tokens; verdicts of both kinds are needed, "
            "each as the last token. Give more pairs."
        )
    return last[0], last[1]


def weighing_room(checkpoint: Checkpoint, device: str) -> int:
    """Bytes of layer inputs that `verdict_weights` keeps at a time, so that large checkpoints are not read too often."""
    stored = sum(tensor.bytes for tensor in checkpoint.tensors.values())
    return min(stored // WEIGHT_SHARE, free_bytes(device) // 4)


def within(decoder: CheckpointDecoder, units: Sequence[list[Batch]], limit: int) -> Iterator[list[list[Batch]]]:
    """Runs of units whose kept states stay within a limit of bytes, or of one unit."""
    each = int(decoder.skeleton.config.hidden_size) * (len(decoder) + 1) * decoder.dtype.itemsize
    group: list[list[Batch]] = []
    used = 0
    for unit in units:
        cost = sum(math.prod(batch.shape) for batch in unit) * each
        if group and used + cost > limit:
            yield group
            group, used = [], 0
        group.append(unit)
        used += cost
    yield group


class BackwardPass:
    """Forward through all layers with every layer's input kept, and backward through one layer at a time.

    It takes groups of units, a unit being a batch with the prefix before it where there is one.
    """

    def __init__(
        self, decoder: CheckpointDecoder, choices: tuple[int, int], listen: Listener, after_layer: AfterLayer | None
    ) -> None:
        self.decoder, self.listen, self.after_layer = decoder, listen, after_layer
        self.norm, self.direction = self._head(choices)
        self.margins: dict[int, float] = {}

    def _head(self, choices: tuple[int, int]) -> tuple[Any, torch.Tensor]:
        """The final norm, filled, and the difference of the two choices' rows of the head."""
        checkpoint, place = self.decoder.checkpoint, {"device": self.decoder.device, "dtype": self.decoder.dtype}
        norm = self.decoder.skeleton.model.norm
        norm.load_state_dict({"weight": read_tensor(checkpoint, "model.norm.weight").to(**place)}, assign=True)
        table = read_tensor(checkpoint, HEAD if has_own_head(checkpoint) else EMBEDDING)
        rows = table[list(choices)].to(**place)
        return norm.requires_grad_(False), rows[0] - rows[1]

    def run(self, groups: Sequence[list[list[Batch]]]) -> dict[int, float]:
        """The transcripts' margins by number, when every linear layer was listened to."""
        import torch

        layers = range(len(self.decoder))
        steps, total = itertools.count(1), 2 * len(groups) * len(layers)
        tell = self.after_layer or (lambda done, total: None)
        signs = torch.Generator().manual_seed(0)
        for group in groups:
            states = self._rooms(group)
            for index in layers:
                with self.decoder.layer(index) as layer, torch.no_grad():
                    for unit, kept in zip(group, states, strict=True):
                        self._forward(layer, index, unit, kept)
                tell(next(steps), total)
            gradients = [self._at_the_end(unit, kept, signs) for unit, kept in zip(group, states, strict=True)]
            for index in reversed(layers):
                with self.decoder.layer(index) as layer:
                    for unit, kept, gradient in zip(group, states, gradients, strict=True):
                        gradient[:] = self._backward(layer, index, unit, [part[index] for part in kept], gradient)
                tell(next(steps), total)
            del states, gradients, kept  # before the next group's are made
        return self.margins

    def _rooms(self, group: list[list[Batch]]) -> list[list[torch.Tensor]]:
        """For each batch room for what enters every layer and leaves the last, [layers + 1, sequences, longest, width]."""
        embedded = iter(self.decoder.embed([batch for unit in group for batch in unit]))

        def room(entering: torch.Tensor) -> torch.Tensor:
            kept = entering.new_empty(len(self.decoder) + 1, *entering.shape)
            kept[0] = entering
            return kept

        return [[room(next(embedded)) for _ in unit] for unit in group]

    def _forward(self, layer: Any, index: int, unit: list[Batch], kept: list[torch.Tensor]) -> None:
        shared = SharedPrefix()
        for batch, part in zip(unit, kept, strict=True):
            middle, gated = self.decoder.run(layer, batch, part[index], shared)
            part[index + 1] = middle + layer.mlp.down_proj(gated)

    def _at_the_end(self, unit: list[Batch], kept: list[torch.Tensor], signs: torch.Generator) -> list[torch.Tensor]:
        """The gradients of the margins with respect to what leaves the last layer."""
        import torch

        gradients = [torch.zeros_like(part[-1]) for part in kept]
        batch, states = unit[-1], kept[-1][-1]
        rows, places = torch.arange(len(states)), torch.tensor(batch.lengths) - 1
        last = states[rows, places].clone().requires_grad_(True)
        with torch.enable_grad():
            margins = (self.norm(last) * self.direction).sum(-1)
            margins.sum().backward()
        sign = torch.ones(len(states))
        if len(unit) > 1:
            sign -= 2.0 * torch.randint(2, (len(states),), generator=signs)
        gradients[-1][rows, places] = gradient_of(last) * sign.to(last).unsqueeze(-1)
        self.margins.update(zip(cast("tuple[int, ...]", batch.numbers), margins.tolist(), strict=True))
        return gradients

    def _backward(
        self, layer: Any, index: int, unit: list[Batch], entering: list[torch.Tensor], leaving: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The gradients at the layer's inputs for one unit, given the ones at its outputs; each linear is listened to."""
        import torch

        shared, prefix = SharedPrefix(), layer_prefix(index)
        inputs = [states.detach().requires_grad_(True) for states in entering]
        ends: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        for batch, states, gradient in zip(unit, inputs, leaving, strict=True):
            with torch.enable_grad(), self._listening(layer, prefix, batch):
                middle, gated = self.decoder.run(layer, batch, states, shared)
            # what the last linear puts out is not needed, and what its inputs' gradient is needs no graph
            self.listen(f"{prefix}mlp.down_proj", batch, gated.detach(), gradient)
            ends += [gated, middle]
            gradients += [gradient @ layer.mlp.down_proj.weight, gradient]
        torch.autograd.backward(ends, gradients)
        return [gradient_of(states) for states in inputs]

    @contextmanager
    def _listening(self, layer: Any, prefix: str, batch: Batch) -> Iterator[None]:
        """Have each linear's input and output but the last one's listened to."""

        def hook(name: str, module: Any, inputs: Any, output: torch.Tensor) -> None:
            x = inputs[0].detach()
            output.register_hook(lambda gradient: self.listen(prefix + name, batch, x, gradient))

        names = [name for stage in STAGES[:-1] for name in stage]
        handles = [layer.get_submodule(name).register_forward_hook(partial(hook, name)) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def gradient_of(states: torch.Tensor) -> torch.Tensor:
    assert states.grad is not None
    return states.grad
