"""The training step: SAM's losses on a few samples, with gradients streamed through the decoders.

The image encoder runs once. Its embedding is cut off as a leaf, each decoder runs forward and backward on its own (the
mask decoder round by round and chunk of objects by chunk of objects), and the gradient that has gathered on the leaf
goes through the encoder at the end. Gradients are those of one backward through the whole graph, since a sum's gradient
is the sum of the gradients and prompts are drawn without gradient; memory is that of one round of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler

from napari_resfinetune.config.schema import Positions
from napari_resfinetune.data.patches import Patch
from napari_resfinetune.models import SamModel
from napari_resfinetune.models.encoder import Unit, compiled, encoder_units, first_that_learns, run_units
from napari_resfinetune.models.instance_decoder import run_instance_decoder
from napari_resfinetune.models.mask_decoder import embed_prompts, predict_masks
from napari_resfinetune.models.preprocess import resized_shape, scale_boxes, scale_coords, to_model_input
from napari_resfinetune.planning.levers import Work
from napari_resfinetune.training.feature_cache import FeatureCache
from napari_resfinetune.training.losses import instance_loss, low_res_mask_loss, upsample_masks
from napari_resfinetune.training.prompts import PromptPlan, Prompts, next_points

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepSettings:
    """How a step is computed. Only `input_px` and `positions` change what is learned; the rest is equal up to rounding.

    Attributes
    ----------
    autocast
        Number format of the activations; `None` is float32.
    object_chunk
        Objects sent through the mask decoder at once; `None` is all of them.
    checkpoint_encoder, checkpoint_instance_decoder
        Keep fewer activations and compute them again in the backward pass.
    folded_attention
        Send relative positions through the attention kernel as extra columns.
    compile
        Run encoder blocks and decoders through ``torch.compile``.
    input_px
        Side of the square that a patch is resized to; SAM's own is 1024.
    positions
        Which position encodings a smaller input gets: ``"part"`` those of the upper left part of SAM's field of view,
        ``"stretched"`` those of the whole field, interpolated.
    """

    autocast: torch.dtype | None = None
    object_chunk: int | None = None
    checkpoint_encoder: bool = False
    checkpoint_instance_decoder: bool = False
    folded_attention: bool = True
    compile: bool = False
    input_px: int = 1024
    positions: Positions = "part"


def step_settings(work: Work) -> StepSettings:
    """Return how a step of this work is computed."""
    return StepSettings(
        autocast=DTYPES[work.precision],
        object_chunk=work.object_chunk,
        checkpoint_encoder=work.checkpoint_encoder,
        checkpoint_instance_decoder=work.checkpoint_instance_decoder,
        compile=work.compile,
        input_px=work.input_px,
        positions=work.positions,
    )


@dataclass(frozen=True)
class Losses:
    """Losses of one sample; `None` where a part is not trained."""

    mask: float | None
    iou: float | None
    instance: float | None

    @property
    def total(self) -> float:
        """Sum of the parts, which is what is minimised."""
        return sum(part for part in (self.mask, self.iou, self.instance) if part is not None)


def backward_samples(
    model: SamModel,
    patches: Sequence[Patch],
    plans: Sequence[PromptPlan | None],
    settings: StepSettings,
    *,
    train_instances: bool,
    weight: float = 1.0,
    scaler: GradScaler | None = None,
    features: FeatureCache | None = None,
) -> list[Losses]:
    """Add the gradients of some samples' losses to the model's trainable parameters.

    The samples share one pass through the image encoder; decoders see them one by one.

    Parameters
    ----------
    model
        In training mode, on its device.
    patches
        The samples.
    plans
        Prompts for the mask decoder's loss of each sample; `None` leaves it out.
    settings
        How to compute.
    train_instances
        Whether the instance decoder's loss is part of the sum.
    weight
        Factor on all losses, one over the number of samples in an optimizer step.
    scaler
        Multiplies losses before the backward pass (float16).
    features
        Where the frozen part of the image encoder is read instead of computed.

    Returns
    -------
    list of Losses
        Of each sample, unweighted.
    """
    embedding, input_size = encode_patches(model, patches, settings, features)
    learns = embedding.requires_grad
    leaves = [part.detach().requires_grad_(learns) for part in embedding.split(1)]

    def backward(loss: Tensor) -> None:
        loss = loss * weight
        (scaler.scale(loss) if scaler is not None else loss).backward()

    computed: list[Tensor] = []
    for leaf, patch, plan in zip(leaves, patches, plans, strict=True):
        # Mask, IoU and instance loss, added up where they are: reading each would make a card wait for every round.
        sums = torch.zeros(3, device=leaf.device, dtype=torch.promote_types(leaf.dtype, torch.float32))
        if train_instances:
            loss = instance_part(model, leaf, patch, input_size, settings)
            backward(loss)
            sums[2] = loss.detach()
            del loss
        if plan is not None:
            for parts in mask_part(model, leaf, plan, input_size, settings):
                backward(parts[0] + parts[1])
                sums[:2] += torch.stack(parts).detach()
        computed.append(sums)
    gathered = [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]
    if learns:
        embedding.backward(torch.cat(gathered))
    return [
        Losses(
            mask=None if plan is None else mask,
            iou=None if plan is None else iou,
            instance=instance if train_instances else None,
        )
        for (mask, iou, instance), plan in zip(torch.stack(computed).tolist(), plans, strict=True)
    ]


@torch.no_grad()
def validate_sample(
    model: SamModel,
    patch: Patch,
    plan: PromptPlan | None,
    settings: StepSettings,
    *,
    with_instances: bool,
    features: FeatureCache | None = None,
) -> Losses:
    """Compute the losses of one sample without gradients; the model is in evaluation mode."""
    embedding, input_size = encode_patches(model, [patch], settings, features)
    instance = instance_part(model, embedding, patch, input_size, settings).item() if with_instances else None
    mask = iou = None
    if plan is not None:
        parts = list(mask_part(model, embedding, plan, input_size, settings))
        mask = sum(mask_loss.item() for mask_loss, _ in parts)
        iou = sum(iou_loss.item() for _, iou_loss in parts)
    return Losses(mask, iou, instance)


def instance_part(
    model: SamModel, embedding: Tensor, patch: Patch, input_size: tuple[int, int], settings: StepSettings
) -> Tensor:
    """Return the loss of foreground and distance maps: dice errors of the three."""
    original_size = (patch.image.shape[-2], patch.image.shape[-1])
    with autocast(embedding.device, settings):
        checkpointed = settings.checkpoint_instance_decoder and torch.is_grad_enabled()
        # Checkpointed stages leave the statistics of batch norms alone, which torch.compile cannot follow.
        run = run_instance_decoder if checkpointed else _run(run_instance_decoder, settings)
        prediction: Tensor = run(
            model.instance_decoder,
            embedding,
            input_size,
            original_size,
            checkpoint=checkpointed,
        )
    return instance_loss(prediction, patch.targets[None].to(prediction.device, non_blocking=True))


def mask_part(
    model: SamModel, embedding: Tensor, plan: PromptPlan, input_size: tuple[int, int], settings: StepSettings
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield mask and IoU loss per round and chunk of objects; they sum to the sample's loss.

    Each pair may be sent backward as soon as it is yielded. The loss of a round is the mean over its objects of the
    best candidate's dice error, plus the mean squared error of the predicted IoU; the sample's is the mean over rounds.
    The embedding is one "1CYX" for all objects of the plan, or one for each, "NCYX".
    """
    total, rounds = len(plan.masks), len(plan.mask_prompts) + 1
    chunk = settings.object_chunk or total
    size = (plan.masks.shape[-2], plan.masks.shape[-1])
    for start in range(0, total, chunk):
        chosen = slice(start, min(start + chunk, total))
        masks, draws = (
            part.to(embedding.device, non_blocking=True) for part in (plan.masks[chosen], plan.draws[:, chosen])
        )
        prompts = plan.first.rows(chosen).to(embedding.device)
        own = embedding if len(embedding) == 1 else embedding[chosen]
        mask_prompt = None
        for round_index in range(rounds):
            with autocast(embedding.device, settings):
                low_res, iou_prediction = predict_round(
                    model, own, prompts, mask_prompt, size, plan.multimask and round_index == 0, settings, plan.place
                )
            loss = low_res_mask_loss(low_res, masks, iou_prediction, input_size=input_size, input_px=settings.input_px)
            yield loss.mask / (total * rounds), loss.iou / (total * rounds)
            if round_index == rounds - 1:
                break
            with torch.no_grad():
                objects = torch.arange(len(low_res), device=low_res.device)
                best = low_res[objects, iou_prediction.argmax(1)][:, None]
                predicted = upsample_masks(best, input_size, size, settings.input_px)[:, 0] > 0
                prompts = prompts.with_points(*next_points(predicted, masks, draws[round_index]))
                mask_prompt = best if plan.mask_prompts[round_index] else None


def predict_round(
    model: SamModel,
    embedding: Tensor,
    prompts: Prompts,
    mask_prompt: Tensor | None,
    size: tuple[int, int],
    multimask: bool,
    settings: StepSettings,
    place: tuple[float, float] = (0.0, 0.0),
) -> tuple[Tensor, Tensor]:
    """Return low-resolution mask logits "NCYX" and predicted IoU "NC" of every object; `size` is the patch's.

    Where the encoder knows places, a part of the field is its upper left corner; else it lies at `place`, so that the
    mask decoder gets to know all of the field.
    """
    encoder = model.sam.prompt_encoder
    grid = (int(embedding.shape[-2]), int(embedding.shape[-1]))
    if settings.positions == "stretched":
        field, positions = (settings.input_px, settings.input_px), encoder.pe_layer(grid)[None]
        corner = (0, 0)
    else:
        field, positions = encoder.input_image_size, encoder.get_dense_pe()
        free = [0 if model.knows_places else int(positions.shape[-2 + axis]) - grid[axis] for axis in (0, 1)]
        corner = (round(place[0] * free[0]), round(place[1] * free[1]))
        positions = positions[..., corner[0] : corner[0] + grid[0], corner[1] : corner[1] + grid[1]]
    moved = torch.tensor([corner[1], corner[0]], device=embedding.device) * (settings.input_px // grid[0])
    sparse = embed_prompts(
        encoder,
        None if prompts.points is None else scale_coords(prompts.points, size, settings.input_px) + moved,
        prompts.point_labels,
        None if prompts.boxes is None else scale_boxes(prompts.boxes, size, settings.input_px) + moved.repeat(2),
        field,
    )
    predicted: tuple[Tensor, Tensor] = _run(predict_masks, settings)(
        model.sam.mask_decoder,
        encoder,
        embedding,
        positions,
        sparse,
        mask_prompt_logits=mask_prompt,
        multimask=multimask,
    )
    return predicted


def frozen_units(model: SamModel, settings: StepSettings) -> list[Unit]:
    """Return the units of the image encoder below the first that learns."""
    units = encoder_units_of(model, settings)
    return units[: first_that_learns(units)]


def encoder_units_of(model: SamModel, settings: StepSettings) -> list[Unit]:
    """Take the image encoder apart as the settings ask."""
    return encoder_units(
        model.sam.image_encoder,
        folded=settings.folded_attention,
        stretched=settings.positions == "stretched",
        through_compile=settings.compile,
    )


def encode_patches(
    model: SamModel, patches: Sequence[Patch], settings: StepSettings, features: FeatureCache | None = None
) -> tuple[Tensor, tuple[int, int]]:
    """Return the embedding "BCYX" of patches of one size, and height and width of each in the model's input, in px."""
    device = next(model.parameters()).device
    units = encoder_units_of(model, settings)
    with autocast(device, settings):
        if features is None:
            # One by one: stacked on the CPU they would leave the pinned memory that a copy in the background needs.
            pixels = torch.stack([patch.image.to(device, non_blocking=True) for patch in patches])
            tokens, _ = to_model_input(pixels, settings.input_px)
        else:
            tokens = torch.cat([frozen_tokens(model, patch, settings, features) for patch in patches])
            units = units[first_that_learns(units) :]
        embedding = run_units(units, tokens, checkpoint_units=settings.checkpoint_encoder)
    height, width = patches[0].image.shape[-2:]
    return embedding, resized_shape((height, width), settings.input_px)


@torch.no_grad()
def frozen_tokens(model: SamModel, patch: Patch, settings: StepSettings, features: FeatureCache) -> Tensor:
    """Return what the frozen part of the image encoder makes of a patch, from the cache or computed and put there."""
    device = next(model.parameters()).device

    def compute() -> Tensor:
        with autocast(device, settings):
            images, _ = to_model_input(patch.image[None].to(device, non_blocking=True), settings.input_px)
            return run_units(frozen_units(model, settings), images)

    return features.get(patch.image, compute).to(device, non_blocking=True)


def _run(function: Callable[..., Any], settings: StepSettings) -> Callable[..., Any]:
    return compiled(function) if settings.compile else function


def autocast(device: torch.device, settings: StepSettings) -> AbstractContextManager[object]:
    """Let activations have the number format of the settings."""
    if settings.autocast is None:
        return nullcontext()
    return torch.autocast(device.type, settings.autocast)
