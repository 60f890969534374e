"""What a command needs besides gramlite itself, asked for before any work is done."""

from __future__ import annotations

from importlib.util import find_spec

from gramlite.errors import InputError


def need_packages(extra: str, *packages: str) -> None:
    """Raise InputError, which names the extra to install, unless all the packages are there."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise InputError(f"This needs the package {missing[0]!r}. Type: pip install 'gramlite[{extra}]'")
