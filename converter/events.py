"""What a run tells the outside while it works: events, a progress display, and a JSON log.

`convert(on_event=f)` calls `f(event)` for every `Event`, in order, on the thread that does the
work. The contract: `f` returns nothing, must not change the model, and an exception it raises
stops the run as Ctrl-C does. It is never called inside a durable write, so whatever it does
cannot leave half a file. `done` of one stage never falls, and reaches `total` where that is known.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as RichProgress,
)

from reattend.durable import os_errors_explained
from reattend.errors import OutputError

Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Event:
    """One step of a run.

    Attributes:
        stage: which part of the pipeline (`find`, `statistics`, `layerwise`, ...).
        site: path of the attention site concerned, or "" for the whole model.
        layer: its layer number, or None.
        done: units of the stage that are finished; the stage says what a unit is.
        total: units of the stage, or None while unknown.
        message: one line for a person, or "".
        values: measurements by name (`loss`, `kl`, `tokens`).
    """

    stage: str
    site: str = ""
    layer: int | None = None
    done: int = 0
    total: int | None = None
    message: str = ""
    values: Mapping[str, Scalar] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line of strict JSON; NaN and infinity become the texts "nan", "inf", "-inf"."""
        data = asdict(self)
        data["values"] = {
            name: str(value)
            if isinstance(value, float) and (value != value or abs(value) == float("inf"))
            else value
            for name, value in self.values.items()
        }
        return json.dumps(data, ensure_ascii=False, allow_nan=False)


OnEvent = Callable[[Event], None]


def both(*listeners: OnEvent | None) -> OnEvent:
    """One listener that passes every event to each of `listeners` in turn; None is skipped."""
    present = [listener for listener in listeners if listener is not None]

    def tell(event: Event) -> None:
        for listener in present:
            listener(event)

    return tell


class Progress:
    """A display with one bar per stage, its layer and the time left; an `OnEvent`.

    Silent where `stream` is not a terminal, so logs of batch jobs stay clean. Use as a context
    manager: the cursor is restored however the block ends.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        stream = sys.stderr if stream is None else stream
        self.enabled = stream.isatty()
        self._tasks: dict[str, TaskID] = {}
        self._bars = RichProgress(
            TextColumn("[bold]{task.fields[stage]}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.description}"),
            console=Console(file=stream),
            disable=not self.enabled,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if not self.enabled:
            return
        task = self._tasks.get(event.stage)
        if task is None:
            task = self._bars.add_task("", total=event.total, stage=event.stage)
            self._tasks[event.stage] = task
        self._bars.update(
            task, completed=event.done, total=event.total, description=_describe(event)
        )


class JsonLog:
    """Write every event as one JSON line with the seconds since the start; an `OnEvent`.

    Args:
        target: a stream, or the path of a file to append to. Each line is flushed, so the log
            ends with the last event even if the process is killed.

    Raises:
        OutputError: the file cannot be opened for writing.
    """

    def __init__(self, target: str | Path | IO[str]) -> None:
        self._own = isinstance(target, str | Path)
        self._name = Path(target) if isinstance(target, str | Path) else Path("the event log")
        if isinstance(target, str | Path):
            try:
                self._stream: IO[str] = Path(target).open("a", encoding="utf-8")  # noqa: SIM115
            except OSError as error:
                raise OutputError(
                    "the event log cannot be written",
                    where=str(target),
                    why=error.strerror or str(error),
                    next_step="choose another file for --log-json; its folder must be there",
                ) from error
        else:
            self._stream = target
        self._start = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._own:
            self._stream.close()

    def __call__(self, event: Event) -> None:
        """Log one event."""
        seconds = round(time.monotonic() - self._start, 3)
        with os_errors_explained(self._name):
            self._stream.write(f'{{"seconds": {seconds}, {event.to_json()[1:]}\n')
            self._stream.flush()


def _describe(event: Event) -> str:
    parts = []
    if event.layer is not None:
        parts.append(f"layer {event.layer}")
    elif event.site:
        parts.append(event.site)
    if event.message:
        parts.append(event.message)
    parts += [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in event.values.items()
    ]
    # Square brackets would be read as rich markup: module paths and messages may hold them.
    return "  ".join(parts).replace("[", "\\[")
