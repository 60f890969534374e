"""What an export will write, settled before the first byte: every tensor matched, the tokenizer read."""

from __future__ import annotations

from dataclasses import dataclass

from gramlite.errors import ModelError
from gramlite.formats.architecture import Architecture, ExpectedTensor, expected_tensors, read_architecture
from gramlite.formats.checkpoint import Checkpoint, StoredTensor
from gramlite.formats.gguf_writer import ModelPlan
from gramlite.formats.tensor_stream import NUMPY_TYPES, read_pieces
from gramlite.formats.tokenizer import read_vocabulary

BUFFERS = ("rotary_emb.inv_freq",)  # computed from the config, saved by old versions of transformers


@dataclass(frozen=True)
class ExportPlan:
    """What goes into the file, in the order in which the source files hold it; `expected` is by the stored name."""

    checkpoint: Checkpoint
    model: ModelPlan
    expected: dict[str, ExpectedTensor]
    notes: tuple[str, ...]

    def stored_as(self, tensor: ExpectedTensor) -> str:
        return "F32" if len(tensor.shape) == 1 else self.model.file_type


def plan_export(checkpoint: Checkpoint, dtype: str) -> ExportPlan:
    """Match a checkpoint's tensors and tokenizer to its architecture; raises ModelError for whatever does not fit."""
    architecture = read_architecture(checkpoint.config)
    matched, notes = match_tensors(checkpoint, architecture)
    vocabulary = read_vocabulary(checkpoint.folder, checkpoint.config, architecture.vocabulary)
    kind = dtype.upper()
    tensors = tuple((tensor, "F32" if len(tensor.shape) == 1 else kind) for _, tensor in matched)
    model = ModelPlan(architecture, vocabulary, kind, tensors)
    return ExportPlan(
        checkpoint, model, {stored.name: tensor for stored, tensor in matched}, (*notes, *vocabulary.notes)
    )


def match_tensors(
    checkpoint: Checkpoint, architecture: Architecture
) -> tuple[tuple[tuple[StoredTensor, ExpectedTensor], ...], list[str]]:
    """Pair each stored tensor with the one expected, in the order of the files, and say what was left out."""
    expected = expected_tensors(architecture)
    matched, notes = [], []
    for name, stored in checkpoint.tensors.items():
        if name.endswith(BUFFERS):
            continue
        if architecture.tied and name == "lm_head.weight":
            check_tied_head(checkpoint, stored)
            notes.append("lm_head.weight repeats the embedding it is tied to and was left out")
            continue
        if name not in expected:
            raise ModelError(
                f"{stored.file} has the unexpected tensor {name!r}, which {architecture.family} does not have. Export another checkpoint."
            )
        if stored.shape != expected[name].shape:
            raise ModelError(
                f"The tensor {name!r} of {stored.file} has the shape {list(stored.shape)}; config.json asks for "
                f"{list(expected[name].shape)}. Download the checkpoint again."
            )
        if stored.dtype not in NUMPY_TYPES:
            raise ModelError(
                f"The tensor {name!r} of {stored.file} is {stored.dtype}; only F32, F16 and BF16 can be exported."
            )
        matched.append((stored, expected[name]))
    missing = expected.keys() - checkpoint.tensors.keys()
    if missing:
        name = next(name for name in expected if name in missing)
        raise ModelError(
            f"The tensor {name!r} is missing from {checkpoint.folder} ({len(missing)} in all). Download the checkpoint again."
        )
    return tuple(matched), notes


def check_tied_head(checkpoint: Checkpoint, head: StoredTensor) -> None:
    """A head that is stored although it is tied must be the embedding, or one of the two would be lost."""
    embedding = checkpoint.tensors.get("model.embed_tokens.weight")
    if embedding and (embedding.shape, embedding.dtype) == (head.shape, head.dtype):
        with embedding.file.open("rb") as first, head.file.open("rb") as second:
            if all(
                one == other
                for one, other in zip(read_pieces(first, embedding), read_pieces(second, head), strict=True)
            ):
                return
    raise ModelError(
        "config.json ties lm_head.weight to the embedding, but the two differ. Set tie_word_embeddings to false if the head is its own."
    )
