"""Losses equal those of micro-sam and torch-em, and so do their gradients."""

from __future__ import annotations

import pytest
import torch
from micro_sam.training.sam_trainer import SamTrainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch_em.loss import DiceBasedDistanceLoss, DiceLoss

from napari_resfinetune.errors import TrainingError
from napari_resfinetune.training.losses import (
    instance_loss,
    low_res_mask_loss,
    mask_and_iou_loss,
    upsample_masks,
)

SIZES = [((64, 64), (32, 32)), ((64, 40), (50, 31)), ((37, 64), (90, 155))]


class _Trainer(SamTrainer):
    """micro-sam's trainer with nothing but what its loss needs."""

    def __init__(self) -> None:
        self.loss = DiceLoss(reduce_channel=None)
        self.mse_loss = nn.MSELoss()


def _postprocess(masks: Tensor, input_size: tuple[int, int], original_size: tuple[int, int]) -> Tensor:
    """What ``Sam.postprocess_masks`` does for a model with an input of 64 px."""
    masks = F.interpolate(masks, (64, 64), mode="bilinear", align_corners=False)
    masks = masks[..., : input_size[0], : input_size[1]]
    return F.interpolate(masks, original_size, mode="bilinear", align_corners=False)


def _close(ours: Tensor | None, theirs: Tensor | None) -> bool:
    assert ours is not None
    assert theirs is not None
    return bool((ours - theirs).norm() <= 1e-5 * theirs.norm())


@pytest.mark.parametrize(("input_size", "original_size"), SIZES)
def test_upsampling_equals_postprocessing(input_size: tuple[int, int], original_size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    low_res = 5 * torch.randn(2, 3, 16, 16, requires_grad=True)
    low_res.retain_grad()
    expected = _postprocess(low_res, input_size, original_size)
    weights = torch.randn(expected.shape)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), low_res)
    masks = upsample_masks(low_res, input_size, original_size, 64)
    (gradient,) = torch.autograd.grad((masks * weights).sum(), low_res)
    assert masks.shape == expected.shape
    assert _close(masks, expected)
    assert _close(gradient, expected_gradient)


@pytest.mark.parametrize(("input_size", "original_size"), SIZES)
@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("objects", [1, 5])
def test_mask_loss_equals_micro_sam(
    objects: int, candidates: int, input_size: tuple[int, int], original_size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    low_res = (3 * torch.randn(objects, candidates, 16, 16)).requires_grad_()
    iou = torch.rand(objects, candidates, requires_grad=True)
    targets = torch.rand(objects, *original_size) > 0.7
    masks = _postprocess(low_res, input_size, original_size)
    outputs = [{"masks": masks, "iou_predictions": iou}]
    _, expected_mask, expected_iou = _Trainer()._compute_loss(outputs, [targets.unsqueeze(1).float()])
    expected = torch.autograd.grad(expected_mask + expected_iou, (low_res, iou))

    from_low_res = low_res_mask_loss(low_res, targets, iou, input_size=input_size, input_px=64)
    from_masks = mask_and_iou_loss(_postprocess(low_res, input_size, original_size), targets.to(torch.uint8), iou)
    for loss in (from_low_res, from_masks):
        torch.testing.assert_close(loss.mask / objects, expected_mask, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loss.iou / objects, expected_iou, rtol=1e-5, atol=1e-6)
        gradients = torch.autograd.grad((loss.mask + loss.iou) / objects, (low_res, iou))
        assert all(_close(ours, theirs) for ours, theirs in zip(gradients, expected, strict=True))
        assert loss.best.shape == (objects,)
        assert loss.true_iou.shape == loss.dice_error.shape == (objects, candidates)
        assert not loss.true_iou.requires_grad


def test_mask_loss_of_16_bit_masks_is_float32() -> None:
    torch.manual_seed(0)
    low_res = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    loss = low_res_mask_loss(low_res, torch.ones(2, 16, 16), torch.rand(2, 3), input_size=(32, 32), input_px=32)
    (loss.mask + loss.iou).backward()
    assert loss.mask.dtype == torch.float32
    assert low_res.grad is not None
    assert low_res.grad.dtype == torch.bfloat16


def test_empty_object_has_no_gradient_that_is_not_finite() -> None:
    low_res = torch.full((1, 1, 8, 8), -200.0, requires_grad=True)
    loss = mask_and_iou_loss(low_res, torch.zeros(1, 8, 8), torch.zeros(1, 1))
    loss.mask.backward()
    assert loss.mask.item() == pytest.approx(1.0)
    assert low_res.grad is not None
    assert low_res.grad.isfinite().all()


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(TrainingError, match=r"\(8, 8\).*\(9, 8\)"):
        mask_and_iou_loss(torch.zeros(1, 1, 8, 8), torch.zeros(1, 9, 8), torch.zeros(1, 1))
    with pytest.raises(TrainingError, match=r"\(2, 8, 8\)"):
        mask_and_iou_loss(torch.zeros(1, 1, 8, 8), torch.zeros(2, 8, 8), torch.zeros(1, 1))
    with pytest.raises(TrainingError, match="must both be"):
        instance_loss(torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8))


@pytest.mark.parametrize("batch", [1, 3])
def test_instance_loss_equals_torch_em(batch: int) -> None:
    torch.manual_seed(0)
    prediction = torch.rand(batch, 3, 32, 32, requires_grad=True)
    target = torch.rand(batch, 3, 32, 32)
    target[:, 0] = (target[:, 0] > 0.5).float()
    expected = DiceBasedDistanceLoss(mask_distances_in_bg=True)(prediction, target)
    (expected_gradient,) = torch.autograd.grad(expected, prediction)
    loss = instance_loss(prediction, target)
    (gradient,) = torch.autograd.grad(loss, prediction)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert _close(gradient, expected_gradient)
