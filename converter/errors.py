"""The catalogue of mistakes a user can make or meet.

Every error says what happened, where, why, and what to do next, and carries the exit code of
the command line (ARCHITECTURE.md lists them). Library code raises these; only `reattend.cli`
turns them into text and a status.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_INTERNAL = 1
EXIT_BAD_INPUT = 2
EXIT_REFUSED = 3
EXIT_GATE = 4
EXIT_MISSING = 5
EXIT_INTERRUPTED = 6


class ReattendError(Exception):
    """Base of the catalogue.

    Args:
        what: one sentence: what is wrong.
        where: file, site path, plan rule or argument concerned.
        why: the reason, with the numbers.
        next_step: what the user does now (a command or a line to paste).
    """

    exit_code = EXIT_INTERNAL

    def __init__(self, what: str, *, where: str = "", why: str = "", next_step: str = "") -> None:
        self.what, self.where, self.why, self.next_step = what, where, why, next_step
        super().__init__(self.text())

    def text(self) -> str:
        """The message as the user sees it: one labelled line per part that is known."""
        parts = [self.what]
        for label, value in (("where", self.where), ("why", self.why), ("next", self.next_step)):
            if value:
                parts.append(f"  {label}: {value}")
        return "\n".join(parts)


class PlanError(ReattendError):
    """The plan does not parse, has an unknown key, or asks for something impossible."""

    exit_code = EXIT_BAD_INPUT


class ArgumentError(ReattendError):
    """An argument of `convert`, `load`, `export` or the command line is wrong."""

    exit_code = EXIT_BAD_INPUT


class ModelError(ReattendError):
    """The model folder, its weights or its config cannot be used."""

    exit_code = EXIT_BAD_INPUT


class DataError(ReattendError):
    """The calibration or evaluation data cannot be read."""

    exit_code = EXIT_BAD_INPUT


class OutputError(ReattendError):
    """The output folder is taken, read-only or full."""

    exit_code = EXIT_BAD_INPUT


class RefusedError(ReattendError):
    """One or more sites cannot take the conversion the plan asks for."""

    exit_code = EXIT_REFUSED


class NothingFoundError(ReattendError):
    """No attention site was found, or no rule of the plan matches one."""

    exit_code = EXIT_REFUSED


class CaptureError(ReattendError):
    """torch.export could not capture the model."""

    exit_code = EXIT_REFUSED


class UnsupportedCacheError(ReattendError):
    """A converted layer was given a cache, or a cache operation, that it cannot serve."""

    exit_code = EXIT_REFUSED


class GateError(ReattendError):
    """A verification gate of the plan failed; nothing was published."""

    exit_code = EXIT_GATE


class TrainingError(ReattendError):
    """Calibration met NaN or infinity, in weights, activations or loss."""

    exit_code = EXIT_GATE


class MissingExtraError(ReattendError):
    """An optional package or op library is not installed."""

    exit_code = EXIT_MISSING


class InterruptedRun(ReattendError):
    """Ctrl-C or a signal: what was finished is kept and the same command continues."""

    exit_code = EXIT_INTERRUPTED
