"""A bioimage.io package around our own network, for models that micro-sam's exporter cannot take.

That is ``vit_t``: micro-sam's needs the package mobile_sam, which is on no registry. Where our package is installed,
this one runs and passes ``bioimageio test``.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bioimageio.spec import save_bioimageio_package
from bioimageio.spec.model import v0_5 as spec
from numpy.typing import NDArray
from pydantic import ValidationError

from napari_resfinetune.errors import ModelError
from napari_resfinetune.inference.packaged import PackagedModel
from napari_resfinetune.models import SamModel

_CITE = (
    ("Archit et al., Segment Anything for Microscopy", "10.1038/s41592-024-02580-4"),
    ("Kirillov et al., Segment Anything", "10.1109/ICCV51070.2023.00371"),
)
_ABOUT = """# {name}

{description}

Input: an RGB image of 8 bit (gray images three times), scaled so that its {low} and {high} intensity percentiles are 0
and 255. Output: one id per object. Objects should be as large, in pixels, as in the images that it was trained on; it
was trained on patches of {patch} px.

The network is that of the Python package napari-resfinetune, which must be installed.
"""
_ENVIRONMENT = """name: resfinetune
channels: [conda-forge]
dependencies:
  - python>=3.11
  - pip
  - pip: [napari-resfinetune]
"""


def authors(names: Sequence[str]) -> list[Any]:
    """Return names as the specification wants them."""
    return [spec.Author(name=name) for name in names]


def write_package(
    model: SamModel, weights: Path, path: Path, about: dict[str, Any], image: NDArray[np.uint8], folder: Path
) -> None:
    """Write a package of a model with instance decoder.

    Parameters
    ----------
    model
        The model, in evaluation mode.
    weights
        Its file, as `save_model` wrote it.
    path
        The zip to write.
    about
        ``name``, ``authors``, ``description`` and ``license``.
    image
        uint8 "YXC" with 3 channels that the package is tested on.
    folder
        A folder for intermediate files.

    Raises
    ------
    ModelError
        When the model has no instance decoder.
    """
    if model.instance_decoder is None:
        raise ModelError(
            f"{model.name}: no instance decoder, which a bioimage.io package of vit_t needs; export it as .pt"
        )
    patch_px = int(model.meta.get("patch_px") or 512)
    low, high = model.meta.get("percentiles") or (0.1, 99.9)
    arguments: dict[str, Any] = {"architecture": model.architecture, "patch_px": patch_px}
    network = PackagedModel(**arguments).eval()
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    pixels = np.ascontiguousarray(image.transpose(2, 0, 1))[None]
    np.save(folder / "image.npy", pixels)
    np.save(folder / "labels.npy", network(torch.from_numpy(pixels)).numpy())
    text = _ABOUT.format(name=about["name"], description=about["description"], low=low, high=high, patch=patch_px)
    (folder / "documentation.md").write_text(text, encoding="utf-8")
    (folder / "environment.yaml").write_text(_ENVIRONMENT, encoding="utf-8")
    _draw_cover(folder / "cover.png", image)
    save_bioimageio_package(_describe(about, arguments, weights, folder), output_path=path)


def say_invalid(error: ValidationError) -> str:
    """Return what the specification does not accept, in words."""
    if "index_key" in str(error):
        return (
            f"bioimageio.spec {version('bioimageio.spec')} does not work with pydantic {version('pydantic')}; "
            "install an older one (pip install 'pydantic<2.14') or a newer bioimageio.core"
        )
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:5])


def _describe(about: dict[str, Any], arguments: dict[str, Any], weights: Path, folder: Path) -> Any:
    def space(axis: str) -> Any:
        return spec.SpaceInputAxis(id=spec.AxisId(axis), size=spec.ParameterizedSize(min=64, step=1))

    def like_input(axis: str) -> Any:
        size = spec.SizeReference(tensor_id=spec.TensorId("image"), axis_id=spec.AxisId(axis))
        return spec.SpaceOutputAxis(id=spec.AxisId(axis), size=size)

    image = spec.InputTensorDescr(
        id=spec.TensorId("image"),
        axes=[
            spec.BatchAxis(size=1),
            spec.ChannelAxis(channel_names=[spec.Identifier(name) for name in ("red", "green", "blue")]),
            space("y"),
            space("x"),
        ],
        test_tensor=spec.FileDescr(source=folder / "image.npy"),
        data=spec.IntervalOrRatioDataDescr(type="uint8"),
    )
    labels = spec.OutputTensorDescr(
        id=spec.TensorId("labels"),
        axes=[
            spec.BatchAxis(size=1),
            spec.ChannelAxis(channel_names=[spec.Identifier("labels")]),
            like_input("y"),
            like_input("x"),
        ],
        test_tensor=spec.FileDescr(source=folder / "labels.npy"),
        data=spec.IntervalOrRatioDataDescr(type="int32"),
    )
    network = spec.ArchitectureFromLibraryDescr(
        callable=spec.Identifier("PackagedModel"),
        import_from="napari_resfinetune.inference.packaged",
        kwargs=arguments,
    )
    return spec.ModelDescr(
        name=about["name"],
        description=about["description"],
        authors=authors(about["authors"] or ["unknown"]),
        license=spec.LicenseId(about["license"]),
        cite=[spec.CiteEntry(text=text, doi=spec.Doi(doi)) for text, doi in _CITE],
        tags=["segment-anything", "instance-segmentation", "2d", f"napari-resfinetune-{version('napari-resfinetune')}"],
        documentation=spec.FileDescr(source=folder / "documentation.md"),
        covers=[spec.FileDescr(source=folder / "cover.png")],
        inputs=[image],
        outputs=[labels],
        weights=spec.WeightsDescr(
            pytorch_state_dict=spec.PytorchStateDictWeightsDescr(
                source=weights,
                architecture=network,
                pytorch_version=spec.Version(torch.__version__.partition("+")[0]),
                dependencies=spec.FileDescr(source=folder / "environment.yaml"),
            )
        ),
    )


def _draw_cover(path: Path, image: NDArray[np.uint8]) -> None:
    from PIL import Image

    side = min(image.shape[:2])
    Image.fromarray(image[:side, :side]).save(path)
