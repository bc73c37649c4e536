"""Low-rank adapters in the image encoder, through peft: put in, merged into the weights, written, read.

SAM and TinyViT project to queries, keys and values with one layer. It is taken apart before adapters go in, so that
each of the three can have one of its own, and put together again when they are merged.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from napari_resfinetune.config.schema import LoraStrategy
from napari_resfinetune.errors import ModelError, ResourceError

if TYPE_CHECKING:
    from peft import LoraConfig

PARTS = ("q", "k", "v")


class SplitProjection(nn.Module):
    """A joint projection to queries, keys and values as three layers `q`, `k` and `v`.

    Parameters
    ----------
    joint
        The layer whose weights are taken.
    groups
        Its outputs are queries, keys, values of so many groups one after the other: 1 for SAM, the number of heads
        for TinyViT.
    """

    def __init__(self, joint: nn.Linear, groups: int) -> None:
        super().__init__()
        self.groups = groups
        weight = joint.weight.detach().unflatten(0, (groups, 3, -1))
        bias = joint.bias.detach().unflatten(0, (groups, 3, -1)) if joint.bias is not None else None
        for i, name in enumerate(PARTS):
            own = None if bias is None else bias[:, i].flatten()
            setattr(self, name, _linear(weight[:, i].flatten(0, 1), own))

    def forward(self, x: Tensor) -> Tensor:
        """Project "...C" as the joint layer does."""
        parts = [getattr(self, name)(x).unflatten(-1, (self.groups, -1)) for name in PARTS]
        return torch.stack(parts, dim=-2).flatten(-3)

    def joint(self) -> nn.Linear:
        """Return one layer with the same weights."""
        parts = [getattr(self, name) for name in PARTS]
        weight = torch.stack([part.weight.detach().unflatten(0, (self.groups, -1)) for part in parts], dim=1)
        if parts[0].bias is None:
            return _linear(weight.flatten(0, 2), None)
        bias = torch.stack([part.bias.detach().unflatten(0, (self.groups, -1)) for part in parts], dim=1)
        return _linear(weight.flatten(0, 2), bias.flatten())


def add_lora(image_encoder: nn.Module, blocks: Sequence[Any], strategy: LoraStrategy) -> None:
    """Put fresh adapters, which change nothing yet, into blocks of an image encoder; nothing else in it learns.

    Parameters
    ----------
    image_encoder
        Of ``segment_anything``, or `TinyViTEncoder`; changed in place.
    blocks
        Those of its blocks that get adapters; blocks without attention are passed over.
    strategy
        Rank, scale, dropout and targets.

    Raises
    ------
    ResourceError
        When 4-bit weights are asked for where they cannot be had.
    """
    with_attention = [block for block in blocks if hasattr(block, "attn")]
    if set(PARTS) & set(strategy.targets):
        for block in with_attention:
            # SAM's attention has all queries first; TinyViT's has those of the first head, its keys, its values, ...
            groups = 1 if hasattr(block.attn, "use_rel_pos") else block.attn.num_heads
            block.attn.qkv = SplitProjection(block.attn.qkv, groups).to(block.attn.qkv.weight.device)
    layers = {id(layer) for block in with_attention for layer in _targets(block, strategy.targets)}
    names = [name for name, module in image_encoder.named_modules() if id(module) in layers]
    if strategy.quantize:
        _quantize(image_encoder, names)
    _inject(_peft_config(names, strategy), image_encoder)


def has_lora(module: nn.Module) -> bool:
    """Tell whether there are adapters anywhere in a module."""
    return any(hasattr(part, "lora_A") for part in module.modules())


def merge_lora(module: nn.Module) -> None:
    """Add the adapters to the weights beside them, in place, and leave plain layers under their first names."""
    for name, layer in list(module.named_modules()):
        if hasattr(layer, "lora_A"):
            _replace(module, name, _merged(layer))
    for name, split in list(module.named_modules()):
        if isinstance(split, SplitProjection):
            _replace(module, name, split.joint())


def without_lora(module: nn.Module) -> nn.Module:
    """Return the module, or a copy with merged adapters if there are any."""
    if not has_lora(module):
        return module
    plain = copy.deepcopy(module)
    merge_lora(plain)
    return plain


def state_to_keep(module: nn.Module) -> dict[str, Tensor]:
    """Return the state of a module without its 4-bit weights, which come from the base and are made anew."""
    state = dict(module.state_dict())
    packed = tuple(name.removesuffix(".absmax") for name in state if name.endswith(".weight.absmax"))
    return {name: tensor for name, tensor in state.items() if not name.startswith(packed)} if packed else state


def lora_state(image_encoder: nn.Module) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return the adapters' configuration and their weights, which are those of the module, under peft's names."""
    config: LoraConfig = image_encoder.peft_config["default"]  # type: ignore[index,assignment]
    # Not by peft's own function: it goes by the names in the state dict, which for vit_t are those of MobileSAM.
    names = (name for name, _ in image_encoder.named_parameters() if ".lora_A." in name or ".lora_B." in name)
    return config, {name.replace(".default.", "."): image_encoder.get_parameter(name).data for name in names}


def load_lora_state(image_encoder: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Fill adapters that `add_lora` put in.

    Raises
    ------
    ModelError
        When the weights are of other adapters.
    """
    _, own = lora_state(image_encoder)
    wrong = set(own) ^ set(state) or {name for name in own if own[name].shape != state[name].shape}
    if wrong:
        raise ModelError(f"{where}: {len(wrong)} weights do not fit the adapters, as {min(wrong)}; export it again")
    for name, tensor in own.items():
        tensor.copy_(state[name])


def _targets(block: Any, targets: Sequence[str]) -> list[nn.Module]:
    layers = [getattr(block.attn.qkv, name) for name in PARTS if name in targets]
    if "proj" in targets:
        layers.append(block.attn.proj)
    if "mlp" in targets:
        layers += [layer for layer in block.mlp.modules() if isinstance(layer, nn.Linear)]
    return layers


def _peft_config(names: list[str], strategy: LoraStrategy) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(
        r=strategy.rank,
        lora_alpha=strategy.alpha if strategy.alpha is not None else strategy.rank,  # type: ignore[arg-type]
        lora_dropout=strategy.dropout,
        target_modules=names,
    )


def _inject(config: LoraConfig, image_encoder: nn.Module) -> None:
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, image_encoder)


def _quantize(module: nn.Module, names: Sequence[str]) -> None:
    """Replace linear layers by 4-bit ones (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314)."""
    device = next(module.parameters()).device
    if device.type != "cuda":
        raise ResourceError(f"strategy.quantize: 4-bit weights need a CUDA card, and this runs on {device.type}")
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise ResourceError("strategy.quantize: needs the package bitsandbytes; pip install bitsandbytes") from None
    for name in names:
        plain = module.get_submodule(name)
        small = bnb.nn.Linear4bit(
            plain.in_features,
            plain.out_features,
            bias=plain.bias is not None,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
        )
        small.load_state_dict(plain.state_dict())
        _replace(module, name, small.to(device))


def _merged(layer: Any) -> nn.Linear:
    base = layer.get_base_layer()
    weight = base.weight
    if hasattr(weight, "quant_state"):
        import bitsandbytes as bnb

        weight = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    change = layer.get_delta_weight("default")
    return _linear((weight.detach() + change).to(change.dtype), None if base.bias is None else base.bias.detach())


@torch.no_grad()
def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def _replace(module: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, new)
