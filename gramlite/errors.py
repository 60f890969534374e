"""Every error gramlite raises on purpose, and the exit code each one means on the command line.

    GramliteError            1  failure
    ├── InputError           2  usage, or an input that cannot be judged
    ├── ModelError           3  a model, artifact or template that is refused
    │   └── CannotRunHere    3  a sound one that this machine has no way to run; caught where it need not run
    ├── ResourceError        4  memory, disk space or a device that is not there
    │   └── OutOfMemory      4  a GPU's memory ran out; caught where there is another place to run
    ├── IntegrityError       6  a run that cannot be resumed, or a lock somebody else holds
    └── GateError            7  a regression gate that failed

Exit code 5 (finished, but some rows have no verdict) is an outcome and not an exception; 130 is an interrupt.
Every message says what happened and what to type next.
"""

from __future__ import annotations

from typing import ClassVar


class GramliteError(Exception):
    """Anything gramlite refuses or fails at; `exit_code` is what the command line ends with."""

    exit_code: ClassVar[int] = 1


class InputError(GramliteError):
    """A row, an option or a file of pairs that cannot be used."""

    exit_code = 2


class ModelError(GramliteError):
    """A model file, manifest, tokenizer or template that is refused."""

    exit_code = 3


class CannotRunHere(ModelError):
    """A sound artifact that this machine has no way to run, which is no fault of it."""


class ResourceError(GramliteError):
    """Not enough memory or disk, or a device that was demanded and is not usable."""

    exit_code = 4


class OutOfMemory(ResourceError):
    """A GPU's memory ran out while a model was loaded or ran; the message is the library's own reason."""


class IntegrityError(GramliteError):
    """An output that does not belong to this run, or that another process is writing."""

    exit_code = 6


class GateError(GramliteError):
    """A regression gate whose clauses did not all hold."""

    exit_code = 7


SOME_ROWS_WITHOUT_VERDICT = 5
INTERRUPTED = 130
