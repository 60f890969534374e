"""The options that every judging command shares."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from .generation.scaffold import BUILT_IN, ChatTemplate
from .judging.settings import MOST_SEQUENCES, THINK_SEQUENCES

if TYPE_CHECKING:
    from .judging.judge import Judge
    from .judging.pair import Winner


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
        from .judging.judge import Settings
        from .loading import load
        from .runtime.options import RuntimeOptions

        settings = Settings(
            mode=self.mode,  # type: ignore[arg-type]
            orders=self.orders,  # type: ignore[arg-type]
            votes=self.votes,
            temperature=self.temperature,
            budget=Settings.budget if self.budget == "auto" else self.budget,
            seed=self.seed,
            delimiters=self.delimiters,  # type: ignore[arg-type]
            early_stop=not self.all_votes,
            confidence=self.confidence,
        )
        runtime = RuntimeOptions(
            device=self.device,  # type: ignore[arg-type]
            threads=self.threads,
            context=self.context,
            parallel=self.parallel,
            adapter=self.adapter,
            deterministic=self.deterministic,
            load_in=self.load_in,  # type: ignore[arg-type]
        )
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


CHAT_OPTIONS = (
    click.option("--chat-template", metavar="NAME|FILE",
                 help=f"{', '.join(BUILT_IN)}, or a Jinja file.  [default: the model's own]"),
    click.option("--trust-template", is_flag=True, help="Run a chat template that is not built in, in a sandbox."),
)  # fmt: skip
OPTIONS = (
    click.option("-m", "--model", metavar="MODEL", help="GGUF file or artifact folder.  [default: the reference judge]"),
    click.option("--adapter", metavar="LORA", help="LoRA adapter in GGUF form to judge with."),
    click.option("--template", metavar="NAME|FILE", help="gramlite, gram-r2, gram, or a file.  [default: the model's own]"),
    *CHAT_OPTIONS,
    click.option("--mode", type=click.Choice(["think", "direct"]), default="think", show_default=True,
                 help="Write a rationale first, or answer in one forward pass."),
    click.option("--orders", type=click.Choice(["both", "ab"]), default="both", show_default=True,
                 help="Judge each pair as given and swapped, or only as given."),
    click.option("--votes", type=click.IntRange(1, 1024), default=1, show_default=True, metavar="K",
                 help="Rationales sampled for each order, no more than it takes to settle the verdict."),
    click.option("--all-votes", is_flag=True, help="Take every vote, also those that cannot change the verdict."),
    click.option("--confidence", type=click.FloatRange(0.5, 1, max_open=True), metavar="P",
                 help="Stop an order's votes, too, once a sequential test is this sure of its majority."),
    click.option("--temperature", type=float, metavar="F", help="0 is greedy.  [default: 0, with several votes 0.75]"),
    click.option("--budget", type=budget, default=1024, show_default=True, metavar="N|auto",
                 help="Most tokens a rationale may take; auto is what `gramlite calibrate` measured."),
    click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of sampled rationales."),
    click.option("--delimiters", type=click.Choice(["neutralize", "flag", "reject"]), default="neutralize",
                 show_default=True, help="What to do with section delimiters inside the judged text."),
    click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True,
                 help="Where to run; cuda never falls back."),
    click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads.  [default: the physical cores]"),
    click.option("--load-in", type=click.Choice(["nf4", "int8"]),
                 help="Quantize a Hugging Face checkpoint with bitsandbytes while it is loaded."),
    click.option("--context", type=click.IntRange(64), metavar="N",
                 help="Most tokens of a prompt and its rationale.  [default: the model's, at most 8192]"),
    click.option("--parallel", type=click.IntRange(1, 64), metavar="N",
                 help="Sequences decoded together where llama.cpp runs the model (GGUF, packed GPTQ); hf and onnx judge one at a "
                      f"time.  [default: {THINK_SEQUENCES}, with votes up to {MOST_SEQUENCES}, in direct mode 1]"),
    click.option("--calibrated", is_flag=True, help="Rescale confidence as `gramlite calibrate` fitted it."),
    click.option("--deterministic", is_flag=True, help="One sequence at a time: the same bits for the same input."),
)  # fmt: skip


def said_labels(_: click.Context, __: click.Parameter, text: str | None) -> dict[str, Winner | None] | None:
    from .rows import parse_labels

    return None if text is None else parse_labels(text)


labels_option = click.option(
    "--labels", callback=said_labels, metavar="0=A,1=B,2=tie",
    help="What the labels of your own pairs mean where they don't say it themselves; error=none is no label.",
)  # fmt: skip


def chat_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say which chat template a model is asked with; they arrive as `chat: ChatTemplate`."""

    @functools.wraps(function)
    def packed(*, chat_template: str | None, trust_template: bool, **arguments: Any) -> Any:
        return function(chat=ChatTemplate(choice=chat_template, trust=trust_template), **arguments)

    for option in reversed(CHAT_OPTIONS):
        packed = option(packed)
    return packed


def judge_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the judging options to a click command; they arrive as one `options: JudgeOptions` argument."""
    names = [field.name for field in fields(JudgeOptions)]

    @functools.wraps(function)
    def packed(**arguments: Any) -> Any:
        options = JudgeOptions(**{name: arguments.pop(name) for name in names})
        return function(options=options, **arguments)

    for option in reversed(OPTIONS):
        packed = option(packed)
    return packed
