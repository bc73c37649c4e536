"""Use a model: load, segment, score, export."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from napari_resfinetune.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from napari_resfinetune.data.doctor import CheckReport
    from napari_resfinetune.data.pairs import Pairs
    from napari_resfinetune.evaluation import Evaluation
    from napari_resfinetune.inference import SegmentedFile
    from napari_resfinetune.models import SamModel

_LINKING = ("link", "gap_closing", "min_z_extent")


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
        "ais" uses the instance decoder, "apg" turns what it finds into points for the mask decoder, "amg" takes SAM's
        grid of points.
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
    from napari_resfinetune.planning import kept_where_there_is_room

    check_mode(mode)
    sources = find_images(images, image_key=options.pop("image_key", None), axes=options.pop("axes", None))
    linking = {name: options.pop(name) for name in _LINKING if name in options}
    loaded = _loaded(model, [mode], device)
    settings = inference_settings(loaded, device, options) | linking
    check_channels(sources, settings["channels"])
    with kept_where_there_is_room():
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
    model, mode, device
        As for `segment`.
    format
        "tiff" or "zarr" (OME-Zarr with a pyramid).
    overwrite
        Replace label images that another model, other settings or something else has made. Those of the same
        model, settings and image are kept in any case, so that an interrupted job goes on.
    on_progress
        Called with the name of the image, and windows of it done and in all.
    **options
        As for `segment`.

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
    from napari_resfinetune.planning import kept_where_there_is_room
    from napari_resfinetune.training.run_folder import check_writable

    check_mode(mode)
    check_writable(Path(output))
    sources = find_images(images, image_key=options.pop("image_key", None), axes=options.pop("axes", None))
    label_paths(sources, Path(output), format, overwrite=overwrite)
    linking = {name: options.pop(name) for name in _LINKING if name in options}
    loaded = _loaded(model, [mode], device)
    settings = inference_settings(loaded, device, options) | linking
    check_channels(sources, settings["channels"])
    how: dict[str, Any] = {"form": format, "overwrite": overwrite, "on_progress": on_progress}
    with kept_where_there_is_room():
        yield from segment_sources(loaded, sources, Path(output), mode=mode, **how, **settings)


def evaluate(
    images: Any,
    labels: Any,
    *,
    model: str | Path | SamModel | Sequence[str | Path | SamModel],
    modes: Sequence[str] = ("ais",),
    volumes: bool = False,
    cache: bool | str | Path = True,
    device: str = "auto",
    on_progress: Callable[[int, int, str], None] | None = None,
    on_warning: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Any:
    """Score a model, or several side by side, on labelled images.

    Parameters
    ----------
    images, labels
        As for `train`.
    model
        As for `segment`, or a list of such.
    modes
        Any of "ais", "apg", "amg", "box", "point", "iterative_box", "iterative_point".
    volumes
        Score a "ZYX" stack as one volume instead of slice by slice.
    cache
        Keep embeddings and scores in this user's cache folder, or the folder that is given, so that a second evaluation
        is quick; `False` keeps and takes nothing.
    device
        As for `segment`.
    on_progress
        Called with images done, images in all, and the name of the next.
    on_warning
        Called with sentences about images that are left out, or there twice.
    **options
        As for `segment`, and ``image_key``, ``label_key``, ``min_object_px``.

    Returns
    -------
    Evaluation
        ``rows`` per image and mode, means per mode as ``to_dict()``, and intervals, counts and sizes as ``summary()``.
        For a list of models a dict of them, by the models as they were given.
    """
    from napari_resfinetune.data.doctor import check_pairs
    from napari_resfinetune.data.pairs import find_pairs
    from napari_resfinetune.evaluation import check_modes
    from napari_resfinetune.planning import kept_where_there_is_room

    check_modes(modes)
    where = {name: options.pop(name, None) for name in ("image_key", "label_key", "axes")}
    pairs = find_pairs(images, labels, channels=options.get("channels"), **where)
    min_object_px = options.pop("min_object_px", 25)
    before = check_pairs(pairs, min_object_px=min_object_px)
    # Which channels to look at is the model's to say, so that alone is judged once it is loaded.
    replace(before, errors=tuple(problem for problem in before.errors if problem.code != "channels")).raise_for_errors()
    for problem in before.warnings:
        if problem.code in ("image-without-labels", "same-image"):
            on_warning(str(problem))
    models: list[Any] = list(model) if isinstance(model, list | tuple) else [model]
    names = [str(one) if isinstance(one, str | Path) else one.name for one in models]
    if not models or len(set(names)) < len(names):
        found = "has one twice" if models else "is empty"
        raise ConfigError(f"model: the list {found} ({', '.join(names)}); name one model, or several different ones")
    how: dict[str, Any] = {"modes": tuple(modes), "volumes": volumes, "on_progress": on_progress}
    how |= {"cache": cache, "min_object_px": min_object_px}
    evaluations = {}
    with kept_where_there_is_room():
        for name, one in zip(names, models, strict=True):
            loaded = _loaded(one, modes, device)
            settings = inference_settings(loaded, device, options)
            evaluations[name] = _evaluate_one(loaded, pairs, before, **how, **settings)
    return evaluations if isinstance(model, list | tuple) else evaluations[names[0]]


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


def inference_settings(model: SamModel, device: str, options: Mapping[str, Any]) -> dict[str, Any]:
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
    actual = model.device.type
    return {
        "channels": tuple(channels) if channels is not None else None,
        "percentiles": tuple(options.get("percentiles") or trained.get("percentiles") or defaults.percentiles),
        "patch_px": options.get("patch_px") or trained.get("patch_px") or defaults.patch_px,
        "precision": DTYPES[choose_precision("auto", actual, probe_hardware()).name],
    }


def _loaded(model: str | Path | SamModel, modes: Sequence[str], device: str) -> SamModel:
    if not isinstance(model, str | Path):
        return model
    return load_model(model, device=device, decoder="required" if {"ais", "apg"} & set(modes) else "none")


def _evaluate_one(
    model: SamModel,
    pairs: Pairs,
    checked: CheckReport,
    *,
    cache: bool | str | Path,
    min_object_px: int,
    **settings: Any,
) -> Evaluation:
    from napari_resfinetune.data.doctor import check_pairs
    from napari_resfinetune.evaluation import Store, evaluate_model, evaluation_folder

    channels = settings.pop("channels")
    if any(pair.channels != channels for pair in pairs.pairs):
        pairs = replace(pairs, pairs=tuple(replace(pair, channels=channels) for pair in pairs.pairs))
        checked = check_pairs(pairs, min_object_px=min_object_px)
    checked.raise_for_errors()
    store = None
    if cache:
        folder = evaluation_folder() if cache is True else Path(cache)
        store = Store(folder, model, patch_px=settings["patch_px"], precision=settings["precision"])
    return evaluate_model(model, pairs, store=store, **settings)
