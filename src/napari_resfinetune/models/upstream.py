"""The names we take from micro-sam, segment-anything and torch-em, each imported when it is first used.

Upstream moves its modules now and then; one line of this table is what changes here. micro-sam also brings napari's
progress bar with it, so nothing is imported before it is needed: ``from napari_resfinetune.models.upstream import
SamPredictor`` inside a function, or ``upstream.SamPredictor`` where it is used.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "segment_anything": ("SamPredictor", "sam_model_registry"),
    "segment_anything.modeling": ("ImageEncoderViT", "MaskDecoder", "PromptEncoder", "Sam", "TwoWayTransformer"),
    "segment_anything.modeling.common": ("LayerNorm2d",),
    "segment_anything.modeling.image_encoder": ("window_partition", "window_unpartition"),
    "segment_anything.utils.transforms": ("ResizeLongestSide",),
    "micro_sam.util": ("get_centers_and_bounding_boxes", "models", "precompute_image_embeddings"),
    "micro_sam.instance_segmentation": (
        "AutomaticMaskGenerator",
        "AutomaticPromptGenerator",
        "DecoderAdapter",
        "InstanceSegmentationWithDecoder",
        "TiledAutomaticMaskGenerator",
        "TiledAutomaticPromptGenerator",
        "TiledInstanceSegmentationWithDecoder",
        "get_unetr",
    ),
    "micro_sam.bioimageio": ("export_sam_model",),
    "micro_sam.multi_dimensional_segmentation": ("merge_instance_segmentation_3d",),
    "micro_sam.prompt_generators": ("IterativePromptGenerator", "PointAndBoxPromptGenerator"),
    "micro_sam.training.sam_trainer": ("SamTrainer",),
    "micro_sam.training.trainable_sam": ("TrainableSAM",),
    "micro_sam.training.util": ("ConvertToSamInputs",),
    "torch_em.model": ("UNETR",),
    "torch_em.loss": ("DiceBasedDistanceLoss",),
    "torch_em.transform.label": ("PerObjectDistanceTransform",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

NAMES = tuple(sorted(_HOME))


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
