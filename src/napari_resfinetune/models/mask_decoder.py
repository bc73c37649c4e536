"""The mask decoder of Segment Anything, rearranged so that a training step moves less memory.

It takes the modules of ``segment_anything`` and uses their parameters; outputs and gradients are theirs up to rounding.
What differs is the order of the work, for ``N`` objects of one image with ``L`` image tokens of width ``D`` and ``T``
prompt tokens per object:

- Image tokens are never projected in the two cross attentions. A query ``q`` meets a key ``W x`` as ``(W^T q) x``, and
  a weighted mean of values ``V x`` is ``V`` of the weighted mean, so the projections act on the few prompt tokens.
- The position encoding is the same for all objects. It enters the scores as one matrix product instead of being added
  to every object's image tokens.
- While no object has a mask prompt, all objects share the image tokens of the first layer.
- A transposed convolution whose kernel equals its stride is a linear layer per pixel. Pixels are kept nested
  ``(coarse pixel, 2x2, 2x2)`` until the masks are made, and only those are brought into raster order.
- Image tokens stay in one dtype (that of autocast, where it is on); prompt tokens, which are few, stay in float32.

The modules must be the plain ones: adapters that wrap linear layers of the mask decoder are not seen.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from napari_resfinetune.errors import ModelError

if TYPE_CHECKING:
    from segment_anything.modeling.mask_decoder import MaskDecoder
    from segment_anything.modeling.prompt_encoder import PromptEncoder
    from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock, TwoWayTransformer


class _ImageTokens(NamedTuple):
    """Image tokens: ``keys`` is "NLD", or "1LD" while all objects share them; ``pe`` is "LD"."""

    keys: Tensor
    pe: Tensor


class _PromptTokens(NamedTuple):
    """Prompt tokens "NTD", as they are now and as they came in, which is their position encoding."""

    queries: Tensor
    pe: Tensor


def predict_masks(
    mask_decoder: MaskDecoder,
    prompt_encoder: PromptEncoder,
    embedding: Tensor,
    dense_pe: Tensor,
    sparse: Tensor,
    *,
    mask_prompt_logits: Tensor | None = None,
    multimask: bool = False,
) -> tuple[Tensor, Tensor]:
    """Predict masks for the objects of one image, or of several when each object brings its own embedding.

    Parameters
    ----------
    mask_decoder, prompt_encoder
        The modules of ``segment_anything`` whose parameters are used.
    embedding
        "CYX" or "1CYX", the image embedding of all objects, or "NCYX", one for each; it may be a leaf that requires a
        gradient, or frozen.
    dense_pe
        "1CYX", what ``prompt_encoder.get_dense_pe()`` gives.
    sparse
        "NTC", embedded points and boxes, from `embed_prompts`.
    mask_prompt_logits
        "N1YX" at four times the size of the embedding, the mask prompts of all objects; None for no mask prompts.
    multimask
        Three candidates per object instead of one.

    Returns
    -------
    tuple of Tensor
        Mask logits "NCYX" at four times the size of the embedding and predicted IoU "NC", both float32.

    Raises
    ------
    ModelError
        If there are more embeddings than one, but not one per object.
    """
    if embedding.dim() == 4 and embedding.shape[0] not in (1, sparse.shape[0]):
        raise ModelError(
            f"mask decoder: got {embedding.shape[0]} embeddings for {sparse.shape[0]} objects; give the image's one "
            "embedding, or one per object"
        )
    height, width = embedding.shape[-2:]
    device_type = embedding.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else embedding.dtype
    with torch.autocast(device_type, enabled=False):
        keys = _image_tokens(prompt_encoder, embedding, mask_prompt_logits, dtype)
        image = _ImageTokens(keys, _flatten_grid(dense_pe, dtype)[0])
        own = torch.cat([mask_decoder.iou_token.weight, mask_decoder.mask_tokens.weight])
        tokens = torch.cat([own.expand(sparse.shape[0], -1, -1), sparse], dim=1).to(_wide(dtype))
        queries, keys = _two_way(mask_decoder.transformer, image, tokens)
        wanted = slice(1, None) if multimask else slice(0, 1)
        iou = _mlp(queries[:, 0], mask_decoder.iou_prediction_head.layers, dtype)[:, wanted].to(_wide(dtype))
        weights = _hypernetworks(mask_decoder, queries[:, 1 : 1 + mask_decoder.num_mask_tokens], dtype)[:, wanted]
        masks = _all_masks(mask_decoder.output_upscaling, keys, weights)
        return _raster_order(masks, height, width).to(_wide(dtype)), iou


def embed_prompts(
    prompt_encoder: PromptEncoder,
    points: Tensor | None,
    labels: Tensor | None,
    boxes: Tensor | None,
    input_px: tuple[int, int] | None = None,
) -> Tensor:
    """Embed points and boxes.

    Parameters
    ----------
    prompt_encoder
        The module of ``segment_anything`` whose parameters are used.
    points, labels
        "NPX" point coordinates (x, y) in px of the model's input and "NP" labels: 1 object, 0 background, -1 padding.
    boxes
        "NX" with (x0, y0, x1, y1) in px of the model's input.
    input_px
        Height and width that the coordinates refer to; the prompt encoder's own where None.

    Returns
    -------
    Tensor
        "NTC", float32: all points, one padding point where there are no boxes, then two corners per box.

    Raises
    ------
    ModelError
        If there are neither points nor boxes, or points without labels.
    """
    size = input_px or prompt_encoder.input_image_size
    parts: list[Tensor] = []
    if points is not None:
        if labels is None:
            raise ModelError(f"prompts: {points.shape[1]} points per object but no labels; give a label for each point")
        parts.append(_embed_points(prompt_encoder, points, labels, size))
        if boxes is None:
            padding = prompt_encoder.not_a_point_embed.weight
            parts.append(padding.expand(points.shape[0], 1, -1))
    if boxes is not None:
        corners = torch.stack([prompt_encoder.point_embeddings[2].weight, prompt_encoder.point_embeddings[3].weight], 1)
        parts.append(_encode_positions(prompt_encoder, boxes.reshape(-1, 2, 2), size) + corners)
    if not parts:
        raise ModelError("prompts: found neither points nor boxes; give at least one of them for each object")
    return torch.cat(parts, dim=1)


def _encode_positions(prompt_encoder: PromptEncoder, coordinates: Tensor, size: tuple[int, int]) -> Tensor:
    with torch.autocast(coordinates.device.type, enabled=False):
        centres = coordinates.float() + 0.5
        encoded: Tensor = prompt_encoder.pe_layer.forward_with_coords(centres, size)
    return encoded


def _embed_points(prompt_encoder: PromptEncoder, points: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor:
    table = torch.cat(
        [prompt_encoder.not_a_point_embed.weight] + [prompt_encoder.point_embeddings[i].weight for i in (0, 1)]
    )
    position = _encode_positions(prompt_encoder, points, size) * (labels != -1).unsqueeze(-1)
    return position + table[labels.long() + 1]


def _flatten_grid(grid: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring "CYX" or "BCYX" to tokens "BLC"; one "CYX" is a batch of one."""
    return grid.reshape(-1, grid.shape[-3], grid.shape[-2] * grid.shape[-1]).to(dtype).transpose(1, 2).contiguous()


def _image_tokens(
    prompt_encoder: PromptEncoder, embedding: Tensor, mask_prompt_logits: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Add the dense prompt to the embedding: "1LD" for one embedding without mask prompts, else "NLD"."""
    tokens = _flatten_grid(embedding, dtype)
    if mask_prompt_logits is None:
        unprompted: Tensor = tokens + prompt_encoder.no_mask_embed.weight.to(dtype)
        return unprompted
    first, norm1, act1, second, norm2, act2, last = prompt_encoder.mask_downscaling
    n, _, height, width = mask_prompt_logits.shape
    # Nested pixels (coarse pixel, 2x2, 2x2), in which each strided convolution is a linear layer.
    x = mask_prompt_logits.to(dtype).reshape(n, height // 4, 2, 2, width // 4, 2, 2).permute(0, 1, 4, 2, 5, 3, 6)
    x = _linear(x.reshape(n, -1, 4, 4), first.weight.flatten(1), first.bias)
    x = act1(_layer_norm(x, norm1.weight, norm1.bias, norm1.eps))
    # The weight is "out, in, 2, 2"; the nested input runs over 2x2 first and channels last.
    x = _linear(x.flatten(2), second.weight.permute(0, 2, 3, 1).flatten(1), second.bias)
    x = act2(_layer_norm(x, norm2.weight, norm2.bias, norm2.eps))
    weight = last.weight.flatten(1).to(dtype).t()
    tokens = tokens + last.bias.to(dtype)
    prompted: Tensor = torch.baddbmm(tokens.expand(n, -1, -1), x, weight.expand(n, -1, -1))
    return prompted


def _two_way(transformer: TwoWayTransformer, image: _ImageTokens, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Run the two-way transformer; gives prompt tokens "NTD" and image tokens "NLD" (or "1LD")."""
    queries = tokens
    for layer in transformer.layers:
        queries, keys = _layer(layer, image, _PromptTokens(queries, tokens))
        image = image._replace(keys=keys)
    queries = queries + _tokens_to_image(transformer.final_attn_token_to_image, image, queries + tokens)
    return _norm(queries, transformer.norm_final_attn), image.keys


def _layer(layer: TwoWayAttentionBlock, image: _ImageTokens, prompt: _PromptTokens) -> tuple[Tensor, Tensor]:
    queries, pe = prompt
    dtype = image.keys.dtype
    if layer.skip_first_layer_pe:
        queries = _self_attention(layer.self_attn, queries, queries, dtype)
    else:
        queries = queries + _self_attention(layer.self_attn, queries + pe, queries, dtype)
    queries = _norm(queries, layer.norm1)
    queries = queries + _tokens_to_image(layer.cross_attn_token_to_image, image, queries + pe)
    queries = _norm(queries, layer.norm2)
    queries = queries + _mlp(queries, (layer.mlp.lin1, layer.mlp.lin2), dtype, layer.mlp.act).to(queries.dtype)
    queries = _norm(queries, layer.norm3)
    keys = _image_to_tokens(layer.cross_attn_image_to_token, image, _PromptTokens(queries, pe))
    return queries, _norm(keys, layer.norm4)


def _self_attention(attention: Attention, q: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention among the prompt tokens of each object; ``q`` are queries and keys."""
    heads = attention.num_heads

    def project(x: Tensor, layer: nn.Linear) -> Tensor:
        projected = _linear(x.to(dtype), layer.weight, layer.bias)
        return projected.view(*x.shape[:2], heads, -1).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        project(q, attention.q_proj), project(q, attention.k_proj), project(v, attention.v_proj)
    )
    out = out.transpose(1, 2).flatten(2)
    return _linear(out, attention.out_proj.weight, attention.out_proj.bias).to(v.dtype)


def _by_head(weight: Tensor, heads: int) -> Tensor:
    """View a weight "ID", whose rows belong to heads one after the other, as "HID"."""
    return weight.reshape(heads, -1, weight.shape[1])


def _fold(rows: Tensor, weight: Tensor) -> Tensor:
    """Carry "NTI" per head through ``weight`` ("ID", heads in consecutive rows given as "HID"): "N(HT)D"."""
    n, tokens, _ = rows.shape
    heads, width, _ = weight.shape
    by_head = rows.reshape(n * tokens, heads, width).transpose(0, 1)
    folded = torch.bmm(by_head, weight.to(rows.dtype))
    return folded.view(heads, n, tokens, -1).transpose(0, 1).reshape(n, heads * tokens, -1)


def _scores(image: _ImageTokens, folded: Tensor, constant: Tensor | None = None) -> Tensor:
    """Scores "N(HT)L" of folded prompt tokens "N(HT)D" with image tokens and their position encoding."""
    n, rows, _ = folded.shape
    flat = folded.flatten(0, 1)
    if image.keys.shape[0] == 1:
        positions = (image.keys[0] + image.pe).t()
    else:
        positions = image.pe.t()
    if constant is None:
        scores = flat @ positions
    else:
        scores = torch.addmm(constant.reshape(-1, 1), flat, positions)
    scores = scores.view(n, rows, -1)
    if image.keys.shape[0] == 1:
        return scores
    return torch.baddbmm(scores, folded, image.keys.transpose(1, 2))


def _tokens_to_image(attention: Attention, image: _ImageTokens, q: Tensor) -> Tensor:
    """Prompt tokens "NTD" attend to the image tokens: what is to be added to them, "NTD"."""
    heads, dtype = attention.num_heads, image.keys.dtype
    n, tokens, _ = q.shape
    projected = _linear(q.to(dtype), attention.q_proj.weight, attention.q_proj.bias)
    projected = projected * (1.0 / math.sqrt(projected.shape[-1] // heads))
    folded = _fold(projected, _by_head(attention.k_proj.weight, heads))
    weights = _scores(image, folded).softmax(dim=-1)
    if image.keys.shape[0] == 1:
        context = (weights.flatten(0, 1) @ image.keys[0]).view(n, heads * tokens, -1)
    else:
        context = torch.bmm(weights, image.keys)
    by_head = context.view(n, heads, tokens, -1).transpose(0, 1).flatten(1, 2)
    values = torch.bmm(by_head, _by_head(attention.v_proj.weight.to(dtype), heads).transpose(1, 2))
    values = values.view(heads, n, tokens, -1).permute(1, 2, 0, 3).flatten(2)
    # The keys' bias adds the same to all scores of a query, which softmax drops. It enters with factor zero, so that
    # it gets its gradient, zero, as any other parameter.
    values = values + (attention.v_proj.bias + 0.0 * attention.k_proj.bias).to(dtype)
    return _linear(values, attention.out_proj.weight, attention.out_proj.bias).to(q.dtype)


def _image_to_tokens(attention: Attention, image: _ImageTokens, prompt: _PromptTokens) -> Tensor:
    """Image tokens attend to the prompt tokens of each object: the new image tokens "NLD", before their norm."""
    heads, dtype = attention.num_heads, image.keys.dtype
    k = _linear((prompt.queries + prompt.pe).to(dtype), attention.k_proj.weight, attention.k_proj.bias)
    k = k * (1.0 / math.sqrt(k.shape[-1] // heads))
    v = _linear(prompt.queries.to(dtype), attention.v_proj.weight, attention.v_proj.bias)
    n, tokens, _ = k.shape
    folded = _fold(k, _by_head(attention.q_proj.weight, heads))
    constant = _fold(k, attention.q_proj.bias.view(heads, -1, 1))
    scores = _scores(image, folded, constant)
    weights = scores.view(n, heads, tokens, -1).softmax(dim=2).view(n, heads * tokens, -1)
    # The weights of each head sum to one, so the output's bias can ride on the values of the heads.
    out = attention.out_proj
    values = _fold(v, _by_head(out.weight.t(), heads)) + (out.bias / heads).to(dtype)
    return torch.baddbmm(image.keys.expand(n, -1, -1), weights.transpose(1, 2), values)


def _hypernetworks(mask_decoder: Any, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Channel weights "NCE" of all masks from their tokens "NCD", all networks at once."""
    x = tokens.to(dtype).transpose(0, 1)
    networks = [network.layers for network in mask_decoder.output_hypernetworks_mlps]
    depth = len(networks[0])
    for i in range(depth):
        weight = torch.stack([layers[i].weight for layers in networks]).to(dtype)
        bias = torch.stack([layers[i].bias for layers in networks]).to(dtype)
        x = torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))
        x = F.relu(x) if i < depth - 1 else x
    return x.transpose(0, 1)


def _all_masks(upscaling: nn.Sequential, keys: Tensor, weights: Tensor) -> Tensor:
    # Object by object the upscaled pixels stay in a CPU's cache; a GPU wants few, large kernels.
    step = 1 if keys.device.type == "cpu" else len(weights)
    parts = zip(torch.split(keys, step), torch.split(weights, step), strict=True)
    return torch.cat([_masks(upscaling, k, w) for k, w in parts])


def _masks(upscaling: Any, keys: Tensor, weights: Tensor) -> Tensor:
    """Mask logits "N(L 2 2)(2 2 C)" in nested pixel order, from image tokens "NLD" and channel weights "NCE"."""
    first, norm, act1, second, act2 = upscaling
    x = _upscale(keys, first)
    x = act1(_layer_norm(x, norm.weight, norm.bias, norm.eps))
    x = act2(_upscale(x, second))
    return torch.bmm(x, weights.transpose(1, 2))


def _upscale(x: Tensor, layer: Any) -> Tensor:
    """Apply a transposed 2x2 convolution of stride 2 to pixels "NPC": "N(P 2 2)E"."""
    weight = layer.weight.permute(2, 3, 1, 0).flatten(0, 2)
    bias = torch.cat([layer.bias] * 4)
    return _linear(x, weight, bias).view(len(x), 4 * x.shape[1], -1)


def _raster_order(masks: Tensor, height: int, width: int) -> Tensor:
    """Bring nested pixels "N(Y X 2 2 2 2)C" to masks "NCYX"."""
    n, _, candidates = masks.shape
    nested = masks.view(n, height, width, 2, 2, 2, 2, candidates)
    return nested.permute(0, 7, 1, 3, 5, 2, 4, 6).reshape(n, candidates, 4 * height, 4 * width)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Give the dtype of prompt tokens and results beside image tokens of ``dtype``: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return _layer_norm(x, norm.weight, norm.bias, norm.eps)


def _mlp(x: Tensor, layers: Any, dtype: torch.dtype, act: nn.Module | None = None) -> Tensor:
    """Apply linear layers with an activation (ReLU where None) between them."""
    x = x.to(dtype)
    steps = list(layers)
    for i, layer in enumerate(steps):
        x = _linear(x, layer.weight, layer.bias)
        if i < len(steps) - 1:
            x = F.relu(x) if act is None else act(x)
    return x
