"""The options that commands share: how to judge, where rows go, what labels mean."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from .generation.scaffold import BUILT_IN, ChatTemplate
from .judging.settings import MOST_SEQUENCES, THINK_SEQUENCES
from .rows import parse_labels
from .rows.judged_run import RowsOutput

if TYPE_CHECKING:
    from .judging.judge import Judge

Option = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """The judging options as given on the command line."""

    model: str | None
    adapter: str | None
    template: str | None
    chat_template: str | None = None
    trust_template: bool = False
    mode: str
    orders: str
    votes: int
    temperature: float | None
    budget: int | Literal["auto"]
    seed: int
    delimiters: str
    device: str
    threads: int | None
    context: int | None
    parallel: int | None
    deterministic: bool
    calibrated: bool = False
    all_votes: bool = False
    confidence: float | None = None
    load_in: str | None = None

    def open(self) -> Judge:
        """Open the judge that these options describe; an interrupt stops it."""
        from .interrupt import on_interrupt
        from .judging.settings import Settings
        from .loading import load
        from .runtime.options import RuntimeOptions

        budget = Settings.budget if self.budget == "auto" else self.budget
        settings = Settings(**self._fields_of(Settings) | {"budget": budget, "early_stop": not self.all_votes})
        runtime = RuntimeOptions(**self._fields_of(RuntimeOptions))
        judge = load(
            self.model,
            template=self.template,
            settings=settings,
            runtime=runtime,
            chat_template=self.chat_template,
            trust_template=self.trust_template,
        )
        on_interrupt(judge.abort)
        try:
            return self._measured(judge)
        except BaseException:
            judge.close()
            raise

    def _fields_of(self, kind: Any) -> dict[str, Any]:
        """What is given for the fields of another dataclass, by their names."""
        return {field.name: getattr(self, field.name) for field in fields(kind) if hasattr(self, field.name)}

    def _measured(self, judge: Judge) -> Judge:
        """The judge with what was measured of it: its think budget and its calibration, where they are asked for."""
        if self.budget == "auto":
            from .judging.budget import stored_budget

            chosen = stored_budget(self.artifact_path(), judge.model, judge.settings_record)
            judge = judge.with_settings(budget=chosen)
        if self.calibrated:
            from .judging.confidence import stored_calibration

            judge = judge.calibrated(stored_calibration(self.artifact_path(), judge.model, judge.settings_record))
        return judge

    def inputs(self) -> list[Path]:
        """What opening the judge reads, or takes for a file: the model and the adapter, what lies beside them, a template."""
        from .formats.artifact import manifest_path
        from .formats.sidecar import sidecar_path

        named = [Path(each) for each in (self.model, self.adapter, self.template) if each]
        return [*named, *(beside(path) for path in named for beside in (manifest_path, sidecar_path))]

    def artifact_path(self) -> Path:
        """The model's file or folder; without one, the reference judge's."""
        if self.model is not None:
            return Path(self.model)
        from .reference.files import cached_gguf

        return cached_gguf()


def budget(value: str | int) -> int | Literal["auto"]:
    """A whole number of at least 1, or `auto`."""
    if value == "auto":
        return "auto"
    if not str(value).isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value!r} is neither a whole number of at least 1 nor auto.")
    return int(value)


def _choice(name: str, *values: str, help: str) -> Option:
    """An option whose first value is the default."""
    return click.option(name, type=click.Choice(values), default=values[0], show_default=True, help=help)


def _number(name: str, kind: Any, help: str, *, metavar: str = "N", default: int | None = None) -> Option:
    return click.option(name, type=kind, default=default, show_default=True, metavar=metavar, help=help)


def _text(*names: str, metavar: str, help: str) -> Option:
    return click.option(*names, metavar=metavar, help=help)


CHAT_TEMPLATE = f"{', '.join(BUILT_IN)}, or a Jinja file.  [default: the model's own]"
VOTES = "Rationales sampled for each order, no more than it takes to settle the verdict."
CONFIDENCE = "Stop an order's votes, too, once a sequential test is this sure of its majority."
BUDGET = "Most tokens a rationale may take; auto is what `gramlite calibrate` measured."
LOAD_IN = "Quantize a Hugging Face checkpoint with bitsandbytes while it is loaded."
CONTEXT = "Most tokens of a prompt and its rationale.  [default: the model's, at most 8192]"
PARALLEL = (
    "Sequences decoded together where llama.cpp runs the model (GGUF, packed GPTQ); hf and onnx judge one at a "
    f"time.  [default: {THINK_SEQUENCES}, with votes up to {MOST_SEQUENCES}, in direct mode 1]"
)
CHAT_OPTIONS = (
    _text("--chat-template", metavar="NAME|FILE", help=CHAT_TEMPLATE),
    click.option("--trust-template", is_flag=True, help="Run a chat template that is not built in, in a sandbox."),
)
OPTIONS = (
    _text("-m", "--model", metavar="MODEL", help="GGUF file or artifact folder.  [default: the reference judge]"),
    _text("--adapter", metavar="LORA", help="LoRA adapter in GGUF form to judge with."),
    _text("--template", metavar="NAME|FILE", help="gramlite, gram-r2, gram, or a file.  [default: the model's own]"),
    *CHAT_OPTIONS,
    _choice("--mode", "think", "direct", help="Write a rationale first, or answer in one forward pass."),
    _choice("--orders", "both", "ab", help="Judge each pair as given and swapped, or only as given."),
    _number("--votes", click.IntRange(1, 1024), VOTES, metavar="K", default=1),
    click.option("--all-votes", is_flag=True, help="Take every vote, also those that cannot change the verdict."),
    _number("--confidence", click.FloatRange(0.5, 1, max_open=True), CONFIDENCE, metavar="P"),
    _number("--temperature", float, "0 is greedy.  [default: 0, with several votes 0.75]", metavar="F"),
    _number("--budget", budget, BUDGET, metavar="N|auto", default=1024),
    _number("--seed", int, "Seed of sampled rationales.", default=0),
    _choice(
        "--delimiters",
        "neutralize",
        "flag",
        "reject",
        help="What to do with section delimiters inside the judged text.",
    ),
    _choice("--device", "auto", "cuda", "cpu", help="Where to run; cuda never falls back."),
    _number("--threads", click.IntRange(1), "CPU threads.  [default: the physical cores]"),
    click.option("--load-in", type=click.Choice(["nf4", "int8"]), help=LOAD_IN),
    _number("--context", click.IntRange(64), CONTEXT),
    _number("--parallel", click.IntRange(1, 64), PARALLEL),
    click.option("--calibrated", is_flag=True, help="Rescale confidence as `gramlite calibrate` fitted it."),
    click.option("--deterministic", is_flag=True, help="One sequence at a time: the same bits for the same input."),
)

labels_option = click.option(
    "--labels",
    metavar="0=A,1=B,2=tie",
    callback=lambda context, option, text: None if text is None else parse_labels(text),
    help="What the labels of your own pairs mean where they don't say it themselves; error=none is no label.",
)


def limit_option(noun: str) -> Option:
    """`--limit N`: only what comes first is judged."""
    return click.option("--limit", type=click.IntRange(1), metavar="N", help=f"Judge the first N {noun} only.")


def _packed(argument: str, make: Callable[..., Any], options: Sequence[Option], names: Sequence[str]) -> Option:
    """Add options to a click command, which gets what `make` makes of those names in one argument."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(**given: Any) -> Any:
            made = make(**{name: given.pop(name) for name in names})
            return function(**{argument: made}, **given)

        for option in reversed(options):
            call = option(call)  # type: ignore[assignment]
        return call

    return decorate


def output_options(metavar: str, about: str, *, required: bool = False) -> Option:
    """Add -o, --resume, --force and --json; they arrive as `output: RowsOutput`."""
    options = (
        click.option(
            "-o", "--output", "path", type=click.Path(path_type=Path), metavar=metavar, help=about, required=required
        ),
        click.option("--resume", is_flag=True, help="Go on with an interrupted -o."),
        click.option("--force", is_flag=True, help="Start an existing -o anew."),
        click.option("--json", "as_json", is_flag=True, help="JSON on a line of its own, also on a terminal."),
    )
    return _packed("output", RowsOutput, options, [field.name for field in fields(RowsOutput)])


# these options say which chat template a model is asked with; they arrive as `chat: ChatTemplate`
chat_options = _packed(
    "chat",
    lambda chat_template, trust_template: ChatTemplate(choice=chat_template, trust=trust_template),
    CHAT_OPTIONS,
    ["chat_template", "trust_template"],
)
# the judging options; they arrive as `options: JudgeOptions`
judge_options = _packed("options", JudgeOptions, OPTIONS, [field.name for field in fields(JudgeOptions)])
