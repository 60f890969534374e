"""First pairs for a LoRA: laid over its base and merged into it, it has to judge alike.

llama.cpp adds the adapter's share in each forward pass, a merge adds it to the weights once; the two have no code in
common. The files that this takes, up to twice the size of the base, are made near the output and removed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from gramlite.errors import CannotRunHere, ModelError
from gramlite.formats.artifact import Manifest
from gramlite.formats.checkpoint import INDEX
from gramlite.generation.scaffold import OWN_TEMPLATE, ChatTemplate
from gramlite.judging.template import judge_template
from gramlite.storage import lies_in

from .gguf import export_gguf
from .lora_gguf import export_adapter
from .lora_merge import merge_adapter
from .smoke import asked_with, judge_margins, smoke_judge

WEIGHTS = (INDEX, "model.safetensors", "model-*-of-*.safetensors")


def smoke_adapter(
    output: Path,
    manifest: Manifest,
    folder: Path,
    base: Path,
    *,
    template: str | None = None,
    chat: ChatTemplate = OWN_TEMPLATE,
    force: bool = False,
) -> Manifest:
    """Judge with the GGUF adapter at `output` over its base, and with `folder` merged into it; return the manifest.

    Where `base` holds no weights, for writing the adapter takes none, the manifest says that nothing was compared.
    """
    with template_file(output, folder, base, template) as choice:

        def merged() -> list[float]:
            need_weights(base)
            with scratch_folder(output, folder, base) as scratch:
                merge_adapter(base, folder, scratch / "merged")
                return gguf_margins(scratch / "merged", scratch, choice, chat)

        def over_base() -> list[float]:
            with scratch_folder(output) as scratch:
                return gguf_margins(base, scratch, choice, chat, adapter=output)

        return smoke_judge(output, manifest, merged, found=over_base, template=choice, force=force)


def smoke_merged(
    output: Path,
    manifest: Manifest,
    base: Path,
    folder: Path,
    *,
    template: str | None = None,
    chat: ChatTemplate = OWN_TEMPLATE,
    force: bool = False,
) -> Manifest:
    """Judge with the merged checkpoint at `output`, and with the adapter in `folder` over its base; return the manifest."""
    with template_file(output, base, folder, template) as choice:

        def over_base() -> list[float]:
            with scratch_folder(output) as scratch:
                export_adapter(folder, base, scratch / "adapter.gguf", dtype="f32")
                return gguf_margins(base, scratch, choice, chat, adapter=scratch / "adapter.gguf")

        def merged() -> list[float]:
            with scratch_folder(output) as scratch:
                return gguf_margins(output, scratch, choice, chat)

        return smoke_judge(output, manifest, over_base, found=merged, template=choice, force=force)


def gguf_margins(
    checkpoint: Path, scratch: Path, template: str | None, chat: ChatTemplate, adapter: Path | None = None
) -> list[float]:
    """The first pairs' margins of a checkpoint as F16, or as BF16 where it has larger values than F16."""
    path = scratch / "judge.gguf"
    try:
        export_gguf(checkpoint, path, dtype="f16")
    except ModelError:
        export_gguf(checkpoint, path, dtype="bf16")
    return judge_margins(path, template, adapter=adapter, **asked_with(chat))


def need_weights(base: Path) -> None:
    if not any(any(base.glob(name)) for name in WEIGHTS):
        raise CannotRunHere(f"{base} holds no weights to lay it over")


@contextmanager
def template_file(output: Path, first: Path, second: Path, choice: str | None) -> Iterator[str | None]:
    """The artifact's template as a file, for a base alone may not have it; None where there is none."""
    judge = judge_template(first, choice) or judge_template(second, None)
    if judge is None:
        yield None
        return
    with scratch_folder(output) as scratch:
        path = scratch / "template.txt"
        path.write_text(judge["text"], encoding="utf-8")
        yield str(path)


@contextmanager
def scratch_folder(output: Path, *sources: Path) -> Iterator[Path]:
    """A folder near the output, on its disk, and in none of the sources: a checkpoint is not written into one."""
    place = output.absolute().parent
    while any(lies_in(place, source) for source in sources) and place != place.parent:
        place = place.parent
    with TemporaryDirectory(dir=place, prefix=f".{output.name}.") as folder:
        yield Path(folder)
