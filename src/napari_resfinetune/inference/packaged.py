"""What a bioimage.io package of ours names as its network: an image in, labels out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from napari_resfinetune.inference.segment import segment_plane
from napari_resfinetune.models import new_model


class PackagedModel(nn.Module):
    """Automatic instance segmentation (AIS) with the sizes that a model was trained with.

    Parameters
    ----------
    architecture
        ``"vit_t"``, ``"vit_b"``, ``"vit_l"`` or ``"vit_h"``.
    patch_px
        Side of the patches the model was trained with, in pixels.
    """

    def __init__(self, architecture: str, patch_px: int) -> None:
        super().__init__()
        self.model = new_model(architecture, decoder=True)
        self.patch_px = patch_px

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take the weights as `save_model` wrote them."""
        self.model.sam.load_state_dict(state_dict["model_state"], strict, assign)
        return self.model.instance_decoder.load_state_dict(state_dict["decoder_state"], strict, assign)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Segment an image, "BCYX" with one image of 3 channels from 0 to 255, as int32 labels "BCYX"."""
        pixels = image[0].permute(1, 2, 0).float().cpu().numpy()
        labels = segment_plane(self.model, pixels, patch_px=self.patch_px)
        return torch.from_numpy(labels.astype("int32"))[None, None]
