"""A model as a file for other tools: micro-sam's checkpoint, a bioimage.io package, an adapter.

There is no ONNX here: micro-sam's own ``micro_sam.bioimageio.bioengine_export`` makes it from the checkpoint. See
docs/export.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from napari_resfinetune.errors import ConfigError, ModelError
from napari_resfinetune.models.adapter_files import is_adapter
from napari_resfinetune.models.packages import META

CHECKPOINT_SUFFIXES = (".pt", ".pth")
KINDS = ("checkpoint", "bioimageio", "adapter")
_TEST_IMAGE_PX = 256
_LICENSE = "CC-BY-4.0"
_MIN_NAME = 5  # of the specification


def export_model(
    model: str | Path,
    path: str | Path,
    *,
    kind: str | None = None,
    name: str | None = None,
    authors: Sequence[str] = (),
    description: str | None = None,
    license: str = _LICENSE,
    test_image: Any = None,
    test_labels: Any = None,
) -> Path:
    """Write a model for other tools.

    Parameters
    ----------
    model
        A name, a checkpoint, a run folder, an adapter or a bioimage.io package, as for `load_model`.
    path
        Where to; it must not exist.
    kind
        "checkpoint", "bioimageio" or "adapter"; by default what the suffix says: ".pt", ".zip", or none.
    name, authors, description, license
        Of a bioimage.io package; the licence by its SPDX name.
    test_image, test_labels
        What a bioimage.io package is tested on: an image of 8 bit, "YX" or "YXC" with 3 channels, in which the model
        finds objects, and its labels; by default a drawn one. They become part of the package.

    Returns
    -------
    Path
        What was written.

    Raises
    ------
    ConfigError
        When something is there already, or nothing says what kind it shall be.
    ModelError
        When the model cannot be loaded or is none of that kind.
    """
    path = Path(path)
    kind = kind or _kind_of(path)
    if kind not in KINDS:
        raise ConfigError(f"kind: found {kind!r}; expected one of {', '.join(KINDS)}")
    if path.exists():
        raise ConfigError(f"{path}: exists already, and nothing is overwritten; name another file or folder")
    if kind == "adapter":
        _export_adapter(Path(model), path)
    elif kind == "checkpoint":
        from napari_resfinetune.models import load_model, save_model

        loaded = load_model(model, decoder="optional")
        with _new_file(path) as new:
            save_model(new, loaded, loaded.meta)
    else:
        about = {
            "name": name or (path.stem if len(path.stem) >= _MIN_NAME else f"model {path.stem}"),
            "authors": list(authors),
            "description": description or "Segment Anything, finetuned for microscopy",
            "license": license,
        }
        with _new_file(path) as new:
            _export_package(model, new, about, *_test_pair(test_image, test_labels))
    return path


def _kind_of(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in CHECKPOINT_SUFFIXES:
        return "checkpoint"
    if suffix == ".zip":
        return "bioimageio"
    if not suffix:
        return "adapter"
    hint = "; for ONNX export a .pt and see docs/export.md" if suffix == ".onnx" else ""
    raise ConfigError(
        f"{path}: the suffix {suffix} says nothing of the kind; use .pt (micro-sam), .zip (bioimage.io) or none "
        f"(adapter folder), or give kind{hint}"
    )


def _export_adapter(model: Path, path: Path) -> None:
    folder = model if is_adapter(model) else model / "adapter"
    if not is_adapter(folder):
        raise ModelError(
            f"{model}: has no adapter; runs with strategy lora or late_lora do. Export the whole model as .pt instead"
        )
    with _new_file(path) as new:
        shutil.copytree(folder, new, symlinks=False)


def _export_package(
    model: str | Path, path: Path, about: dict[str, Any], image: NDArray[np.uint8], labels: NDArray[np.int32]
) -> None:
    from napari_resfinetune.library import bioimageio
    from napari_resfinetune.models import load_model, save_model, upstream

    loaded = load_model(model, decoder="optional")
    # bioimageio.spec leaves the file open that it wrote, which Windows would not move or delete.
    with tempfile.TemporaryDirectory(prefix="resfinetune-", ignore_cleanup_errors=True) as folder:
        weights, packed = Path(folder) / "weights.pt", Path(folder) / "package.zip"
        save_model(weights, loaded, loaded.meta)
        try:
            if loaded.architecture == "vit_t":
                bioimageio.write_package(loaded, weights, packed, about, image, Path(folder))
            else:
                upstream.export_sam_model(
                    image=image,
                    label_image=labels,
                    model_type=loaded.architecture,
                    output_path=packed,
                    checkpoint_path=weights,
                    name=about["name"],
                    description=about["description"],
                    **({"authors": bioimageio.authors(about["authors"])} if about["authors"] else {}),
                )
                with zipfile.ZipFile(packed, "a") as package:
                    package.writestr(META, json.dumps(dict(loaded.meta)))
        except ValidationError as error:
            raise ModelError(f"{about['name']}: no bioimage.io package: {bioimageio.say_invalid(error)}") from None
        except (RuntimeError, ValueError) as error:  # "did not find any objects", from micro-sam
            raise ModelError(f"{model}: {' '.join(str(error).split())}") from None
        shutil.copyfile(packed, path)


def _test_pair(image: Any, labels: Any) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    from napari_resfinetune.data.sources import open_array

    if image is None:
        from napari_resfinetune.data.scaling import apply_scaling, measure_scaling
        from napari_resfinetune.data.synthetic import make_sample

        sample = make_sample("fluorescence_nuclei", seed=3, shape=(_TEST_IMAGE_PX, _TEST_IMAGE_PX))
        gray = apply_scaling(np.stack([sample.image] * 3, -1), measure_scaling(open_array(sample.image)))
        return gray.astype(np.uint8), sample.labels
    pixels = open_array(image).read()
    pixels = np.stack([pixels] * 3, -1) if pixels.ndim == 2 else pixels
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise ConfigError(
            f"test_image: found {pixels.dtype} of shape {pixels.shape}; expected 8 bit, YX or YXC with 3 channels"
        )
    found = np.zeros(pixels.shape[:2], np.int32) if labels is None else open_array(labels, indexed=True).read()
    return pixels, found.astype(np.int32)


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """Hand out a name beside `path`, and put what was written there in its place when all went well."""
    new = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield new
        if path.exists():  # since it was looked for, which took a while
            raise ConfigError(f"{path}: appeared while it was being written, and is not overwritten; name another one")
        os.replace(new, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error}); choose another folder") from None
    finally:
        shutil.rmtree(new, ignore_errors=True) if new.is_dir() else new.unlink(missing_ok=True)
