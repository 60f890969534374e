"""First pairs for a LoRA: laid over its base and merged into it, it has to judge alike.

llama.cpp adds the adapter's share in each forward pass, a merge adds it to the weights once; the two have no code in
common. The files that this takes, up to twice the size of the base, are made near the output and removed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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
    output: Path, manifest: Manifest, folder: Path, base: Path, *, template: str | None = None, **asked: Any
) -> Manifest:
    """Judge with the GGUF adapter at `output` over its base, and with `folder` merged into it; return the manifest.

    Where `base` holds no weights, for writing the adapter takes none, the manifest says that nothing was compared.
    `asked` is the `chat` template and the `force` of `smoke_judge`.
    """

    def merged(scratch: Path) -> tuple[Path, None]:
        if not any(any(base.glob(name)) for name in WEIGHTS):
            raise CannotRunHere(f"{base} holds no weights to lay it over")
        merge_adapter(base, folder, scratch / "merged")
        return scratch / "merged", None

    return _compare(output, manifest, merged, lambda scratch: (base, output), (folder, base), template, **asked)


def smoke_merged(
    output: Path, manifest: Manifest, base: Path, folder: Path, *, template: str | None = None, **asked: Any
) -> Manifest:
    """Judge with the merged checkpoint at `output`, and with the adapter in `folder` over its base; return the manifest."""

    def over_base(scratch: Path) -> tuple[Path, Path]:
        export_adapter(folder, base, scratch / "adapter.gguf", dtype="f32")
        return base, scratch / "adapter.gguf"

    return _compare(output, manifest, over_base, lambda scratch: (output, None), (base, folder), template, **asked)


Judged = Callable[
    [Path], tuple[Path, Path | None]
]  # makes in a folder what is judged: a checkpoint, an adapter over it


def _compare(
    output: Path,
    manifest: Manifest,
    expected: Judged,
    found: Judged,
    sources: tuple[Path, Path],
    template: str | None,
    *,
    chat: ChatTemplate = OWN_TEMPLATE,
    force: bool = False,
) -> Manifest:
    with template_file(output, *sources, template) as choice:

        def margins(make: Judged) -> list[float]:
            with scratch_folder(output, *sources) as scratch:
                checkpoint, adapter = make(scratch)
                return gguf_margins(checkpoint, scratch, choice, chat, adapter=adapter)

        judged, own = partial(margins, expected), partial(margins, found)
        return smoke_judge(output, manifest, judged, found=own, template=choice, force=force)


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
