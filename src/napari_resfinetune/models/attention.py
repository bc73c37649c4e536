"""The attention of Segment Anything's image encoder, run with less memory and the same result.

The relative positions of SAM's attention are two terms per score, one for the row of the key and one for its column. As
further columns of queries (the terms) and keys (the row and column as one-hot vectors) they are part of the ordinary
product of queries and keys. In the blocks with global attention a fused kernel, which keeps no matrix of scores, can
then run; windows are too small for it, but are spared two passes over their scores.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from napari_resfinetune.models import upstream

if TYPE_CHECKING:
    from segment_anything.modeling.image_encoder import Attention, Block


# Up to so many tokens a plain product is faster than a fused kernel.
FEW_TOKENS = 256
# Scores of so many queries with 4096 keys, in 16 bit, fit into the cache of a core.
QUERIES_AT_ONCE = 256
DEVICES_IN_CHUNKS = frozenset({"cpu"})


def vit_attention(attention: Attention, x: Tensor, *, stretched: bool = False) -> Tensor:
    """Compute SAM's attention with relative positions as part of one product.

    Parameters
    ----------
    attention
        ``segment_anything.modeling.image_encoder.Attention``; its projections may be wrapped by adapters.
    x
        "BYXC", tokens on their grid.
    stretched
        On a smaller grid, interpolate the relative positions instead of using those of the same distances.

    Returns
    -------
    Tensor
        "BYXC", what the module itself would give, up to rounding.
    """
    batch, height, width, _ = x.shape
    heads = attention.num_heads
    qkv = attention.qkv(x).reshape(batch, height * width, 3, heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    scaled = q * attention.scale
    if not attention.use_rel_pos:
        out = F.scaled_dot_product_attention(scaled, k, v, scale=1.0)
    else:
        grid = q.unflatten(2, (height, width))
        by_row = torch.einsum("bnyxc,ykc->bnyxk", grid, _relative(attention.rel_pos_h, height, stretched).to(q.dtype))
        by_column = torch.einsum("bnyxc,xkc->bnyxk", grid, _relative(attention.rel_pos_w, width, stretched).to(q.dtype))
        terms = by_row.flatten(2, 3).to(q.dtype), by_column.flatten(2, 3).to(q.dtype)
        if height * width > FEW_TOKENS and x.device.type in DEVICES_IN_CHUNKS:
            out = _ChunkedAttention.apply(scaled, k, v, *terms)
        else:
            out = _folded_attention(scaled, k, v, *terms)
    out = out.transpose(1, 2).reshape(batch, height, width, -1)
    projected: Tensor = attention.proj(out)
    return projected


def _folded_attention(q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Attention "BHLC" of scaled queries, with the terms "BHLY" and "BHLX" as columns of queries and keys."""
    height, width, channels = by_row.shape[-1], by_column.shape[-1], v.shape[-1]
    q = torch.cat([q, by_row, by_column], dim=-1)
    k = torch.cat([k, _one_hot_places(height, width, k).expand(*k.shape[:2], -1, -1)], dim=-1)
    if height * width <= FEW_TOKENS:
        return (q @ k.transpose(-2, -1)).softmax(dim=-1).to(v.dtype) @ v
    # Fused kernels want values as wide as queries and keys.
    padded = F.pad(v, (0, q.shape[-1] - channels))
    return F.scaled_dot_product_attention(q, k, padded, scale=1.0)[..., :channels]


class _ChunkedAttention(torch.autograd.Function):
    """The same, some queries of one head at a time, whose scores stay in the cache of a CPU.

    A CPU is bound by arithmetic, of which further columns triple the amount; here the terms are added to the scores.
    Scores are computed again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        shape = inputs[0].shape
        q, k, v, by_row, by_column = flat = [x.flatten(0, 1).contiguous() for x in inputs]
        ctx.save_for_backward(*flat)
        with torch.autocast(q.device.type, enabled=False):
            out = torch.empty_like(v)
            for head in _heads(len(q)):
                for rows in _chunk_rows(q.shape[1]):
                    weights = _weights(q[head, rows], k[head], by_row[head, rows], by_column[head, rows])
                    torch.mm(weights, v[head], out=out[head, rows])
        return out.view(shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        shape = gradient.shape
        q, k, v, by_row, by_column = saved = ctx.saved_tensors
        gradient = gradient.flatten(0, 1).contiguous()
        dq, dk, dv, d_row, d_column = (torch.empty_like(x) for x in saved)
        # What many chunks add up to is gathered in float32 at least.
        wide = torch.promote_types(k.dtype, torch.float32)
        for head in _heads(len(q)):
            key_sum, value_sum = (torch.zeros(x.shape[1:], dtype=wide) for x in (k, v))
            for rows in _chunk_rows(q.shape[1]):
                weights = _weights(q[head, rows], k[head], by_row[head, rows], by_column[head, rows])
                above = gradient[head, rows]
                value_sum += weights.t() @ above
                scores = torch._softmax_backward_data(above @ v[head].t(), weights, -1, weights.dtype)
                torch.mm(scores, k[head], out=dq[head, rows])
                key_sum += scores.t() @ q[head, rows]
                on_grid = scores.view(-1, by_row.shape[-1], by_column.shape[-1])
                torch.sum(on_grid, 2, out=d_row[head, rows])
                torch.sum(on_grid, 1, out=d_column[head, rows])
            dk[head], dv[head] = key_sum, value_sum
        return tuple(x.view(*shape[:2], *x.shape[1:]) for x in (dq, dk, dv, d_row, d_column))


def _heads(number: int) -> Iterable[int]:
    """Return the heads one after the other; all cost the same, which a dry run makes use of."""
    return range(number)


def _chunk_rows(length: int) -> list[slice]:
    return [slice(first, first + QUERIES_AT_ONCE) for first in range(0, length, QUERIES_AT_ONCE)]


def _weights(q: Tensor, k: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Attention weights of some queries "QC" of one head for all keys "LC"."""
    terms = (by_row.unsqueeze(2) + by_column.unsqueeze(1)).flatten(1)
    return torch.addmm(terms, q, k.t()).softmax(dim=-1)


def run_block(block: Block, x: Tensor, *, folded: bool = True, stretched: bool = False) -> Tensor:
    """Run a block of the image encoder.

    Parameters
    ----------
    block
        ``segment_anything.modeling.image_encoder.Block``.
    x
        "BYXC", tokens on their grid.
    folded
        Use `vit_attention`; without it the block runs by itself, which stretches its relative positions.
    stretched
        As for `vit_attention`.
    """
    if not folded:
        unchanged: Tensor = block(x)
        return unchanged
    normed = block.norm1(x)
    if block.window_size > 0:
        windows, padded = upstream.window_partition(normed, block.window_size)
        attended = vit_attention(block.attn, windows)
        attended = upstream.window_unpartition(attended, block.window_size, padded, (x.shape[1], x.shape[2]))
    else:
        attended = vit_attention(block.attn, normed, stretched=stretched)
    x = x + attended
    result: Tensor = x + block.mlp(block.norm2(x))
    return result


def absolute_positions(table: Tensor, height: int, width: int, stretched: bool) -> Tensor:
    """Return the position encoding "1YXC" of a smaller grid: a part of the table, or all of it interpolated."""
    if not stretched or table.shape[1:3] == (height, width):
        return table[:, :height, :width]
    resized = F.interpolate(table.permute(0, 3, 1, 2), (height, width), mode="bilinear", align_corners=False)
    return resized.permute(0, 2, 3, 1)


def _relative(table: Tensor, size: int, stretched: bool) -> Tensor:
    """Look up the relative position of each query and key along one axis: (query, key, channel)."""
    distances = 2 * size - 1
    if stretched and table.shape[0] != distances:
        table = F.interpolate(table.t()[None], distances, mode="linear")[0].t()
    elif table.shape[0] > distances:  # a part of the field of view: the same distances, fewer of them
        first = (table.shape[0] - distances) // 2
        table = table[first : first + distances]
    places = torch.arange(size, device=table.device)
    # Not by indexing, whose gradient adds up in any order on a CPU, and so differs in its last bit.
    return F.embedding(places[:, None] - places[None, :] + size - 1, table)


def _one_hot_places(height: int, width: int, like: Tensor) -> Tensor:
    """Row and column of each token of a grid as one-hot vectors: (height * width, height + width)."""
    rows = torch.eye(height, dtype=like.dtype, device=like.device).repeat_interleave(width, dim=0)
    columns = torch.eye(width, dtype=like.dtype, device=like.device).repeat(height, 1)
    return torch.cat([rows, columns], dim=1)
