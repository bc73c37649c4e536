"""SAM with its optional decoder as one module, from a name, a checkpoint, a run folder or fresh weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from napari_resfinetune.config import LoraStrategy
from napari_resfinetune.errors import ModelError
from napari_resfinetune.models import upstream
from napari_resfinetune.models.instance_decoder import run_instance_decoder
from napari_resfinetune.models.lora import merge_lora
from napari_resfinetune.models.mask_decoder import embed_prompts, predict_masks
from napari_resfinetune.models.names import ARCHITECTURES, known_model
from napari_resfinetune.models.resolve import ModelLocation, resolve_model
from napari_resfinetune.models.tiny_vit import LEAST_INPUT_PX, TinyViTEncoder
from napari_resfinetune.models.weights import (
    State,
    Weights,
    check_state,
    load_decoder_state,
    load_state,
    weights_hash,
)

DecoderChoice = Literal["required", "new", "optional", "none"]
PART_NAMES = ("image_encoder", "prompt_encoder", "mask_decoder", "instance_decoder")


class BatchStatistics(nn.BatchNorm2d):
    """BatchNorm that takes the statistics of what it is given in every mode.

    micro-sam predicts with its instance decoder in training mode, and one image at a time. Doing alike gives the same
    segmentation from the same file there and here; running statistics are still kept for other tools.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise "BCYX"."""
        if self.training:
            return super().forward(x)
        return nn.functional.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)


@dataclass(frozen=True)
class Lora:
    """Adapters in an image encoder: how they were made, and the hash of the encoder that they were put into."""

    strategy: LoraStrategy
    encoder_sha256: str


class SamModel(nn.Module):
    """Segment Anything and micro-sam's decoder for instance segmentation.

    Attributes
    ----------
    sam
        segment-anything's `Sam` (encoder, prompt encoder, mask decoder).
    instance_decoder
        micro-sam's `DecoderAdapter`, or `None`. It works on the image encoder's output and does not contain it.
    architecture
        ``"vit_t"``, ``"vit_b"``, ``"vit_l"`` or ``"vit_h"``.
    name
        What the model was asked for as.
    meta
        What its checkpoint says of itself, plain data: ``patch_px``, ``percentiles`` and so on; empty for foreign ones.
    lora
        Which adapters its image encoder has now; `None` for a plain one.
    padding
        What the image encoder makes of padding, and with which weights; see `inference.tiling`.
    """

    def __init__(self, sam: nn.Module, instance_decoder: nn.Module | None, architecture: str, name: str) -> None:
        super().__init__()
        self.sam: Any = sam
        self.instance_decoder: Any = instance_decoder
        self.architecture = architecture
        self.name = name
        self.meta: Mapping[str, Any] = {}
        self.lora: Lora | None = None
        self.padding: tuple[Any, Tensor] | None = None

    def merge_adapters(self) -> None:
        """Add adapters to the weights beside them, in place."""
        merge_lora(self.sam.image_encoder)
        self.lora = None

    def decode_instances(self, features: Tensor, input_size: tuple[int, int], original_size: tuple[int, int]) -> Tensor:
        """Run the instance decoder; arguments and result as of `run_instance_decoder`."""
        return run_instance_decoder(self.instance_decoder, features, input_size, original_size)

    def predict_masks(
        self, features: Tensor, points: Tensor | None, labels: Tensor | None, boxes: Tensor | None, *, multimask: bool
    ) -> tuple[Tensor, Tensor]:
        """Predict masks from prompts in px of the model's input, of which the features may be a part.

        Parameters
        ----------
        features
            "1CYX", from the image encoder.
        points, labels, boxes
            As for `embed_prompts`.
        multimask
            Three candidates per object instead of one.

        Returns
        -------
        tuple of Tensor
            As of `predict_masks` in `models.mask_decoder`.
        """
        encoder, (height, width) = self.sam.prompt_encoder, features.shape[-2:]
        sparse = embed_prompts(encoder, points, labels, boxes)
        positions = encoder.get_dense_pe()[..., :height, :width]
        return predict_masks(self.sam.mask_decoder, encoder, features, positions, sparse, multimask=multimask)

    @property
    def input_px(self) -> int:
        """Side of the square input, in px."""
        return int(self.sam.image_encoder.img_size)

    @property
    def knows_places(self) -> bool:
        """Whether the image encoder knows where in its field of view a pixel is; TinyViT does not."""
        return self.architecture != "vit_t"

    @property
    def least_input_px(self) -> int:
        """Side of the smallest input, in px, that the image encoder takes as a part of the whole one."""
        return self.input_px if self.knows_places else min(LEAST_INPUT_PX, self.input_px)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.sam.device)


def load_model(
    model: str | Path | ModelLocation,
    *,
    decoder: DecoderChoice = "new",
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> SamModel:
    """Find, download if needed, build and fill a model; it is in eval mode.

    Parameters
    ----------
    model
        A name (``"vit_b_lm"``, ``"random:vit_t"``), the path of a checkpoint or run folder, or what `resolve_model`
        gave.
    decoder
        ``"new"``: the checkpoint's decoder, or a freshly initialised one; ``"required"``: the checkpoint's;
        ``"optional"``: the checkpoint's, if it has one; ``"none"``: leave it out.
    device
        Where to put it.
    seed
        Fixes weights that are freshly initialised.

    Raises
    ------
    ModelError
        When the model cannot be found or read, does not fit, or lacks a required decoder.
    """
    location = model if isinstance(model, ModelLocation) else resolve_model(model)
    if location.adapter is not None and location.base is not None:
        return _from_adapter(location.base, location.adapter, decoder, device, seed)
    if location.path is None:
        if decoder == "required":
            raise ModelError(_no_decoder(location.name))
        return new_model(location.architecture, name=location.name, decoder=decoder == "new", device=device, seed=seed)
    weights = load_state(location.path)
    decoder_state = weights.decoder_state
    if decoder != "none" and location.decoder_path is not None:
        decoder_state = load_decoder_state(location.decoder_path)
    if decoder == "required" and decoder_state is None:
        raise ModelError(_no_decoder(str(location.path)))
    filled = Weights(
        weights.sam_state, decoder_state if decoder != "none" else None, weights.architecture, weights.meta
    )
    built = _from_weights(filled, location, decoder == "new", device, seed)
    built.meta = weights.meta
    return built


def new_model(
    architecture: str, *, name: str = "", decoder: bool = True, device: str | torch.device = "cpu", seed: int = 0
) -> SamModel:
    """Build a freshly initialised model in eval mode; the same `seed` gives the same weights.

    Raises
    ------
    ModelError
        For an unknown architecture.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sam = _new_sam(architecture)
        adapter = new_instance_decoder(sam.image_encoder) if decoder else None
    return SamModel(sam, adapter, architecture, name or f"random:{architecture}").to(device).eval()


def predictor(model: SamModel) -> Any:
    """Return a `SamPredictor` over the model, set up as micro-sam's functions expect. It shares the weights.

    Its hash is that of the weights now: take a new predictor after training on, or embeddings that micro-sam keeps
    on disk would be taken for current.
    """
    sam_predictor = upstream.SamPredictor(model.sam)
    sam_predictor.model_type = model.architecture
    known = known_model(model.name)
    sam_predictor.model_name = model.architecture if known is None or known.embedded else known.name
    sam_predictor._hash = f"sha256:{weights_hash(model.sam.state_dict())}"
    sam_predictor.checkpoint_path = None
    return sam_predictor


def parts(model: SamModel) -> dict[str, nn.Module]:
    """Return the parts by name; ``"instance_decoder"`` only if there is one."""
    named = {name: getattr(model.sam, name) for name in PART_NAMES[:3]}
    if model.instance_decoder is not None:
        named["instance_decoder"] = model.instance_decoder
    return named


def _from_adapter(
    base: ModelLocation, folder: Path, decoder: DecoderChoice, device: str | torch.device, seed: int
) -> SamModel:
    from napari_resfinetune.models.adapters import add_adapter  # which builds on this module

    built = load_model(base, decoder="none", device=device, seed=seed)
    add_adapter(built, folder, with_instance_decoder=decoder != "none")
    built.name = folder.resolve().name
    if built.instance_decoder is None and decoder == "required":
        raise ModelError(_no_decoder(str(folder)))
    if built.instance_decoder is None and decoder == "new":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            built.instance_decoder = new_instance_decoder(built.sam.image_encoder).to(device)
    return built.eval()


def _from_weights(
    weights: Weights, location: ModelLocation, new_decoder: bool, device: str | torch.device, seed: int
) -> SamModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sam = _new_sam(weights.architecture)
        check_state(weights.sam_state, sam.state_dict(), str(location.path))
        sam.load_state_dict(weights.sam_state)
        adapter = None
        if weights.decoder_state is not None:
            where = location.decoder_path or location.path
            adapter = new_instance_decoder(sam.image_encoder, weights.decoder_state, str(where))
        elif new_decoder:
            torch.manual_seed(seed)
            adapter = new_instance_decoder(sam.image_encoder)
    return SamModel(sam, adapter, weights.architecture, location.name).to(device).eval()


def _new_sam(architecture: str) -> Any:
    if architecture not in ARCHITECTURES:
        raise ModelError(f"{architecture}: unknown architecture; expected one of {', '.join(ARCHITECTURES)}")
    if architecture != "vit_t":
        return upstream.sam_model_registry[architecture]()
    return assemble_sam(TinyViTEncoder())


def assemble_sam(image_encoder: nn.Module) -> Any:
    """Return segment-anything's `Sam` around an image encoder that makes 256 channels at a sixteenth of `img_size`."""
    side_px = int(image_encoder.img_size)  # type: ignore[arg-type]
    return upstream.Sam(
        image_encoder=image_encoder,
        prompt_encoder=upstream.PromptEncoder(
            embed_dim=256,
            image_embedding_size=(side_px // 16, side_px // 16),
            input_image_size=(side_px, side_px),
            mask_in_chans=16,
        ),
        mask_decoder=upstream.MaskDecoder(
            num_multimask_outputs=3,
            transformer=upstream.TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
            transformer_dim=256,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
    )


def new_instance_decoder(image_encoder: nn.Module, state: State | None = None, where: str = "") -> Any:
    """Return micro-sam's decoder for an image encoder's embedding, filled with `state` or freshly initialised."""
    try:
        unetr = upstream.get_unetr(image_encoder, decoder_state=state, device="cpu")
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{where}: its decoder is not the one of micro-sam ({detail}); give a checkpoint without it"
        ) from None
    adapter = upstream.DecoderAdapter(unetr)
    for part in list(adapter.modules()):
        for name, child in part.named_children():
            if type(child) is nn.BatchNorm2d:
                norm = BatchStatistics(child.num_features, eps=child.eps, momentum=child.momentum)
                norm.load_state_dict(child.state_dict())
                setattr(part, name, norm)
    return adapter


def _no_decoder(where: str) -> str:
    return (
        f"{where}: no decoder for automatic instance segmentation (AIS) in it; finetune with training.targets 'both' "
        "or 'instances' to get one, choose a model that has one (vit_b_lm), or use mode 'amg'"
    )
