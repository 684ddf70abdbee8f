"""How every command ends: its text and exit code, never a traceback unless asked for."""

from __future__ import annotations

import errno
import functools
import os
import sys
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import typer

from reattend.errors import (
    EXIT_INTERNAL,
    EXIT_INTERRUPTED,
    ArgumentError,
    InterruptedRun,
    ReattendError,
)
from reattend.interrupts import termination_interrupts

if TYPE_CHECKING:
    from rich.console import Console

P = ParamSpec("P")
R = TypeVar("R")
DEBUG: ContextVar[bool] = ContextVar("debug", default=False)
#: Width of tables where nobody sees them: wide enough that paths stay on one line.
WIDE = 160
#: what the system says of a path as it was given
_REFUSED = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)


def console(*, stderr: bool = False) -> Console:
    """A console on the stream as it is now; wide where it is not a terminal."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=WIDE)


def debugging() -> bool:
    """Whether `--debug` was given."""
    return DEBUG.get()


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Turn what a command raises into text on stderr and an exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if debugging():
            return command(*args, **kwargs)
        try:
            with termination_interrupts(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except ReattendError as error:
            show(error)
            code = error.exit_code
        except KeyboardInterrupt:
            show(InterruptedRun("interrupted", next_step="run the same command again"))
            code = EXIT_INTERRUPTED
        except BrokenPipeError:  # `| head` closed our output: not an error of ours
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
            code = EXIT_INTERNAL
        except Exception as problem:
            told = explained(problem)
            show(told)
            code = told.exit_code
        raise typer.Exit(code)

    return run


def explained(problem: Exception) -> ReattendError:
    """An error outside the catalogue: a path the system refuses, memory, or a fault of ours."""
    if isinstance(problem, OSError) and problem.errno in _REFUSED and problem.filename:
        return ArgumentError(
            "a file or folder cannot be used",
            where=str(problem.filename)[:200],
            why=problem.strerror or str(problem),
            next_step="check the path and its permissions",
        )
    first = str(problem).strip().partition("\n")[0]
    name = type(problem).__name__
    if isinstance(problem, MemoryError) or name == "OutOfMemoryError" or "allocate memory" in first:
        return ReattendError(
            "there is not enough memory",
            why=first or name,
            next_step="see what is needed with `reattend convert ... --dry-run`; a smaller "
            "calibrate.batch_size or calibrate.seq_len needs less",
        )
    return ReattendError(
        "internal error: this is a fault of reattend",
        why=f"{name}: {first}" if first else name,
        next_step="run `reattend --debug ...` for the traceback, and report it",
    )


def show(error: ReattendError) -> None:
    """Print one error to stderr; its text is never read as markup."""
    from rich.text import Text

    head, _, rest = error.text().partition("\n")
    text = Text.assemble(("error: ", "bold red"), head, f"\n{rest}" if rest else "")
    console(stderr=True).print(text, soft_wrap=True)


def quiet() -> None:
    """Keep the libraries' own bars and warnings off the screen."""
    if debugging():
        return
    import logging

    from transformers.utils import logging as their

    their.set_verbosity_error()
    their.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)


def emit(text: str) -> None:
    """Write machine-readable output to stdout as it is."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()


def dumped(value: Any) -> str:
    """Plain data as JSON: sorted keys, two spaces."""
    import json

    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False)
