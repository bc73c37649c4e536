"""Losses of a training step, equal to those of micro-sam, without loops and with little kept for the backward pass.

The mask loss is the dice error of the best candidate per object. Only the best candidate has a gradient, so only its
probabilities are kept, and only its mask is carried back to the resolution of the mask decoder.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from napari_resfinetune.errors import TrainingError

_EPS = 1e-7


class MaskLoss(NamedTuple):
    """Losses of the masks of ``N`` objects with ``C`` candidates each.

    Attributes
    ----------
    mask
        Scalar, sum over the objects of the dice error of their best candidate. Divide by the number of objects for
        micro-sam's loss.
    iou
        Scalar, sum over the objects of the mean squared error of the predicted IoU.
    dice_error
        "NC", dice error of each candidate, without gradient.
    true_iou
        "NC", IoU of each candidate with its object, without gradient.
    best
        "N", index of the candidate with the lowest dice error.
    """

    mask: Tensor
    iou: Tensor
    dice_error: Tensor
    true_iou: Tensor
    best: Tensor


def mask_and_iou_loss(logits: Tensor, targets: Tensor, iou_predictions: Tensor) -> MaskLoss:
    """Compare masks with objects at the same resolution.

    Parameters
    ----------
    logits
        "NCYX", mask logits.
    targets
        "NYX", the objects: bool, integer or float of 0 and 1.
    iou_predictions
        "NC", the IoU that the model predicts.

    Returns
    -------
    MaskLoss
        The sums over objects, and what each candidate reached.

    Raises
    ------
    TrainingError
        If the shapes do not fit each other.
    """
    if logits.shape[-2:] != targets.shape[-2:]:
        raise TrainingError(
            f"mask loss: masks of {tuple(logits.shape[-2:])} px against objects of {tuple(targets.shape[-2:])} px; "
            "upsample the masks first"
        )
    return _mask_loss(logits, targets, iou_predictions, None)


def low_res_mask_loss(
    low_res: Tensor, targets: Tensor, iou_predictions: Tensor, *, input_size: tuple[int, int], input_px: int
) -> MaskLoss:
    """Compare masks in the mask decoder's resolution with objects in image resolution.

    Gives what `mask_and_iou_loss` gives for the masks of `upsample_masks`, and keeps less for the backward pass.

    Parameters
    ----------
    low_res
        "NCYX", mask logits as the mask decoder gives them.
    targets
        "NYX" in image resolution: bool, integer or float of 0 and 1.
    iou_predictions
        "NC", the IoU that the model predicts.
    input_size
        Height and width of the image in the model's input, in px, without padding.
    input_px
        Side of the model's square input, in px.

    Returns
    -------
    MaskLoss
        The sums over objects, and what each candidate reached.

    Raises
    ------
    TrainingError
        If the shapes do not fit each other.
    """
    height, width = targets.shape[-2:]
    matrices = _upsampling(low_res, input_size, (height, width), input_px)
    return _mask_loss(low_res, targets, iou_predictions, matrices)


def upsample_masks(
    low_res: Tensor, input_size: tuple[int, int], original_size: tuple[int, int], input_px: int
) -> Tensor:
    """Bring masks of the mask decoder to image resolution.

    Equals enlarging to the model's square input, cutting the padding off and resizing to the image, each bilinear. All
    three are linear and act on rows and columns alone, so two small matrices do it without the large intermediate.

    Parameters
    ----------
    low_res
        "NCYX", mask logits as the mask decoder gives them.
    input_size
        Height and width of the image in the model's input, in px, without padding.
    original_size
        Height and width of the image, in px.
    input_px
        Side of the model's square input, in px.

    Returns
    -------
    Tensor
        "NCYX" in image resolution, at least float32.
    """
    return _upsample(_wide(low_res), _upsampling(low_res, input_size, original_size, input_px))


def instance_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Compute the loss of the instance decoder: dice errors of foreground and of both distances inside objects.

    Parameters
    ----------
    prediction
        "BCYX", foreground probability, distance to the centre, distance to the boundary; all in 0 to 1.
    target
        The same for the labels, as ``PerObjectDistanceTransform`` of torch-em makes them.

    Returns
    -------
    Tensor
        Scalar, the sum of the three dice errors, each over the whole batch.

    Raises
    ------
    TrainingError
        If the shapes differ or there are not three channels.
    """
    if prediction.shape != target.shape or prediction.shape[1] != 3:
        raise TrainingError(
            f"instance loss: prediction {tuple(prediction.shape)} and target {tuple(target.shape)} "
            "must both be (batch, 3, height, width)"
        )
    with torch.autocast(prediction.device.type, enabled=False):
        true = target.to(_wide(prediction).dtype)
        inside = torch.cat([torch.ones_like(true[:, :1]), true[:, :1].expand(-1, 2, -1, -1)], dim=1)
        p, t = _wide(prediction) * inside, true * inside
        overlap = (p * t).sum((0, 2, 3))
        total = (p * p).sum((0, 2, 3)) + (t * t).sum((0, 2, 3))
        return (1.0 - 2.0 * overlap / total.clamp(min=_EPS)).sum()


class _Matrices(NamedTuple):
    """Row matrix "Yy" and column matrix "Xx" of an upsampling from "yx" to "YX"."""

    rows: Tensor
    columns: Tensor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@functools.lru_cache(maxsize=64)
def _interpolation(low: int, input_px: int, kept: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """One axis of the way from mask to image as a matrix (size, low); kept on the device, or a card would wait."""
    with torch.no_grad():
        unit = torch.eye(low).unsqueeze(0)
        enlarged = F.interpolate(unit, size=input_px, mode="linear", align_corners=False)
        resized = F.interpolate(enlarged[..., :kept], size=size, mode="linear", align_corners=False)
    return resized[0].t().contiguous().to(device, dtype)


def _upsampling(
    low_res: Tensor, input_size: tuple[int, int], original_size: tuple[int, int], input_px: int
) -> _Matrices:
    axes = zip(low_res.shape[-2:], input_size, original_size, strict=True)
    where = low_res.device, _wide(low_res).dtype
    return _Matrices(*(_interpolation(low, input_px, int(kept), int(size), *where) for low, kept, size in axes))


def _upsample(masks: Tensor, matrices: _Matrices | None) -> Tensor:
    if matrices is None:
        return masks
    with torch.autocast(masks.device.type, enabled=False):
        wide = masks @ matrices.columns.t()
        return matrices.rows @ wide


def _downsample_gradient(gradient: Tensor, matrices: _Matrices | None) -> Tensor:
    if matrices is None:
        return gradient
    return matrices.rows.t() @ gradient @ matrices.columns


def _mask_loss(logits: Tensor, targets: Tensor, iou_predictions: Tensor, matrices: _Matrices | None) -> MaskLoss:
    n, candidates = logits.shape[:2]
    if targets.dim() != 3 or targets.shape[0] != n or iou_predictions.shape != (n, candidates):
        raise TrainingError(
            f"mask loss: masks {tuple(logits.shape)}, objects {tuple(targets.shape)} and predicted IoU "
            f"{tuple(iou_predictions.shape)} must be (N, C, y, x), (N, Y, X) and (N, C)"
        )
    error, dice_error, true_iou, best = _BestDice.apply(logits, targets, matrices)
    with torch.autocast(logits.device.type, enabled=False):
        iou = (true_iou - _wide(iou_predictions)).square().mean(dim=1).sum()
        return MaskLoss(error.sum(), iou, dice_error, true_iou, best)


class _BestDice(torch.autograd.Function):
    """Dice error of each object's best candidate; keeps the probabilities of that candidate alone."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, matrices: _Matrices | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        p = _upsample(_wide(logits), matrices).sigmoid().flatten(2)
        truth = targets.flatten(1).to(p.dtype).unsqueeze(1)
        overlap = (p * truth).sum(2)
        total = (p * p).sum(2) + truth.square().sum(2)
        dice_error = 1.0 - 2.0 * overlap / total.clamp(min=_EPS)
        error, best = dice_error.min(dim=1)

        # micro-sam compares probabilities with 0.5, which a tiny positive logit rounds to.
        # Counted in the dtype of the probabilities: reductions of bool are several times slower on a CPU.
        inside = torch.gt(p, 0.5, out=torch.empty_like(p))
        common = (inside * truth).sum(2)
        true_iou = common / (inside.sum(2) + truth.sum(2) - common + _EPS)

        objects = torch.arange(len(best), device=best.device)
        ctx.save_for_backward(p[objects, best], targets, overlap[objects, best], total[objects, best], best)
        ctx.matrices, ctx.shape, ctx.dtype = matrices, logits.shape, logits.dtype
        ctx.mark_non_differentiable(dice_error, true_iou, best)
        return error, dice_error, true_iou, best

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        p, targets, overlap, total, best = ctx.saved_tensors
        truth = targets.flatten(1).to(p.dtype)
        clamped = total.clamp(min=_EPS)
        by_overlap = (-2.0 * gradient / clamped).unsqueeze(1)
        by_total = torch.where(total > _EPS, 2.0 * gradient * overlap / clamped.square(), 0.0).unsqueeze(1)
        # d total / d p = 2 p, d overlap / d p = target, d p / d logit = p (1 - p)
        slope = (p * (2.0 * by_total)).addcmul_(truth, by_overlap)
        slope = slope.mul_(p).mul_(1.0 - p).view(-1, *targets.shape[-2:])
        result = torch.zeros(ctx.shape, dtype=p.dtype, device=p.device)
        result[torch.arange(len(best), device=best.device), best] = _downsample_gradient(slope, ctx.matrices)
        return result.to(ctx.dtype), None, None
