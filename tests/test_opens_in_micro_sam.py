"""What we export opens and segments in micro-sam itself, in processes that never import this package.

The model is a vit_b of random weights with an instance decoder whose last layer was fitted to one image, which is
enough to find most of its objects. micro-sam has to find what this package finds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from skimage.measure import label

from napari_resfinetune.evaluation import score
from napari_resfinetune.inference.segment import evaluating, segment_plane
from napari_resfinetune.inference.tiling import embed_plane
from napari_resfinetune.models import SamModel, load_model, save_model
from see_through import disks, paint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SIDE = 192


def scene() -> tuple[np.ndarray, np.ndarray]:
    labels = disks((SIDE, SIDE), step=48, radius=18, border=24)
    image = np.where(labels > 0, 200, 40) + np.random.default_rng(0).integers(0, 40, labels.shape)
    image[0, :2] = 0, 255  # as wide as 8 bit, so that micro-sam scales nothing
    return image.astype(np.uint8), labels


@torch.no_grad()
def fit_last_layer(model: SamModel, image: np.ndarray, labels: np.ndarray) -> None:
    """Set the instance decoder's last convolution so that it says where the objects of this image are."""
    features = []
    last = model.instance_decoder.out_conv
    hook = last.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    (embedding,) = embed_plane(model, np.stack([image] * 3, -1).astype(np.float32), patch_px=SIDE)
    model.instance_decoder(embedding.features, embedding.input_size, embedding.tile.shape)
    hook.remove()
    wanted = torch.from_numpy(paint(labels).transpose(2, 0, 1) / 255)[None]
    grown = torch.nn.functional.interpolate(wanted, features[0].shape[-2:], mode="bilinear")
    inputs = features[0][0].flatten(1).T[::7].double()
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
    logits = (grown[0].flatten(1).T[::7].double() - 0.5) * 8
    normal = inputs.T @ inputs + 1e-6 * len(inputs) * torch.eye(inputs.shape[1])
    solution = torch.linalg.solve(normal, inputs.T @ logits).float()
    last.weight.copy_(solution[:-1].T[..., None, None])
    last.bias.copy_(solution[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an image and the exported model."""
    folder = tmp_path_factory.mktemp("elsewhere")
    image, labels = scene()
    imageio.imwrite(folder / "cells.tif", image)
    model = load_model("random:vit_b", decoder="new", seed=1)
    fit_last_layer(model, image, labels)
    save_model(folder / "exported.pt", model)  # what export_model and every run write with
    return folder


def run_elsewhere(folder: Path, *command: str) -> None:
    """Run a command where this package cannot be imported."""
    hidden = folder / "napari_resfinetune"
    hidden.mkdir(exist_ok=True)
    (hidden / "__init__.py").write_text("raise ImportError('this process shall not import it')")
    environment = {**os.environ, "PYTHONPATH": str(folder), "QT_QPA_PLATFORM": "xcb"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def ours(folder: Path) -> np.ndarray:
    """Return what this package finds in one window and in float32, as micro-sam works; most of it is right."""
    image, labels = scene()
    model = load_model(folder / "exported.pt", decoder="required")
    with evaluating(model):
        found = segment_plane(model, np.stack([image] * 3, -1).astype(np.float32), patch_px=SIDE, halo_px=0)
    assert score(labels, found)["recall"] > 0.8
    return found


def check(found: np.ndarray, ours: np.ndarray) -> None:
    scores = score(ours, label(found))
    assert scores["sa75"] > 0.9, scores


def test_its_command(folder: Path, ours: np.ndarray) -> None:
    script = Path(sys.executable).with_name("micro_sam.automatic_segmentation")
    run_elsewhere(
        folder, str(script), "-i", "cells.tif", "-o", "found.tif",
        "-m", "vit_b", "-c", "exported.pt", "--mode", "ais", "--device", "cpu",
    )  # fmt: skip
    check(imageio.imread(folder / "found.tif"), ours)


BEGIN = """
import importlib.util
if importlib.util.find_spec("triton"):  # before OpenGL, see docs/use-in-micro-sam.md
    import triton, torch._dynamo
import sys
import imageio.v3 as imageio
import numpy as np
from micro_sam.sam_annotator import annotator_2d, annotator_3d, image_series_annotator
from micro_sam.sam_annotator._state import AnnotatorState

image, model = imageio.imread("cells.tif"), {"model_type": "vit_b", "checkpoint_path": "exported.pt", "device": "cpu"}
"""
END = """
assert "napari_resfinetune" not in sys.modules
viewer.close()
"""
ANNOTATOR_2D = """
viewer = annotator_2d(image, return_viewer=True, **model)
widgets = AnnotatorState().widgets
assert widgets["autosegment"].with_decoder
widgets["autosegment"].run_button.click()
np.save("annotator.npy", viewer.layers["auto_segmentation"].data)
viewer.layers["point_prompts"].add(np.array([[24, 24]]))
widgets["segment"](viewer)
np.save("object.npy", viewer.layers["current_object"].data)
"""
ANNOTATOR_3D = """
viewer = annotator_3d(np.stack([np.zeros_like(image), image]), return_viewer=True, **model)
viewer.dims.set_current_step(0, 1)
widget = AnnotatorState().widgets["autosegment"]
assert widget.with_decoder and widget.volumetric
widget.run_button.click()
np.save("volume.npy", viewer.layers["auto_segmentation"].data)
"""
SERIES = """
imageio.imwrite("a.tif", image)
imageio.imwrite("b.tif", image[::-1])
viewer = image_series_annotator(["a.tif", "b.tif"], "annotations", return_viewer=True, **model)
widgets = AnnotatorState().widgets
widgets["autosegment"].run_button.click()
widgets["commit"](viewer, layer="auto_segmentation")
next(dock for name, dock in viewer.window.dock_widgets.items() if hasattr(dock, "call_button"))()  # to the next image
assert (viewer.layers["image"].data == image[::-1]).all()
widgets["autosegment"].run_button.click()
np.save("second.npy", viewer.layers["auto_segmentation"].data)
"""
xvfb = pytest.mark.skipif(sys.platform != "linux", reason="the screen that needs no monitor, Xvfb, is Linux's")


def annotate(folder: Path, script: str) -> None:
    (folder / "annotate.py").write_text(BEGIN + script + END)
    run_elsewhere(folder, sys.executable, "annotate.py")


@xvfb
def test_its_annotator(folder: Path, ours: np.ndarray) -> None:
    annotate(folder, ANNOTATOR_2D)
    check(np.load(folder / "annotator.npy"), ours)
    assert np.load(folder / "object.npy").shape == (SIDE, SIDE)


@xvfb
def test_its_annotator_of_volumes(folder: Path, ours: np.ndarray) -> None:
    annotate(folder, ANNOTATOR_3D)
    volume = np.load(folder / "volume.npy")
    assert volume.shape == (2, SIDE, SIDE)
    check(volume[1], ours)


@xvfb
def test_its_annotator_of_series(folder: Path, ours: np.ndarray) -> None:
    annotate(folder, SERIES)
    check(imageio.imread(folder / "annotations" / "a.tif"), ours)
    assert np.load(folder / "second.npy").any()
