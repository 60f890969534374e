"""How much a verdict hangs on each token and each layer: gradients of the verdict's margin, layer by layer.

The pass goes forward once and keeps every layer's input states, then backward through one layer in memory at a time.
A layer's error at a token matters by the gradient of the margin with respect to the layer's output there: in a judge's
prompt a few tokens carry most of it. Its square is the weight with which GPTQ's second moments count the token, as in
GuidedQuant (Kim et al., 2505.07004), and its product with a change of the weights is, to first order, what that change
does to the margin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gramlite.export.checkpoint import Checkpoint

from gramlite.errors import InputError

from .calibration import Transcript
from .decoder import STAGES, Decoder, layer_prefix, read_tensor
from .stream import Weigh

if TYPE_CHECKING:
    import torch

STATE_BYTES = 512 << 20  # layer inputs kept at a time
FLOOR = 0.3  # the least weight of a token, where the mean is 1 + this
LINEARS = tuple(name for stage in STAGES for name in stage)


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
    after_layer: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Show `visit` every linear layer of every transcript; return the margins, log-odds of the first verdict token.

    Transcripts end with their verdict token; the two that occur are the choices, the lower id first. They are taken
    some at a time, so that the layers' inputs that are kept stay within 512 MiB (or one transcript's).
    Raises InputError where the transcripts' last tokens are not of two kinds.
    """
    choices = verdict_tokens(transcripts)
    decoder = Decoder(checkpoint, device)
    head = _choice_direction(decoder, choices)
    margins: list[float] = []
    done, total = 0, 0
    groups = list(_groups(decoder, transcripts))
    total = 2 * len(groups) * len(decoder)
    for start, group in groups:
        states = [_detached(decoder.embed(group))]
        for index in range(len(decoder)):
            with decoder.layer(index) as layer:
                states.append([_run(decoder, layer, hidden) for hidden in states[-1]])
            done += 1
            if after_layer is not None:
                after_layer(done, total)
        gradients = []
        for hidden in states.pop():
            margin, gradient = _margin_gradient(decoder, head, hidden)
            margins.append(margin)
            gradients.append(gradient)
        for index in reversed(range(len(decoder))):
            with decoder.layer(index) as layer:
                inputs = states.pop()
                for number, (hidden, gradient) in enumerate(zip(inputs, gradients, strict=True)):
                    watch = _Watch(layer, layer_prefix(index), start + number, visit)
                    gradients[number] = watch.backward(decoder, hidden, gradient)
            done += 1
            if after_layer is not None:
                after_layer(done, total)
    return margins


def verdict_weights(
    checkpoint: Checkpoint,
    transcripts: Sequence[Transcript],
    *,
    floor: float = FLOOR,
    device: str = "cpu",
    after_layer: Callable[[int, int], None] | None = None,
) -> Weigh:
    """The weights of tokens for GPTQ: the squared gradient norm at each layer's outputs, mean 1, plus `floor`.

    The floor keeps the tokens that no verdict hangs on from being given up: they may matter to another.
    """
    import torch

    squares: dict[str, list[torch.Tensor]] = {}

    def visit(reading: Reading) -> None:
        rows = squares.setdefault(reading.name, [torch.empty(0)] * len(transcripts))
        rows[reading.number] = reading.gradients.float().square().sum(-1).cpu()

    read_gradients(checkpoint, transcripts, visit, device=device, after_layer=after_layer)
    means = {name: torch.cat(rows).mean().clamp(min=torch.finfo(torch.float32).tiny) for name, rows in squares.items()}

    def weigh(name: str, number: int) -> torch.Tensor:
        # the verdict token itself is read by nobody and has no gradient
        return torch.nn.functional.pad(squares[name][number] / means[name], (0, 1)) + floor

    return weigh


def verdict_tokens(transcripts: Sequence[Transcript]) -> tuple[int, int]:
    """The two tokens that transcripts end with, the lower id first."""
    last = sorted({transcript.ids[-1] for transcript in transcripts})
    if len(last) != 2:
        raise InputError(
            f"The calibration transcripts end with {len(last)} different tokens; verdicts of both kinds are needed, "
            "each as the last token. Give more pairs."
        )
    return last[0], last[1]


def _groups(decoder: Decoder, transcripts: Sequence[Transcript]) -> Any:
    """Runs of transcripts without their verdict token, each run's kept states within bounds."""
    width = int(decoder.skeleton.config.hidden_size)
    each = width * (len(decoder) + 1) * decoder.dtype.itemsize
    group: list[Transcript] = []
    start, used = 0, 0
    for number, transcript in enumerate(transcripts):
        cost = (len(transcript.ids) - 1) * each
        if group and used + cost > STATE_BYTES:
            yield start, group
            start, group, used = number, [], 0
        group.append(Transcript(transcript.ids[:-1], (), transcript.id))
        used += cost
    yield start, group


def _choice_direction(decoder: Decoder, choices: tuple[int, int]) -> Any:
    """The final norm, filled, and the difference of the two choices' rows of the head."""
    norm = decoder.skeleton.model.norm
    weight = read_tensor(decoder.checkpoint, "model.norm.weight").to(device=decoder.device, dtype=decoder.dtype)
    norm.load_state_dict({"weight": weight}, assign=True)
    tied = "lm_head.weight" not in decoder.checkpoint.tensors
    table = read_tensor(decoder.checkpoint, "model.embed_tokens.weight" if tied else "lm_head.weight")
    rows = table[list(choices)].to(device=decoder.device, dtype=decoder.dtype)
    return norm.requires_grad_(False), rows[0] - rows[1]


def _margin_gradient(decoder: Decoder, head: Any, hidden: torch.Tensor) -> tuple[float, torch.Tensor]:
    import torch

    norm, direction = head
    last = hidden[-1:].detach().clone().requires_grad_(True)
    with torch.enable_grad():
        margin = (norm(last)[0] * direction).sum()
        margin.backward()
    gradient = torch.zeros_like(hidden)
    gradient[-1] = last.grad
    return float(margin.detach()), gradient


def _detached(hidden: list[torch.Tensor]) -> list[torch.Tensor]:
    return [states.detach() for states in hidden]


def _run(decoder: Decoder, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    import torch

    with torch.no_grad():
        return _forward(decoder, layer, hidden)


def _forward(decoder: Decoder, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    batch = hidden.unsqueeze(0)
    out: torch.Tensor = layer(batch, position_embeddings=decoder.positions(batch), attention_mask=None)
    return out[0]


class _Watch:
    """Backward through one layer for one transcript, with an ear at each linear's input and output."""

    def __init__(self, layer: Any, prefix: str, number: int, visit: Callable[[Reading], None]) -> None:
        self.layer, self.prefix, self.number, self.visit = layer, prefix, number, visit

    def backward(self, decoder: Decoder, hidden: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient at the layer's input, given the one at its output."""
        import torch

        handles = [self.layer.get_submodule(name).register_forward_hook(self._hook(name)) for name in LINEARS]
        try:
            with torch.enable_grad():
                entering = hidden.detach().requires_grad_(True)
                _forward(decoder, self.layer, entering).backward(gradient)
        finally:
            for handle in handles:
                handle.remove()
        assert entering.grad is not None
        return entering.grad

    def _hook(self, name: str) -> Any:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
            x = inputs[0].detach()[0]

            def heard(gradient: torch.Tensor) -> None:
                self.visit(Reading(self.prefix + name, self.number, x, gradient[0]))

            output.register_hook(heard)

        return hook
