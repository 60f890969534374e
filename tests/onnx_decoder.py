"""A decoder of one layer as an ONNX folder, written by hand, and the same in numpy: no builder, no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, HEADS, KV_HEADS, HEAD_SIZE = 16, 4, 2, 8  # HEAD_SIZE is the least that the operator's kernels take


def random_weights(vocabulary: int) -> dict[str, Any]:
    draw = np.random.default_rng(3)
    shapes = {
        "embed": (vocabulary, HIDDEN),
        "q": (HIDDEN, HEADS * HEAD_SIZE),
        "k": (HIDDEN, KV_HEADS * HEAD_SIZE),
        "v": (HIDDEN, KV_HEADS * HEAD_SIZE),
        "head": (HEADS * HEAD_SIZE, vocabulary),
    }
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def numpy_logits(weights: dict[str, Any], tokens: list[int]) -> Any:
    """Logits at every position, [tokens, vocabulary]."""
    count = len(tokens)
    hidden = weights["embed"][tokens]
    query = (hidden @ weights["q"]).reshape(count, HEADS, HEAD_SIZE)
    key, value = (
        np.repeat((hidden @ weights[name]).reshape(count, KV_HEADS, HEAD_SIZE), HEADS // KV_HEADS, axis=1)
        for name in "kv"
    )
    scores = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(HEAD_SIZE)
    scores = np.where(np.tril(np.ones((count, count), dtype=bool)), scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    attended = np.einsum("hqk,khd->qhd", shares, value).reshape(count, -1)
    return attended @ weights["head"]


def decoder_model(weights: dict[str, Any]) -> Any:
    """The graph, with the names that the model builder gives, its weights inside."""
    from onnx import TensorProto, helper, numpy_helper

    vocabulary = len(weights["embed"])
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    initializers += [
        numpy_helper.from_array(np.array([1], dtype=np.int64), "one"),
        numpy_helper.from_array(np.array(1, dtype=np.int64), "second"),
    ]
    make = helper.make_node
    nodes = [
        make("Gather", ["embed", "input_ids"], ["hidden"]),
        make("MatMul", ["hidden", "q"], ["query"]),
        make("MatMul", ["hidden", "k"], ["key"]),
        make("MatMul", ["hidden", "v"], ["value"]),
        make("ReduceSum", ["attention_mask", "one"], ["counted"], keepdims=1),
        make("Sub", ["counted", "one"], ["last"]),
        make("Cast", ["last"], ["seqlens_k"], to=TensorProto.INT32),
        make("Shape", ["attention_mask"], ["mask_shape"]),
        make("Gather", ["mask_shape", "second"], ["total"]),
        make("Cast", ["total"], ["total_length"], to=TensorProto.INT32),
        make(
            "GroupQueryAttention",
            ["query", "key", "value", "past_key_values.0.key", "past_key_values.0.value", "seqlens_k", "total_length"],
            ["attended", "present.0.key", "present.0.value"],
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
        ),
        make("MatMul", ["attended", "head"], ["logits"]),
    ]
    cache = [1, KV_HEADS, "cells", HEAD_SIZE]
    info = helper.make_tensor_value_info
    inputs = [info("input_ids", TensorProto.INT64, [1, "n"]), info("attention_mask", TensorProto.INT64, [1, "total"])]
    inputs += [info(f"past_key_values.0.{part}", TensorProto.FLOAT, cache) for part in ("key", "value")]
    outputs = [info("logits", TensorProto.FLOAT, [1, "n", vocabulary])]
    outputs += [info(f"present.0.{part}", TensorProto.FLOAT, cache) for part in ("key", "value")]
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def save(model: Any, path: Path, *, external: bool = True) -> None:
    import onnx

    options = {"save_as_external_data": True, "location": f"{path.name}.data", "size_threshold": 64} if external else {}
    onnx.save_model(model, str(path), **options)


def write_decoder(folder: Path, weights: dict[str, Any]) -> Path:
    """An ONNX folder without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save(decoder_model(weights), folder / "model.onnx")
    config = {
        "vocab_size": len(weights["embed"]), "hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": HEADS, "max_position_embeddings": 4096, "eos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "genai_config.json").write_text(json.dumps({"model": {"decoder": {"filename": "model.onnx"}}}))
    return folder
