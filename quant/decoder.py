"""A checkpoint's decoder with one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gramlite.backends.cache_keyword import with_cache
from gramlite.errors import InputError, ModelError
from gramlite.formats.architecture import family_of
from gramlite.formats.checkpoint import Checkpoint, StoredTensor, damaged
from gramlite.formats.model_folder import attention_window

from .batches import Batch, SharedPrefix
from .memory import FreedMemory

if TYPE_CHECKING:
    import torch

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
STAGES = (  # the linears of every family's layers, which are pre-norm
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


class CheckpointDecoder:
    """The decoder layers of transformers, on the meta device until `layer` fills one from its own tensors.

    Weights and activations are float32 on a CPU and as the checkpoint has them on CUDA.
    Raises ModelError for an architecture whose layers are put together otherwise.
    """

    def __init__(self, checkpoint: Checkpoint, device: str) -> None:
        import torch

        self.checkpoint, self.device = checkpoint, device
        self.skeleton = _build_skeleton(checkpoint)
        self.window = attention_window(checkpoint.config)
        self.dtype: torch.dtype = torch.float32 if device == "cpu" else self.skeleton.dtype
        self.freed = FreedMemory(device)
        self.rotary = type(self.skeleton.model.rotary_emb)(self.skeleton.config).to(device)

    def __len__(self) -> int:
        return len(self.skeleton.model.layers)

    def embed(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """The hidden states [sequences, longest, width] that enter the first layer; the table is dropped again."""
        table = read_tensor(self.checkpoint, EMBEDDING)
        largest = max(max(map(max, batch.sequences)) for batch in batches)
        if largest >= len(table):
            raise InputError(f"A calibration transcript holds token {largest}; the model has {len(table)}.")
        longest, window = max(batch.start + max(map(len, batch.sequences)) for batch in batches), self.window
        if window and longest > window:
            raise InputError(
                f"A calibration transcript has {longest:,} tokens; the model's attention spans {window:,}."
            )
        return [batch.spread(table).to(device=self.device, dtype=self.dtype) for batch in batches]

    @contextmanager
    def layer(self, index: int) -> Iterator[Any]:
        """One decoder layer with its weights, for as long as the context lasts."""
        layer = self.skeleton.model.layers[index]
        prefix = layer_prefix(index)
        state = {}
        for name, parameter in layer.named_parameters():
            tensor = read_tensor(self.checkpoint, prefix + name)
            if tensor.shape != parameter.shape:
                raise ModelError(
                    f"{prefix}{name} is {tuple(tensor.shape)} where config.json asks for {tuple(parameter.shape)}."
                )
            state[name] = tensor.to(device=self.device, dtype=self.dtype)
        layer.load_state_dict(state, assign=True)
        del state
        try:
            yield layer.requires_grad_(False)
        finally:
            layer.to("meta")
            self.freed.release()

    def attend(self, layer: Any, batch: Batch, states: torch.Tensor, shared: SharedPrefix) -> torch.Tensor:
        """The input of a layer's `o_proj`, of states that enter the layer; the prefix has to come first."""
        import torch

        places = torch.arange(batch.start, batch.start + states.shape[1], device=states.device)
        cached = batch.is_prefix or batch.start
        with _bare(layer.self_attn, "o_proj"):
            mixed: torch.Tensor = layer.self_attn(
                layer.input_layernorm(states),
                position_embeddings=self.rotary(states, places.unsqueeze(0)),
                attention_mask=shared.mask(batch, self.device),
                **with_cache(layer.self_attn, shared if cached else None),
            )[0]
        return mixed

    def gate(self, layer: Any, states: torch.Tensor) -> torch.Tensor:
        """The input of a layer's `down_proj`, of states behind the attention."""
        with _bare(layer.mlp, "down_proj"):
            gated: torch.Tensor = layer.mlp(layer.post_attention_layernorm(states))
        return gated

    def run(
        self, layer: Any, batch: Batch, states: torch.Tensor, shared: SharedPrefix
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What stands behind a layer's attention, and the input of its `down_proj`, of states that enter the layer."""
        middle = states + layer.self_attn.o_proj(self.attend(layer, batch, states, shared))
        return middle, self.gate(layer, middle)


@contextmanager
def _bare(module: Any, last: str) -> Iterator[None]:
    """Take a block's last linear out, so that the block gives that linear's input."""
    import torch

    linear = getattr(module, last)
    setattr(module, last, torch.nn.Identity())
    try:
        yield
    finally:
        setattr(module, last, linear)


def has_own_head(checkpoint: Checkpoint) -> bool:
    """Whether the head is a matrix of its own: where it is tied to the embedding a stored copy of it counts for nothing.

    Raises ModelError where it should be there and is not.
    """
    if checkpoint.config.get("tie_word_embeddings"):
        return False
    if HEAD not in checkpoint.tensors:
        raise ModelError(f"{checkpoint.folder} lacks the matrix {HEAD!r}. Download the checkpoint again.")
    return True


def layer_prefix(index: int) -> str:
    return f"model.layers.{index}."


def _build_skeleton(checkpoint: Checkpoint) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    family_of(checkpoint.config)
    config = AutoConfig.from_pretrained(str(checkpoint.folder), trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
    return model.eval()


def read_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """One tensor of a checkpoint, in its own dtype and memory; raises ModelError where there is no such tensor."""
    import torch

    stored = checkpoint.tensors.get(name)
    if stored is None:
        raise ModelError(f"{checkpoint.folder} lacks the tensor {name!r}. Download the checkpoint again.")
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if stored.dtype not in types:
        raise ModelError(f"{name!r} is stored as {stored.dtype}; only F32, F16 and BF16 weights can be quantized.")
    return torch.frombuffer(_read_bytes(stored), dtype=types[stored.dtype]).reshape(stored.shape)


def _read_bytes(stored: StoredTensor) -> bytearray:
    # read instead of mapped, so that no page of the file counts as this process's memory
    data = bytearray(stored.bytes)
    with stored.file.open("rb") as file:
        file.seek(stored.start)
        if file.readinto(data) != stored.bytes:
            raise damaged(stored.file, f"it ended while the tensor {stored.name!r} was read")
    return data
