"""The convolutional decoder for automatic instance segmentation, run with less memory and the same result.

It takes micro-sam's ``DecoderAdapter`` and uses its modules; what differs is how they are run:

- A 1x1 convolution after bilinear upsampling is done before it, on a quarter of the pixels: the two commute.
- Everything stays in channels_last layout, also through instance normalization, which would leave it.
- Stages can be checkpointed. Computing a stage again leaves the running statistics of its batch norms alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as run_checkpointed

if TYPE_CHECKING:
    from micro_sam.instance_segmentation import DecoderAdapter

_Stage = Callable[..., Tensor]


def run_instance_decoder(
    decoder: DecoderAdapter,
    embedding: Tensor,
    input_size: tuple[int, int],
    original_size: tuple[int, int],
    *,
    checkpoint: bool = False,
) -> Tensor:
    """Predict foreground and distances from the embedding of images.

    Parameters
    ----------
    decoder
        micro-sam's adapter around the decoder's modules.
    embedding
        "BCYX", embeddings of images; the decoder's output is 16 times as large, which is the size of the model's input.
    input_size
        Height and width of the images in the model's input, in px, without padding.
    original_size
        Height and width of the images, in px.
    checkpoint
        Keep only what enters each stage and compute the rest again in the backward pass.

    Returns
    -------
    Tensor
        "BCYX" in image resolution, at least float32: foreground, distance to the centre, distance to the boundary.
    """
    run = _checkpointed if checkpoint and torch.is_grad_enabled() else _directly
    embedding = embedding.contiguous(memory_format=torch.channels_last)
    from_encoder = [embedding]
    for block in (decoder.deconv1, decoder.deconv2, decoder.deconv3, decoder.deconv4):
        from_encoder.append(run(_deconv, block, from_encoder[-1]))
    x = run(_conv_block, decoder.base, embedding)
    unet = decoder.decoder
    for level, sampler, skip in zip(unet.blocks, unet.samplers, from_encoder[1:4], strict=True):
        x = run(_unet_level, nn.ModuleList([sampler, level]), x, skip)
    x = run(_deconv_or_sampler, decoder.deconv_out, x)
    head = decoder.decoder_head
    x = run(_first_convolution, head, x, from_encoder[4])
    x = run(_second_convolution, nn.ModuleList([head, decoder.out_conv]), x)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if decoder.final_activation is not None:
        x = decoder.final_activation(x)
    x = x[..., : input_size[0], : input_size[1]]
    if tuple(x.shape[-2:]) != tuple(original_size):
        x = F.interpolate(x, tuple(original_size), mode="bilinear", align_corners=False)
    return x


def _directly(stage: _Stage, module: nn.Module, *inputs: Tensor) -> Tensor:
    return stage(module, *inputs)


def _checkpointed(stage: _Stage, module: nn.Module, *inputs: Tensor) -> Tensor:
    def contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        return contextlib.nullcontext(), _frozen_statistics(module)

    result: Tensor = run_checkpointed(
        stage, module, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
    return result


@contextlib.contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Let batch norms in training mode see one more batch without any trace of it in their running statistics."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked


def _unet_level(modules: Any, x: Tensor, skip: Tensor) -> Tensor:
    sampler, level = modules
    x = _deconv_or_sampler(sampler, x)
    # As upstream: of a skip connection with more channels than the level itself, the middle ones are used.
    first = (skip.shape[1] - x.shape[1]) // 2
    return _sequence(level.block[3:], _first_convolution(level, x, skip[:, first : first + x.shape[1]]))


def _first_convolution(module: Any, x: Tensor, skip: Tensor) -> Tensor:
    """Apply norm, convolution and activation of a block to two inputs side by side, without putting them there.

    The norm treats channels one by one, and a convolution of two inputs is the sum of one of each.
    """
    norm, conv, act = module.block[:3]
    own, other = conv.weight.split([x.shape[1], skip.shape[1]], dim=1)
    y = F.conv2d(_instance_norm(norm, x), own, conv.bias, padding=conv.padding)
    result: Tensor = act(y + F.conv2d(_instance_norm(norm, skip), other, None, padding=conv.padding))
    return result


def _second_convolution(modules: Any, x: Tensor) -> Tensor:
    head, out_conv = modules
    result: Tensor = out_conv(_sequence(head.block[3:], x))
    return result


def _conv_block(module: Any, x: Tensor) -> Tensor:
    return _sequence(module.block, x)


def _deconv(module: Any, x: Tensor) -> Tensor:
    upsampler, *rest = module.block
    return _sequence(rest, _deconv_or_sampler(upsampler, x))


def _deconv_or_sampler(module: Any, x: Tensor) -> Tensor:
    """Enlarge by bilinear upsampling and a 1x1 convolution, or by whatever else the module does."""
    conv = getattr(module, "conv", None)
    if getattr(module, "mode", None) != "bilinear" or not isinstance(conv, nn.Conv2d) or conv.kernel_size != (1, 1):
        if hasattr(module, "block") and isinstance(module.block, nn.Sequential):
            return _deconv(module, x)
        result: Tensor = module(x)
        return result
    return _enlarge(conv(x), module.scale_factor)


def _enlarge(x: Tensor, factor: float) -> Tensor:
    # Autocast on a CPU would do this in float32, five times slower, for the same numbers: the weights are quarters.
    with torch.autocast(x.device.type, enabled=False):
        return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def _sequence(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = _instance_norm(module, x) if isinstance(module, nn.InstanceNorm2d) else module(x)
    return x


def _instance_norm(norm: nn.InstanceNorm2d, x: Tensor) -> Tensor:
    """Normalize each channel of each image; for one image this is batch norm, which keeps channels_last."""
    if x.shape[0] != 1 or norm.track_running_stats:
        result: Tensor = norm(x)
        return result
    return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
