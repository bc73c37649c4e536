"""Many image files in, label files out; what is there already, from the same model and settings, is kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from napari_resfinetune.data.sources import ArraySource, open_array, shape_yx
from napari_resfinetune.errors import ConfigError
from napari_resfinetune.inference.blockwise import WHOLE_UP_TO_PX
from napari_resfinetune.inference.files import (
    CHUNK_PX,
    SUFFIX_OF,
    Format,
    count_objects,
    new_ome_zarr,
    own_suffix,
    read_made_by,
    remove_abandoned,
    write_labels,
)
from napari_resfinetune.inference.segment import check_decoder, check_mode
from napari_resfinetune.inference.stacks import check_link, segment_source
from napari_resfinetune.models import SamModel, weights_hash

# Raise it when the same model, image and settings give other labels than before.
SEGMENTATION_VERSION = 3
OnImageProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SegmentedFile:
    """A label image on disk.

    Attributes
    ----------
    image
        Name of the image.
    labels
        Where its labels are.
    objects
        How many there are.
    kept
        Whether it was there already, made by the same model with the same settings from the same image.
    """

    image: str
    labels: Path
    objects: int
    kept: bool


@dataclass(frozen=True)
class _Task:
    """An image, where its labels go, what they will say of themselves, and whether they are there."""

    source: ArraySource
    path: Path
    note: Mapping[str, Any]
    kept: bool


def segment_files(
    model: SamModel,
    sources: Sequence[ArraySource],
    output: Path,
    *,
    mode: str = "ais",
    form: Format = "tiff",
    overwrite: bool = False,
    on_progress: OnImageProgress = lambda name, done, total: None,
    whole_up_to_px: int = WHOLE_UP_TO_PX,
    **settings: Any,
) -> Iterator[SegmentedFile]:
    """Segment images one by one into a folder.

    A label image says what made it: the hash of the weights, the settings, and the hash of the image. One that is
    there and says the same is kept, so that a long job goes on where it was interrupted. Any other one is replaced only
    with `overwrite`. Files appear whole or not at all.

    Parameters
    ----------
    model
        A loaded model.
    sources
        The images.
    output
        The folder; it need not exist.
    mode
        "ais", "apg" or "amg".
    form
        "tiff" or "zarr", an OME-Zarr with a pyramid.
    overwrite
        Replace label images that something else has made.
    on_progress
        Called with the name of the image, windows done and windows in all.
    whole_up_to_px, **settings
        As for `segment_source`.

    Yields
    ------
    SegmentedFile
        In the order of `sources`.

    Raises
    ------
    ConfigError
        When something else is there, before anything is written.
    """
    check_mode(mode, settings.get("parameters"))
    check_decoder(model, mode)
    settings = {"mode": mode, **settings}
    paths = label_paths(sources, output, form, overwrite=overwrite)
    remove_abandoned(output)
    linking = {name: settings.get(name) for name in ("link", "gap_closing", "min_z_extent")}
    links = [check_link(source, **linking) for source in sources]
    weights = _hash_model(model)
    tasks = []
    for source, path, link in zip(sources, paths, links, strict=True):
        note = _note(source, {**settings, "link": link}, whole_up_to_px)
        note = {"model": model.name, "weights_sha256": weights, **note}
        tasks.append(_Task(source, path, note, kept=path.exists() and _same(read_made_by(path), note)))
    if not overwrite:
        others = [task.path for task in tasks if task.path.exists() and not task.kept]
        _refuse(others, "by another model or with other settings")
    settings |= {"whole_up_to_px": whole_up_to_px}
    return (
        SegmentedFile(task.source.name, task.path, count_objects(_Stored(task.path)), kept=True)
        if task.kept
        else _segment_one(model, task, form, on_progress, settings)
        for task in tasks
    )


def label_paths(sources: Sequence[ArraySource], output: Path, form: str, *, overwrite: bool) -> list[Path]:
    """Return where the label images of some images go.

    Raises
    ------
    ConfigError
        For an unknown format, when an image would be replaced, or, without `overwrite`, a file that is not ours.
    """
    if form not in SUFFIX_OF:
        raise ConfigError(f"format: found {form!r}; expected one of {', '.join(SUFFIX_OF)}")
    paths = [output / f"{source.name}{SUFFIX_OF[form]}" for source in sources]
    own = {source.path.resolve() for source in sources if source.path is not None}
    replaced = [str(path) for path in paths if path.resolve() in own]
    if replaced:
        raise ConfigError(f"{replaced[0]}: is one of the images, and is never replaced; choose another folder")
    if not overwrite:
        _refuse([path for path in paths if path.exists() and read_made_by(path) is None], "by something else")
    return paths


def _refuse(taken: Sequence[Path], how: str) -> None:
    if taken:
        raise ConfigError(
            f"{taken[0]}: exists already, made {how} ({len(taken)} such files); add --overwrite (overwrite=True) to "
            "replace them, or choose another folder"
        )


def _segment_one(
    model: SamModel, task: _Task, form: Format, on_progress: OnImageProgress, settings: Mapping[str, Any]
) -> SegmentedFile:
    source, path = task.source, task.path
    path.parent.mkdir(parents=True, exist_ok=True)
    axes = "".join(axis for axis in "TZYX" if axis in source.axes)
    shape = (*[source.plane_count] * (len(axes) - 2), *shape_yx(source))
    with contextlib.ExitStack() as open_files:
        if form == "zarr":
            out = open_files.enter_context(new_ome_zarr(path, shape, task.note, axes=axes))
        elif math.prod(shape) > settings["whole_up_to_px"]:
            out = open_files.enter_context(_scratch(path.parent, shape))
        else:
            out = np.zeros(shape, np.uint32)
        segment_source(
            model,
            source,
            out=out,
            scratch=path.parent,
            on_progress=lambda done, total: on_progress(source.name, done, total),
            **settings,
        )
        objects = count_objects(out)
        if form == "tiff":
            write_labels(out, path, task.note, axes=axes)
    return SegmentedFile(source.name, path, objects, kept=False)


class _Stored:
    """A label image on disk, read in parts."""

    def __init__(self, path: Path) -> None:
        self._source = open_array(path)
        self.shape = self._source.shape

    def __getitem__(self, index: Any) -> Any:
        return self._source.read(index)


def _hash_model(model: SamModel) -> str:
    state = {f"sam.{name}": value for name, value in model.sam.state_dict().items()}
    if model.instance_decoder is not None:
        state |= {f"decoder.{name}": value for name, value in model.instance_decoder.state_dict().items()}
    return weights_hash(state)


def _note(source: ArraySource, settings: Mapping[str, Any], whole_up_to_px: int) -> dict[str, Any]:
    """Everything beside the weights that decides about the labels, as it comes back from JSON."""
    plain = {name: str(value) if name == "precision" else value for name, value in settings.items()}
    plain |= {"blockwise": math.prod(shape_yx(source)) > whole_up_to_px}
    image = {"axes": source.axes, "shape": source.shape, "sha256": _fingerprint(source)}
    note: dict[str, Any] = json.loads(
        json.dumps({"version": SEGMENTATION_VERSION, "settings": plain, "image": image}, sort_keys=True)
    )
    return note


def _same(found: Mapping[str, Any] | None, note: Mapping[str, Any]) -> bool:
    # Weights count, not what the model is called.
    return found is not None and {**found, "model": None} == {**note, "model": None}


def _fingerprint(source: ArraySource) -> str:
    """Hash a file by its content, a folder by the names, sizes and times of its files, an array by its values."""
    digest = hashlib.sha256()
    if source.path is None:
        digest.update(np.ascontiguousarray(source.read()).tobytes())
    elif source.path.is_dir():
        for file in sorted(path for path in source.path.rglob("*") if path.is_file()):
            stamp = file.stat()
            digest.update(f"{file.relative_to(source.path)} {stamp.st_size} {stamp.st_mtime_ns}\n".encode())
    else:
        with source.path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256")
    digest.update((source.key or "").encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _scratch(folder: Path, shape: tuple[int, ...]) -> Iterator[Any]:
    with tempfile.TemporaryDirectory(prefix=".labels-", suffix=own_suffix(), dir=folder) as place:
        chunks = (*[1] * (len(shape) - 2), *(min(CHUNK_PX, size) for size in shape[-2:]))
        yield zarr.create_array(Path(place) / "labels", shape=shape, chunks=chunks, dtype=np.uint32)
