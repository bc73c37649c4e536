"""How a plane is cut for the model, and the embeddings of the pieces.

The model sees objects at the size it saw them in training, where a patch of `patch_px` fills its whole input. So a
window is never larger than one and a half patches, and what is smaller than a patch is padded, not enlarged: up to a
patch, or, for TinyViT, which knows no absolute positions, up to as little as that needs, for a fraction of the time.
Windows of a large plane all have the side of a patch (those of micro-sam's tiling are smaller at the rim, and enlarged
more).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from napari_resfinetune.errors import ConfigError
from napari_resfinetune.models import SamModel
from napari_resfinetune.models.encoder import encode
from napari_resfinetune.models.preprocess import PIXEL_MEAN, to_model_input

HALO_PX = 64
# Few different sides of inputs, so that what libraries prepare for one is used again.
FIELD_STEP_PX = 128
WHOLE_UP_TO = 1.5


@dataclass(frozen=True)
class Tile:
    """A window of a plane, in pixels.

    Attributes
    ----------
    y, x
        Start and stop of what the model sees.
    core_y, core_x
        Start and stop of the part that this tile answers for; the cores of a plane meet without gap or overlap.
    field
        How much of a side of the model's input the window takes.
    """

    y: tuple[int, int]
    x: tuple[int, int]
    core_y: tuple[int, int]
    core_x: tuple[int, int]
    field: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the window."""
        return self.y[1] - self.y[0], self.x[1] - self.x[0]

    @property
    def window(self) -> tuple[slice, slice]:
        """Index of the window in the plane."""
        return slice(*self.y), slice(*self.x)

    @property
    def core(self) -> tuple[slice, slice]:
        """Index of the core in the plane."""
        return slice(*self.core_y), slice(*self.core_x)

    @property
    def core_in_window(self) -> tuple[slice, slice]:
        """Index of the core in the window."""
        (y, x), (core_y, core_x) = (self.y[0], self.x[0]), (self.core_y, self.core_x)
        return slice(core_y[0] - y, core_y[1] - y), slice(core_x[0] - x, core_x[1] - x)


@dataclass(frozen=True)
class TileEmbedding:
    """What the image encoder made of a window.

    Attributes
    ----------
    tile
        The window.
    features
        float32 "BCYX" with one image of 256 channels, on the model's device; as much of the model's grid as the field
        takes.
    input_size
        Height and width of the enlarged window inside the square input, in model pixels.
    """

    tile: Tile
    features: torch.Tensor
    input_size: tuple[int, int]


def plan_tiles(shape_yx: tuple[int, int], patch_px: int, halo_px: int | None = None) -> tuple[Tile, ...]:
    """Cut a plane into windows.

    Parameters
    ----------
    shape_yx
        Height and width of the plane, in pixels.
    patch_px
        Side of the training patch, in pixels.
    halo_px
        How far a window reaches beyond its core at least, in pixels; by default 64, or a quarter of a smaller patch.

    Returns
    -------
    tuple of Tile
        One tile when the longer side is at most one and a half patches; else windows of at most `patch_px`.

    Raises
    ------
    ConfigError
        When a patch leaves no core between its halos.
    """
    if halo_px is None:
        halo_px = min(HALO_PX, patch_px // 4)
    if patch_px <= 2 * halo_px or halo_px < 0:
        raise ConfigError(
            f"patch_px: found {patch_px} with halo_px {halo_px}; expected a halo of 0 px or more, and a patch of more "
            "than twice the halo"
        )
    if max(shape_yx) <= WHOLE_UP_TO * patch_px:
        whole = ((0, shape_yx[0]), (0, shape_yx[1]))
        return (Tile(*whole, *whole, field=min(1.0, max(shape_yx) / patch_px)),)
    rows, columns = (_spans(length, patch_px, halo_px) for length in shape_yx)
    return tuple(Tile(y, x, core_y, core_x) for y, core_y in rows for x, core_x in columns)


def pad_to_field(model: SamModel, image: NDArray[np.float32], patch_px: int) -> NDArray[np.float32]:
    """Pad an image, "YXC", at the bottom and right with SAM's mean colour, when both sides are below `patch_px`.

    The result is square, and what the model can take as a part of its input, at the scale of a patch.
    """
    height, width = image.shape[:2]
    if max(height, width) >= patch_px:
        return image
    steps = -(-max(height, width) * model.input_px // (patch_px * FIELD_STEP_PX))
    input_px = min(max(steps * FIELD_STEP_PX, model.least_input_px), model.input_px)
    side = -(-input_px * patch_px // model.input_px)
    padded = np.empty((side, side, 3), np.float32)
    padded[:] = PIXEL_MEAN  # zero once normalised
    padded[:height, :width] = image
    return padded


def embed_tile(
    model: SamModel, image: NDArray[np.float32], tile: Tile, precision: torch.dtype | None = None
) -> TileEmbedding:
    """Run the image encoder on one window.

    micro-sam's own function would stretch every window to its own minimum and maximum first; here the intensities stay
    as training saw them.

    Parameters
    ----------
    model
        In evaluation mode.
    image
        float32 "YXC", 3 channels, 0 to 255.
    tile
        The window.
    precision
        Number format for autocast; `None` computes in float32.
    """
    return embed_window(model, image[tile.window], tile, precision)


@torch.no_grad()
def embed_window(
    model: SamModel, pixels: NDArray[np.float32], tile: Tile, precision: torch.dtype | None = None
) -> TileEmbedding:
    """Run the image encoder on the pixels of a window, "YXC"; like `embed_tile` otherwise."""
    device = model.device
    patch = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None].to(device)
    with autocast(device, precision):
        inputs, input_size = to_model_input(patch, field_input_px(model, tile))
        features = encode(model.sam.image_encoder, inputs)
    return TileEmbedding(tile, features.float(), (int(input_size[0]), int(input_size[1])))


def embed_plane(
    model: SamModel,
    image: NDArray[np.float32],
    *,
    patch_px: int = 512,
    halo_px: int | None = None,
    precision: torch.dtype | None = None,
) -> Iterator[TileEmbedding]:
    """Yield the embeddings of all windows of an image, padded where it is small, one at a time."""
    padded, tiles = cut(model, image, patch_px, halo_px)
    for tile in tiles:
        yield embed_tile(model, padded, tile, precision)


def cut(
    model: SamModel, image: NDArray[np.float32], patch_px: int, halo_px: int | None = None
) -> tuple[NDArray[np.float32], tuple[Tile, ...]]:
    """Return an image, padded where it is small, and its windows."""
    padded = pad_to_field(model, image, patch_px)
    return padded, plan_tiles((padded.shape[0], padded.shape[1]), patch_px, halo_px)


def field_input_px(model: SamModel, tile: Tile) -> int:
    """Return the side of the input, in px, that a window takes."""
    return round(tile.field * model.input_px / FIELD_STEP_PX) * FIELD_STEP_PX if tile.field < 1 else model.input_px


@torch.no_grad()
def whole_field(model: SamModel, embedding: TileEmbedding) -> TileEmbedding:
    """Return the embedding of a small window as if it had been padded to a patch; prompts need that.

    Far from the rim of the input and from the window, what the encoder makes of padding is the same everywhere.
    """
    if embedding.tile.field >= 1:
        return embedding
    patch_px = round(embedding.tile.shape[0] / embedding.tile.field)
    side = model.input_px // 16
    features = embedding.features
    whole = _padding(model).to(features).repeat(1, 1, side, side)
    whole[..., : features.shape[-2], : features.shape[-1]] = features
    span = (0, patch_px)
    return TileEmbedding(Tile(span, span, span, span), whole, (model.input_px, model.input_px))


def _padding(model: SamModel) -> torch.Tensor:
    """Return what the encoder makes of padding, "BCYX" of one pixel; computed once as long as the weights stay."""
    encoder = model.sam.image_encoder
    key = (model.device, sum(parameter._version for parameter in encoder.parameters()))
    if model.padding is None or model.padding[0] != key:
        half, middle = model.input_px // 2, model.input_px // 64
        features = encode(encoder, torch.zeros(1, 3, half, half, device=model.device))
        model.padding = key, features[..., middle : middle + 1, middle : middle + 1].float()
    return model.padding[1]


def set_embedding(predictor: Any, embedding: TileEmbedding) -> None:
    """Make a `SamPredictor` answer prompts, in pixels of the window, from this embedding."""
    predictor.features = embedding.features
    predictor.input_size = embedding.input_size
    predictor.original_size = embedding.tile.shape
    predictor.is_image_set = True


def autocast(device: torch.device, precision: torch.dtype | None) -> torch.autocast:
    """Return the autocast context for a number format; `None` computes in float32."""
    return torch.autocast(device.type, dtype=precision, enabled=precision is not None)


def _spans(length: int, patch_px: int, halo_px: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Cover a side with windows of `patch_px`, evenly; give each with its core, which ends amid the overlaps."""
    if length <= patch_px:
        return [((0, length), (0, length))]
    count = -(-(length - 2 * halo_px) // (patch_px - 2 * halo_px))
    starts = [(length - patch_px) * index // (count - 1) for index in range(count)]
    cuts = [0, *((after + before + patch_px) // 2 for before, after in itertools.pairwise(starts)), length]
    return [((start, start + patch_px), (cuts[index], cuts[index + 1])) for index, start in enumerate(starts)]
