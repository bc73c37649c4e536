"""What the window asks that takes torch: plans, segmentations, scores."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_resfinetune import api, library
from napari_resfinetune.config import FinetuneConfig, make_config, merge
from napari_resfinetune.data.pairs import to_channels
from napari_resfinetune.data.scaling import apply_scaling, measure_scaling
from napari_resfinetune.data.sources import open_array, read_plane, shape_yx
from napari_resfinetune.engine.data_verbs import put_array
from napari_resfinetune.engine.memory import Kept
from napari_resfinetune.engine.process import Request, Say
from napari_resfinetune.errors import ResFinetuneError
from napari_resfinetune.evaluation import scores
from napari_resfinetune.evaluation.errors import classify_errors, score_curve
from napari_resfinetune.events import StopToken
from napari_resfinetune.inference import TileEmbedding, check_decoder, check_mode, segment_source
from napari_resfinetune.inference.blockwise import WHOLE_UP_TO_PX
from napari_resfinetune.inference.segment import (
    Labels,
    decode_embedded,
    evaluating,
    segment_embedded,
    segment_maps,
)
from napari_resfinetune.models import SamModel, load_model
from napari_resfinetune.planning import (
    PRESETS,
    Plan,
    auto_preset,
    choose_precision,
    device_of,
    kept_where_there_is_room,
    pick_device,
    preset_fits,
    probe_hardware,
)
from napari_resfinetune.training.job import SAM_INPUT_PX
from napari_resfinetune.training.planned import architecture_of, length_of, plan_anywhere
from napari_resfinetune.training.step import DTYPES

# What is offered where a run does not fit, the smallest change first.
SMALLER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Let the last blocks learn instead", {"strategy": {"kind": "late"}}),
    ("Freeze the image encoder instead", {"strategy": {"kind": "frozen"}}),
    ("Use patches of half the size", {"data": {"patch_px": 256}, "training": {"input_px": 512}}),
    ("Start from vit_t_lm instead", {"model": "vit_t_lm"}),
    ("Start from vit_t_lm, encoder frozen", {"model": "vit_t_lm", "strategy": {"kind": "frozen"}}),
)
_kept = Kept()


class _Stopped(ResFinetuneError):
    """The window does not want the answer any more."""


def computer(request: Request, say: Say, stop: StopToken) -> dict[str, Any]:
    """Say what this computer has: device, memory, presets; also what makes the engine ready for anything else."""
    hardware = probe_hardware()
    device, notes = pick_device("auto", hardware)
    gpu = hardware.gpu(device)
    presets = [
        {
            "name": preset.name,
            "fits": preset_fits(preset, hardware)[0],
            "reason": preset_fits(preset, hardware)[1],
            "model": preset.model,
        }
        for preset in PRESETS.values()
    ]
    return {
        "device": device,
        "name": gpu.name if gpu else device.upper(),
        "memory_gb": gpu.memory_total_gb if gpu else hardware.memory_total_gb,
        "free_gb": gpu.memory_free_gb if gpu else hardware.memory_free_gb,
        "preset": auto_preset(hardware, device),
        "presets": presets,
        "notes": list(notes),
    }


def plan(request: Request, say: Say, stop: StopToken) -> dict[str, Any]:
    """Predict memory and time of ``config`` with ``held_out`` regions; where it does not fit, say what would."""
    config = make_config(request["config"], "settings")
    held_out = int(request["held_out"])
    made = _plan(config, held_out)
    answer = made.to_dict()
    patience = config.training.early_stopping or config.training.epochs
    least = min(config.training.epochs, patience + 1)
    at_least = made.seconds_first_epoch + made.seconds_per_epoch * (least - 1)
    answer["seconds_at_least"] = min(at_least, made.seconds_at_most)
    answer["smaller"] = None if made.fits else _smaller(config, held_out)
    return answer


def _plan(config: FinetuneConfig, held_out: int) -> Plan:
    return plan_anywhere(config, probe_hardware(), architecture_of(config.model), length_of(config, held_out))


def _smaller(config: FinetuneConfig, held_out: int) -> dict[str, Any] | None:
    for label, changes in SMALLER:
        candidate = make_config(merge(config.model_dump(mode="json"), changes))
        made = _plan(candidate, held_out)
        if made.fits and candidate != config:
            return {"label": label, "peak_gb": made.peak_gb, "config": candidate.model_dump(mode="json")}
    return None


def segment(request: Request, say: Say, stop: StopToken) -> dict[str, Any]:
    """Segment ``image`` (a file; ``axes`` if known) with ``model``, ``mode`` and ``parameters`` into folder ``output``.

    ``planes`` holds the one slice to segment; without it, all of a stack is. Model and embeddings of a plane are kept,
    so that other parameters take no encoder.
    """
    started = time.monotonic()
    mode, parameters = request["mode"], dict(request.get("parameters") or {})
    check_mode(mode, parameters)
    source = open_array(Path(request["image"]), axes=request.get("axes"))
    say({"text": "loading the model"})
    model = _kept.model(request["model"], request.get("device", "auto"), _decoder_for(mode))
    check_decoder(model, mode)
    settings = api.inference_settings(model, "auto", request.get("options") or {})
    planes = request.get("planes")
    height, width = shape_yx(source)
    if (planes is None and source.plane_count > 1) or height * width > WHOLE_UP_TO_PX:
        # Linked over slices, block by block where a plane is large; there is too much of it to be kept.
        on_part = _progress(say, stop, 0, 1)
        whole = segment_source(model, source, mode=mode, parameters=parameters, on_progress=on_part, **settings)
    else:
        (plane,) = planes or [None]
        scaling = measure_scaling(source, settings["channels"], settings["percentiles"])
        pixels = apply_scaling(to_channels(read_plane(source, plane), settings["channels"]), scaling)
        key = (request["image"], settings["channels"], settings["percentiles"], plane)
        with evaluating(model), kept_where_there_is_room():
            on_tile = _progress(say, stop, 0, 1)
            whole = _segment_plane(model, pixels, key, mode, settings, parameters, on_tile)
    return {
        "labels": put_array(whole, Path(request["output"]), f"labels-{request['id']}"),
        "objects": int(np.unique(whole[whole > 0]).size),
        "seconds": time.monotonic() - started,
        "model": model.name,
    }


def _segment_plane(
    model: SamModel,
    pixels: NDArray[np.float32],
    key: tuple[Any, ...],
    mode: str,
    settings: Mapping[str, Any],
    parameters: Mapping[str, Any],
    on_tile: Callable[[int, int], None],
) -> Labels:
    patch_px, precision = settings["patch_px"], settings["precision"]

    def embeddings() -> list[TileEmbedding]:
        return _kept.embeddings(key, model, pixels, patch_px=patch_px, precision=precision, on_tile=on_tile)

    def one_by_one() -> Iterator[TileEmbedding]:
        found = embeddings()
        for done, embedding in enumerate(found):
            on_tile(len(found) + done, 2 * len(found))
            yield embedding

    if mode != "ais":
        return segment_embedded(model, pixels, one_by_one(), mode=mode, precision=precision, parameters=parameters)

    def decode() -> dict[str, NDArray[np.float32]]:
        return decode_embedded(model, pixels.shape[:2], one_by_one(), precision)

    return segment_maps(model, _kept.maps((*key, patch_px), decode), parameters)


def preview(request: Request, say: Say, stop: StopToken) -> dict[str, Any]:
    """Segment plane ``plane`` of ``image`` with a checkpoint of a run that is being trained; nothing is kept.

    It takes the instance decoder: a grid of points would take minutes, in which nothing else is segmented.
    """
    config = make_config(request["config"])
    source = open_array(Path(request["image"]), axes=request.get("axes"))
    hardware = probe_hardware()
    device, _ = device_of(config.resources, hardware)
    checkpoint = Path(request["run_dir"]) / "checkpoints" / request["checkpoint"]
    model = load_model(checkpoint, decoder="required", device=device)
    data = config.data
    scaling = measure_scaling(source, data.channels, data.percentiles)
    pixels = apply_scaling(to_channels(read_plane(source, request["plane"]), data.channels), scaling)
    precision = DTYPES[choose_precision(config.resources.precision, device.partition(":")[0], hardware).name]
    patch_px = data.patch_px * SAM_INPUT_PX // config.training.input_px
    on_tile = _progress(say, stop, 0, 1)
    with evaluating(model):
        embeddings = Kept().embeddings((), model, pixels, patch_px=patch_px, precision=precision, on_tile=on_tile)
        labels = segment_embedded(model, pixels, embeddings, mode="ais", precision=precision)
    return {
        "labels": put_array(labels, Path(request["output"]), f"preview-{request['id']}"),
        "objects": int(labels.max(initial=0)),
    }


def evaluate(request: Request, say: Say, stop: StopToken) -> dict[str, Any]:
    """Score ``model`` on files ``images`` and ``labels`` in ``modes``; a row per plane and mode."""
    say({"text": "loading the model"})
    modes = request["modes"]
    decoder = "required" if {"ais", "apg"} & set(modes) else "none"
    model = _kept.model(request["model"], request.get("device", "auto"), decoder)

    def on_progress(done: int, total: int, name: str) -> None:
        _go_on_unless(stop)
        say({"text": name, "done": done, "total": total})

    found = api.evaluate(request["images"], request["labels"], model=model, modes=modes, on_progress=on_progress)
    rows = [dataclasses.asdict(row) for row in found.rows]
    return {"rows": rows, "means": found.to_dict(), "model": model.name}


def compare(request: Request, say: Say, stop: StopToken) -> dict[str, Any]:
    """Score label file ``prediction`` against ``truth``; errors come back as an image with a value for each class."""
    truth, prediction = (np.asarray(open_array(Path(request[name])).read()) for name in ("truth", "prediction"))
    row = scores.score(truth, prediction)
    errors, counts = classify_errors(truth, prediction)
    return {
        "row": {"image": request.get("name", ""), "plane": None, "mode": "layer", **row},
        "errors": put_array(errors, Path(request["output"]), f"errors-{request['id']}"),
        "counts": counts,
        "curve": score_curve(truth, prediction),
    }


def suggest(request: Request, say: Say, stop: StopToken) -> dict[str, Any]:
    """Rank ``candidates`` as models to start from for ``config``, on files ``images`` and ``labels``."""
    found = api.suggest_models(
        request["images"],
        request["labels"],
        candidates=request["candidates"],
        on_event=lambda event: say(event.to_dict()),
        stop=stop,
        **{key: value for key, value in request["config"].items() if key != "output"},
    )
    return found.to_dict()


def import_model(request: Request, say: Say, stop: StopToken) -> dict[str, Any]:
    """Take the model at ``source`` into the list in ``folder``."""
    return {"name": library.import_model(request["folder"], request["source"]).name}


def export_model(request: Request, say: Say, stop: StopToken) -> dict[str, Any]:
    """Write ``model`` to ``path``, in the format that its ending says."""
    return {"path": str(api.export_model(request["model"], request["path"]))}


def _decoder_for(mode: str) -> str:
    return "none" if mode == "amg" else "required"


def _progress(say: Say, stop: StopToken, plane: int, planes: int) -> Callable[[int, int], None]:
    def on_tile(done: int, total: int) -> None:
        _go_on_unless(stop)
        text = "looking at the image" if planes == 1 else f"slice {plane + 1} of {planes}"
        say({"text": text, "done": plane + done / total, "total": planes})

    return on_tile


def _go_on_unless(stop: StopToken) -> None:
    if stop.stopped:
        raise _Stopped("stopped")
