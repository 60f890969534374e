"""HF checkpoint -> a folder in bitsandbytes' NF4 or int8, which transformers loads on CUDA and on the CPU.

NF4: Dettmers et al., QLoRA, 2305.14314. int8: Dettmers et al., LLM.int8(), 2208.07339. The folder is saved before the
model's first forward pass: a pass may lay the weights out anew for the processor, and what is saved after it reloads
as garbage without an error. So it is reloaded in a new process and its logits are compared.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from gramlite.export.options import ArtifactOptions, artifact_options
from gramlite.export.plan import match_tensors
from gramlite.export.smoke import smoke_judge

from gramlite.errors import InputError, ModelError
from gramlite.formats.architecture import read_architecture
from gramlite.formats.artifact import Artifact, Manifest
from gramlite.formats.carried import carry_files
from gramlite.formats.checkpoint import Checkpoint, open_checkpoint, read_safetensors_header, weight_files
from gramlite.formats.publish import describe_source, publish_folder, tool_versions
from gramlite.formats.save_tensors import open_to_readers, operating_system_errors
from gramlite.judging.template import judge_template
from gramlite.storage import check_output, sha256_cached

from .packages import need_packages

TYPES = {"nf4": 4.5, "int8": 8.1}  # bits a weight takes, its share of the scales included
PROBE_TOKENS = 48
ALLOWED = 1e-3  # nats between the logits of the saved model and the reloaded one


def quantize_bnb(
    source: Path, destination: Path, *, type: str = "nf4", template: str | None = None, force: bool = False
) -> Manifest:
    """Write a checkpoint as a bitsandbytes folder with its manifest, and return the manifest.

    The embedding, the head and the norms keep their type. Raises ModelError for a checkpoint that is refused or a
    folder that does not reload as it was, InputError for an unknown type or a taken `destination`.
    """
    source, destination = Path(source), Path(destination)
    if type not in TYPES:
        raise InputError(f"bitsandbytes has no type {type!r} here. Choose one of {', '.join(TYPES)}.")
    destination = check_output(destination, [source], force=force, inputs=[template])
    need_packages("bnb", "bitsandbytes", "accelerate", "torch", "transformers")
    from gramlite.backends.hf import quiet

    checkpoint = open_checkpoint(source)
    match_tensors(checkpoint, read_architecture(checkpoint.config))  # transformers fills what is missing at random
    need_bytes = sum(file.stat().st_size for file in checkpoint.files)

    def write(folder: Path) -> Manifest:
        folder.mkdir()
        model = load_quantized(source, type)
        with quiet(), operating_system_errors():
            model.save_pretrained(folder)
        open_to_readers(folder, folder / "config.json")
        carry_files(source, folder)
        difference = reload_difference(folder, model, type)
        del model
        if not difference <= ALLOWED:
            raise ModelError(
                f"The {type} folder of {source} reloads with logits that differ by {difference:.3g} nats. Nothing was "
                "written; try another version of bitsandbytes."
            )
        return Manifest(
            format="hf",
            name=destination.name,
            quantization=type.upper(),
            method="bitsandbytes",
            source=describe_source(source, {file.name: sha256_cached(file) for file in checkpoint.files}),
            settings={"type": type, "reload_difference": difference},
            tools=tool_versions("bitsandbytes", "torch", "transformers"),
            template=judge_template(source, template),
            bits_per_weight=round(bits_per_weight(folder, checkpoint), 4),
        )

    return publish_folder(destination, write, force=force, need_bytes=need_bytes)


def load_quantized(source: Path, type: str) -> Any:
    """The checkpoint with its linear layers quantized on the CPU, other tensors in the type they are stored in."""
    import torch
    import transformers

    from gramlite.backends.hf import quiet

    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=type == "nf4",
        load_in_8bit=type == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with quiet():
        return transformers.AutoModelForCausalLM.from_pretrained(
            source,
            quantization_config=settings,
            dtype="auto",
            device_map={"": "cpu"},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        ).eval()


def reload_difference(folder: Path, model: Any, type: str) -> float:
    """The largest difference between the logits of the model and of its saved folder, opened in a new process."""
    import torch

    from gramlite.backends.hf import compute_in, quiet

    compute_in(model, torch.float32)  # as the backend does on a CPU
    tokens = probe(model.config.vocab_size)
    with torch.inference_mode(), quiet():
        before = model(torch.tensor([tokens])).logits[0, -1].float().numpy()
    finished = subprocess.run(
        [sys.executable, "-c", _CHILD, str(folder), json.dumps(tokens)], capture_output=True, text=True
    )
    if finished.returncode:
        last = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"The {type} folder could not be opened again: {last[:300]}")
    after = np.array(json.loads(finished.stdout.splitlines()[-1]), dtype=np.float32)
    return float(np.abs(before - after).max())


def last_logits(folder: Path, tokens: list[int]) -> Any:
    """The logits after `tokens`, by the backend that judges with the folder, on the CPU."""
    from gramlite.backends.hf import open_artifact
    from gramlite.runtime.options import RuntimeOptions

    backend = open_artifact(Artifact(folder, "hf", None), RuntimeOptions(device="cpu"))
    try:
        return backend._compute(tokens, 0)
    finally:
        backend.close()


_CHILD = """
import json, sys
from pathlib import Path
from gramlite.quant.bnb import last_logits
print(json.dumps(last_logits(Path(sys.argv[1]), json.loads(sys.argv[2])).tolist()))
"""


def probe(vocabulary: int) -> list[int]:
    """Token ids that are the same every time."""
    return [int(token) for token in np.random.default_rng(0).integers(0, vocabulary, PROBE_TOKENS)]


def bits_per_weight(folder: Path, checkpoint: Checkpoint) -> float:
    stored = sum(tensor.bytes for file in weight_files(folder) for tensor in read_safetensors_header(file).values())
    return 8 * stored / checkpoint.weights


@click.command("bnb", short_help="checkpoint -> bitsandbytes NF4 or int8")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--type", "kind", type=click.Choice(list(TYPES), case_sensitive=False), default="nf4", show_default=True)
@artifact_options("The folder to write.")
def command(checkpoint: Path, kind: str, options: ArtifactOptions) -> None:
    """Write a CHECKPOINT as a bitsandbytes folder, and check that it reloads as it was."""
    manifest = quantize_bnb(checkpoint, options.output, type=kind.lower(), **options.writing)
    options.finish(manifest, partial(smoke_judge, source=checkpoint))
