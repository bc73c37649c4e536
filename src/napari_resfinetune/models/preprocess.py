"""Between image pixels and the model's square input: the same numbers as SAM's own transforms, on any device.

An image is scaled so that its longest side is `input_px`, normalised, and padded with zeros at the bottom and right.
"""

from __future__ import annotations

import torch
from torch.nn import functional

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


def resized_shape(original_size: tuple[int, int], input_px: int = 1024) -> tuple[int, int]:
    """Return height and width, in px, of an image inside the model's input."""
    height, width = original_size
    scale = input_px * 1.0 / max(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


def to_model_input(images: torch.Tensor, input_px: int = 1024) -> tuple[torch.Tensor, tuple[int, int]]:
    """Scale, normalise and pad images.

    Parameters
    ----------
    images
        BCYX float, 3 channels, values from 0 to 255.
    input_px
        Side of the model's input, in px.

    Returns
    -------
    torch.Tensor
        BCYX float, `input_px` square.
    tuple of int
        Height and width of the image in it, without padding.
    """
    size = resized_shape((int(images.shape[-2]), int(images.shape[-1])), input_px)
    resized = functional.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
    mean = torch.tensor(PIXEL_MEAN, dtype=resized.dtype, device=resized.device).view(1, 3, 1, 1)
    std = torch.tensor(PIXEL_STD, dtype=resized.dtype, device=resized.device).view(1, 3, 1, 1)
    normalised = (resized - mean) / std
    return functional.pad(normalised, (0, input_px - size[1], 0, input_px - size[0])), size


def masks_to_image(
    low_res_masks: torch.Tensor, input_size: tuple[int, int], original_size: tuple[int, int], input_px: int = 1024
) -> torch.Tensor:
    """Bring mask logits from the mask decoder to the pixels of the image.

    Parameters
    ----------
    low_res_masks
        BCYX float logits, a quarter of `input_px` square.
    input_size
        Height and width of the image in the model's input, from `to_model_input`.
    original_size
        Height and width of the image, in px.
    input_px
        Side of the model's input, in px.

    Returns
    -------
    torch.Tensor
        BCYX float logits of `original_size`.
    """
    masks = functional.interpolate(low_res_masks, (input_px, input_px), mode="bilinear", align_corners=False)
    masks = masks[..., : input_size[0], : input_size[1]]
    return functional.interpolate(masks, original_size, mode="bilinear", align_corners=False)


def scale_coords(coords: torch.Tensor, original_size: tuple[int, int], input_px: int = 1024) -> torch.Tensor:
    """Bring points from image pixels to pixels of the model's input.

    Parameters
    ----------
    coords
        Points as (x, y) in the last dimension, any shape before it.
    original_size
        Height and width of the image, in px.
    input_px
        Side of the model's input, in px.

    Returns
    -------
    torch.Tensor
        float32 of the same shape; `coords` is left as it is.
    """
    height, width = original_size
    new_height, new_width = resized_shape(original_size, input_px)
    scaled = coords.to(torch.float32, copy=True)
    scaled[..., 0] *= new_width / width
    scaled[..., 1] *= new_height / height
    return scaled


def scale_boxes(boxes: torch.Tensor, original_size: tuple[int, int], input_px: int = 1024) -> torch.Tensor:
    """Bring boxes (x0, y0, x1, y1), shape (N, 4), from image pixels to pixels of the model's input, as float32."""
    return scale_coords(boxes.reshape(-1, 2, 2), original_size, input_px).reshape(-1, 4)
