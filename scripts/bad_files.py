"""Files for scripts/bad_input.py: what each kind of good or bad file holds."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tifffile
import zarr
from numpy.typing import NDArray
from PIL import Image

SIDE_PX = 96


def make_files(folder: Path, files: Mapping[str, str]) -> None:
    """Write `files`, path to kind, into `folder`; "text: ..." stands for itself."""
    for name, kind in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind.startswith("text: "):
            path.write_text(kind.removeprefix("text: "), encoding="utf-8")
        else:
            KINDS[kind](path)


def _labels(path: Path) -> NDArray[np.uint16]:
    """Return squares that depend on the number in the file name, so that an image and its labels fit."""
    rng = np.random.default_rng(int("0" + re.sub(r"\D", "", path.stem)))
    labels = np.zeros((SIDE_PX, SIDE_PX), np.uint16)
    for number, (y, x) in enumerate(np.ndindex(3, 3), 1):
        side = rng.integers(8, 20)
        labels[8 + 28 * y : 8 + 28 * y + side, 8 + 28 * x : 8 + 28 * x + side] = number
    return labels


def _image(path: Path) -> NDArray[np.uint16]:
    noise = np.random.default_rng(0).integers(0, 300, (SIDE_PX, SIDE_PX))
    return (np.where(_labels(path) > 0, 3000, 400) + noise).astype(np.uint16)


def _tiff(make: Callable[[Path], Any], **options: Any) -> Callable[[Path], Any]:
    return lambda path: tifffile.imwrite(path, make(path), **{"photometric": "minisblack", **options})


def _with_nan(path: Path) -> NDArray[np.float32]:
    image = _image(path).astype(np.float32)
    image[:4] = np.nan
    return image


def _hdf5(*names: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with h5py.File(path, "w") as file:
            for name in names:
                file[name] = _labels(path) if "label" in name else _image(path)

    return write


def _damaged(make: Callable[[Path], bytes], share: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        content = make(path)
        path.write_bytes(content[: int(len(content) * share)])

    return write


def _tiff_bytes(path: Path) -> bytes:
    tifffile.imwrite(path, _image(path))
    return path.read_bytes()


def _scrambled_tiff(path: Path) -> None:
    tifffile.imwrite(path, _image(path), compression="zlib")
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        start = tiff.pages[0].dataoffsets[0]
    content[start : start + 200] = b"\xff" * 200
    path.write_bytes(content)


class Leaves:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("the-code-in-it-ran", "w"))


def _npy_with_code(path: Path) -> None:
    np.save(path, np.array([Leaves()], dtype=object), allow_pickle=True)


@cache
def _checkpoint(decoder: bool) -> bytes:
    import tempfile

    from napari_resfinetune.models import load_model, save_model

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vit_t.pt"
        save_model(path, load_model("random:vit_t", decoder="new" if decoder else "none", seed=0))
        return path.read_bytes()


def _torch_file(make: Callable[[], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import torch

        torch.save(make(), path)

    return write


def _other_network() -> Any:
    import torch

    return torch.nn.Linear(3, 3).state_dict()


def _lacking_tensors() -> Any:
    import io

    import torch

    state = torch.load(io.BytesIO(_checkpoint(False)), weights_only=True)["model_state"]
    return {name: tensor for name, tensor in state.items() if not name.startswith("mask_decoder")}


KINDS: dict[str, Callable[[Path], Any]] = {
    "folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "image": _tiff(_image),
    "labels": _tiff(_labels),
    "cut off": _damaged(_tiff_bytes, 0.5),
    "cut in its header": _damaged(_tiff_bytes, 0.002),
    "scrambled": _scrambled_tiff,
    "narrow labels": _tiff(lambda path: _labels(path)[:, :80]),
    "RGB labels": _tiff(lambda path: np.stack([_labels(path)] * 3, -1).astype(np.uint8), photometric="rgb"),
    "zeros": _tiff(lambda path: np.zeros_like(_labels(path))),
    "fractions": _tiff(lambda path: _labels(path) / np.float32(3)),
    "whole floats": _tiff(lambda path: _labels(path).astype(np.float32)),
    "negative": _tiff(lambda path: _labels(path).astype(np.int16) - 3),
    "mask": _tiff(lambda path: (_labels(path) > 0).astype(np.uint8) * 255),
    "specks": _tiff(lambda path: np.where(np.indices((SIDE_PX, SIDE_PX)).sum(0) % 32 == 0, _labels(path), 0)),
    "image with NaN": _tiff(_with_nan),
    "constant": _tiff(lambda path: np.full((SIDE_PX, SIDE_PX), 7, np.uint8)),
    "complex numbers": lambda path: np.save(path, np.ones((SIDE_PX, SIDE_PX), complex)),
    "4D": _tiff(lambda path: np.stack([np.stack([_image(path)] * 3)] * 5), imagej=True, metadata={"axes": "TZYX"}),
    "5 channels": _tiff(lambda path: np.stack([_image(path)] * 5), imagej=True, metadata={"axes": "CYX"}),
    "5 planes": lambda path: np.save(path, np.stack([_image(path)] * 5)),
    "JPEG": lambda path: Image.fromarray(_labels(path).astype(np.uint8)).save(path),
    "HDF5 with two arrays": _hdf5("raw", "other"),
    "HDF5 with labels": _hdf5("labels"),
    "HDF5 without arrays": _hdf5(),
    "zarr without arrays": lambda path: zarr.open_group(str(path), mode="w"),
    "npy with code": _npy_with_code,
    "vit_t": lambda path: path.write_bytes(_checkpoint(True)),
    "vit_t without decoder": lambda path: path.write_bytes(_checkpoint(False)),
    "truncated vit_t": _damaged(lambda _: _checkpoint(False), 0.6),
    "vit_t without mask decoder": _torch_file(_lacking_tensors),
    "pickle with code": lambda path: path.write_bytes(pickle.dumps({"model_state": Leaves()})),
    "torch file with code": _torch_file(lambda: {"model_state": Leaves()}),
    "another network": _torch_file(_other_network),
}
