"""The command ``sweep``: its table of jobs before, while and after they run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.table import Table

from napari_resfinetune import api
from napari_resfinetune.cli.options import AsJson
from napari_resfinetune.cli.output import (
    STOPPED,
    errors,
    escape,
    plain_errors,
    print_json,
    print_table,
    results,
    stop_on_interrupt,
)
from napari_resfinetune.data.pairs import some
from napari_resfinetune.words import duration

ROWS_SHOWN = 30
COLOURS = {"running": "green", "queued": "cyan", "failed": "bold red", "stopped": "yellow", "done": "dim"}
# What a person wants to see first when not all fit on the screen.
ORDER = ("failed", "running", "queued", "stopped", "waiting", "done")


def sweep(
    grid: Annotated[Path, typer.Argument(metavar="GRID.yaml", help="Lists of models, strategies, presets, images.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every job with its predicted memory and time; run nothing.")
    ] = False,
    log: Annotated[str | None, typer.Option("--log", metavar="JOB", help="Print the log of a job.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Also run those again that failed before.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Look after the jobs, or hand them to the cluster and leave.")
    ] = True,
    executor: Annotated[
        str | None,
        typer.Option("--executor", metavar="WHERE", help="YAML file of a cluster, address of dask, or local."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Another folder than the grid's.")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch data by name that is not there.")] = False,
    published: Annotated[
        bool, typer.Option("--published", help="Show the values of the published study beside.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train and score every combination of a grid, here or on a cluster.

    Call it again to go on: what is finished is not done again. Ctrl-C lets what runs save itself and stop.
    """
    from napari_resfinetune.experiments import read_grid
    from napari_resfinetune.experiments.expand import expand
    from napari_resfinetune.experiments.sweep import describe, read_log

    with plain_errors():
        settings = read_grid(grid, executor, output)
        if log is not None:
            results.print(read_log(settings.output.absolute(), log), markup=False, end="")
            return
        found = expand(settings, download=download)
        if dry_run:
            plan = describe(found, settings, with_published=published)
            _print_plan(plan, as_json)
            return
        for line in (*_left_out(found.left_out), *_notes(found.notes)):
            errors.print(line)
        with (
            stop_on_interrupt("stopping: what runs is asked to save and end; Ctrl-C again leaves it alone") as (stop),
            _Watching() as watching,
        ):
            result = api.sweep(
                settings, on_change=watching, stop=stop, retry=retry, wait=wait, expansion=found, published=published
            )
        _end(result, grid, as_json, wait)


def run_in_chunks(
    verb: Any, data: Any, output: Path | None, arguments: list[str], executor: str, chunk: int, as_json: bool
) -> None:
    """Segment or score many images through an executor; for the commands of these names."""
    from napari_resfinetune.errors import ConfigError
    from napari_resfinetune.experiments.grid import read_executor
    from napari_resfinetune.experiments.plates import run_plate

    if data.images is None or output is None or (verb == "evaluate" and data.labels is None):
        raise ConfigError(f"{verb}: --images, --output{' and --labels' if verb == 'evaluate' else ''} are needed")
    where = data.model_dump(include={"image_key", "label_key", "axes"})
    said = "stopping: what runs is asked to save and end; Ctrl-C again leaves it alone"
    with stop_on_interrupt(said) as stop, _Watching() as watching:
        result = run_plate(
            verb, data.images, data.labels, output, arguments, read_executor(executor),
            chunk=chunk, where=where, on_change=watching, stop=stop,
        )  # fmt: skip
    for line in _notes(result.notes):
        errors.print(line)
    failed = [job for job in result.jobs if job.state == "failed"]
    for job in failed:
        errors.print(f"[bold red]failed:[/] {escape(job.name)}: {escape(job.note)}")
    if as_json:
        chunks = [{"name": job.name, "state": job.state, "note": job.note} for job in result.jobs]
        print_json({"images": result.images, "done": result.done, "table": str(result.table), "jobs": chunks})
    else:
        results.print(f"{result.done} of {result.images} images" + (f": {escape(result.table)}" if result.done else ""))
    if result.stopped:
        errors.print("stopped; give the same command again to go on")
        raise typer.Exit(STOPPED)
    if failed:
        raise typer.Exit(1)


def _end(result: Any, grid: Path, as_json: bool, wait: bool) -> None:
    if as_json:
        print_json(result.to_dict())
    for job in result.jobs:
        if job.state == "failed":
            errors.print(f"[bold red]failed:[/] {escape(job.name)}: {escape(job.note)}")
    if not as_json:
        left = len(result.jobs) - result.count("done") - result.count("failed")
        results.print(f"{result.count('done')} done, {result.count('failed')} failed, {left} left")
        for path in result.files:
            if path.suffix in (".md", ".png"):
                results.print(escape(path))
    if result.stopped and wait:
        errors.print(f"stopped; go on with: resfinetune sweep {escape(grid)}")
        raise typer.Exit(STOPPED)
    if result.count("failed"):
        raise typer.Exit(1)


def _print_plan(plan: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(plan)
        return
    columns = {"job": "left", "memory": "right", "of": "right", "epoch": "right", "at most": "right", "to fit": "left"}
    compared = any("published_seconds_per_epoch" in job for job in plan["jobs"])
    if compared:
        columns["published epoch"] = "right"
    rows = []
    for job in plan["jobs"]:
        theirs = job.get("published_seconds_per_epoch")
        row = [
            job["name"],
            f"{job['peak_gb']:.1f} GB",
            f"{job['limit_gb']:.0f} GB" if job["fits"] else f"{job['limit_gb']:.0f} GB !",
            duration(job["seconds_per_epoch"]),
            duration(job["seconds"]),
            ", ".join(lever.partition(".")[2] for lever in job["levers"]),
        ]
        rows.append([*row, duration(theirs) if theirs else ""] if compared else row)
    rows += [[job["name"], "", "", "", duration(job["seconds"]), "", *([""] if compared else [])]
             for job in plan["initial"]]  # fmt: skip
    print_table(columns, rows)
    left_out = _left_out((each["name"], each["reason"]) for each in plan["left_out"])
    for line in (*left_out, *_notes(plan["notes"])):
        results.print(line)
    results.print(
        f"{plan['count']} jobs, {len(plan['left_out'])} left out; one after another at most "
        f"{duration(plan['seconds'])}, memory up to {plan['peak_gb']:.1f} GB; executor: {plan['executor']}"
    )


def _left_out(named: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Say each reason once, with the combinations that it holds for."""
    names_of: dict[str, list[str]] = {}
    for name, reason in named:
        names_of.setdefault(reason, []).append(name)
    for reason, names in names_of.items():
        yield f"left out: {escape(some(names))}: {escape(reason)}"


def _notes(notes: Iterable[str]) -> Iterator[str]:
    return (f"note: {escape(note)}" for note in notes)


class _Watching:
    """A live table of jobs on a terminal; elsewhere a line whenever one changes."""

    def __init__(self) -> None:
        self._live = Live(console=errors, refresh_per_second=2, transient=True) if errors.is_terminal else None
        self._before: dict[str, str] = {}

    def __enter__(self) -> _Watching:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, states: Sequence[Any]) -> None:
        """Show the states of all jobs."""
        if self._live is not None:
            self._live.update(_state_table(states))
            return
        for job in states:
            if self._before.get(job.name) != job.state and (job.state != "waiting" or job.name in self._before):
                errors.print(f"{escape(job.name)}: {job.state}{f' ({escape(job.note)})' if job.note else ''}")
            self._before[job.name] = job.state


def _state_table(states: Sequence[Any]) -> Table:
    counts = {state: sum(job.state == state for job in states) for state in ORDER}
    said = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    table = Table(title=f"{len(states)} jobs: {said}", title_justify="left", box=None, pad_edge=False)
    for name in ("job", "state", "how far"):
        table.add_column(name, overflow="fold")
    first = sorted(states, key=lambda job: ORDER.index(job.state))[:ROWS_SHOWN]
    for job in first:
        table.add_row(escape(job.name), f"[{COLOURS.get(job.state, 'default')}]{job.state}[/]", escape(job.note))
    if len(states) > len(first):
        table.add_row(f"... and {len(states) - len(first)} more", "", "")
    return table
