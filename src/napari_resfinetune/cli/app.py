"""The command: its verbs in the order of its help, and those that need no file of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from napari_resfinetune import api
from napari_resfinetune.cli import inference, training
from napari_resfinetune.cli import models as models_command
from napari_resfinetune.cli.options import AsJson, Images, Labels, Set, data_values, to_config
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
from napari_resfinetune.cli.sweep import sweep
from napari_resfinetune.errors import DataError

app = typer.Typer(
    name="resfinetune",
    help="Finetune Segment Anything on your own cells, with the computer you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def doctor(as_json: AsJson = False) -> None:
    """Say what this computer has, and what of resfinetune works on it."""
    with plain_errors():
        report = api.doctor()
        if as_json:
            print_json(report)
            return
        for section in report["sections"]:
            print_table({"": "left", " ": "left"}, [[str(k), str(v)] for k, v in section["rows"]], section["title"])
            results.print()
        for advice in report["advice"]:
            results.print(f"! {escape(advice)}")


def check(images: Images = None, labels: Labels = None, set_: Set = None, as_json: AsJson = False) -> None:
    """Look for problems in images and labels, each with its fix, before any model is loaded."""
    with plain_errors():
        config = to_config(None, {"data": data_values(images, labels)}, set_)
        report = api.check(data=config.data.model_dump(mode="json", exclude_none=True))
        if as_json:
            print_json(report.to_dict())
        else:
            for problem in report.errors:
                results.print(f"[bold red]error[/]    {escape(problem)}")
            for problem in report.warnings:
                results.print(f"[yellow]warning[/]  {escape(problem)}")
            results.print(f"{len(report.errors)} errors, {len(report.warnings)} warnings")
    if report.errors:
        raise typer.Exit(DataError.exit_status)


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run folders; several are compared. Or the folder of a sweep."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE.html", help="The page; for one run its report.html, which is made anew."
        ),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="For a sweep: show the values of the published study beside.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write the report of a run anew, one page that compares several, or the tables and figures of a sweep so far."""
    with plain_errors():
        if len(runs) == 1 and (runs[0] / "sweep.yaml").is_file():
            files = api.report_sweep(runs[0], published=published)
            if as_json:
                print_json({"files": [str(path) for path in files]})
                return
            for path in files:
                results.print(escape(path))
            if not files:
                results.print("no job has given numbers yet")
            return
        page = api.report(list(runs), output)
        if as_json:
            print_json({"report": str(page)})
        else:
            results.print(f"report: {escape(page)}")


def suggest(
    images: Images = None,
    labels: Labels = None,
    candidates: Annotated[
        list[str] | None,
        typer.Option(
            "--candidates",
            "-c",
            metavar="MODEL",
            help="Names, checkpoints, run folders, adapters, or folders of them; several may follow. Default: all that "
            "are downloaded.",
        ),
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="MODEL...", help="More candidates.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Folder for a report; a stopped search goes on there."),
    ] = None,
    patches: Annotated[int, typer.Option(help="Patches of the images that are looked at, at most.")] = 16,
    pilot: Annotated[int, typer.Option(metavar="EPOCHS", help="Settle close calls by training for so long.")] = 0,
    timing: Annotated[bool, typer.Option("--timing", help="Measure what finetuning would take beside it.")] = False,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Rank models to start from on images and their labels, before any training."""
    from napari_resfinetune.cli.suggest import SearchProgress, print_remarks, print_suggestions

    with plain_errors():
        config = to_config(None, {"data": data_values(images, labels)}, set_)
        said = "stopping after this look, which is kept with --output; press Ctrl-C again to end at once"
        with stop_on_interrupt(said) as stop, SearchProgress() as progress:
            found = api.suggest_models(
                config,
                candidates=[*(candidates or []), *(more or [])] or None,
                output=output,
                patches=patches,
                pilot_epochs=pilot,
                timing=timing,
                on_event=progress,
                stop=stop,
            )
        if as_json:
            print_json([each.to_dict() for each in found])
            print_remarks(found, errors)
        else:
            print_suggestions(found)
    if found.status == "stopped":
        raise typer.Exit(STOPPED)


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="New folder for images, run and picture.")
    ] = Path("resfinetune-demo"),
    as_json: AsJson = False,
) -> None:
    """Make sample images, finetune on them for a few minutes, and show what it brought. Needs no network."""
    from napari_resfinetune.cli.demo import run_demo

    with plain_errors():
        with stop_on_interrupt() as stop:
            outcome = run_demo(output, stop, (errors if as_json else results).print)
        if as_json:
            print_json(outcome)
        if outcome["status"] == "stopped":
            raise typer.Exit(STOPPED)


for verb in (
    doctor,
    check,
    suggest,
    training.plan,
    training.train,
    training.resume,
    inference.segment,
    inference.evaluate,
    report,
    models_command.export,
    sweep,
    demo,
):
    app.command()(verb)
app.add_typer(models_command.app, name="models")
