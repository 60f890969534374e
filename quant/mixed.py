"""Mixed precision: every matrix the type whose bytes buy most, by what its rounding does to the verdict's margin.

To first order a rounding D of a weight changes a transcript's margin by <G, D>, where G is the margin's gradient there:
the sum over tokens of g^T D x, of the gradient g at the layer's output and its input x. That is measured for every
matrix, every type it could take and every transcript. Changes of different matrices may add up (rounding can undo a
fine-tuning everywhere at once) or not, so what is made small is the mean square of their sum plus the sum of their mean
squares, and a little of the layers' own output errors, because rationales hang on more than the verdict's margin does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from gramlite.export.architecture import gguf_names, read_architecture
from gramlite.export.checkpoint import Checkpoint, open_checkpoint

from gramlite.errors import InputError
from gramlite.ggml_types import GGML_TYPES

from .calibration import Transcript
from .decoder import read_tensor
from .ggml import TYPE_NUMBERS, rounded
from .sensitivity import Reading, read_gradients, verdict_tokens

if TYPE_CHECKING:
    import torch

AUTO = re.compile(r"auto:(\d+(?:\.\d+)?)(?:bpw)?", re.IGNORECASE)
CANDIDATES = ("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "IQ4_NL", "Q4_0", "IQ4_XS", "Q3_K", "Q2_K")
LOCAL = 0.1  # the share of the layers' own errors in what is made small
MOVES = 2000

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Option:
    """A type that a matrix can take: its bytes, the first-order change of each transcript's margin in nats, and the
    share of the layer's output energy that is lost."""

    kind: str
    bytes: int
    changes: Doubles
    local: float = 0.0


def target_bits(text: str) -> float | None:
    """The bits per weight of `auto:4.5bpw`, None for any other type's name."""
    match = AUTO.fullmatch(text)
    return float(match[1]) if match else None


def choose_types(
    folder: Path,
    transcripts: Sequence[Transcript],
    *,
    bits: float,
    importance: Mapping[str, Floats] | None = None,
    device: str = "cpu",
    progress: Progress = lambda stage, done, total: None,
) -> tuple[dict[str, str], dict[str, Any]]:
    """The type of every matrix, by its GGUF name, for a file of at most `bits` per weight; and what to record of it.

    Vectors stay F32 and count. `importance` is the matrix that the types will be written with.
    Raises InputError where even the smallest types take more.
    """
    checkpoint = open_checkpoint(folder)
    options = measure(checkpoint, transcripts, importance or {}, device=device, progress=progress)
    shapes = [tensor.shape for tensor in checkpoint.tensors.values()]
    vectors = sum(4 * math.prod(shape) for shape in shapes if len(shape) == 1)
    budget = int(bits * sum(map(math.prod, shapes)) / 8) - vectors
    chosen = allocate(options, budget)
    return {name: option.kind for name, option in chosen.items()}, {
        "target_bits_per_weight": bits,
        "expected_margin_error": round(float(np.abs(sum(option.changes for option in chosen.values())).mean()), 4),
        "margin_change_rms": {
            name: round(float(np.sqrt(np.square(option.changes).mean())), 5) for name, option in chosen.items()
        },
    }


def measure(
    checkpoint: Checkpoint,
    transcripts: Sequence[Transcript],
    importance: Mapping[str, Floats],
    *,
    device: str = "cpu",
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, list[Option]]:
    """What each type would do to the margins, for every matrix, embedding and head included, by its GGUF name."""
    names = gguf_names(read_architecture(checkpoint.config))
    with ThreadPoolExecutor() as pool:
        layers = _Layers(checkpoint, len(transcripts), lambda name: importance.get(names(name)), pool, device)
        ends = _Ends(checkpoint, transcripts)

        def visit(reading: Reading) -> None:
            layers.hear(reading)
            ends.hear(reading)

        read_gradients(
            checkpoint,
            transcripts,
            visit,
            device=device,
            after_layer=lambda done, total: progress("Weighing roundings", done, total),
        )
        found = layers.options | ends.options()
    return {names(name): listed for name, listed in found.items()}


class _Layers:
    """The linear layers' options. Roundings are computed when a layer comes up, and kept until the next one does."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        count: int,
        importance: Callable[[str], Floats | None],
        pool: ThreadPoolExecutor,
        device: str,
    ) -> None:
        self.checkpoint, self.count, self.importance = checkpoint, count, importance
        self.pool, self.device = pool, device
        self.options: dict[str, list[Option]] = {}
        self.prefix = ""
        self.errors: dict[str, torch.Tensor] = {}

    def hear(self, reading: Reading) -> None:
        name = f"{reading.name}.weight"
        prefix = reading.name.split(".self_attn.")[0].split(".mlp.")[0]
        if prefix != self.prefix:
            self.errors.clear()
            self.prefix = prefix
        if name not in self.errors:
            self.errors[name] = self._round(name, reading)
        gradient = reading.gradients.float().T @ reading.inputs.float()
        changes = self.errors[name] @ gradient.flatten()
        for option, change in zip(self.options[name], changes.tolist(), strict=True):
            option.changes[reading.number] = change

    def _round(self, name: str, reading: Reading) -> torch.Tensor:
        """The roundings [types, out * in] of a matrix; the first time also what they do to the layer's own output."""
        import torch

        weight = read_tensor(self.checkpoint, name).float().numpy()
        kinds = kinds_for(weight.shape[1])
        importance = self.importance(name)
        errors = np.stack(list(self.pool.map(lambda kind: rounded(weight, kind, importance) - weight, kinds)))
        if name not in self.options:
            squares = reading.inputs.float().square().mean(0).cpu().numpy()
            energy = float(np.square(weight).sum(0) @ squares)
            local = [float(np.square(error).sum(0) @ squares) / max(energy, 1e-30) for error in errors]
            self.options[name] = [
                Option(kind, bytes_of(weight.shape, kind), np.zeros(self.count), share)
                for kind, share in zip(kinds, local, strict=True)
            ]
        return torch.from_numpy(errors.reshape(len(kinds), -1)).to(self.device)


class _Ends:
    """The embedding's and the head's options.

    The gradient at the embedding's output is put together from what the first layer's linears heard of it. The two rows
    of the head that a margin reads are taken to be rounded like any other two, independently of each other.
    """

    FIRST = "model.layers.0."
    READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    BESIDE = "self_attn.o_proj"

    def __init__(self, checkpoint: Checkpoint, transcripts: Sequence[Transcript]) -> None:
        self.checkpoint, self.transcripts = checkpoint, transcripts
        verdict_tokens(transcripts)
        self.table = read_tensor(checkpoint, "model.embed_tokens.weight")
        self.norm = read_tensor(checkpoint, self.FIRST + "input_layernorm.weight").float()
        self.heard: dict[int, dict[str, torch.Tensor]] = {}
        self.gradients: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def hear(self, reading: Reading) -> None:
        part = reading.name.removeprefix(self.FIRST)
        if part not in (*self.READERS, self.BESIDE):
            return
        parts = self.heard.setdefault(reading.number, {})
        parts[part] = reading.gradients.float().cpu()
        if len(parts) == len(self.READERS) + 1:
            ids = self.transcripts[reading.number].ids[:-1]
            self.gradients[reading.number] = self._by_token(ids, self.heard.pop(reading.number))

    def _by_token(self, ids: Sequence[int], parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The distinct tokens and the margin's gradient [tokens, width] with respect to their embeddings.

        Beside the attention a token's state goes on as it is, with the gradient of the attention's own output.
        """
        import torch

        tokens = torch.tensor(ids)
        states = self.table[tokens].float().requires_grad_(True)
        epsilon = float(self.checkpoint.config.get("rms_norm_eps", 1e-6))
        weights = [read_tensor(self.checkpoint, f"{self.FIRST}{name}.weight").float() for name in self.READERS]
        read = [parts[name] @ weight for name, weight in zip(self.READERS, weights, strict=True)]
        with torch.enable_grad():
            normed = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + epsilon) * self.norm
            normed.backward(torch.stack(read).sum(0))
        assert states.grad is not None
        gradient = states.grad + parts[self.BESIDE]
        distinct, places = torch.unique(tokens, return_inverse=True)
        return distinct, torch.zeros(len(distinct), gradient.shape[1]).index_add_(0, places, gradient)

    def options(self) -> dict[str, list[Option]]:
        """Of the embedding, which may be the head too, and of a head of its own."""
        import torch

        seen = torch.unique(torch.cat([tokens for tokens, _ in self.gradients.values()]))
        rows = self.table[seen].float().numpy()
        final = read_tensor(self.checkpoint, "model.norm.weight").double().square().numpy()
        tied = "lm_head.weight" not in self.checkpoint.tensors

        def option(kind: str) -> Option:
            error = rounded(rows, kind) - rows
            changes = np.zeros(len(self.transcripts))
            for number, (tokens, gradient) in self.gradients.items():
                mine = torch.from_numpy(error)[torch.searchsorted(seen, tokens)]
                changes[number] = float((mine * gradient).sum())
            read = self._as_head(error, final, len(changes)) if tied else 0.0
            return Option(kind, bytes_of(self.table.shape, kind), changes + read, _lost(error, rows))

        found = {"model.embed_tokens.weight": [option(kind) for kind in kinds_for(rows.shape[1])]}
        if not tied:
            head = read_tensor(self.checkpoint, "lm_head.weight")
            some = head[:: max(1, len(head) // 1024)].float().numpy()
            errors = {kind: rounded(some, kind) - some for kind in kinds_for(some.shape[1])}
            found["lm_head.weight"] = [
                Option(
                    kind,
                    bytes_of(head.shape, kind),
                    self._as_head(error, final, len(self.transcripts)),
                    _lost(error, some),
                )
                for kind, error in errors.items()
            ]
        return found

    @staticmethod
    def _as_head(error: Floats, final: Doubles, count: int) -> Doubles:
        """A margin's change of the size to be expected where two rows are rounded, its sign going to and fro."""
        size = math.sqrt(2 * float(np.square(error.astype(np.float64)).mean(0) @ final))
        return size * np.where(np.arange(count) % 2, 1.0, -1.0)


def _lost(error: Floats, rows: Floats) -> float:
    return float(np.square(error).sum() / max(float(np.square(rows).sum()), 1e-30))


def kinds_for(columns: int) -> list[str]:
    """The types whose blocks fill rows of so many weights, F16 where there is none."""
    fitting = [kind for kind in CANDIDATES if columns % GGML_TYPES[TYPE_NUMBERS[kind]].block == 0]
    return fitting or ["F16"]


def bytes_of(shape: Sequence[int], kind: str) -> int:
    block = GGML_TYPES[TYPE_NUMBERS[kind]]
    return math.prod(shape) // block.block * block.block_bytes


def allocate(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """One option for each matrix, their bytes within the budget, for a small square of the margins' changes.

    From the smallest options on, the change of one matrix's type that saves most per byte is made as long as one fits;
    then one or two types are changed at a time while that helps within the budget.
    Raises InputError where the smallest options don't fit.
    """
    table = _Table(options)
    least = sum(min(option.bytes for option in listed) for listed in options.values())
    if least > budget:
        raise InputError(
            f"Even the smallest types take {least:,} bytes and the target leaves {budget:,} for matrices. "
            "Ask for more bits per weight."
        )
    while table.best_single(budget, per_byte=True):
        pass
    for _ in range(MOVES):
        if not (table.best_single(budget, per_byte=False) or table.best_pair(budget)):
            break
    return table.chosen()


class _Table:
    """Every option of every matrix as a row, and which row each matrix has now."""

    def __init__(self, options: Mapping[str, Sequence[Option]]) -> None:
        self.names = list(options)
        self.rows = [option for listed in options.values() for option in listed]
        self.owner = np.repeat(np.arange(len(options)), [len(listed) for listed in options.values()])
        self.bytes = np.array([option.bytes for option in self.rows], dtype=np.int64)
        self.changes = np.stack([option.changes for option in self.rows])
        own = np.square(self.changes).mean(1)
        local = np.array([option.local for option in self.rows])
        start = [self._smallest(number) for number in range(len(self.names))]
        scale = LOCAL * own[start].sum() / max(float(local[start].sum()), 1e-30)
        self.alone = own + scale * local
        self.now = np.array(start)

    def _smallest(self, number: int) -> int:
        mine = np.flatnonzero(self.owner == number)
        return int(min(mine, key=lambda row: (self.bytes[row], np.square(self.changes[row]).mean())))

    def _moves(self) -> tuple[Doubles, Doubles, npt.NDArray[np.int64]]:
        """For every row: how the changes, the objective and the bytes would change if its matrix took it."""
        held = self.now[self.owner]
        step = self.changes - self.changes[held]
        total = self.changes[self.now].sum(0)
        worth = (2 * step @ total + np.square(step).sum(1)) / len(total) + self.alone - self.alone[held]
        return step, worth, self.bytes - self.bytes[held]

    def best_single(self, budget: int, *, per_byte: bool) -> bool:
        """Make the best change of one type; whether there was one that helps."""
        _, worth, cost = self._moves()
        room = budget - int(self.bytes[self.now].sum())
        value = np.where(cost > 0, worth / np.maximum(cost, 1), worth * 1e9) if per_byte else worth
        value = np.where((cost <= room) & (worth < -1e-12), value, 0.0)
        best = int(value.argmin())
        if value[best] >= 0:
            return False
        self.now[self.owner[best]] = best
        return True

    def best_pair(self, budget: int) -> bool:
        """Make the best change of two matrices' types at once; whether there was one that helps."""
        step, worth, cost = self._moves()
        room = budget - int(self.bytes[self.now].sum())
        both = worth[:, None] + worth[None, :] + 2 * (step @ step.T) / step.shape[1]
        fits = (cost[:, None] + cost[None, :] <= room) & (self.owner[:, None] != self.owner[None, :])
        both = np.where(fits, both, 0.0)
        best = int(both.argmin())
        first, second = divmod(best, len(worth))
        if both[first, second] >= -1e-12:
            return False
        self.now[self.owner[first]], self.now[self.owner[second]] = first, second
        return True

    def chosen(self) -> dict[str, Option]:
        return {name: self.rows[row] for name, row in zip(self.names, self.now, strict=True)}
