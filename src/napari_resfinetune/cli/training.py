"""The verbs ``train``, ``plan`` and ``resume``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from napari_resfinetune import api
from napari_resfinetune.cli.options import AsJson, Images, Labels, Set, run_values, to_config
from napari_resfinetune.cli.output import (
    STOPPED,
    TrainingProgress,
    errors,
    escape,
    plain_errors,
    print_json,
    results,
    stop_on_interrupt,
)
from napari_resfinetune.config import parse_overrides
from napari_resfinetune.errors import ConfigError, ResourceError
from napari_resfinetune.training.ranks import is_first_rank
from napari_resfinetune.words import duration

ConfigFile = Annotated[
    Path | None, typer.Argument(metavar="CONFIG.yaml", help="Configuration as YAML; options below go over it.")
]
StartModel = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="MODEL", help="Start from this name, checkpoint, run folder or adapter."),
]
StrategyName = Annotated[
    str | None,
    typer.Option("--strategy", "-s", metavar="NAME", help="What learns: full, late, lora, late_lora or frozen."),
]
PresetName = Annotated[str | None, typer.Option("--preset", "-p", metavar="NAME", help="Hardware preset, or auto.")]
Isolate = Annotated[
    bool,
    typer.Option(
        "--isolate", help="Train in a process of its own; if the system kills it, this one says so, and how to go on."
    ),
]
Processes = Annotated[
    int,
    typer.Option(
        "--processes",
        metavar="N",
        help="Share every step among N processes, on CPUs or with a card each; training.batch_size is that of all.",
    ),
]


def train(
    config: ConfigFile = None,
    images: Images = None,
    labels: Labels = None,
    model: StartModel = None,
    strategy: StrategyName = None,
    preset: PresetName = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="RUN", help="New folder for the run.")
    ] = None,
    isolate: Isolate = False,
    processes: Processes = 1,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Finetune a model on images and labels.

    Ctrl-C saves a checkpoint and stops; go on with: resfinetune resume RUN.
    """
    with plain_errors():
        values = run_values(images, labels, model, strategy, preset)
        if output is not None:
            values["output"] = str(output)
        settings = to_config(config, values, set_)
        with stop_on_interrupt() as stop, TrainingProgress() as progress:
            result = api.train(
                settings, on_event=progress, stop=stop, isolate=isolate, processes=processes, enforce_limits=True
            )
        _end(result, as_json)


def plan(
    config: ConfigFile = None,
    images: Images = None,
    labels: Labels = None,
    model: StartModel = None,
    strategy: StrategyName = None,
    preset: PresetName = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Say what a training run would take, and what is switched on to make it fit, before it starts.

    A preset for another computer is planned as if on it. Exit status 3: it does not fit.
    """
    with plain_errors():
        found = api.plan(to_config(config, run_values(images, labels, model, strategy, preset), set_))
        if as_json:
            print_json(found.to_dict())
        else:
            _print_plan(found)
    if not found.fits:
        raise typer.Exit(ResourceError.exit_status)


def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.")],
    epochs: Annotated[int | None, typer.Option(help="A new number of epochs.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="A new number of minutes, those of before included; see training.minutes.")
    ] = None,
    isolate: Isolate = False,
    processes: Processes = 1,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A key of resources, as in --set resources.memory_gb=12."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Continue a run exactly where it stopped."""
    with plain_errors():
        changes = parse_overrides(set_ or [])
        others = sorted(set(changes) - {"resources"})
        if others:
            raise ConfigError(
                f"--set {others[0]}: a run keeps it; only resources (and --epochs, --minutes) may change on resume"
            )
        with stop_on_interrupt() as stop, TrainingProgress() as progress:
            result = api.resume(
                run,
                epochs=epochs,
                minutes=minutes,
                resources=changes.get("resources"),
                on_event=progress,
                stop=stop,
                isolate=isolate,
                processes=processes,
                enforce_limits=True,
            )
        _end(result, as_json)


def _print_plan(plan: Any) -> None:
    work = plan.work
    verdict = "fits" if plan.fits else "[bold red]does not fit[/]"
    results.print(
        f"{work.architecture}, {work.strategy.kind}, {work.objects} objects, {work.device} in {work.precision}"
    )
    results.print(f"memory  {plan.peak_gb:.1f} of {plan.limit_gb:.1f} GB: {verdict}")
    for name, gb in plan.breakdown_gb.items():
        results.print(f"        {gb:5.2f} GB {name}")
    first = f" (the first: {duration(plan.seconds_first_epoch)})" if work.keep_features else ""
    results.print(
        f"time    {duration(plan.seconds_per_step)} a step, {duration(plan.seconds_per_epoch)} an epoch{first}, "
        f"at most {duration(plan.seconds_at_most)} in all"
    )
    results.print(f"disk    {plan.disk_gb:.1f} GB")
    if plan.levers:
        results.print("to fit, these are switched on:")
        for pulled in plan.levers:
            results.print(f"        {escape(pulled)}")
    for advice in plan.advice:
        results.print(f"also    {escape(advice)}")
    if not plan.measured:
        results.print("note    nothing was trained on this computer yet; the next plan will be nearer")


def _end(result: api.TrainResult, as_json: bool) -> None:
    if not is_first_rank():  # of processes that torchrun began
        return
    if as_json:
        print_json(result.to_dict())
    words = {
        "finished": "finished",
        "early_stopped": "stopped early, since it no longer improved",
        "stopped": "stopped",
    }
    if result.status == "stopped":
        errors.print(f"stopped; go on with: resfinetune resume {escape(result.run_dir)}")
        raise typer.Exit(STOPPED)
    if not as_json:
        best = "no validation" if result.best_metric is None else f"validation {result.best_metric:.3f}"
        results.print(
            f"{words[result.status]}: best epoch {result.best_epoch + 1}, {best}, "
            f"{duration(result.seconds)}, peak {result.peak_memory_gb:.1f} GB"
        )
        if result.comparison is not None:
            results.print(escape(result.comparison["sentence"]))
        results.print(f"model: {escape(result.run_dir / 'model.pt')}")
        if (result.run_dir / "report.html").is_file():
            results.print(f"report: {escape(result.run_dir / 'report.html')}")
        results.print(f"next:  resfinetune segment --model {escape(result.run_dir)} --images FOLDER --output FOLDER")
