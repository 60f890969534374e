"""Small but real checkpoints and tokenizers, made on the spot with transformers and tokenizers."""

from __future__ import annotations

import ctypes
import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).resolve().parents[2] / "../shared"
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>")
USER_DEFINED = ("<think>", "</think>")
SPLITS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
CORPUS = (
    "The response is correct, and it doesn't repeat itself. I'm sure they'll agree that it's the better one of the two.",
    "Which response is better? Response A explains the steps; Response B names 3 reasons, 12 examples and 2024 dates.",
    "def add(left, right):\n    return left + right  # sum\n\nfor index in range(10):\n    print(add(index, 3.14))\n",
    "L'été dernier, nous avons mangé des crêpes à Besançon. Größe, Übung, señor, niño, São Paulo, naïve café.",
    "Привет, мир. Это ответ на вопрос. Καλημέρα κόσμε. 你好，世界。这个回答更好。こんにちは世界。안녕하세요 세계",
    "😀 😃 👍🏽 🇫🇷 👩‍💻 ❤️ {\"key\": [1, 2, 3], \"value\": null} <b>bold</b> a && b || c != d",
    "DON'T SHOUT, THEY'RE LISTENING. we've i'd you'll SHE'S 1st 2nd 1,000,000 0x1F 3/4",
)  # fmt: skip


def train_tokenizer(style: str) -> Any:
    """A byte-level BPE tokenizer with one of the known pre-tokenizers, trained on a few lines."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=style == "llama-bpe"))
    if style in SPLITS:
        split = pre_tokenizers.Split(Regex(SPLITS[style]), "isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    elif style == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if style == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in USER_DEFINED])
    if style == "llama-bpe":
        bos = (SPECIAL[0], tokenizer.token_to_id(SPECIAL[0]))
        template = processors.TemplateProcessing(
            single=f"{SPECIAL[0]} $A", pair=f"{SPECIAL[0]} $A $B", special_tokens=[bos]
        )
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def write_tokenizer(folder: Path, style: str) -> int:
    """Save a tokenizer with its tokenizer_config.json; return the number of its tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(style)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[3], "chat_template": "{{ messages[0]['content'] }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return int(tokenizer.get_vocab_size())


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama3.1": ("Llama", "llama-bpe", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": False}),
    "llama-tied": ("Llama", "smollm", {"tie_word_embeddings": True}),
    "llama-untied": ("Llama", "gpt-2", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "llama-linear": (
        "Llama",
        "gpt-2",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "qwen2": ("Qwen2", "qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-6}),
    "qwen2-yarn": (
        "Qwen2",
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": ("Mistral", "gpt-2", {"sliding_window": None, "head_dim": 32, "tie_word_embeddings": False}),
    "mistral-window": ("Mistral", "gpt-2", {"sliding_window": 48}),
    "qwen3": ("Qwen3", "qwen2", {"tie_word_embeddings": False, "head_dim": 32}),
}


def make_checkpoint(folder: Path, family: str, *, dtype: str = "float32", shards: int = 1, **changes: Any) -> Path:
    """A random checkpoint of two layers whose attention is sharp enough to notice wrong positions."""
    import torch
    import transformers

    name, style, settings = FAMILIES[family]
    vocabulary = write_tokenizer(folder, style)
    sizes = {
        "vocab_size": vocabulary + 3,  # rows that no token names, as Qwen's checkpoints have
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.25,
    }
    config = getattr(transformers, f"{name}Config")(**{**sizes, **settings, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith(("norm.weight", ".bias")):
                value.add_(torch.randn_like(value) * 0.2)
    model.save_pretrained(folder, max_shard_size="5GB" if shards == 1 else "100KB")
    return folder


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes, once a session, the checkpoint of a family; tests that change it must copy it."""
    pytest.importorskip("transformers")
    made: dict[str, Path] = {}

    def make(family: str, **options: Any) -> Path:
        key = f"{family}-{json.dumps(options, sort_keys=True)}"
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp("checkpoint") / family, family, **options)
        return made[key]

    return make


@pytest.fixture
def tokenizer_folder() -> Callable[[Path, str], int]:
    pytest.importorskip("tokenizers")
    return write_tokenizer


@pytest.fixture(scope="session")
def strings() -> list[str]:
    """500 strings with digits, accents, emoji, CJK, code, white space and special literals, in NFC."""
    pieces = [
        *CORPUS,
        *SPECIAL,
        *USER_DEFINED,
        "\n",
        "\n\n",
        "  ",
        "\t",
        "\r\n",
        " \n  ",
        "\u00a0",
        "\u3000",
        "...",
        "1234567",
        "٣٤٥",
        "½²Ⅷ",
    ]
    pieces += [
        "I'M",
        "we'Ve",
        "ŒUVRE",
        "ﬁn",
        "ǅ",
        "İstanbul",
        "ß",
        "𝔘𝔫𝔦",
        "한글",
        "漢字かな",
        "🧑🏿‍🚀",
        "🏴‍☠️",
        "e\u0301",
        "\u200b",
        "\ufeff",
        "a\u0327",
    ]
    pieces += [
        "<|not_special|>",
        "<think",
        "think>",
        "</",
        "|>",
        "#include <vector>",
        "x**=2;",
        "$\\frac{1}{2}$",
        "https://a.b/c?d=e&f",
    ]
    words = [word for piece in CORPUS for word in piece.split(" ")]
    chance = random.Random(7)
    made = list(dict.fromkeys([*pieces, *words]))[:200]
    while len(made) < 500:
        parts = [chance.choice(pieces if chance.random() < 0.4 else words) for _ in range(chance.randint(1, 12))]
        made.append(chance.choice(["", " ", "\n"]).join(parts))
    return [unicodedata.normalize("NFC", text) for text in made]


@pytest.fixture(scope="session")
def last_logits() -> Callable[[Path, list[int]], Any]:
    """llama.cpp's logits at the last of some tokens, as a numpy array; with a LoRA adapter where one is given."""
    import llama_cpp
    import numpy

    def ignore(level: int, text: bytes, data: object) -> None:
        return

    callback = llama_cpp.llama_log_callback(ignore)

    def logits(path: Path, tokens: list[int], adapter: Path | None = None) -> Any:
        llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
        model_options = llama_cpp.llama_model_default_params()
        model_options.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_options)
        assert model
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = 512
        options.n_threads = options.n_threads_batch = 2
        options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
        options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = llama_cpp.llama_init_from_model(model, options)
        try:
            if adapter:
                lora = llama_cpp.llama_adapter_lora_init(model, str(adapter).encode())
                assert lora
                adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(lora)
                assert llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0
            ids = (llama_cpp.llama_token * len(tokens))(*tokens)
            assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, len(tokens))) == 0
            size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
            return numpy.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), shape=(size,)).copy()
        finally:
            llama_cpp.llama_free(context)
            llama_cpp.llama_model_free(model)

    return logits


@pytest.fixture
def make_adapter() -> Callable[..., Path]:
    """Writes a PEFT folder with random factors of whole numbers / 8, exact in every dtype, for modules of a checkpoint."""

    def make(
        folder: Path, checkpoint: Path, modules: list[str], *, rank: int = 4, dtype: str = "float32", **settings: Any
    ) -> Path:
        import torch
        from safetensors.torch import load_file, save_file

        folder.mkdir(parents=True)
        torch.manual_seed(5)
        tensors = {}
        weights = load_file(checkpoint / "model.safetensors")
        for module in modules:
            out_features, in_features = weights[f"{module}.weight"].shape
            ranks = settings.get("rank_pattern")
            own = ranks.get(module.rpartition(".")[2], rank) if isinstance(ranks, dict) else rank
            for letter, shape in (("A", (own, in_features)), ("B", (out_features, own))):
                factor = torch.randint(-4, 5, shape).to(getattr(torch, dtype)) / 8
                tensors[f"base_model.model.{module}.lora_{letter}.weight"] = factor
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": 2 * rank,
            "bias": "none",
            "base_model_name_or_path": "org/base",
        }
        (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
        return folder

    return make


@pytest.fixture(scope="session")
def reference_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference judge before its adapter: bf16(dequantize(base GGUF)) as a checkpoint folder."""
    import shutil

    import gguf
    import numpy

    from gramlite.reference.weights import DATA, base_path

    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("base") / "checkpoint"
    shutil.copytree(DATA / "hf", folder)
    names = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    tensors = {}
    for tensor in gguf.GGUFReader(base_path()).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        parts = tensor.name.split(".")
        name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}.get(parts[0])
        name = name or f"model.layers.{parts[1]}.{names[parts[2]]}"
        if parts[-2] in ("attn_q", "attn_k"):  # rows 0, 1, 2, ... of a head are 0, 32, 1, 33, ... of the checkpoint's
            row = numpy.arange(len(values))
            values = values[row // 64 * 64 + row % 64 % 32 * 2 + row % 64 // 32]
        tensors[f"{name}.weight"] = torch.from_numpy(numpy.array(values)).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def reference_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gramlite.reference.files import build_checkpoint

    return build_checkpoint(tmp_path_factory.mktemp("reference") / "checkpoint")
