"""Mixed precision: every matrix the type whose bytes buy most, by what its rounding does to the verdict's margin.

To first order a rounding D of a weight changes a transcript's margin by <G, D>, where G is the margin's gradient there:
the sum over tokens of g^T D x, of the gradient g at the layer's output and its input x. That is measured for every
matrix, every type it could take and every transcript, and `allocate` spends the bytes.
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

from gramlite.errors import InputError
from gramlite.formats.architecture import gguf_names, read_architecture
from gramlite.formats.checkpoint import Checkpoint, open_checkpoint
from gramlite.formats.ggml_types import GGML_TYPES

from .allocate import Option, allocate, unseen_changes
from .calibration import Transcript
from .decoder import EMBEDDING, HEAD, has_own_head, read_tensor
from .ggml import NEED_IMPORTANCE, TYPE_NUMBERS, rounded
from .memory import free_bytes
from .report import Progress
from .sensitivity import Reading, read_gradients, verdict_tokens

if TYPE_CHECKING:
    import torch

AUTO = re.compile(r"auto:(\d+(?:\.\d+)?)(?:bpw)?", re.IGNORECASE)
CANDIDATES = ("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "IQ4_NL", "Q4_0", "IQ4_XS", "Q3_K", "Q2_K")
SAMPLE_ROWS = 1024  # of a head, to measure how far two of its rows are rounded
LAYER_SHARE = 4  # a layer holds about four times the weights of its largest matrix
UNWEIGHED = ("Q8_0", "F16", "BF16", "F32")  # types that an importance matrix changes nothing of

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Way = tuple[str, Floats | None]  # a type, and the importance it is written with


@dataclass(frozen=True, eq=False)
class Choice:
    """An option for each matrix by its GGUF name, and the change of each transcript's margin that such a choice makes
    when it is made without that transcript."""

    options: dict[str, Option]
    unseen: Doubles

    def describe(self) -> dict[str, Any]:
        """What a manifest says of it: the margin error expected to first order, and each matrix's share."""
        return {
            "expected_margin_error": round(float(np.abs(self.unseen).mean()), 4),
            "margin_change_rms": {
                name: round(float(np.sqrt(np.square(option.changes).mean())), 5)
                for name, option in self.options.items()
            },
            "written_with_imatrix": sorted(name for name, option in self.options.items() if option.weighed),
        }


def target_bits(text: str) -> float | None:
    """The bits per weight of `auto:4.5bpw`, None for any other type's name."""
    match = AUTO.fullmatch(text)
    return float(match[1]) if match else None


def choose_types(
    folder: Path,
    transcripts: Sequence[Transcript],
    *,
    bits: float,
    types: Mapping[str, str] | None = None,
    importance: Mapping[str, Floats] | None = None,
    device: str = "cpu",
    progress: Progress = lambda stage, done, total: None,
) -> Choice:
    """The type of every matrix, by its GGUF name, for a file of at most `bits` per weight.

    Vectors stay F32 and count, and so do matrices whose types are settled by `types`. Where `importance` has a matrix,
    each type may be written with or without it.
    Raises InputError where even the smallest types take more.
    """
    checkpoint = open_checkpoint(folder)
    own_head = has_own_head(checkpoint)
    shapes = [stored.shape for name, stored in checkpoint.tensors.items() if own_head or name != HEAD]
    vectors = sum(4 * math.prod(shape) for shape in shapes if len(shape) == 1)
    budget = int(bits * sum(map(math.prod, shapes)) / 8) - vectors
    options = measure(checkpoint, transcripts, types=types, importance=importance, device=device, progress=progress)
    return Choice(allocate(options, budget), unseen_changes(options, budget))


def choose_weighed(
    folder: Path,
    transcripts: Sequence[Transcript],
    *,
    types: Mapping[str, str],
    importance: Mapping[str, Floats],
    device: str = "cpu",
    progress: Progress = lambda stage, done, total: None,
) -> Choice:
    """For matrices of settled `types`, which are better written with the importance matrix and which without."""
    options = measure(
        open_checkpoint(folder), transcripts, types=types, importance=importance, device=device, progress=progress
    )
    return settle(options)


def settle(options: Mapping[str, Sequence[Option]]) -> Choice:
    """The choice between plain and weighed, unless on transcripts it has not seen it does worse than none.

    Each matrix's first option is the plain one where it has one.
    """
    room = sum(max(option.bytes for option in listed) for listed in options.values())
    unseen = unseen_changes(options, room)
    plain = {name: listed[0] for name, listed in options.items()}
    together = np.sum([option.changes for option in plain.values()], axis=0)
    if np.square(unseen).sum() >= np.square(together).sum():
        return Choice(plain, together)
    return Choice(allocate(options, room), unseen)


def measure(
    checkpoint: Checkpoint,
    transcripts: Sequence[Transcript],
    *,
    types: Mapping[str, str] | None = None,
    importance: Mapping[str, Floats] | None = None,
    device: str = "cpu",
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, list[Option]]:
    """What each type would do to the margins, for every matrix, embedding and head included, by its GGUF name.

    Every candidate that fits is tried, or the one that `types` names; with and, where it can be, without importance.
    Raises InputError for a type that cannot be written so.
    """
    names = gguf_names(read_architecture(checkpoint.config))
    weights = importance or {}

    def ways(name: str, columns: int) -> list[Way]:
        kind = (types or {}).get(names(name))
        kinds = [kind] if kind else kinds_for(columns)
        given = weights.get(names(name))
        plain: list[Way] = [(kind, None) for kind in kinds if kind not in NEED_IMPORTANCE]
        found = plain + [(kind, given) for kind in kinds if given is not None and kind not in UNWEIGHED]
        if not found:
            raise InputError(f"{names(name)} cannot be {kind}, which needs an importance matrix and has none here.")
        return found

    with ThreadPoolExecutor() as pool:
        layers = LayerOptions(checkpoint, len(transcripts), ways, pool, device)
        outer = EmbeddingOptions(checkpoint, transcripts, ways)

        def visit(reading: Reading) -> None:
            layers.add(reading)
            outer.add(reading)

        read_gradients(
            checkpoint,
            transcripts,
            visit,
            device=device,
            after_layer=lambda done, total: progress("Weighing roundings", done, total),
        )
        found = layers.options | outer.options()
    return {names(name): listed for name, listed in found.items()}


class LayerOptions:
    """The linear layers' options. Roundings are computed when a layer comes up, and kept until the next one does."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        count: int,
        ways: Callable[[str, int], list[Way]],
        pool: ThreadPoolExecutor,
        device: str,
    ) -> None:
        self.checkpoint, self.count, self.ways = checkpoint, count, ways
        self.pool, self.device = pool, device
        self.options: dict[str, list[Option]] = {}
        self.prefix = ""
        self.errors: dict[str, torch.Tensor] = {}

    def add(self, reading: Reading) -> None:
        name = f"{reading.name}.weight"
        prefix = reading.name.split(".self_attn.")[0].split(".mlp.")[0]
        if prefix != self.prefix:
            self.errors.clear()
            self.prefix = prefix
        if name not in self.errors:
            self.errors[name] = self._round(name, reading)
        gradient = reading.gradients.float().T @ reading.inputs.float()
        changes = products(self.errors[name], gradient.flatten())
        for option, change in zip(self.options[name], changes.tolist(), strict=True):
            option.changes[reading.number] = change

    def _round(self, name: str, reading: Reading) -> torch.Tensor:
        """The roundings [types, out * in] of a matrix; the first time also what they do to the layer's own output."""
        import torch

        weight = read_tensor(self.checkpoint, name).float().numpy()
        ways = self.ways(name, weight.shape[1])
        squares = reading.inputs.float().square().mean(0).cpu().numpy()
        energy = max(float(np.square(weight).sum(0) @ squares), 1e-30)
        errors = torch.empty(len(ways), weight.size, dtype=self._kept_as(weight.size * len(ways)), device=self.device)

        def compute(index: int) -> float:
            error = rounded(weight, *ways[index]) - weight
            errors[index] = torch.from_numpy(error).flatten()
            return float(np.square(error).sum(0) @ squares) / energy

        local = list(self.pool.map(compute, range(len(ways))))
        if name not in self.options:
            self.options[name] = [
                Option(kind, bytes_of(weight.shape, kind), np.zeros(self.count), share, importance is not None)
                for (kind, importance), share in zip(ways, local, strict=True)
            ]
        return errors

    def _kept_as(self, numbers: int) -> torch.dtype:
        """The dtype of so many rounding errors: a float32 for each, unless a layer's would crowd the memory."""
        import torch

        layer = numbers * LAYER_SHARE
        return torch.float32 if 4 * layer <= free_bytes(self.device) // 4 else torch.bfloat16


def products(errors: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Each row of errors [ways, weights] times a float32 gradient [weights], summed up in float32."""
    import torch

    if errors.dtype == gradient.dtype:
        return errors @ gradient
    return torch.stack([error.float() @ gradient for error in errors])


class EmbeddingOptions:
    """The embedding's and the head's options.

    The gradient at the embedding's output is put together from what the first layer's linears were told of it. The two rows
    of the head that a margin reads are taken to be rounded like any other two, independently of each other.
    """

    FIRST = "model.layers.0."
    READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    BESIDE = "self_attn.o_proj"

    def __init__(
        self, checkpoint: Checkpoint, transcripts: Sequence[Transcript], ways: Callable[[str, int], list[Way]]
    ) -> None:
        self.checkpoint, self.transcripts, self.ways = checkpoint, transcripts, ways
        verdict_tokens(transcripts)
        self.table = read_tensor(checkpoint, EMBEDDING)
        self.norm = read_tensor(checkpoint, self.FIRST + "input_layernorm.weight").float()
        self.read: dict[int, dict[str, torch.Tensor]] = {}
        self.gradients: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, reading: Reading) -> None:
        part = reading.name.removeprefix(self.FIRST)
        if part not in (*self.READERS, self.BESIDE):
            return
        parts = self.read.setdefault(reading.number, {})
        parts[part] = reading.gradients.float().cpu()
        if len(parts) == len(self.READERS) + 1:
            ids = self.transcripts[reading.number].ids[:-1]
            self.gradients[reading.number] = self._by_token(ids, self.read.pop(reading.number))

    def _by_token(self, ids: Sequence[int], parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The distinct tokens and the margin's gradient [tokens, width] with respect to their embeddings.

        Beside the attention a token's state goes on as it is, with the gradient of the attention's own output.
        """
        import torch

        tokens = torch.tensor(ids)
        states = self.table[tokens].float().requires_grad_(True)
        epsilon = float(self.checkpoint.config.get("rms_norm_eps", 1e-6))
        weights = [read_tensor(self.checkpoint, f"{self.FIRST}{name}.weight").float() for name in self.READERS]
        through = [parts[name] @ weight for name, weight in zip(self.READERS, weights, strict=True)]
        with torch.enable_grad():
            normed = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + epsilon) * self.norm
            normed.backward(torch.stack(through).sum(0))
        assert states.grad is not None
        gradient = states.grad + parts[self.BESIDE]
        distinct, places = torch.unique(tokens, return_inverse=True)
        return distinct, torch.zeros(len(distinct), gradient.shape[1]).index_add_(0, places, gradient)

    def options(self) -> dict[str, list[Option]]:
        """Of the embedding, which may be the head too, and of a head of its own."""
        import torch

        seen = torch.unique(torch.cat([tokens for tokens, _ in self.gradients.values()]))
        final = read_tensor(self.checkpoint, "model.norm.weight").double().square().numpy()
        tied = not has_own_head(self.checkpoint)

        def as_embedding(error: Floats) -> Doubles:
            changes = np.zeros(len(self.transcripts))
            for number, (tokens, gradient) in self.gradients.items():
                mine = torch.from_numpy(error)[torch.searchsorted(seen, tokens)]
                changes[number] = float((mine * gradient).sum())
            return changes + self._as_head(error, final) if tied else changes

        found = {EMBEDDING: self._tried(EMBEDDING, self.table[seen].float().numpy(), as_embedding)}
        if not tied:
            head = read_tensor(self.checkpoint, HEAD)
            some = head[:: max(1, len(head) // SAMPLE_ROWS)].float().numpy()
            found[HEAD] = self._tried(HEAD, some, lambda error: self._as_head(error, final))
        return found

    def _tried(self, name: str, rows: Floats, changes_by: Callable[[Floats], Doubles]) -> list[Option]:
        """Every way to write a matrix, by what it does to some of its rows."""
        found, shape = [], self.checkpoint.tensors[name].shape
        for kind, importance in self.ways(name, rows.shape[1]):
            error = rounded(rows, kind, importance) - rows
            lost = float(np.square(error).sum() / max(float(np.square(rows).sum()), 1e-30))
            found.append(Option(kind, bytes_of(shape, kind), changes_by(error), lost, importance is not None))
        return found

    def _as_head(self, error: Floats, final: Doubles) -> Doubles:
        """A margin's change of the size to be expected where two rows are rounded, its sign going to and fro."""
        size = math.sqrt(2 * float(np.square(error.astype(np.float64)).mean(0) @ final))
        return size * np.where(np.arange(len(self.transcripts)) % 2, 1.0, -1.0)


def kinds_for(columns: int) -> list[str]:
    """The types whose blocks fill rows of so many weights, F16 where there is none."""
    fitting = [kind for kind in CANDIDATES if columns % GGML_TYPES[TYPE_NUMBERS[kind]].block == 0]
    return fitting or ["F16"]


def bytes_of(shape: Sequence[int], kind: str) -> int:
    block = GGML_TYPES[TYPE_NUMBERS[kind]]
    return math.prod(shape) // block.block * block.block_bytes
