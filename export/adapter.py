"""The command `export adapter`: a PEFT LoRA folder as a GGUF adapter, judged with over its base before it is relied on."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from .lora_gguf import export_adapter
from .options import ArtifactOptions, artifact_options
from .report import judge_command
from .smoke_lora import smoke_adapter

DTYPES = ("f16", "q8_0", "f32")


@click.command("adapter", short_help="PEFT LoRA -> GGUF adapter")
@click.argument("peft_folder", type=click.Path(path_type=Path))
@click.option(
    "--base",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of the checkpoint the adapter was trained on.",
)
@click.option("--dtype", type=click.Choice(DTYPES, case_sensitive=False), default="f16", show_default=True)
@artifact_options("The GGUF file to write.", kind="file")
def command(peft_folder: Path, base: Path, dtype: str, options: ArtifactOptions) -> None:
    """Write a LoRA adapter (PEFT_FOLDER) as a GGUF file that goes with any GGUF of its base: -m BASE --adapter OUT."""
    manifest = export_adapter(peft_folder, base, options.output, dtype=dtype, **options.writing)
    typed = judge_command(options.output, manifest, adapter=True)
    options.finish(manifest, partial(smoke_adapter, folder=peft_folder, base=base), command=typed)
