"""The command line: finds each command's file when it is asked for, and turns errors into exit codes."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

import click

from . import interrupt
from .errors import INTERRUPTED, GateError, GramliteError, InputError, ResourceError
from .terminal import note, open_streams, visible

KEEP_ROWS = (["judge"], ["rank"], ["calibrate"], ["bench", "run"])  # with -o, and go on with --resume


REMOVED = {
    "quantize distill": "quantize distill was removed. Judge with a GPTQ folder as it is: "
    "gramlite quantize gptq CHECKPOINT -o OUT --calibration PAIRS.jsonl",
    "bench quality": "bench quality was removed. Judge with each file, then compare the runs with gold: "
    "gramlite bench run SUITE:FILE -m MODEL -o RUN --mode direct; gramlite bench compare RUN RUN... --gold GOLD.jsonl",
    "bench gptq-layers": "bench gptq-layers was removed. It is a script of the source code: "
    "python bench/claims/gptq_layers.py CHECKPOINT FOLDER... --pairs FILE",
}


class LazyGroup(click.Group):
    """A group whose commands live in modules that are imported only when they are used.

    `commands_in` maps a command's name to its module and its line in the group's help.
    """

    def __init__(self, *args: Any, commands_in: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._commands_in = commands_in

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self._commands_in, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if removed := REMOVED.get(f"{self.name} {name}"):
            raise InputError(removed)
        if name not in self._commands_in:
            return super().get_command(ctx, name)
        module = importlib.import_module(self._commands_in[name][0])
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, line) for name, (_, line) in self._commands_in.items()]
        rows += [(name, command.get_short_help_str(100)) for name, command in sorted(self.commands.items())]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _dashes(name: str) -> str:
    return name.replace("_", "-")


CONTEXT = {"token_normalize_func": _dashes, "help_option_names": ["-h", "--help"], "max_content_width": 110}

COMMANDS = {
    "judge": ("gramlite.commands.judge", "Judge pairs of responses, from options, a file or standard input."),
    "rank": ("gramlite.commands.rank", "Rank the completions of each question."),
    "calibrate": ("gramlite.commands.calibrate", "Fit the confidence, or the think budget, to labelled pairs."),
    "pull": ("gramlite.commands.pull", "Fetch a judge from the Hugging Face Hub."),
    "inspect": ("gramlite.commands.inspect", "Say what a model file is and how much memory it needs."),
    "doctor": ("gramlite.commands.doctor", "Say what works on this machine, and why something does not."),
    "reference": ("gramlite.commands.reference", "Build the reference judge."),
    "pack": ("gramlite.quant.pack", "Pack a GPTQ folder into GGUF or ONNX, bit for bit."),
}


@click.group(cls=LazyGroup, commands_in=COMMANDS, context_settings=CONTEXT)
@click.version_option(package_name="gramlite")
def command() -> None:
    """Judge which of two responses is better, with a rationale, on this machine alone."""


GROUPS = {
    "export": (
        "Turn a trained checkpoint into a file that runs here, with no loss beyond the dtype.",
        {
            "gguf": ("gramlite.export.gguf", "A checkpoint as a GGUF file."),
            "adapter": ("gramlite.export.adapter", "A LoRA folder as a GGUF adapter."),
            "onnx": ("gramlite.export.onnx", "A checkpoint as an ONNX folder."),
            "merge": ("gramlite.export.merge", "A LoRA merged into its checkpoint."),
        },
    ),
    "quantize": (
        "Make a judge smaller, calibrated on judging.",
        {
            "gguf": ("gramlite.quant.gguf", "A checkpoint or GGUF file in any of llama.cpp's types."),
            "gptq": ("gramlite.quant.gptq", "A checkpoint as a GPTQ folder."),
            "onnx": ("gramlite.quant.onnx", "A checkpoint as an ONNX folder with weights in 8 or 4 bits."),
            "bnb": ("gramlite.quant.bnb", "A checkpoint as a bitsandbytes folder, NF4 or int8."),
        },
    ),
    "bench": (
        "Measure judges: what quantization cost, flips, speed.",
        {
            "run": ("gramlite.bench.run", "Judge a suite into a run folder."),
            "compare": ("gramlite.bench.compare", "Compare runs pair by pair, with intervals and a gate."),
            "sweep": ("gramlite.bench.sweep", "Quantize a checkpoint in many ways and compare them all."),
            "speed": ("gramlite.bench.speed", "Time a judge against its floor and its neighbours."),
        },
    ),
}
for _name, (_line, _commands) in GROUPS.items():
    command.add_command(LazyGroup(_name, commands_in=_commands, help=_line, context_settings=CONTEXT))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with the code that the errors module documents."""
    open_streams()
    logger = logging.getLogger("gramlite")
    logger.setLevel(logging.INFO)
    logger.addHandler(_StderrHandler())
    try:
        if sys._getframe(1).f_globals.get("__name__") == "__main__":  # the process is ours, as it is not in a test
            interrupt.install()
        code = interrupt.final_code(run(arguments))
    except KeyboardInterrupt:  # before there was anything to stop, or while the outcome was reported
        interrupt.report()
        code = interrupt.final_code(INTERRUPTED)
    sys.exit(code)


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    keeps_rows = arguments[:1] in KEEP_ROWS or arguments[:2] in KEEP_ROWS
    keeps_output = keeps_rows and any(word.startswith(("-o", "--output")) for word in arguments)
    interrupt.begin(arguments)
    if keeps_output:
        interrupt.say_on_interrupt(interrupt.resume_hint)
    try:
        code = command.main(args=arguments, prog_name="gramlite", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except interrupt.interrupt_types():  # asked only when something was raised
        interrupt.report()
        return INTERRUPTED
    except GramliteError as error:
        lines = str(error).split("\n") if isinstance(error, GateError) else [str(error)]  # a clause a line
        note(f"Error: {lines[0]}", *lines[1:])
        return error.exit_code
    except click.ClickException as error:
        error.message = visible(error.message)  # type: ignore[misc]  # which is final, and from anywhere
        error.show()
        return InputError.exit_code
    except UnicodeEncodeError as error:
        note(
            f"Error: {ascii(error.object):.200} has characters that {error.encoding} cannot hold. Rename it, or type: PYTHONUTF8=1"
        )
        return InputError.exit_code
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.EBADF) and error.filename is None:
            if error.errno == errno.EBADF:
                note("Error: standard input or output is closed. Open it, or name files in its place.")
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit stays quiet
            return GramliteError.exit_code
        said, code = explain(error)
        note(f"Error: {said}")
        return code


def explain(error: OSError) -> tuple[str, int]:
    """What the system refused, on one line with what to do, and the exit code: space and permissions are resources."""
    reason = error.strerror or str(error) or type(error).__name__
    said = f"{os.fsdecode(error.filename)}: {reason}." if isinstance(error.filename, str | bytes) else f"{reason}."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{said} Free some space, or choose another path.", ResourceError.exit_code
    if error.errno in (errno.EACCES, errno.EROFS):
        return f"{said} Choose a path that you may write to, or change its permissions.", ResourceError.exit_code
    return f"{said} Check the paths that were given.", GramliteError.exit_code


class _StderrHandler(logging.Handler):
    """Writes notices as plain lines to whatever standard error is at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        note(self.format(record))
