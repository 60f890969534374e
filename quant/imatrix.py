"""The importance matrix: the mean square of every linear layer's inputs over judge transcripts, as llama.cpp keeps it.

Format: GGUF as llama-imatrix writes it, two float32 tensors a layer, named after the weight's GGUF name:
`<name>.in_sum2` [in], the sum of x squared, and `<name>.counts` [1], how many tokens were summed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gramlite.errors import ModelError
from gramlite.formats.architecture import gguf_names, read_architecture
from gramlite.formats.checkpoint import open_checkpoint
from gramlite.formats.publish import unicode_name
from gramlite.storage import atomic_output

from .calibration import Transcript
from .stream import Stage, stream_decoder


@dataclass(frozen=True)
class ImportanceMatrix:
    """Sums of squares by GGUF tensor name, the tokens they are over, and the names of the data sets."""

    sums: dict[str, npt.NDArray[np.float32]]
    tokens: float
    chunks: int
    datasets: tuple[str, ...]

    def means(self) -> dict[str, npt.NDArray[np.float32]]:
        """What `llama_model_quantize` takes: the mean square of each input."""
        return {name: (values / self.tokens).astype(np.float32) for name, values in self.sums.items()}


def collect_importance(
    folder: Path,
    transcripts: Sequence[Transcript],
    *,
    dataset: str,
    device: str = "cpu",
    after_layer: Callable[[int], None] | None = None,
) -> ImportanceMatrix:
    """Run the transcripts through a checkpoint, layer by layer, and sum the squares of every linear layer's inputs."""
    checkpoint = open_checkpoint(folder)
    names = gguf_names(read_architecture(checkpoint.config))
    sums: dict[str, npt.NDArray[np.float32]] = {}

    def visit(stage: Stage) -> None:
        values = stage.moment.float().cpu().numpy()
        sums.update({names(f"{name}.weight"): values for name in stage.linears})

    stream_decoder(checkpoint, transcripts, visit, device=device, diagonal=True, after_layer=after_layer)
    tokens = float(sum(len(transcript.ids) for transcript in transcripts))
    return ImportanceMatrix(sums, tokens, len(transcripts), (dataset,))


def write_imatrix(path: Path, matrix: ImportanceMatrix, *, force: bool = False) -> None:
    """Write an importance matrix that llama.cpp's llama-quantize and llama-imatrix read."""
    import gguf

    tokens_each = max(1, round(matrix.tokens / max(matrix.chunks, 1)))
    with atomic_output(path, force=force) as temporary:
        writer = gguf.GGUFWriter(temporary, "imatrix")
        try:
            writer.add_type("imatrix")
            writer.add_array("imatrix.datasets", [unicode_name(name) for name in matrix.datasets])
            writer.add_uint32("imatrix.chunk_count", matrix.chunks)
            writer.add_uint32("imatrix.chunk_size", tokens_each)
            for name, values in sorted(matrix.sums.items()):
                writer.add_tensor(f"{name}.in_sum2", values.reshape(1, -1))
                writer.add_tensor(f"{name}.counts", np.full((1, 1), matrix.tokens, np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read an importance matrix in llama.cpp's GGUF form; raises ModelError for anything else."""
    from gramlite.formats.gguf_format import parse_header

    header = parse_header(path)
    if header.metadata.get("general.type") != "imatrix":
        raise ModelError(f"{path} is no importance matrix in GGUF form. Make one again with a current llama-imatrix.")
    sums: dict[str, npt.NDArray[np.float32]] = {}
    counts: dict[str, float] = {}
    with path.open("rb") as file:
        for tensor in header.tensors:
            file.seek(header.data_offset + tensor.offset)
            values = np.frombuffer(file.read(tensor.bytes), np.float32)
            name, _, part = tensor.name.rpartition(".")
            if part == "in_sum2":
                sums[name] = values
            elif part == "counts":
                counts[name] = float(values.sum())
    if not sums or sums.keys() != counts.keys() or min(counts.values()) <= 0:
        raise ModelError(f"{path} has sums and counts that do not belong together. Make the matrix again.")
    tokens = max(counts.values())
    scaled = {name: (values * (tokens / counts[name])).astype(np.float32) for name, values in sums.items()}
    datasets, chunks = (header.metadata.get(f"imatrix.{key}") for key in ("datasets", "chunk_count"))
    return ImportanceMatrix(
        sums=scaled,
        tokens=tokens,
        chunks=chunks if isinstance(chunks, int) else 0,
        datasets=tuple(map(str, datasets)) if isinstance(datasets, tuple) else (),
    )


def matrix_sha256(matrix: ImportanceMatrix) -> str:
    """A hash of all that a quantizer sees of a matrix."""
    digest = hashlib.sha256()
    for name, values in sorted(matrix.means().items()):
        digest.update(name.encode() + b"\0" + values.tobytes())
    return digest.hexdigest()
