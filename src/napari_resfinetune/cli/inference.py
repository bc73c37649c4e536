"""The verbs ``segment`` and ``evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from napari_resfinetune import api
from napari_resfinetune.cli.options import AsJson, Images, Labels, Set, data_values, to_config
from napari_resfinetune.cli.output import WindowProgress, errors, escape, plain_errors, print_json, results
from napari_resfinetune.cli.sweep import run_in_chunks
from napari_resfinetune.config import parse_overrides
from napari_resfinetune.errors import ConfigError

GO_ON = "stopped; what is done is kept, and the same command goes on from there"

Model = Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help="Model name, checkpoint or run folder.")]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or mps.")]
OnExecutor = Annotated[
    str | None,
    typer.Option(
        "--executor",
        metavar="WHERE",
        help="For thousands of images: run in chunks, on a cluster (its YAML file, or the address of a dask "
        "scheduler) or here (local).",
    ),
]
Chunk = Annotated[int, typer.Option("--chunk", min=1, metavar="N", help="Images of a job, with --executor.")]


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
        data = to_config(None, {"data": data_values(images, None)}, set_).data
        if executor is not None:
            arguments = ["--model", model, "--mode", mode, "--device", device, "--format", form, *_words_of(set_)]
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
            results.print(f"{len(written)} label images in {escape(output)}")


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
        data = to_config(None, {"data": data_values(images, labels)}, set_).data
        if executor is not None:
            modes = [word for name in mode or ["ais"] for word in ("--mode", name)]
            models = [word for name in model or ["vit_b_lm"] for word in ("--model", name)]
            arguments = [*models, *modes, "--device", device, *_words_of(set_)]
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
            on_progress=lambda done, total, name: errors.print(f"{done} of {total}: {escape(name)}"),
            on_warning=lambda text: errors.print(f"note: {escape(text)}"),
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


def _words_of(overrides: list[str] | None) -> list[str]:
    return [word for override in overrides or [] for word in ("--set", override)]


def _inference(data: Any, overrides: list[str] | None) -> dict[str, Any]:
    """Pass on only what was asked for, so that a model's own settings count otherwise."""
    asked = parse_overrides(overrides or []).get("data", {})
    names = ("channels", "percentiles", "patch_px", "axes", "image_key")
    return {name: getattr(data, name) for name in names if name in asked}
