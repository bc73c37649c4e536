"""Weights out of bioimage.io packages, and nothing else out of them: what code they bring is never looked at.

The format is that of https://github.com/bioimage-io/spec-bioimage-io, a zip with a description in YAML.
"""

from __future__ import annotations

import contextlib
import json
import lzma
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from napari_resfinetune.errors import ModelError

META = "resfinetune.json"
_DESCRIPTIONS = ("rdf.yaml", "bioimageio.yaml", "model.yaml")
_WEIGHTS = ("pytorch_state_dict",)
_MAX_DESCRIPTION_BYTES = 5_000_000
_UNREADABLE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError)


def is_package(path: Path) -> bool:
    """Tell whether a file is a bioimage.io package. Checkpoints of torch are zip files too."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as file:
            return any(name in _DESCRIPTIONS for name in file.namelist())
    except zipfile.BadZipFile:
        return False


@contextlib.contextmanager
def unpacked_weights(path: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Copy the weights of a package to a temporary file.

    Parameters
    ----------
    path
        The package.

    Yields
    ------
    path
        The file with the weights, as it is in the package.
    meta
        What our own export says of the model; empty for packages from elsewhere.

    Raises
    ------
    ModelError
        When it is damaged, is no model, or has its weights in another format or elsewhere.
    """
    try:
        with zipfile.ZipFile(path) as file, tempfile.TemporaryDirectory(prefix="resfinetune-") as folder:
            member = _weights_member(path, file)
            target = Path(folder) / "weights.pt"
            _check_room(path, file.getinfo(member).file_size, Path(folder))
            with file.open(member) as packed, target.open("wb") as out:
                shutil.copyfileobj(packed, out, 2**20)
            yield target, _meta(file)
    except (*_UNREADABLE, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise ModelError(f"{path}: the package cannot be read ({error}); copy or download it again") from None


def _weights_member(path: Path, file: zipfile.ZipFile) -> str:
    names = set(file.namelist())
    description = next(name for name in _DESCRIPTIONS if name in names)
    if file.getinfo(description).file_size > _MAX_DESCRIPTION_BYTES:
        raise ModelError(f"{path}: its {description} is far too long for a description; download the package again")
    try:
        content = yaml.safe_load(file.read(description))
    except (yaml.YAMLError, ValueError, RecursionError):
        content = None
    weights = content.get("weights") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise ModelError(f"{path}: its {description} describes no model with weights; expected a model of bioimage.io")
    entry = next((weights[name] for name in _WEIGHTS if isinstance(weights.get(name), dict)), None)
    if entry is None:
        raise ModelError(
            f"{path}: has its weights as {', '.join(map(str, weights))}; expected pytorch_state_dict, the one format "
            "that can be trained on"
        )
    source = str(entry.get("source", "")).removeprefix("./")
    if source not in names:
        raise ModelError(
            f"{path}: its weights ({source[:100]}) are not in the package; download the whole package, as a zip"
        )
    return source


def _meta(file: zipfile.ZipFile) -> Mapping[str, Any]:
    if META not in file.namelist() or file.getinfo(META).file_size > _MAX_DESCRIPTION_BYTES:
        return {}
    with contextlib.suppress(ValueError):
        meta = json.loads(file.read(META))
        return meta if isinstance(meta, dict) else {}
    return {}


def _check_room(path: Path, needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ModelError(
            f"{path}: its weights take {needed / 1e9:.1f} GB unpacked, {free / 1e9:.1f} GB are free in {folder.parent}"
        )
