"""The image encoder of Segment Anything, run with less memory and the same result.

The relative positions of SAM's attention are two terms per score, one for the row of the key and one for its column. As
further columns of queries (the terms) and keys (the row and column as one-hot vectors) they are part of the ordinary
product of queries and keys, so that fused attention kernels, which keep no matrix of scores, can run. This pays in the
blocks with global attention; the windows of the other blocks are too small for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from segment_anything.modeling.image_encoder import Attention, Block


def encode(image_encoder: nn.Module, x: Tensor, *, checkpoint_blocks: bool = False, folded: bool = True) -> Tensor:
    """Compute the embedding of images.

    Parameters
    ----------
    image_encoder
        The image encoder: ``ImageEncoderViT`` of ``segment_anything``, or any other module, which is then called. A
        module that has ``forward_checkpointed(x)`` is run by that for ``checkpoint_blocks``.
    x
        "BCYX", images as the encoder wants them: normalized and padded to its square.
    checkpoint_blocks
        Keep only what enters each block and compute the rest again in the backward pass.
    folded
        Use `vit_attention` in blocks with global attention.

    Returns
    -------
    Tensor
        "BCYX", the embedding. Without trainable parameters (and with images that need no gradient) it has no graph.
    """
    needs_graph = x.requires_grad or any(parameter.requires_grad for parameter in image_encoder.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and needs_graph):
        if not _is_vit(image_encoder):
            forward = getattr(image_encoder, "forward_checkpointed", None) if checkpoint_blocks else None
            embedding: Tensor = (forward or image_encoder)(x)
            return embedding
        return _encode_vit(image_encoder, x, checkpoint_blocks=checkpoint_blocks, folded=folded)


def vit_attention(attention: Attention, x: Tensor) -> Tensor:
    """Compute SAM's attention with relative positions by a fused kernel.

    Parameters
    ----------
    attention
        ``segment_anything.modeling.image_encoder.Attention``; its projections may be wrapped by adapters.
    x
        "BYXC", tokens on their grid.

    Returns
    -------
    Tensor
        "BYXC", what the module itself would give, up to rounding.
    """
    batch, height, width, _ = x.shape
    heads = attention.num_heads
    qkv = attention.qkv(x).reshape(batch, height * width, 3, heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    channels = q.shape[-1]
    scaled = q * attention.scale
    if attention.use_rel_pos:
        grid = q.unflatten(2, (height, width))
        by_row = torch.einsum("bnyxc,ykc->bnyxk", grid, _relative(attention.rel_pos_h, height).to(q.dtype))
        by_column = torch.einsum("bnyxc,xkc->bnyxk", grid, _relative(attention.rel_pos_w, width).to(q.dtype))
        terms = torch.cat([by_row, by_column], dim=-1).flatten(2, 3).to(q.dtype)
        places = _one_hot_places(height, width, q)
        scaled = torch.cat([scaled, terms], dim=-1)
        k = torch.cat([k, places.expand(batch, heads, -1, -1)], dim=-1)
        # Fused kernels want values as wide as queries and keys.
        v = F.pad(v, (0, height + width))
    out = F.scaled_dot_product_attention(scaled, k, v, scale=1.0)[..., :channels]
    out = out.transpose(1, 2).reshape(batch, height, width, heads * channels)
    projected: Tensor = attention.proj(out)
    return projected


def _is_vit(image_encoder: nn.Module) -> bool:
    return all(hasattr(image_encoder, name) for name in ("patch_embed", "pos_embed", "blocks", "neck"))


def _encode_vit(image_encoder: Any, x: Tensor, *, checkpoint_blocks: bool, folded: bool) -> Tensor:
    x = image_encoder.patch_embed(x)
    if image_encoder.pos_embed is not None:
        x = x + image_encoder.pos_embed[:, : x.shape[1], : x.shape[2]]
    # segment-anything's own attention stretches the relative positions of a whole field over a part of it.
    folded = folded or x.shape[1] * 16 < image_encoder.img_size
    for block in image_encoder.blocks:
        # A frozen block below all trainable ones keeps nothing, so there is nothing to compute again.
        trains = x.requires_grad or any(parameter.requires_grad for parameter in block.parameters())
        if checkpoint_blocks and trains and torch.is_grad_enabled():
            x = checkpoint(_run_block, block, x, folded, use_reentrant=False, preserve_rng_state=False)
        else:
            x = _run_block(block, x, folded)
    embedding: Tensor = image_encoder.neck(x.permute(0, 3, 1, 2))
    return embedding


def _run_block(block: Block, x: Tensor, folded: bool) -> Tensor:
    if block.window_size > 0 or not folded:
        unchanged: Tensor = block(x)
        return unchanged
    x = x + vit_attention(block.attn, block.norm1(x))
    result: Tensor = x + block.mlp(block.norm2(x))
    return result


def _relative(table: Tensor, size: int) -> Tensor:
    """Look up the relative position of each query and key along one axis: (query, key, channel)."""
    distances = 2 * size - 1
    if table.shape[0] > distances:  # a part of the field of view: the same distances, fewer of them
        first = (table.shape[0] - distances) // 2
        table = table[first : first + distances]
    places = torch.arange(size, device=table.device)
    return table[places[:, None] - places[None, :] + size - 1]


def _one_hot_places(height: int, width: int, like: Tensor) -> Tensor:
    """Row and column of each token of a grid as one-hot vectors: (height * width, height + width)."""
    rows = torch.eye(height, dtype=like.dtype, device=like.device).repeat_interleave(width, dim=0)
    columns = torch.eye(width, dtype=like.dtype, device=like.device).repeat(height, 1)
    return torch.cat([rows, columns], dim=1)
