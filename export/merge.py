"""The command `export merge`: a checkpoint with a LoRA merged into it, judged with before it is relied on."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from .lora_merge import merge_adapter
from .options import ArtifactOptions, artifact_options
from .smoke_lora import smoke_merged


@click.command("merge", short_help="checkpoint + PEFT LoRA -> checkpoint")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("peft_folder", type=click.Path(path_type=Path))
@artifact_options("The folder to write.", kind="checkpoint folder")
def command(checkpoint: Path, peft_folder: Path, options: ArtifactOptions) -> None:
    """Merge the LoRA adapter in PEFT_FOLDER into CHECKPOINT and write the result as a checkpoint folder."""
    output = options.output
    manifest = merge_adapter(checkpoint, peft_folder, output, **options.writing)
    typed = f"gramlite export gguf {output} -o {output.with_suffix('.gguf').name}"
    options.finish(manifest, partial(smoke_merged, base=checkpoint, folder=peft_folder), command=typed)
