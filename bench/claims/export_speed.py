"""Measures `export gguf`: peak memory and throughput against a plain copy of the same bytes on the same disk.

    python bench/claims/export_speed.py --gigabytes 2 --folder /tmp

makes a random bfloat16 Llama checkpoint of that size, exports it in a process of its own and copies the result,
a few times in turn. Each turn exports it twice: as a checkpoint that was never seen, whose sha256 is computed on the way,
and once more, when that is remembered. One JSON object a line; the last one has the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy

from gramlite.terminal import say_json

TURNS = ("first", "again")  # with the source's sha256 to be computed, and with it remembered

EXPORT = """
import json, resource, sys, time
from pathlib import Path
from gramlite.export.gguf import export_gguf
start = time.perf_counter()
export_gguf(Path(sys.argv[1]), Path(sys.argv[2]), dtype=sys.argv[3], force=True)
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write a random Llama checkpoint with the reference judge's tokenizer; return its largest tensor's bytes."""
    import gramlite
    from gramlite.formats.architecture import expected_tensors, read_architecture

    shutil.copytree(Path(gramlite.__file__).with_name("data") / "reference" / "hf", folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
    layer_bytes, rest = 2 * 61_000_000, 2 * 49152 * 2048
    config["num_hidden_layers"] = max(1, round((gigabytes * 1e9 - rest) / layer_bytes))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    header, position = {}, 0
    tensors = expected_tensors(read_architecture(config)).values()
    for tensor in tensors:
        size = 2 * int(numpy.prod(tensor.shape))
        header[tensor.name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    random = numpy.random.default_rng(0)
    pattern = (random.standard_normal(1 << 22).astype(numpy.float32).view(numpy.uint32) >> 16).astype("<u2").tobytes()
    encoded = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for start in range(0, position, len(pattern)):
            file.write(pattern[: position - start])
    return max(2 * int(numpy.prod(tensor.shape)) for tensor in tensors)


def copy_durably(source: Path, destination: Path) -> float:
    """Copy a file, wait until it is on the disk, remove it; return the seconds.

    The file is in memory before, as the checkpoint is that was exported just now: neither has to wait for the disk.
    """
    with source.open("rb", buffering=0) as file:
        while file.read(1 << 22):
            pass
    start = time.perf_counter()
    shutil.copyfile(source, destination)
    with destination.open("rb") as file:
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    destination.unlink()
    return seconds


def measure(checkpoint: Path, kept: Path, dtype: str) -> dict[str, float]:
    """Export twice and copy `kept`, an earlier export, once; each writes a new file that is removed again."""
    output = kept.with_name("again.gguf")
    copied = copy_durably(kept, kept.with_name("copy.gguf"))
    shutil.rmtree(os.environ["GRAMLITE_CACHE"], ignore_errors=True)
    measured: dict[str, float] = {"copy_seconds": copied}
    for turn in TURNS:
        result = export(checkpoint, output, dtype)
        measured |= {f"{turn}_{name}": value for name, value in result.items()}
        measured["bytes"] = output.stat().st_size
        output.unlink()
    return measured


def export(checkpoint: Path, output: Path, dtype: str) -> dict[str, float]:
    """Export in a process of its own: seconds, and peak resident bytes."""
    words = [sys.executable, "-c", EXPORT, str(checkpoint), str(output), dtype]
    result: dict[str, float] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory and throughput of export gguf.")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, default=None, help="a folder on the disk to measure")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "f16", "f32"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        os.environ["GRAMLITE_CACHE"] = str(Path(scratch) / "cache")
        checkpoint, output = Path(scratch) / "checkpoint", Path(scratch) / "model.gguf"
        largest = make_checkpoint(checkpoint, options.gigabytes)
        for dtype in options.dtypes:
            export(checkpoint, output, dtype)
            rows = [measure(checkpoint, output, dtype) for _ in range(options.repeats)]
            for row in rows:
                say_json({"dtype": dtype, **row})
            summary: dict[str, Any] = {"dtype": dtype, "n": len(rows)}
            for turn in TURNS:
                shares = [row["copy_seconds"] / row[f"{turn}_seconds"] for row in rows]
                summary[f"{turn}_share_of_copy"] = {
                    "median": statistics.median(shares), "low": min(shares), "high": max(shares)
                }  # fmt: skip
            summary["peak_bytes"] = max(row[f"{turn}_peak_bytes"] for row in rows for turn in TURNS)
            say_json(summary | {"allowed_peak_bytes": 1.5 * largest + 300e6})


if __name__ == "__main__":
    main()
