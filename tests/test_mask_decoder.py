"""The rearranged mask decoder gives the outputs and gradients of segment_anything's.

Gradients are compared in float64: in float32 a ReLU input within rounding of zero may fall on either side.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor, nn

from napari_resfinetune.errors import ModelError
from napari_resfinetune.models.mask_decoder import embed_prompts, predict_masks

GRID = 16
Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@pytest.fixture
def modules() -> tuple[MaskDecoder, PromptEncoder]:
    torch.manual_seed(0)
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=512, num_heads=8)
    decoder = MaskDecoder(transformer_dim=256, transformer=transformer)
    encoder = PromptEncoder(
        embed_dim=256, image_embedding_size=(GRID, GRID), input_image_size=(GRID * 16, GRID * 16), mask_in_chans=16
    )
    for module in (decoder, encoder):
        for parameter in module.parameters():
            parameter.data.add_(0.02 * torch.randn(parameter.shape))
    return decoder, encoder


def _upstream(decoder: MaskDecoder, encoder: PromptEncoder, masks: Tensor | None, multimask: bool) -> Forward:
    def forward(embedding: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
        if masks is not None:
            dense = encoder.mask_downscaling(masks)
        else:
            dense = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(len(sparse), -1, GRID, GRID)
        pe = encoder.get_dense_pe().to(embedding.dtype)
        result: tuple[Tensor, Tensor] = decoder(embedding, pe, sparse, dense, multimask)
        return result

    return forward


def _ours(decoder: MaskDecoder, encoder: PromptEncoder, masks: Tensor | None, multimask: bool) -> Forward:
    def forward(embedding: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
        pe = encoder.get_dense_pe()
        return predict_masks(
            decoder,
            encoder,
            embedding,
            pe,
            sparse,
            mask_prompt_logits=masks,
            multimask=multimask,
        )

    return forward


def _run(
    modules: tuple[nn.Module, ...], forward: Forward, embedding: Tensor, sparse: Tensor
) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    embedding = embedding.detach().clone().requires_grad_(embedding.requires_grad)
    sparse = sparse.clone().requires_grad_()
    for module in modules:
        module.zero_grad(set_to_none=True)
    outputs = list(forward(embedding, sparse))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    torch.autograd.backward(outputs, weights)
    gradients = {f"{i}.{name}": p.grad for i, module in enumerate(modules) for name, p in module.named_parameters()}
    return [y.detach() for y in outputs], gradients | {"embedding": embedding.grad, "sparse": sparse.grad}


def _relative(ours: Tensor, theirs: Tensor) -> float:
    # The gradients of the keys' biases are zero but for rounding, hence the small constant.
    return float((ours - theirs).norm() / (theirs.norm() + 1e-3))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("with_masks", [True, False])
@pytest.mark.parametrize("objects", [1, 5])
def test_outputs_and_gradients_equal_upstream(
    modules: tuple[MaskDecoder, PromptEncoder], objects: int, with_masks: bool, multimask: bool, frozen: bool
) -> None:
    decoder, encoder = modules
    decoder.double()
    encoder.mask_downscaling.double()
    encoder.no_mask_embed.double()
    masks = 5 * torch.randn(objects, 1, 4 * GRID, 4 * GRID, dtype=torch.float64) if with_masks else None
    embedding = torch.randn(1, 256, GRID, GRID, dtype=torch.float64, requires_grad=not frozen)
    sparse = torch.randn(objects, 3, 256, dtype=torch.float64)
    theirs = _run(modules, _upstream(decoder, encoder, masks, multimask), embedding, sparse)
    ours = _run(modules, _ours(decoder, encoder, masks, multimask), embedding, sparse)
    for y, expected in zip(ours[0], theirs[0], strict=True):
        assert y.shape == expected.shape
        assert _relative(y, expected) < 1e-9
    for name, expected_gradient in theirs[1].items():
        gradient = ours[1][name]
        assert (gradient is None) == (expected_gradient is None), name
        if gradient is not None and expected_gradient is not None:
            assert _relative(gradient, expected_gradient) < 1e-9, name


@pytest.mark.parametrize("kind", ["points", "boxes", "both"])
@pytest.mark.parametrize("with_masks", [True, False])
def test_from_prompts_to_masks_in_float32(
    modules: tuple[MaskDecoder, PromptEncoder], kind: str, with_masks: bool
) -> None:
    decoder, encoder = modules
    points = 255 * torch.rand(4, 3, 2) if kind != "boxes" else None
    labels = torch.tensor([[1, 0, -1]]).expand(4, 3) if kind != "boxes" else None
    boxes = 255 * torch.rand(4, 4) if kind != "points" else None
    masks = 5 * torch.randn(4, 1, 4 * GRID, 4 * GRID) if with_masks else None
    embedding = torch.randn(256, GRID, GRID)
    with torch.no_grad():
        prompts = None if points is None else (points, labels)
        expected_sparse, dense = encoder(points=prompts, boxes=boxes, masks=masks)
        expected = decoder(embedding[None], encoder.get_dense_pe(), expected_sparse, dense, True)
        sparse = embed_prompts(encoder, points, labels, boxes)
        ours = _ours(decoder, encoder, masks, True)(embedding, sparse)
    torch.testing.assert_close(sparse, expected_sparse, rtol=1e-6, atol=1e-6)
    for y, y_expected in zip(ours, expected, strict=True):
        assert _relative(y, y_expected) < 1e-5


@pytest.mark.parametrize("with_points", [True, False])
@pytest.mark.parametrize("with_boxes", [True, False])
def test_gradients_of_prompt_embeddings_equal_upstream(
    modules: tuple[MaskDecoder, PromptEncoder], with_points: bool, with_boxes: bool
) -> None:
    encoder = modules[1]
    points, labels = 255 * torch.rand(4, 2, 2), torch.tensor([[1, 0]]).expand(4, 2)
    boxes = 255 * torch.rand(4, 4) if with_boxes else None
    if not with_points and not with_boxes:
        with pytest.raises(ModelError, match="neither points nor boxes"):
            embed_prompts(encoder, None, None, None)
        return
    expected = encoder(points=(points, labels) if with_points else None, boxes=boxes, masks=None)[0]
    weights = torch.randn(expected.shape)
    ours = embed_prompts(encoder, points if with_points else None, labels if with_points else None, boxes)
    gradients = []
    for sparse in (ours, expected):
        encoder.zero_grad(set_to_none=True)
        (sparse * weights).sum().backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None})
    nonzero = {name for name, gradient in gradients[1].items() if gradient.any()}
    assert nonzero <= gradients[0].keys() <= gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-6)


def test_autocast_stays_near_float32(modules: tuple[MaskDecoder, PromptEncoder]) -> None:
    decoder, encoder = modules
    embedding, sparse = torch.randn(256, GRID, GRID), torch.randn(3, 4, 256)
    with torch.no_grad():
        expected, _ = _ours(decoder, encoder, None, True)(embedding, sparse)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            masks, iou = _ours(decoder, encoder, None, True)(embedding, sparse)
            theirs, _ = _upstream(decoder, encoder, None, True)(embedding[None], sparse)
    assert masks.dtype == iou.dtype == torch.float32
    assert _relative(masks, expected) < 1.5 * _relative(theirs.float(), expected) + 1e-3


@pytest.mark.parametrize("with_masks", [True, False])
def test_objects_of_several_images_at_once_equal_image_by_image(
    modules: tuple[MaskDecoder, PromptEncoder], with_masks: bool
) -> None:
    decoder, encoder = modules
    for module in (decoder, encoder.mask_downscaling, encoder.no_mask_embed):
        module.double()
    owners = torch.tensor([0, 0, 1, 1, 1])
    masks = 5 * torch.randn(5, 1, 4 * GRID, 4 * GRID, dtype=torch.float64) if with_masks else None
    embeddings = torch.randn(2, 256, GRID, GRID, dtype=torch.float64, requires_grad=True)
    sparse = torch.randn(5, 2, 256, dtype=torch.float64)

    def image_by_image(embedding: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for image in range(2):
            own = owners == image
            forward = _ours(*modules, None if masks is None else masks[own], True)
            parts.append(forward(embedding[image], sparse[own]))
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def at_once(embedding: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
        return _ours(*modules, masks, True)(embedding[owners], sparse)

    expected, expected_gradients = _run(modules, image_by_image, embeddings, sparse)
    found, gradients = _run(modules, at_once, embeddings, sparse)
    for y, y_expected in zip(found, expected, strict=True):
        assert _relative(y, y_expected) < 1e-9
    for name, expected_gradient in expected_gradients.items():
        gradient = gradients[name]
        if gradient is not None and expected_gradient is not None:
            assert _relative(gradient, expected_gradient) < 1e-9, name


def test_embeddings_that_do_not_match_the_objects_are_refused(modules: tuple[MaskDecoder, PromptEncoder]) -> None:
    with pytest.raises(ModelError, match="2 embeddings for 3 objects"):
        _ours(*modules, None, False)(torch.randn(2, 256, GRID, GRID), torch.randn(3, 2, 256))
