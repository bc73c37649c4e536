"""The verbs of the command and their options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from napari_resfinetune import api
from napari_resfinetune.cli import models as models_command
from napari_resfinetune.cli.output import (
    STOPPED,
    TrainingProgress,
    WindowProgress,
    errors,
    plain_errors,
    print_json,
    print_table,
    results,
    stop_on_interrupt,
)
from napari_resfinetune.cli.sweep import run_in_chunks, sweep
from napari_resfinetune.config import FinetuneConfig, make_config, merge, parse_overrides, read_yaml
from napari_resfinetune.errors import ConfigError, DataError, ResourceError
from napari_resfinetune.training.ranks import is_first_rank
from napari_resfinetune.words import duration

app = typer.Typer(
    name="resfinetune",
    help="Finetune Segment Anything on your own cells, with the computer you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

app.add_typer(models_command.app, name="models")
app.command()(models_command.export)

Images = Annotated[
    list[str] | None,
    typer.Option("--images", "-i", metavar="PATH", help="Folder, glob or files with images; repeat for more."),
]
Labels = Annotated[
    list[str] | None,
    typer.Option(
        "--labels",
        "-l",
        metavar="PATH",
        help="Folder, glob or files with labels, one id per object; paired by file stem.",
    ),
]
Model = Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help="Model name, checkpoint or run folder.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Any configuration key, as in --set training.epochs=20; repeat for more."
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")
]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or mps.")]


GO_ON = "stopped; what is done is kept, and the same command goes on from there"


@app.command()
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
            results.print(f"! {advice}")


@app.command()
def check(images: Images = None, labels: Labels = None, set_: Set = None, as_json: AsJson = False) -> None:
    """Look for problems in images and labels, each with its fix, before any model is loaded."""
    with plain_errors():
        config = _config(None, {"data": _data(images, labels)}, set_)
        report = api.check(data=config.data.model_dump(mode="json", exclude_none=True))
        if as_json:
            print_json(report.to_dict())
        else:
            for problem in report.errors:
                results.print(f"[bold red]error[/]    {_markup(problem)}")
            for problem in report.warnings:
                results.print(f"[yellow]warning[/]  {_markup(problem)}")
            results.print(f"{len(report.errors)} errors, {len(report.warnings)} warnings")
    if report.errors:
        raise typer.Exit(DataError.exit_status)


OnExecutor = Annotated[
    str | None,
    typer.Option(
        "--executor",
        metavar="FILE",
        help="For thousands of images: run in chunks on a cluster (YAML file with kind: slurm) or here (local).",
    ),
]
Chunk = Annotated[int, typer.Option("--chunk", min=1, metavar="N", help="Images of a job, with --executor.")]


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


@app.command()
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
        values = _run_values(images, labels, model, strategy, preset)
        if output is not None:
            values["output"] = str(output)
        settings = _config(config, values, set_)
        with stop_on_interrupt() as stop, TrainingProgress() as progress:
            result = api.train(
                settings, on_event=progress, stop=stop, isolate=isolate, processes=processes, enforce_limits=True
            )
        _end(result, as_json)


@app.command()
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
        found = api.plan(_config(config, _run_values(images, labels, model, strategy, preset), set_))
        if as_json:
            print_json(found.to_dict())
        else:
            _print_plan(found)
    if not found.fits:
        raise typer.Exit(ResourceError.exit_status)


@app.command()
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


@app.command()
def segment(
    images: Images = None,
    model: Model = "vit_b_lm",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Folder for one label image per image.")
    ] = None,
    mode: Annotated[
        str, typer.Option(metavar="NAME", help="ais or apg (with the instance decoder), or amg (grid of points).")
    ] = "ais",
    form: Annotated[str, typer.Option("--format", metavar="NAME", help="tiff, or zarr (OME-Zarr, pyramid).")] = "tiff",
    link: Annotated[
        bool | None,
        typer.Option(
            "--link/--no-link",
            help="Whether objects keep their id from plane to plane. Default: in stacks, not in time series.",
        ),
    ] = None,
    gap_closing: Annotated[
        int | None, typer.Option(metavar="N", help="Fill pieces that are missing in up to N slices.")
    ] = None,
    min_z_extent: Annotated[int | None, typer.Option(metavar="N", help="Drop objects in fewer than N slices.")] = None,
    device: Device = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace label images of other models, settings or origin.")
    ] = False,
    executor: OnExecutor = None,
    chunk: Chunk = 100,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Segment images: one label image per image, under the same stem.

    Those that the same model made with the same settings are kept: after an interruption, give the same command again.
    """
    with plain_errors(GO_ON):
        data = _config(None, {"data": _data(images, None)}, set_).data
        if executor is not None:
            arguments = ["--model", model, "--mode", mode, "--device", device, "--format", form, *_again(set_)]
            arguments += [] if link is None else ["--link" if link else "--no-link"]
            arguments += [] if gap_closing is None else ["--gap-closing", str(gap_closing)]
            arguments += [] if min_z_extent is None else ["--min-z-extent", str(min_z_extent)]
            arguments += ["--overwrite"] if overwrite else []
            run_in_chunks("segment", data, output, arguments, executor, chunk, as_json)
            return
        if data.images is None or output is None:
            raise ConfigError("segment: --images and --output are both needed")
        linking = {"link": link, "gap_closing": gap_closing, "min_z_extent": min_z_extent}
        written = []
        with WindowProgress() as progress:
            for file in api.segment_files(
                data.images,
                output,
                model=model,
                mode=mode,
                device=device,
                format=form,
                overwrite=overwrite,
                on_progress=progress,
                **_inference(data, set_),
                **{name: value for name, value in linking.items() if value is not None},
            ):
                labels = {"labels": str(file.labels), "objects": file.objects, "kept": file.kept}
                written.append({"image": file.image, **labels})
                progress.say(f"{file.image}: {file.objects} objects" + (", was there already" if file.kept else ""))
        if as_json:
            print_json({"model": model, "mode": mode, "results": written})
        else:
            results.print(f"{len(written)} label images in {output}")


@app.command()
def evaluate(
    images: Images = None,
    labels: Labels = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="Model name, checkpoint or run folder; repeat to compare several."
        ),
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="ais, apg, amg, box, point, iterative_box or iterative_point; repeat for more. Default: ais.",
        ),
    ] = None,
    volumes: Annotated[bool, typer.Option("--volumes", help="Score a stack as one volume, not each slice.")] = False,
    device: Device = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            "--csv",
            "--output",
            "-o",
            metavar="FILE",
            help="Also write one line per model and image as CSV; a folder for chunks.",
        ),
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep embeddings and scores, and take those that are kept.")
    ] = True,
    executor: OnExecutor = None,
    chunk: Chunk = 100,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Score models on labelled images: SA50, SA75, mSA and more, with intervals and kinds of error."""
    from napari_resfinetune.cli.scores import print_scores, scores_as_json
    from napari_resfinetune.evaluation import write_rows
    from napari_resfinetune.training.run_folder import check_writable

    with plain_errors(GO_ON):
        data = _config(None, {"data": _data(images, labels)}, set_).data
        if executor is not None:
            modes = [word for name in mode or ["ais"] for word in ("--mode", name)]
            models = [word for name in model or ["vit_b_lm"] for word in ("--model", name)]
            arguments = [*models, *modes, "--device", device, *_again(set_)]
            arguments += [*(["--volumes"] if volumes else []), *([] if cache else ["--no-cache"])]
            run_in_chunks("evaluate", data, output, arguments, executor, chunk, as_json)
            return
        if data.images is None or data.labels is None:
            raise ConfigError("evaluate: --images and --labels are both needed")
        if output is not None and output.exists():
            raise ConfigError(f"{output}: exists already and is not overwritten; name another file")
        if output is not None:
            check_writable(output.parent)
        found = api.evaluate(
            data.images,
            data.labels,
            model=list(dict.fromkeys(model or ["vit_b_lm"])),
            modes=tuple(mode or ["ais"]),
            volumes=volumes,
            cache=cache,
            device=device,
            on_progress=lambda done, total, name: errors.print(f"{done} of {total}: {_markup(name)}"),
            on_warning=lambda text: errors.print(f"note: {_markup(text)}"),
            **_inference(data, set_),
            label_key=data.label_key,
            min_object_px=data.min_object_px,
        )
        if output is not None:
            write_rows(output, found)
        if as_json:
            print_json(scores_as_json(found))
        else:
            print_scores(found)


@app.command()
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
                results.print(str(path))
            if not files:
                results.print("no job has given numbers yet")
            return
        page = api.report(list(runs), output)
        if as_json:
            print_json({"report": str(page)})
        else:
            results.print(f"report: {_markup(page)}")


@app.command()
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
    from napari_resfinetune.cli.suggest import SearchProgress, print_suggestions

    with plain_errors():
        config = _config(None, {"data": _data(images, labels)}, set_)
        with stop_on_interrupt() as stop, SearchProgress() as progress:
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
        else:
            print_suggestions(found)
    if found.status == "stopped":
        raise typer.Exit(STOPPED)


@app.command()
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


app.command()(sweep)


def _data(images: list[str] | None, labels: list[str] | None) -> dict[str, Any]:
    named = {"images": images, "labels": labels}
    return {name: value[0] if len(value) == 1 else value for name, value in named.items() if value}


def _run_values(
    images: list[str] | None, labels: list[str] | None, model: str | None, strategy: str | None, preset: str | None
) -> dict[str, Any]:
    values: dict[str, Any] = {"data": _data(images, labels)}
    if model is not None:
        values["model"] = model
    if strategy is not None:
        values["strategy"] = {"kind": strategy}
    if preset is not None:
        values["resources"] = {"preset": preset}
    return values


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
            results.print(f"        {_markup(pulled)}")
    for advice in plan.advice:
        results.print(f"also    {_markup(advice)}")
    if not plan.measured:
        results.print("note    nothing was trained on this computer yet; the next plan will be nearer")


def _config(path: Path | None, options: Mapping[str, Any], overrides: list[str] | None) -> FinetuneConfig:
    values = read_yaml(path) if path is not None else {}
    return make_config(merge(values, options, parse_overrides(overrides or [])), str(path or "options"))


def _again(overrides: list[str] | None) -> list[str]:
    return [word for override in overrides or [] for word in ("--set", override)]


def _inference(data: Any, overrides: list[str] | None) -> dict[str, Any]:
    """Pass on only what was asked for, so that a model's own settings count otherwise."""
    asked = parse_overrides(overrides or []).get("data", {})
    names = ("channels", "percentiles", "patch_px", "axes", "image_key")
    return {name: getattr(data, name) for name in names if name in asked}


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
        errors.print(f"stopped; go on with: resfinetune resume {result.run_dir}")
        raise typer.Exit(STOPPED)
    if not as_json:
        best = "no validation" if result.best_metric is None else f"validation {result.best_metric:.3f}"
        results.print(
            f"{words[result.status]}: best epoch {result.best_epoch + 1}, {best}, "
            f"{duration(result.seconds)}, peak {result.peak_memory_gb:.1f} GB"
        )
        if result.comparison is not None:
            results.print(_markup(result.comparison["sentence"]))
        results.print(f"model: {result.run_dir / 'model.pt'}")
        if (result.run_dir / "report.html").is_file():
            results.print(f"report: {result.run_dir / 'report.html'}")
        results.print(f"next:  resfinetune segment --model {result.run_dir} --images FOLDER --output FOLDER")


def _markup(problem: Any) -> str:
    return str(problem).replace("[", r"\[")
