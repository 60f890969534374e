"""`gramlite pull`: fetch a judge from the Hugging Face Hub, the one command that uses the network."""

from __future__ import annotations

import filecmp
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from gramlite.errors import GramliteError, InputError, ModelError
from gramlite.formats.artifact import PICKLE_SUFFIXES
from gramlite.formats.carried import is_notice
from gramlite.storage import check_free_space, remove_path, sha256_file
from gramlite.terminal import say, say_json

SCRATCH = ".gramlite-pull"  # in the folder that is fetched into: what is not whole yet
BESIDE_WEIGHTS = (".json", ".jinja", ".md", ".txt", ".model")
WEIGHTS = (".safetensors", ".gguf", ".onnx", ".data")


@dataclass(frozen=True)
class Selection:
    """The files of one commit of a repository that a judge needs, and their size in bytes."""

    repository: str
    commit: str
    files: tuple[str, ...]
    bytes: int


def select(repository: str, commit: str, sizes: dict[str, int], wanted: Sequence[str]) -> Selection:
    """Choose the files to fetch: those named, else weights without pickles and the small files beside them.

    Raises InputError for a file that isn't there or where one of several GGUF files must be named, ModelError for a
    repository whose weights are pickles only.
    """
    missing = [name for name in wanted if name not in sizes]
    if missing:
        raise InputError(f"{repository} has no file {missing[0]!r}. It has: {', '.join(sorted(sizes))}.")
    gguf = sorted(name for name in sizes if name.endswith(".gguf"))
    if not wanted and len(gguf) > 1:
        raise InputError(f"{repository} has {len(gguf)} GGUF files; name one of them after it: {', '.join(gguf)}.")
    if not wanted and not any(name.endswith(WEIGHTS) for name in sizes):
        pickles = any(Path(name).suffix in PICKLE_SUFFIXES for name in sizes)
        kind = "only pickles, which can run code when they are opened" if pickles else "no weights"
        raise ModelError(f"{repository} has {kind}. Look for a repository with safetensors or GGUF files.")
    chosen = [name for name in sizes if (name in wanted if wanted else name.endswith(WEIGHTS)) or _beside(name)]
    outside = [name for name in chosen if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise ModelError(
            f"{repository} has a file {outside[0]!r}, which would lie outside of the folder. Don't use it."
        )
    return Selection(repository, commit, tuple(sorted(chosen)), sum(sizes[name] for name in chosen))


def _beside(name: str) -> bool:
    return "/" not in name and (name.endswith(BESIDE_WEIGHTS) or is_notice(name))


def pull(repository: str, wanted: Sequence[str], output: Path, *, revision: str | None) -> Selection:
    """Fetch a repository's files, all of one commit, into a folder; a fetch that was cut off goes on.

    Nothing that is in the folder is replaced or removed. Raises InputError, ModelError, ResourceError before anything
    is fetched, GramliteError where the Hub refuses.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise GramliteError("Fetching needs huggingface_hub. Type: pip install 'gramlite[hub]'") from error
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is no folder. Choose another -o.")
    scratch = output / SCRATCH
    try:
        found = HfApi().model_info(repository, revision=revision, files_metadata=True)
        sizes = {file.rfilename: int(file.size or 0) for file in found.siblings or []}
        selection = select(repository, str(found.sha), sizes, wanted)
        hashes = {file.rfilename: getattr(getattr(file, "lfs", None), "sha256", None) for file in found.siblings or []}
        missing = [name for name in selection.files if not is_there(output / name, sizes[name], hashes[name])]
        scratch.mkdir(parents=True, exist_ok=True)
        check_free_space(output, sum(sizes[name] for name in missing))
        snapshot_download(repository, revision=selection.commit, local_dir=scratch, allow_patterns=missing)
        put_in_place(scratch, output, missing)
    except HFValidationError as error:
        raise InputError(f"{repository!r} is no name of a repository. Write it as owner/name.") from error
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise GramliteError(
            f"{repository} could not be fetched: {reason}. Run the same command again to go on; "
            "for a gated repository, set HF_TOKEN."
        ) from error
    return selection


def is_there(path: Path, size: int, sha256: str | None) -> bool:
    """Whether a file is known to be there already; raises InputError for another one, which would have to go."""
    if not os.path.lexists(path):
        return False
    if not path.is_file() or path.stat().st_size != size or (sha256 and sha256_file(path) != sha256):
        raise in_the_way(path)
    return sha256 is not None


def put_in_place(scratch: Path, output: Path, names: Sequence[str]) -> None:
    """Move what was fetched to where it belongs; raises InputError, before anything is moved, for what would be lost."""
    fetched = [name for name in names if (scratch / name).is_file()]
    for name in fetched:
        if os.path.lexists(output / name) and not filecmp.cmp(scratch / name, output / name, shallow=False):
            raise in_the_way(output / name)
    for name in fetched:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        if not (output / name).exists():
            os.rename(scratch / name, output / name)
    remove_path(scratch)


def in_the_way(path: Path) -> InputError:
    return InputError(
        f"{path} is there already and is another file than the repository's, and pull replaces nothing. "
        "Move it away, or choose another -o."
    )


def next_command(folder: Path, selection: Selection) -> list[str]:
    """What to type with what was fetched."""
    gguf = [name for name in selection.files if name.endswith(".gguf")]
    if gguf:
        return ["gramlite", "judge", "PAIRS.jsonl", "-m", str(folder / gguf[0])]
    return ["gramlite", "export", "gguf", str(folder), "-o", f"{folder.name}.F16.gguf"]


@click.command("pull", short_help="Fetch a judge from the Hugging Face Hub.")
@click.argument("repository", metavar="HUB_REPO")
@click.argument("files", nargs=-1, metavar="[FILE]...")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The folder to fetch into.  [default: its name]")
@click.option("--revision", help="A branch, a tag or a commit.  [default: the main branch]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, as when not on a terminal.")
def command(repository: str, files: tuple[str, ...], output: Path | None, revision: str | None, as_json: bool) -> None:
    """Fetch HUB_REPO, or some FILEs of it, into a folder: weights (never pickles), tokenizer, model card.

    This is the only command that uses the network. The commit that was fetched is printed; give it as --revision to
    fetch the same files again.
    """
    folder = output or Path(repository.rstrip("/").rpartition("/")[2])
    selection = pull(repository, files, folder, revision=revision)
    following = shlex.join(next_command(folder, selection))
    row: dict[str, Any] = {"path": str(folder), "repository": repository, "commit": selection.commit}
    row |= {"files": list(selection.files), "bytes": selection.bytes, "command": following}
    if as_json or not sys.stdout.isatty():
        say_json(row)
        return
    say(
        f"{repository} at {selection.commit[:12]}: {len(selection.files)} files, {selection.bytes / 1e6:,.1f} MB",
        f"folder  {folder}",
        f"next    {following}",
    )
