"""The image encoder as a row of units, any stretch of which can be run, checkpointed or left out on its own.

A unit is a block of the transformer (of TinyViT also a convolutional one) or what lies before, between and behind
blocks. Units below the first one that learns compute the same for the same pixels in every epoch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from napari_resfinetune.models.attention import absolute_positions, run_block


class Unit(NamedTuple):
    """A part of the image encoder, from tokens to tokens; the first takes images, the last gives the embedding.

    Attributes
    ----------
    run
        Computes it.
    parts
        The modules and single parameters that it consists of.
    is_block
        Whether it is a block, as `late` strategies count them.
    """

    run: Callable[[Tensor], Tensor]
    parts: tuple[nn.Module | nn.Parameter, ...]
    is_block: bool = False

    def parameters(self) -> Iterator[nn.Parameter]:
        """Go through its parameters."""
        for part in self.parts:
            if isinstance(part, nn.Parameter):
                yield part
            else:
                yield from part.parameters()

    @property
    def learns(self) -> bool:
        """Whether any of its parameters does."""
        return any(parameter.requires_grad for parameter in self.parameters())


def encoder_units(
    image_encoder: Any, *, folded: bool = True, stretched: bool = False, through_compile: bool = False
) -> list[Unit]:
    """Take an image encoder apart.

    Parameters
    ----------
    image_encoder
        ``ImageEncoderViT`` of ``segment_anything``, `TinyViTEncoder`, or any other module, which is then one unit.
    folded
        Use `vit_attention` instead of the attention of ``segment_anything``.
    stretched
        Give an input that is smaller than the encoder's own the position encodings of the whole field of view,
        interpolated, instead of those of its upper left part.
    through_compile
        Run each unit through ``torch.compile``.

    Returns
    -------
    list of Unit
        In the order in which they run.
    """
    call = compiled(_call) if through_compile else _call
    if all(hasattr(image_encoder, name) for name in ("patch_embed", "pos_embed", "blocks", "neck")):
        block = compiled(run_block) if through_compile else run_block
        return _vit_units(image_encoder, call, functools.partial(block, folded=folded, stretched=stretched), stretched)
    if all(hasattr(image_encoder, name) for name in ("patch_embed", "stages", "neck")):
        call_byxc = compiled(_call_byxc) if through_compile else _call_byxc
        return _tiny_vit_units(image_encoder, call, call_byxc)
    return [Unit(functools.partial(call, image_encoder), (image_encoder,))]


def run_units(units: Sequence[Unit], x: Tensor, *, checkpoint_units: bool = False) -> Tensor:
    """Run units one after the other; those that neither learn nor get a gradient keep nothing.

    Parameters
    ----------
    units
        All of an encoder's, or a stretch of them.
    x
        What the first of them takes.
    checkpoint_units
        Keep only what enters each unit and compute the rest again in the backward pass.
    """
    with_gradients = torch.is_grad_enabled()
    for unit in units:
        learns = with_gradients and (x.requires_grad or unit.learns)
        with torch.set_grad_enabled(learns):
            if checkpoint_units and learns:
                x = checkpoint(unit.run, x, use_reentrant=False)
            else:
                x = unit.run(x)
    return x


def encode(image_encoder: nn.Module, images: Tensor, **how: Any) -> Tensor:
    """Compute the embedding "BCYX" of images "BCYX": normalized, and padded to a square.

    Parameters
    ----------
    image_encoder
        As for `encoder_units`.
    images
        As the encoder wants them.
    **how
        As for `encoder_units`.
    """
    return run_units(encoder_units(image_encoder, **how), images)


def first_that_learns(units: Sequence[Unit]) -> int:
    """Return how many units come before the first that learns."""
    return next((i for i, unit in enumerate(units) if unit.learns), len(units))


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of a module as ``torch.compile`` makes it, once per process."""
    result: Callable[..., Any] = torch.compile(function)
    return result


def _vit_units(
    encoder: Any, call: Callable[..., Tensor], run_one: Callable[..., Tensor], stretched: bool
) -> list[Unit]:
    def patches(x: Tensor) -> Tensor:
        tokens: Tensor = encoder.patch_embed(x)
        if encoder.pos_embed is None:
            return tokens
        return tokens + absolute_positions(encoder.pos_embed, tokens.shape[1], tokens.shape[2], stretched)

    def neck(x: Tensor) -> Tensor:
        return call(encoder.neck, x.permute(0, 3, 1, 2))

    stem = (encoder.patch_embed,) if encoder.pos_embed is None else (encoder.patch_embed, encoder.pos_embed)
    blocks = [Unit(functools.partial(run_one, block), (block,), is_block=True) for block in encoder.blocks]
    return [Unit(patches, stem), *blocks, Unit(neck, (encoder.neck,))]


def _tiny_vit_units(encoder: Any, call: Callable[..., Tensor], call_byxc: Callable[..., Tensor]) -> list[Unit]:
    convolutional, *stages = encoder.stages

    def patches(x: Tensor) -> Tensor:
        return call(encoder.patch_embed, x.contiguous(memory_format=torch.channels_last))

    units = [Unit(patches, (encoder.patch_embed,))]
    units += [Unit(functools.partial(call, block), (block,), is_block=True) for block in convolutional.blocks]
    for stage in stages:
        units.append(Unit(functools.partial(call, stage.downsample), (stage.downsample,)))
        units += [Unit(functools.partial(call_byxc, block), (block,), is_block=True) for block in stage.blocks]
    units.append(Unit(functools.partial(call, encoder.neck), (encoder.neck,)))
    return units


def _call(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return module(x)


def _call_byxc(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Call a module that takes and gives "BYXC" with "BCYX"."""
    return module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
