"""What goes along with a model's weights: its tokenizer's files, its card, and the licences and notices it is under.

Licences and notices travel with every artifact: in a folder under their own names, beside a file as `<file>.NOTICE`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from gramlite.errors import InputError, ModelError
from gramlite.storage import atomic_output, remove_path, sha256_file

from .artifact import manifest_path, read_manifest

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
CARRIED_FILES = (
    *TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "generation_config.json",
    "README.md",
)  # fmt: skip
DESCRIBED_FILES = ("config.json", "adapter_config.json", *TOKENIZER_FILES)  # say what a model is, beside its weights
NOTICE = re.compile(r"(licen[cs]es?|notices?|copying|copyright|use_policy)([-._ ].*)?", re.IGNORECASE)


def is_notice(name: str) -> bool:
    """Whether a file of this name, without its folder, says under what terms a model may be used."""
    return NOTICE.fullmatch(name) is not None


def notices_of(*sources: Path) -> dict[str, Path]:
    """The licences and notices of models or adapters, by the name under which they travel.

    Of a folder those in it; of a file those beside it that bear its name, or, where it isn't gramlite's, all beside it.
    Of two different ones of one name the later gets a number.
    """
    found: dict[str, Path] = {}
    for source in filter(Path.exists, sources):
        own = f"{source.name}."
        others = source.is_dir() or not manifest_path(source).is_file()
        for path in sorted((source if source.is_dir() else source.parent).iterdir()):
            name = path.name.removeprefix(own)
            if not is_notice(name) or not path.is_file() or not (others or path.name.startswith(own)):
                continue
            chosen, number = name, 1
            taken = {each.casefold(): each for each in found}  # some file systems know no cases
            while chosen.casefold() in taken and sha256_file(found[taken[chosen.casefold()]]) != sha256_file(path):
                number += 1
                chosen = f"{name}.{number}"
            found.setdefault(taken.get(chosen.casefold(), chosen), path)
    return found


def carry_files(source: Path, folder: Path, *, more: tuple[str, ...] = ()) -> None:
    """Copy what goes along with the weights of the folder `source`, and the files named in `more`, into `folder`."""
    named = {name: source / name for name in (*CARRIED_FILES, *more) if (source / name).is_file()}
    for name, path in (named | notices_of(source)).items():
        shutil.copyfile(path, folder / name)


def plan_notices(destination: Path, *sources: Path) -> dict[str, Path]:
    """The sources' licences and notices by the names they are to have beside the file `destination`.

    Raises InputError where there is one that isn't of the artifact there, as its manifest has it, nor the same.
    """
    planned = {f"{destination.name}.{name}": path for name, path in notices_of(*sources).items()}
    older = _recorded(destination)
    for name, path in planned.items():
        place = destination.with_name(name)
        if place.exists() and sha256_file(place) not in (sha256_file(path), older.get(name)):
            raise InputError(f"{place} is in the way of a notice of {destination.name}. Move it, or choose another -o.")
    return planned


@contextmanager
def notices_beside(destination: Path, *sources: Path) -> Iterator[dict[str, str]]:
    """Put the planned notices beside a file in place of older ones as the body ends; yield their sha256 by name."""
    planned, older = plan_notices(destination, *sources), _recorded(destination)
    with ExitStack() as stack:
        for name, path in planned.items():
            shutil.copyfile(path, stack.enter_context(atomic_output(destination.with_name(name), force=True)))
        yield {name: sha256_file(path) for name, path in planned.items()}
    for name in older.keys() - planned.keys():
        remove_path(destination.with_name(name))


def _recorded(destination: Path) -> dict[str, str]:
    """The notices that the manifest of a file lists and that are still what it says, by name."""
    try:
        manifest = read_manifest(destination)
    except ModelError:
        return {}
    start, found = f"{destination.name}.", {}
    for name, digest in (manifest.notices if manifest else {}).items():
        ours = name == Path(name).name and name.startswith(start) and is_notice(name.removeprefix(start))
        if ours and destination.with_name(name).is_file() and sha256_file(destination.with_name(name)) == digest:
            found[name] = digest
    return found


def remove_notices(artifact: Path) -> None:
    """Remove the notices beside a file that its manifest lists, for who removes both."""
    for name in _recorded(artifact):
        remove_path(artifact.with_name(name))
