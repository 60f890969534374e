"""Fixtures of the backends' tests: tiny checkpoints of each family, and a decoder that only writes down logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from broken_gguf import FLOAT32, INT32, STRING, UINT32, adapter_pieces, byte_alphabet, model_pieces
from fakes import request_for, run_all

from gramlite import Judge, RuntimeOptions, Settings
from gramlite.backends.gguf.adapters import PARKED
from gramlite.backends.gguf.backend import GgufBackend, open_artifact
from gramlite.backends.protocol import Backend
from gramlite.formats.artifact import Artifact
from gramlite.generation.decoder import Generation
from gramlite.generation.request import Request
from gramlite.generation.scaffold import LLAMA31
from gramlite.judging.template import packaged_template

from ..export.conftest import checkpoint_of  # noqa: F401

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@dataclass
class Probe:
    """A decoder that feeds `then`, one entry a step, and keeps the logits of every step."""

    then: list[Sequence[int]] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)
    finished: bool = False
    generated: int = 0
    answering: bool = True  # so that nothing is guessed ahead of it

    def advance(self, logits: Any) -> Sequence[int]:
        self.seen.append(np.array(logits, dtype=np.float32))
        if len(self.seen) <= len(self.then):
            return self.then[len(self.seen) - 1]
        self.finished = True
        return ()

    def restarted(self) -> Probe:
        self.seen.clear()
        return self

    def result(self, *, cached: int = 0) -> Generation:
        return Generation(thinking=None, forced=False, generated=0, cached=cached)


def run_probes(backend: Any, probes: Sequence[tuple[Request, Probe]]) -> list[tuple[int, Generation]]:
    """Run requests, each with a probe in the place of its decoder."""
    by_key = {request.key: probe for request, probe in probes}
    backend._decoder = lambda request: by_key[request.key].restarted()
    return run_all(backend, [request for request, _ in probes])


def logits_of(
    backend: Backend, prompt: Sequence[int], splits: tuple[int, ...] = (), then: Sequence[Sequence[int]] = ()
) -> tuple[list[Any], int]:
    """The logits after a prompt and after each further feed, and how many of its tokens were not computed again."""
    probe = Probe(list(then))
    ((_, generation),) = run_probes(backend, [(request_for(0, prompt, splits), probe)])
    return probe.seen, generation.cached


@pytest.fixture(scope="session")
def reference_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference judge as a checkpoint's folder."""
    from gramlite.reference.files import build_checkpoint

    return build_checkpoint(tmp_path_factory.mktemp("backends") / "checkpoint")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two random blocks that reads bytes."""
    pieces = model_pieces()
    tokens: list[object] = [*SPECIAL, *byte_alphabet(), "ab"]
    pieces.put("llama.context_length", UINT32, 4096)
    pieces.put("tokenizer.ggml.pre", STRING, "llama-bpe")
    pieces.put_array("tokenizer.ggml.tokens", STRING, tokens)
    pieces.put_array("tokenizer.ggml.scores", FLOAT32, [0.0] * len(tokens))
    pieces.put_array("tokenizer.ggml.token_type", INT32, [3] * len(SPECIAL) + [1] * 257)
    for name in ("bos", "eos", "unknown", "padding"):
        pieces.put(f"tokenizer.ggml.{name}_token_id", UINT32, 4)
    embedding = pieces.tensor("token_embd.weight")
    pieces.drop_tensor("token_embd.weight")
    pieces.add_tensor("token_embd.weight", [embedding.shape[0], len(tokens)], embedding.kind)
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    path.write_bytes(pieces.file())
    return path


@pytest.fixture(scope="session")
def adapters(tiny: Path) -> list[str]:
    """Adapters of the tiny model that differ in their strength, one more than are kept parked beside another."""
    paths = []
    for number in range(PARKED + 2):
        pieces = adapter_pieces()
        pieces.put("adapter.lora.alpha", FLOAT32, 40.0 * (number + 1))
        path = tiny.with_name(f"adapter{number}.gguf")
        path.write_bytes(pieces.file())
        paths.append(str(path))
    return paths


def tiny_backend(tiny: Path, **options: Any) -> GgufBackend:
    return open_artifact(
        Artifact(tiny, "gguf", None), RuntimeOptions(**{"device": "cpu", "threads": 1, "context": 2048, **options})
    )


def tiny_judge(tiny: Path, **options: Any) -> Judge:
    adapter = options.get("adapter")
    model = {"name": "tiny", "format": "gguf", "sha256": "0" * 64} | ({"adapter": "1" * 64} if adapter else {})
    return Judge(
        tiny_backend(tiny, **{"parallel": 16, **options}), packaged_template(), LLAMA31, Settings(mode="direct"), model,
        adapter=adapter, parallel=options.get("parallel", 1),
    )  # fmt: skip
