"""One call per verb, over one configuration: what scripts, the command and the window all use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from napari_resfinetune.config import FinetuneConfig, as_config, make_config, merge, not_given
from napari_resfinetune.errors import ConfigError
from napari_resfinetune.events import OnEvent, StopToken
from napari_resfinetune.training.result import TrainResult

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from napari_resfinetune.data.doctor import CheckReport
    from napari_resfinetune.evaluation import Evaluation
    from napari_resfinetune.inference import SegmentedFile
    from napari_resfinetune.models import SamModel
    from napari_resfinetune.planning import Plan

_LINKING = ("link", "gap_closing", "min_z_extent")


def train(
    images: Any = None,
    labels: Any = None,
    *,
    output: str | Path | None = None,
    on_event: OnEvent | None = None,
    stop: StopToken | None = None,
    resume: bool = False,
    isolate: bool = False,
    enforce_limits: bool = False,
    **settings: Any,
) -> TrainResult:
    """Finetune a model on labelled images.

    Parameters
    ----------
    images, labels
        A folder, a glob, a list of paths, or a list of arrays ("YX", "YXC", "ZYX"); labels hold one id per object, 0 is
        background. Or one `FinetuneConfig` as the only positional argument.
    output
        The run folder; it must be new or empty, unless `resume`.
    on_event
        Called with every event, in this thread.
    stop
        Ask it to stop and the run saves a checkpoint and ends after the current step.
    resume
        Continue the run in `output` when there is one.
    isolate
        Train in a process of its own, inside its limits: on Linux the system refuses it more memory, all of it is given
        back at the end, and a process that is killed leaves its checkpoint and an error here.
    enforce_limits
        Let the system keep the limits for this process too, all of it, while it trains; without, training looks after
        each step whether it is inside them.
    **settings
        ``model``, ``strategy`` and ``preset`` by name, and the sections ``data``, ``training``, ``resources`` as
        mappings, with the keys of `FinetuneConfig`.

    Returns
    -------
    TrainResult

    Raises
    ------
    ConfigError, DataError, ModelError, ResourceError, TrainingError
        Before anything is written wherever possible.
    """
    with_settings = bool(settings) or isinstance(images, FinetuneConfig)
    config, images, labels = as_config(images, labels, output, settings)
    output = config.output
    if output is None:
        problem = "output: not given; name a new folder for the run, as in --output runs/my-cells"
        raise ConfigError(problem, *not_given(config, images, labels))
    if resume and (output / "config.yaml").is_file():
        from napari_resfinetune.training.run_folder import open_run

        written = open_run(output)[1].model_copy(update={"output": output})
        config = _same_run(written, config, whole=with_settings)
    else:
        from napari_resfinetune.training.run_folder import check_output

        resume = False
        check_output(output)
    return _train(config, images, labels, on_event, stop, resume=resume, isolate=isolate, enforce=enforce_limits)


def resume(
    run_dir: str | Path,
    images: Any = None,
    labels: Any = None,
    *,
    on_event: OnEvent | None = None,
    stop: StopToken | None = None,
    epochs: int | None = None,
    resources: Mapping[str, Any] | None = None,
    isolate: bool = False,
    enforce_limits: bool = False,
) -> TrainResult:
    """Continue a run exactly where it was.

    Parameters
    ----------
    run_dir
        The run folder.
    images, labels
        Needed only for a run that was given arrays.
    on_event, stop
        As for `train`.
    epochs
        A new number of epochs.
    resources
        Changes to that section of the configuration, as ``{"memory_gb": 12}``. What an earlier session had to switch on
        when its memory ran out is then no longer kept.
    isolate, enforce_limits
        As for `train`.

    Raises
    ------
    ConfigError
        When there is no run.
    """
    from napari_resfinetune.training.run_folder import open_run

    _, config = open_run(Path(run_dir))
    config = config.model_copy(update={"output": Path(run_dir)})
    changes: dict[str, Any] = {"resources": resources or {}}
    if epochs is not None:
        changes["training"] = {"epochs": epochs}
    config = make_config(merge(config.model_dump(mode="json"), changes), "resume")
    return _train(
        config,
        images,
        labels,
        on_event,
        stop,
        resume=True,
        isolate=isolate,
        enforce=enforce_limits,
        keep_levers=not resources,
    )


def plan(images: Any = None, labels: Any = None, **settings: Any) -> Plan:
    """Say what a training run would take, before it starts.

    Parameters
    ----------
    images, labels
        As for `train`; without them, two held-out images are assumed.
    **settings
        As for `train`. A preset for another computer than this one is planned as if on it.

    Returns
    -------
    Plan
        Memory, time, disk, and which levers were switched on to make it fit.

    Raises
    ------
    ConfigError, DataError, ModelError
        For settings or data that a run would refuse.
    """
    from napari_resfinetune.planning import probe_hardware
    from napari_resfinetune.training.planned import architecture_of, length_of, plan_anywhere
    from napari_resfinetune.training.prepare import open_data

    config, images, labels = as_config(images, labels, None, settings)
    hardware = probe_hardware()
    architecture = architecture_of(config.model)
    if images is None and config.data.images is None:
        held_out = 2
    else:
        held_out = len(open_data(config, images, labels).split.validation)
    return plan_anywhere(config, hardware, architecture, length_of(config, held_out))


def check(images: Any = None, labels: Any = None, **settings: Any) -> CheckReport:
    """Look for everything that is wrong with images and labels, before any model is loaded.

    Parameters
    ----------
    images, labels
        As for `train`.
    **settings
        The section ``data`` as for `train`.

    Returns
    -------
    CheckReport
        ``errors`` stop a training, ``warnings`` do not; each names its fix.

    Raises
    ------
    DataError
        When there is nothing to look at.
    """
    from napari_resfinetune.data.doctor import check_pairs
    from napari_resfinetune.data.pairs import find_pairs, join_held_out

    config, images, labels = as_config(images, labels, None, settings)
    data = config.data
    images, labels = images if images is not None else data.images, labels if labels is not None else data.labels
    missing = not_given(config, images, labels)
    if missing:
        raise ConfigError(*missing)
    where: dict[str, Any] = data.model_dump(include={"image_key", "label_key", "axes", "channels"})
    pairs = find_pairs(images, labels, **where)
    if data.validation_images is not None:
        pairs = join_held_out(pairs, find_pairs(data.validation_images, data.validation_labels, **where))
    return check_pairs(pairs, patch_px=data.patch_px, min_object_px=data.min_object_px)


def load_model(model: str | Path, *, device: str = "auto", decoder: str = "none") -> SamModel:
    """Load a model by name, from a checkpoint, or from a run folder.

    Parameters
    ----------
    model
        A name such as "vit_b_lm", the path of a checkpoint, or of a run folder.
    device
        "auto", "cpu", "cuda" or "mps".
    decoder
        "required" refuses a model without instance decoder, "new" makes one where it lacks, "none" leaves it out.

    Raises
    ------
    ModelError
        When it cannot be loaded.
    """
    from napari_resfinetune.models import load_model as load
    from napari_resfinetune.planning import pick_device, probe_hardware

    name, _ = pick_device(device, probe_hardware())
    return load(model, decoder=decoder, device=name)  # type: ignore[arg-type]


def segment(
    image: Any, *, model: str | Path | SamModel, mode: str = "ais", device: str = "auto", **options: Any
) -> NDArray[np.uint32]:
    """Segment one image.

    Parameters
    ----------
    image
        Array "YX", "YXC" or "ZYX", or the path of an image file.
    model
        As for `load_model`, or a loaded model.
    mode
        "ais" uses the instance decoder, "amg" SAM's grid of points.
    device
        "auto", "cpu", "cuda" or "mps".
    **options
        ``axes``, ``channels``, ``percentiles``, ``patch_px`` when they differ from what the model was trained with;
        ``link`` (by default, objects keep their id over the slices of a stack, and not over the frames of a time
        series), ``gap_closing`` and ``min_z_extent`` as for `inference.link_slices`.

    Returns
    -------
    uint32 array, "YX" or "ZYX": one id per object, 0 is background.
    """
    (labels,) = (result for _, result in segment_many([image], model=model, mode=mode, device=device, **options))
    return labels


def segment_many(
    images: Any, *, model: str | Path | SamModel, mode: str = "ais", device: str = "auto", **options: Any
) -> Iterator[tuple[str, NDArray[np.uint32]]]:
    """Segment images one by one, with the model loaded once.

    Parameters
    ----------
    images
        As for `train`.
    model, mode, device, **options
        As for `segment`.

    Yields
    ------
    name
        Stem of the file, or "array 1" and so on.
    labels
        As `segment` returns.
    """
    from napari_resfinetune.data.pairs import check_channels, find_images
    from napari_resfinetune.inference import check_mode, segment_source

    check_mode(mode)
    sources = find_images(images, image_key=options.pop("image_key", None), axes=options.pop("axes", None))
    linking = {name: options.pop(name) for name in _LINKING if name in options}
    loaded = _loaded(model, [mode], device)
    settings = _inference_settings(loaded, device, options) | linking
    check_channels(sources, settings["channels"])
    for source in sources:
        yield source.name, segment_source(loaded, source, mode=mode, **settings)


def segment_files(
    images: Any,
    output: str | Path,
    *,
    model: str | Path | SamModel,
    mode: str = "ais",
    device: str = "auto",
    format: str = "tiff",
    overwrite: bool = False,
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    **options: Any,
) -> Iterator[SegmentedFile]:
    """Segment images of any size into a folder, one after the other as the result is asked for.

    Parameters
    ----------
    images
        As for `train`.
    output
        The folder; each label image has the name of its image.
    model, mode, device, **options
        As for `segment`.
    format
        "tiff" or "zarr" (OME-Zarr with a pyramid).
    overwrite
        Replace label images that another model, other settings or something else has made. Those of the same
        model, settings and image are kept in any case, so that an interrupted job goes on.
    on_progress
        Called with the name of the image, and windows of it done and in all.

    Yields
    ------
    SegmentedFile
        ``image``, ``labels`` (path), ``objects``, ``kept``.

    Raises
    ------
    ConfigError, DataError, ModelError, ResourceError
    """
    from napari_resfinetune.data.pairs import check_channels, find_images
    from napari_resfinetune.inference import check_mode, label_paths
    from napari_resfinetune.inference import segment_files as segment_sources
    from napari_resfinetune.training.run_folder import check_writable

    check_mode(mode)
    check_writable(Path(output))
    sources = find_images(images, image_key=options.pop("image_key", None), axes=options.pop("axes", None))
    label_paths(sources, Path(output), format, overwrite=overwrite)
    linking = {name: options.pop(name) for name in _LINKING if name in options}
    loaded = _loaded(model, [mode], device)
    settings = _inference_settings(loaded, device, options) | linking
    check_channels(sources, settings["channels"])
    how: dict[str, Any] = {"form": format, "overwrite": overwrite, "on_progress": on_progress}
    yield from segment_sources(loaded, sources, Path(output), mode=mode, **how, **settings)


def evaluate(
    images: Any,
    labels: Any,
    *,
    model: str | Path | SamModel,
    modes: Sequence[str] = ("ais",),
    device: str = "auto",
    on_progress: Callable[[int, int, str], None] | None = None,
    **options: Any,
) -> Evaluation:
    """Score a model on labelled images.

    Parameters
    ----------
    images, labels
        As for `train`.
    model
        As for `segment`.
    modes
        Any of "ais", "amg", "box", "point".
    device
        As for `segment`.
    on_progress
        Called with images done, images in all, and the name of the next.
    **options
        As for `segment`, and ``image_key``, ``label_key``, ``min_object_px``.

    Returns
    -------
    Evaluation
        ``rows`` per image and mode, and means per mode as ``to_dict()``.
    """
    from napari_resfinetune.data.doctor import check_pairs
    from napari_resfinetune.data.pairs import find_pairs
    from napari_resfinetune.evaluation import check_modes, evaluate_model

    check_modes(modes)
    where = {name: options.pop(name, None) for name in ("image_key", "label_key", "axes")}
    pairs = find_pairs(images, labels, channels=options.get("channels"), **where)
    min_object_px = options.pop("min_object_px", 25)
    before = check_pairs(pairs, min_object_px=min_object_px)
    # Which channels to look at is the model's to say, so that alone is judged once it is loaded.
    replace(before, errors=tuple(problem for problem in before.errors if problem.code != "channels")).raise_for_errors()
    loaded = _loaded(model, modes, device)
    settings = _inference_settings(loaded, device, options)
    channels = settings.pop("channels")
    pairs = replace(pairs, pairs=tuple(replace(pair, channels=channels) for pair in pairs.pairs))
    check_pairs(pairs, min_object_px=min_object_px).raise_for_errors()
    return evaluate_model(loaded, pairs, modes=tuple(modes), on_progress=on_progress, **settings)


def export_model(model: str | Path, path: str | Path, **options: Any) -> Path:
    """Write a model for other tools: micro-sam's checkpoint (.pt), a bioimage.io package (.zip), an adapter (folder).

    Parameters
    ----------
    model
        As for `load_model`.
    path
        Where to; nothing is overwritten.
    **options
        As for `napari_resfinetune.library.export.export_model`.

    Returns
    -------
    Path
        What was written.

    Raises
    ------
    ConfigError, ModelError
    """
    from napari_resfinetune.library.export import export_model as export

    return export(model, path, **options)


def doctor() -> dict[str, Any]:
    """Say what this computer has and what of the product works on it, as plain data."""
    from napari_resfinetune.planning import doctor_report

    return doctor_report()


def _same_run(written: FinetuneConfig, asked: FinetuneConfig, *, whole: bool) -> FinetuneConfig:
    """Let a resumed run differ from what is written in its number of epochs and in resources only.

    `whole` says whether `asked` holds settings at all, or paths of the data only.
    """
    data = asked.data.with_absolute_paths()
    named = {name: getattr(data, name) for name in ("images", "labels") if getattr(data, name) is not None}
    differs = [f"data.{name}" for name, value in named.items() if value != getattr(written.data, name)]
    if whole:
        # What a preset or strategy decided when the run began is no difference.
        decided = {
            name: getattr(written.training, name)
            for name in ("objects", "patch_bank")
            if getattr(asked.training, name) is None
        }
        training = asked.training.model_copy(update={"epochs": written.training.epochs, **decided})
        kept = {name: getattr(written.data, name) for name in ("images", "labels")}
        pairs = {
            "data": (data.model_copy(update=kept), written.data),
            "model": (asked.model, written.model)
            if not Path(asked.model).exists()
            else (str(Path(asked.model).absolute()), written.model),
            "strategy": (asked.strategy, written.strategy),
            "training": (training, written.training),
        }
        differs += [name for name, (now, before) in pairs.items() if now != before]
    if differs:
        raise ConfigError(
            f"{written.output}: holds a run with another {' and another '.join(differs)}; choose another folder, "
            "or resume it with what its config.yaml names"
        )
    if not whole:
        return written
    epochs = written.training.model_copy(update={"epochs": asked.training.epochs})
    return written.model_copy(update={"training": epochs, "resources": asked.resources})


def _train(
    config: FinetuneConfig,
    images: Any,
    labels: Any,
    on_event: OnEvent | None,
    stop: StopToken | None,
    *,
    resume: bool,
    isolate: bool,
    enforce: bool,
    keep_levers: bool = True,
) -> TrainResult:
    how: dict[str, Any] = {"on_event": on_event, "stop": stop, "resume": resume, "keep_levers": keep_levers}
    if isolate:
        from napari_resfinetune.training.child import train_in_child

        return train_in_child(config, images, labels, **how)
    from napari_resfinetune.training.session import run_training

    return run_training(config, images, labels, enforce=enforce, **how)


def _loaded(model: str | Path | SamModel, modes: Sequence[str], device: str) -> SamModel:
    if not isinstance(model, str | Path):
        return model
    return load_model(model, device=device, decoder="required" if {"ais", "apg"} & set(modes) else "none")


def _inference_settings(model: SamModel, device: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Scale images as the model saw them in training, unless told otherwise."""
    from napari_resfinetune.config import DataConfig
    from napari_resfinetune.planning import choose_precision, probe_hardware
    from napari_resfinetune.training.step import DTYPES

    unknown = set(options) - {"channels", "percentiles", "patch_px"}
    if unknown:
        raise ConfigError(
            f"{', '.join(sorted(unknown))}: unknown option; known are channels, percentiles, patch_px, axes, and for "
            f"segmentation {', '.join(_LINKING)}"
        )
    defaults = DataConfig()
    trained = model.meta
    channels = options.get("channels", trained.get("channels"))
    actual = str(next(model.parameters()).device.type)
    return {
        "channels": tuple(channels) if channels is not None else None,
        "percentiles": tuple(options.get("percentiles") or trained.get("percentiles") or defaults.percentiles),
        "patch_px": options.get("patch_px") or trained.get("patch_px") or defaults.patch_px,
        "precision": DTYPES[choose_precision("auto", actual, probe_hardware()).name],
    }
