"""`gramlite inspect`: what a model file is, read from its header alone, without loading it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..errors import ModelError

CONTEXTS = (2048, 4096, 8192, 16384, 32768)
MiB = 1 << 20


def inspect_gguf(path: Path) -> dict[str, Any]:
    """What a GGUF file says of itself and the memory it needs, in bytes; raises ModelError when it is refused."""
    from ..backends import RuntimeOptions
    from ..device import choose_layout, context_size
    from ..gguf_header import hyperparameters, read_header
    from ..memory import predict
    from ..quantization import bits_per_weight, quantization_name
    from ..scaffold import KNOWN_TEMPLATES, template_hash

    header = read_header(path)
    sizes = hyperparameters(header)
    chat_template = header.metadata.get("tokenizer.chat_template")
    known = KNOWN_TEMPLATES.get(template_hash(chat_template)) if isinstance(chat_template, str) else None
    memory = {}
    for context in CONTEXTS:
        if context <= sizes.context:
            needed = predict(header, context_size(choose_layout(RuntimeOptions()), context))
            memory[context] = {**asdict(needed), "total": needed.total}
    return {
        "path": str(path),
        "format": "gguf",
        "name": header.metadata.get("general.name"),
        "architecture": header.architecture,
        "quantization": quantization_name(header),
        "bits_per_weight": round(bits_per_weight(header), 3),
        "bytes": header.file_bytes,
        "layers": sizes.blocks,
        "embedding": sizes.embedding,
        "heads": sizes.heads,
        "key_value_heads": sizes.key_value_heads,
        "vocabulary": sizes.vocabulary,
        "context": sizes.context,
        "template": header.metadata.get("gramlite.template.name"),
        "chat_template": known.name if known else ("unknown" if chat_template else None),
        "memory": memory,
    }


def inspect_model(path: Path) -> dict[str, Any]:
    """What an artifact is: its format, its manifest and, for GGUF, its header."""
    from ..loading import open_artifact

    artifact = open_artifact(path)
    found = inspect_gguf(path) if artifact.format == "gguf" else {"path": str(path), "format": artifact.format}
    return {**found, "manifest": asdict(artifact.manifest) if artifact.manifest else None}


def show(found: dict[str, Any]) -> None:
    """Print what was found as two readable tables."""
    from rich.console import Console
    from rich.table import Table

    from ..display import visible

    console = Console(highlight=False)
    facts = Table(show_header=False, box=None, pad_edge=False)
    for key, value in found.items():
        if key not in ("memory", "manifest") and value is not None:
            shown = f"{value:,}" if isinstance(value, int) else visible(str(value))
            facts.add_row(key.replace("_", " "), shown, style=None)
    manifest = found.get("manifest")
    facts.add_row(
        "manifest", f"made by {manifest['method']}" if manifest and manifest["method"] else str(bool(manifest))
    )
    console.print(facts)
    if found.get("memory"):
        table = Table(title="Memory needed, MiB", title_justify="left")
        for heading in ("context", "weights", "KV cache", "compute", "total"):
            table.add_column(heading, justify="right")
        for context, needed in found["memory"].items():
            table.add_row(f"{context:,}", *(f"{needed[key] / MiB:,.0f}" for key in needed))
        console.print(table)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object, also on a terminal.")
def command(model: Path, as_json: bool) -> None:
    """Say what MODEL is: architecture, size, quantization, template, context and the memory it needs."""
    if not model.exists():
        raise ModelError(f"There is no model at {model}.")
    found = inspect_model(model)
    if as_json or not sys.stdout.isatty():
        click.echo(json.dumps(found, ensure_ascii=False))
    else:
        show(found)
