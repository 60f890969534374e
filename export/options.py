"""The options that every command which writes an artifact shares, and how such a command ends."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from gramlite.formats.artifact import Manifest
from gramlite.generation.scaffold import ChatTemplate
from gramlite.options import chat_options

from .report import judge_command, print_artifact, print_notes
from .smoke import smoke_option

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True, kw_only=True)
class ArtifactOptions:
    """Where an artifact goes, and how it is judged with once it is there, as given on the command line."""

    output: Path
    template: str | None
    chat: ChatTemplate
    smoke: bool
    force: bool
    as_json: bool

    @property
    def writing(self) -> dict[str, Any]:
        """What the function that writes the artifact takes of them by name."""
        return {"template": self.template, "force": self.force}

    def finish(self, manifest: Manifest, judge: Callable[..., Manifest], *, command: str | None = None) -> None:
        """Say what there is to note, judge the first pairs with `judge` unless told not to, and print the artifact.

        `command` is what to type next, where that is not to judge with the artifact.
        """
        print_notes(manifest)
        if self.smoke:
            manifest = judge(self.output, manifest, chat=self.chat, **self.writing)
        print_artifact(
            self.output, manifest, command=command or judge_command(self.output, manifest), as_json=self.as_json
        )


def artifact_options(output: str, *, kind: str = "folder", template: str = "that of the model card") -> Decorator:
    """Add the options to a click command; they arrive as one `options: ArtifactOptions` argument.

    `output` is the help of -o, `kind` what --force replaces, `template` which judge's template is taken by default.
    """
    added: tuple[Callable[..., Any], ...] = (
        click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help=output),
        click.option("--template", metavar="NAME|FILE", help=f"The judge's template; by default {template}."),
        chat_options,
        smoke_option,
        click.option("--force", is_flag=True, help=f"Replace an existing {kind}."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
    )

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def packed(**arguments: Any) -> Any:
            options = ArtifactOptions(**{each.name: arguments.pop(each.name) for each in fields(ArtifactOptions)})
            return function(options=options, **arguments)

        for add in reversed(added):
            packed = add(packed)
        return packed

    return decorate
