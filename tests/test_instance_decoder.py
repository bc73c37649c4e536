"""The instance decoder gives what micro-sam's adapter gives, and keeps the same running statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from micro_sam.instance_segmentation import DecoderAdapter
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn
from torch_em.model import UNETR

from napari_resfinetune.models.instance_decoder import run_instance_decoder

GRID = 4
INPUT_PX = 16 * GRID


def _decoder(use_conv_transpose: bool = False) -> DecoderAdapter:
    torch.manual_seed(0)
    encoder = ImageEncoderViT(img_size=INPUT_PX, embed_dim=16, depth=1, num_heads=1, out_chans=32)
    unetr = UNETR(
        backbone="sam",
        encoder=encoder,
        out_channels=3,
        use_sam_stats=True,
        final_activation="Sigmoid",
        use_skip_connection=False,
        use_conv_transpose=use_conv_transpose,
        initial_features=8,
        embed_dim=32,
    )
    return DecoderAdapter(unetr).double()


def _gradients(decoder: nn.Module, prediction: Tensor, embedding: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(prediction.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (prediction * weights).sum().backward()
    gradients = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
    assert embedding.grad is not None
    return gradients | {"embedding": embedding.grad}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("input_size", [(INPUT_PX, INPUT_PX), (INPUT_PX, 40)])
def test_equals_micro_sam(batch: int, checkpoint: bool, training: bool, input_size: tuple[int, int]) -> None:
    theirs = _decoder().train(training)
    ours = copy.deepcopy(theirs)
    original_size = (input_size[0] // 2, input_size[1] // 2)
    embedding = torch.randn(batch, 32, GRID, GRID, dtype=torch.float64)
    inputs = [embedding.clone().requires_grad_() for _ in range(2)]
    expected = theirs(inputs[0], input_size, original_size)
    prediction = run_instance_decoder(ours, inputs[1], input_size, original_size, checkpoint=checkpoint)
    torch.testing.assert_close(prediction, expected, rtol=1e-9, atol=1e-9)
    expected_gradients = _gradients(theirs, expected, inputs[0])
    gradients = _gradients(ours, prediction, inputs[1])
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).norm() <= 1e-9 * (expected_gradients[name].norm() + 1), name
    buffers = dict(ours.named_buffers())
    assert any(name.endswith("num_batches_tracked") for name in buffers)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-9, atol=1e-12, msg=name)


def test_transposed_convolutions_of_older_checkpoints() -> None:
    decoder = _decoder(use_conv_transpose=True)
    embedding = torch.randn(1, 32, GRID, GRID, dtype=torch.float64)
    size = (INPUT_PX, INPUT_PX)
    expected = copy.deepcopy(decoder)(embedding, size, size)
    torch.testing.assert_close(run_instance_decoder(decoder, embedding, size, size), expected, rtol=1e-9, atol=1e-9)
