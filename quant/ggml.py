"""llama.cpp's own quantizers: a whole file in a process of its own, or rows of one matrix in this one.

A whole file is quantized by `llama_model_quantize` in a child process, because llama.cpp ends the process where it
meets what it holds impossible. The child is this module run as a program: a line of JSON and the importance matrix's
floats go in, what llama.cpp says comes out.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from gramlite.errors import GramliteError, ModelError
from gramlite.formats.ggml_types import GGML_TYPES
from gramlite.formats.quantization import FILE_TYPES

FILE_TYPE_NUMBERS = {name: number for number, name in FILE_TYPES.items()}
TYPE_NUMBERS = {kind.name: number for number, kind in GGML_TYPES.items()}
# of some of these llama.cpp ends the process without an importance matrix, the others it refuses to write
NEED_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
STARTED = re.compile(r"^\[ *(\d+)/ *(\d+)\]", re.MULTILINE)
FELL_BACK = re.compile(r"warning: (\S+) +- ncols.*?required for type +(\w+)\).*?falling back to +(\w+)")
PLANNED = re.compile(r"^\[ *\d+/ *\d+\] +(\S+) .*-> .*MiB \((\w+)\)$", re.MULTILINE)
FAILED = re.compile(r"failed to quantize: (.+)")

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One file to quantize: `kind` names llama.cpp's file type; `overrides` are pairs of a pattern and a tensor type.

    With `dry_run` nothing is written.
    """

    source: str
    output: str
    kind: str
    overrides: tuple[tuple[str, str], ...] = ()
    threads: int = 1
    dry_run: bool = False


@dataclass(frozen=True)
class Outcome:
    """What llama.cpp did: the tensors that took another type than meant (name, meant, taken), and in a dry run the type
    that each tensor would be turned into."""

    fallbacks: tuple[tuple[str, str, str], ...]
    types: dict[str, str]


class QuantizerError(GramliteError):
    """llama.cpp's quantizer gave up; `words` are its own."""

    def __init__(self, words: str) -> None:
        super().__init__(f"llama.cpp could not quantize the file: {words}.")
        self.words = words


def quantize_file(job: Job, matrix: Mapping[str, Floats], *, advance: Callable[[int, int], None]) -> Outcome:
    """Run a job to its end; `advance` is told the number of the tensor in work and of all.

    Raises QuantizerError with llama.cpp's words, also where it ended its process.
    """
    command = [sys.executable, "-P", "-m", "gramlite.quant.ggml"]
    quietly = os.environ | {"GGML_NO_BACKTRACE": "1"}  # an abort would wait for a debugger's trace, perhaps for ever
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=quietly
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        try:
            _send(child.stdin, job, matrix)
            said = _listen(child.stdout, advance)
            code = child.wait()
        except BaseException:
            child.kill()
            raise
    if code != 0:
        reason = FAILED.search(said)
        raise QuantizerError(reason[1].strip() if reason else _last_words(said, code))
    found = FELL_BACK.findall(said)
    types = {name: kind.upper() for name, kind in PLANNED.findall(said)}
    return Outcome(tuple((name, meant.upper(), taken.upper()) for name, meant, taken in found), types)


def _send(stream: IO[bytes], job: Job, matrix: Mapping[str, Floats]) -> None:
    try:
        importance = [(name, len(values)) for name, values in matrix.items()]  # whose floats follow in this order
        stream.write(json.dumps(asdict(job) | {"importance": importance}).encode() + b"\n")
        for values in matrix.values():
            stream.write(np.ascontiguousarray(values, np.float32).tobytes())
        stream.close()
    except BrokenPipeError:
        pass  # it ended early, and its exit says why


def _listen(stream: IO[bytes], advance: Callable[[int, int], None]) -> str:
    """All that the child says; each tensor it begins moves the progress on."""
    said = []
    for line in stream:
        text = line.decode("utf-8", "replace")
        if match := STARTED.match(text):
            advance(int(match[1]), int(match[2]))
        said.append(text)
    return "".join(said)


def _last_words(said: str, code: int) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"its process ended with {ended}" + (f" after {lines[-1]!r}" if lines else "")


def main() -> int:
    """The child: read a job from standard input, quantize, and say on standard output what llama.cpp says."""
    import llama_cpp

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    job = json.loads(sys.stdin.buffer.readline())
    matrix = {name: np.frombuffer(sys.stdin.buffer.read(4 * size), np.float32) for name, size in job["importance"]}

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def say(level: int, text: bytes, data: object) -> None:
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()

    llama_cpp.llama_log_set(say, ctypes.c_void_p(0))
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPE_NUMBERS[job["kind"]]
    parameters.nthread = job["threads"]
    parameters.dry_run = job["dry_run"]
    overrides = [(pattern.encode(), TYPE_NUMBERS[kind]) for pattern, kind in job["overrides"]]
    entries = [
        (name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), len(values))
        for name, values in matrix.items()
    ]
    if overrides:  # both lists end with an entry of zeros
        parameters.tt_overrides = (llama_cpp.llama_model_tensor_override * (len(overrides) + 1))(*overrides)
    if entries:
        parameters.imatrix = (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))(*entries)
    failed: int = llama_cpp.llama_model_quantize(
        os.fsencode(job["source"]), os.fsencode(job["output"]), ctypes.byref(parameters)
    )
    return int(failed != 0)


@functools.cache
def _library() -> ctypes.CDLL:
    found = importlib.util.find_spec("llama_cpp")
    if found is None or not found.submodule_search_locations:
        raise ModelError("The package llama_cpp is missing. Type: pip install llama-cpp-python")
    ending = "dylib" if sys.platform == "darwin" else "so"
    library = ctypes.CDLL(str(Path(found.submodule_search_locations[0]) / "lib" / f"libggml-base.{ending}"))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    return library


def quantize_rows(weight: Floats, kind: str, importance: Floats | None = None) -> npt.NDArray[np.uint8]:
    """A matrix [rows, columns] as llama.cpp would write it in the type `kind`, uint8 [rows, bytes of a row].

    Raises ModelError where the type's blocks do not divide the columns, or where it needs an importance and has none.
    """
    rows, columns = weight.shape
    block = GGML_TYPES[TYPE_NUMBERS[kind]]
    if columns % block.block:
        raise ModelError(f"{kind} has blocks of {block.block} weights, which rows of {columns} do not fill.")
    if importance is None and kind in NEED_IMPORTANCE:  # llama.cpp would end the process
        raise ModelError(f"{kind} cannot be written without an importance matrix.")
    weight = np.ascontiguousarray(weight, np.float32)
    out = np.zeros((rows, columns // block.block * block.block_bytes), np.uint8)
    counts = None if importance is None else np.ascontiguousarray(importance, np.float32)
    address = None if counts is None else counts.ctypes.data
    written = _library().ggml_quantize_chunk(
        TYPE_NUMBERS[kind], weight.ctypes.data, out.ctypes.data, 0, rows, columns, address
    )
    if written != out.nbytes:
        raise ModelError(f"llama.cpp wrote {written:,} bytes of {kind} where {out.nbytes:,} are due.")
    return out


def dequantize_rows(blocks: npt.NDArray[np.uint8], kind: str, columns: int) -> Floats:
    """The weights [rows, columns] that blocks of a quantized type stand for."""
    out = np.empty((len(blocks), columns), np.float32)
    blocks = np.ascontiguousarray(blocks)
    dequantize = getattr(_library(), f"dequantize_row_{kind.lower().replace('_k', '_K')}")
    dequantize.restype = None
    dequantize(ctypes.c_void_p(blocks.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(out.size))
    return out


def rounded(weight: Floats, kind: str, importance: Floats | None = None) -> Floats:
    """What is left of a matrix [rows, columns] once it was stored in the type `kind`."""
    if kind in ("F32", "BF16"):  # where what goes in was one of them already
        return weight
    if kind == "F16":
        return weight.astype(np.float16).astype(np.float32)
    return dequantize_rows(quantize_rows(weight, kind, importance), kind, weight.shape[1])


if __name__ == "__main__":
    sys.exit(main())
