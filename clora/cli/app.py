"""How commands start and end: the application, exit codes, errors as lines on stderr.

Exit codes: 0 done, 1 failed, 2 bad input; 128 + N after signal N, with the state saved.
"""

from __future__ import annotations

import functools
import logging
import os
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Annotated, ParamSpec

import typer

from clora.errors import InputError, Interrupted, NonFiniteError, ParityError, ProcessLost, Stopped, WriteError

FAILED, BAD_INPUT, STOPPED = 1, 2, 130
PARALLEL = {"cache", "eval", "extend", "teach", "train"}  # the commands that torchrun may start on several processes
_debug: ContextVar[bool] = ContextVar("debug", default=False)
Arguments = ParamSpec("Arguments")

app = typer.Typer(
    name="clora",
    help="Distil many effect LoRAs and few-step sampling into one LoRA for an image-editing model.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run_command(arguments: Sequence[str]) -> None:
    """Run the command that the arguments name."""
    limit_spinning()
    # --debug is the program's own option; users add it to the end of the command that failed.
    rest = [argument for argument in arguments if argument != "--debug"]
    app(["--debug"] * (len(rest) != len(arguments)) + rest, prog_name="clora")


def limit_spinning() -> None:
    """Let OpenMP's threads sleep soon when they wait for each other; read when torch is first loaded.

    By default they spin for milliseconds. Where other programs want the cores, a thread then spins away the time that
    the one it waits for needs. Where it sleeps too soon, waking it costs as much, above all in a virtual machine; this
    lies between the two. A user's own setting stays.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "3000"


def command(name: str) -> Callable[[Callable[Arguments, None]], Callable[Arguments, None]]:
    """Register a command whose errors become lines on stderr and exit codes."""

    def register(job: Callable[Arguments, None]) -> Callable[Arguments, None]:
        @app.command(name)
        @functools.wraps(job)
        def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
            try:
                if name not in PARALLEL and os.environ.get("WORLD_SIZE", "1") != "1":
                    raise InputError(f"`clora {name}` is one process; start it without torchrun")
                job(*args, **kwargs)
            except (typer.Exit, typer.Abort):
                raise
            except InputError as error:
                say(error.faults)
                raise typer.Exit(BAD_INPUT) from error
            except KeyboardInterrupt as error:
                raise typer.Exit(STOPPED) from error
            except Exception as error:
                raise typer.Exit(_failure(error)) from error

        return guarded

    return register


def _failure(error: Exception) -> int:
    """Report what is not the input's fault in one line, the whole of it with --debug; returns the exit
    code."""
    if _debug.get():
        traceback.print_exception(error)
    if isinstance(error, Interrupted | NonFiniteError):
        if is_main():  # all processes raise the same
            say([str(error)])
        return error.code if isinstance(error, Interrupted) else FAILED
    if isinstance(error, ParityError | ProcessLost | Stopped | WriteError):
        say([str(error)])
        return STOPPED if isinstance(error, Stopped) else FAILED
    what = " ".join(str(error).split()) or "no message"
    hint = "" if _debug.get() else " (--debug shows where)"
    say([f"{type(error).__name__}: {what}{hint}"])
    return FAILED


def say(faults: Iterable[str]) -> None:
    """A line on stderr for each."""
    whose = "" if is_main() else f" of process {os.environ['RANK']}"
    for fault in faults:
        typer.echo(f"error{whose}: {fault}", err=True)


def is_main() -> bool:
    """Whether this process speaks for all: `distributed.is_main`, before torch is there."""
    return os.environ.get("RANK", "0") == "0"


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"clora {version('clora')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error arose.")] = False,
) -> None:
    logging.basicConfig(format="warning: %(message)s", level=logging.WARNING)
    _debug.set(debug)
