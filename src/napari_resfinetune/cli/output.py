"""What the command prints: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from napari_resfinetune.errors import ResFinetuneError
from napari_resfinetune.events import Checkpointed, EpochEnded, Event, MemoryLever, Message, Started, Step, StopToken

STOPPED = 130
errors = Console(stderr=True, highlight=False, soft_wrap=True)
results = Console(highlight=False, soft_wrap=True)


@contextmanager
def plain_errors(stopped: str = "stopped") -> Iterator[None]:
    """Turn known errors into a message and an exit status; nobody sees a traceback for bad input.

    Parameters
    ----------
    stopped
        What to say when Ctrl-C ends it.
    """
    try:
        yield
    except ResFinetuneError as error:
        for problem in error.problems:
            errors.print(f"[bold red]error:[/] {escape(problem)}")
        raise typer.Exit(error.exit_status) from None
    except KeyboardInterrupt:
        errors.print(stopped)
        raise typer.Exit(STOPPED) from None


@contextmanager
def stop_on_interrupt(
    said: str = "stopping after this step and saving a checkpoint; press Ctrl-C again to end at once",
) -> Iterator[StopToken]:
    """Hand out a token that Ctrl-C (or a request to terminate) sets; a second Ctrl-C ends at once."""
    token = StopToken()

    def ask(signum: int, frame: FrameType | None) -> None:
        if token.stopped:
            raise KeyboardInterrupt
        token.stop()
        errors.print(said)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield token
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_json(content: Any) -> None:
    """Print one JSON object on standard output."""
    sys.stdout.write(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")


def print_table(columns: Mapping[str, str], rows: list[list[str]], title: str | None = None) -> None:
    """Print a table; `columns` maps names to "left" or "right"."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, (name, justify) in enumerate(columns.items()):
        # Names may go on in the next line, numbers not.
        least = max((len(row[number]) for row in rows), default=0) if justify == "right" else None
        table.add_column(name, justify="right" if justify == "right" else "left", overflow="fold", min_width=least)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    results.print(table)


class TrainingProgress:
    """Progress bar with loss, memory and time left, and one line an epoch."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left (at most)"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[detail]}"),
            console=errors,
            transient=True,
        )
        self._task = self._bar.add_task("preparing", total=None, detail="")
        self._epochs = self._steps = 0
        self._limit = ""

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Message):
            self._bar.console.print(escape(event.text))
        elif isinstance(event, Started):
            self._epochs, self._steps = event.epochs, event.steps_per_epoch
            self._limit = "" if event.memory_limit_gb is None else f" of {event.memory_limit_gb:.1f}"
            done = event.epoch * event.steps_per_epoch + event.step
            self._bar.console.print(
                f"training on {event.device} in {event.precision}, writing to {escape(event.run_dir)}"
            )
            self._bar.reset(self._task, total=event.epochs * event.steps_per_epoch, completed=done, detail="")
            self._bar.update(self._task, description=f"epoch {event.epoch + 1} of up to {event.epochs}")
        elif isinstance(event, Step):
            self._bar.update(
                self._task,
                completed=event.epoch * self._steps + event.step + 1,
                description=f"epoch {event.epoch + 1} of up to {self._epochs}",
                detail=f"loss {event.loss:.3f}, {event.memory_gb:.1f}{self._limit} GB, {event.seconds:.1f} s a step",
            )
        elif isinstance(event, MemoryLever):
            changes = ", which changes training" if event.changes_training else ""
            self._bar.console.print(
                f"memory: {escape(event.reason)}; going on with {event.lever}={event.after} instead of "
                f"{event.before}{changes}"
            )
        elif isinstance(event, EpochEnded):
            best = "best so far" if event.best_epoch == event.epoch else f"best was epoch {event.best_epoch + 1}"
            self._bar.console.print(
                f"epoch {event.epoch + 1}: training loss {event.train_loss:.3f}, "
                f"validation {event.metric:.3f} ({best}), peak {event.peak_memory_gb:.1f} GB"
            )
        elif isinstance(event, Checkpointed):
            self._bar.update(self._task, detail=f"saved {event.name}")


class WindowProgress:
    """Progress bar over the windows of the image that is being segmented."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=errors,
            transient=True,
        )
        self._task = self._bar.add_task("loading", total=None)
        self._name = ""

    def __enter__(self) -> WindowProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, name: str, done: int, total: int) -> None:
        """Show windows done and in all of an image."""
        if name != self._name:
            self._name = name
            self._bar.reset(self._task, total=total, description=escape(name))
        self._bar.update(self._task, completed=done)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(escape(text))


def escape(text: object) -> str:
    """Keep rich from taking brackets for markup."""
    return str(text).replace("[", r"\[")
