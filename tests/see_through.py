"""A model without learned weights whose right answers are known.

Its encoder passes the image on unchanged, its instance decoder reads foreground and distances from the image's
channels, and its mask decoder fills the box it is asked for, or a square around the point. So whatever segmentation
gets wrong comes from cutting, scaling, padding and joining.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from skimage.measure import regionprops
from torch import nn
from torch.nn import functional as F

from napari_resfinetune.models import SamModel, upstream
from napari_resfinetune.models.preprocess import PIXEL_MEAN, PIXEL_STD

INPUT_PX = 1024


class Encoder(nn.Module):
    img_size = INPUT_PX

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls.append(images)
        return F.pixel_unshuffle(images, 16)


class InstanceDecoder(nn.Module):
    def forward(self, features: torch.Tensor, input_size: Any, original_size: Any) -> torch.Tensor:
        images = F.pixel_shuffle(features, 16)
        maps = (images * torch.tensor(PIXEL_STD).view(1, 3, 1, 1) + torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1)) / 255
        maps = maps[..., : input_size[0], : input_size[1]]
        return F.interpolate(maps, original_size, mode="bilinear", align_corners=False)


class PromptEncoder(nn.Module):
    def __init__(self, point_px: float) -> None:
        super().__init__()
        self.point_px = point_px

    def get_dense_pe(self) -> torch.Tensor:
        return torch.zeros(1)

    def forward(self, points: Any, boxes: Any, masks: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if boxes is None:
            centers = points[0][:, 0]
            boxes = torch.cat([centers - self.point_px, centers + self.point_px], dim=1)
        return boxes.reshape(-1, 4), torch.zeros(1)


class MaskDecoder(nn.Module):
    def forward(
        self,
        image_embeddings: Any,
        image_pe: Any,
        sparse_prompt_embeddings: torch.Tensor,
        dense_prompt_embeddings: Any,
        multimask_output: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        at = (torch.arange(INPUT_PX // 4) + 0.5) * 4
        x0, y0, x1, y1 = (side[:, None] for side in sparse_prompt_embeddings.T)
        inside = ((at > y0) & (at < y1))[:, :, None] & ((at > x0) & (at < x1))[:, None, :]
        masks = inside.float()[:, None] * 40 - 20
        quality = torch.full((len(masks), 1), 0.9)
        if multimask_output:
            return torch.cat([-masks, masks, -masks], 1), torch.cat([quality - 0.8, quality, quality - 0.8], 1)
        return masks, quality


class SeeThroughModel(SamModel):
    def decode_instances(self, features: torch.Tensor, input_size: Any, original_size: Any) -> torch.Tensor:
        return self.instance_decoder(features, input_size, original_size)

    def predict_masks(self, features: Any, points: Any, labels: Any, boxes: Any, *, multimask: bool) -> Any:
        sparse, _ = self.sam.prompt_encoder(
            points=None if points is None else (points, labels), boxes=boxes, masks=None
        )
        masks, quality = self.sam.mask_decoder(features, None, sparse, None, multimask)
        height, width = (4 * size for size in features.shape[-2:])
        return masks[..., :height, :width], quality


def see_through_model(decoder: bool = True, point_px: float = 40) -> SamModel:
    """Return the model; `point_px` is half the side of the square around a point, in pixels of the model's input."""
    sam = upstream.Sam(Encoder(), PromptEncoder(point_px), MaskDecoder())
    return SeeThroughModel(sam, InstanceDecoder() if decoder else None, "vit_t", "see-through").eval()


def paint(labels: np.ndarray) -> np.ndarray:
    """Return the image, float32 "YXC", in which the instance decoder sees exactly these objects."""
    image = np.full((*labels.shape, 3), 255, np.float32)
    image[..., 0] = np.where(labels > 0, 255, 0)
    for region in regionprops(labels):
        inside = np.pad(region.image, 1)
        depth = distance_transform_edt(inside)[1:-1, 1:-1]
        window = image[region.slice]
        relative = 1 - depth / depth.max()
        for channel in (1, 2):
            window[..., channel] = np.where(region.image, 255 * relative, window[..., channel])
    return image


def disks(shape: tuple[int, int], step: int = 40, radius: int = 14, border: int = 20) -> np.ndarray:
    """Return a label image with a grid of disks."""
    labels = np.zeros(shape, np.int32)
    yy, xx = np.mgrid[: shape[0], : shape[1]]
    number = 0
    for y in range(border, shape[0] - border + 1, step):
        for x in range(border, shape[1] - border + 1, step):
            number += 1
            labels[(yy - y) ** 2 + (xx - x) ** 2 <= radius**2] = number
    return labels
