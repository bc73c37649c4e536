"""MobileSAM's image encoder (``vit_t``) from timm's TinyViT, with MobileSAM's names in its state dict.

MobileSAM itself is on no package registry. Its encoder is TinyViT-5M with the last downsampling switched off, so that
1024 px give 64x64 features, and SAM's neck behind it: Zhang et al. 2023, https://arxiv.org/abs/2306.14289; TinyViT: Wu
et al. 2022, https://arxiv.org/abs/2207.10666. The classification head is carried, unused, because files for other
tools must have it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, MutableMapping
from types import SimpleNamespace
from typing import Any

import torch
from timm.models.tiny_vit import Attention, TinyVit
from torch import nn
from torch.nn import functional as F

from napari_resfinetune.errors import ModelError
from napari_resfinetune.models import upstream

# What starts were trained with at least, and little beside what a smaller one would save.
LEAST_INPUT_PX = 256
_RENAMES = (
    (r"^patch_embed\.conv1\.", "patch_embed.seq.0."),
    (r"^patch_embed\.conv2\.", "patch_embed.seq.2."),
    (r"^stages\.(\d+)\.downsample\.", lambda found: f"layers.{int(found[1]) - 1}.downsample."),
    (r"^stages\.", "layers."),
    (r"\.conv\.(?=\w+$)", ".c."),
    (r"^head\.norm\.", "norm_head."),
    (r"^head\.fc\.", "head."),
)


def mobile_sam_name(name: str) -> str:
    """Return MobileSAM's name of a tensor of `TinyViTEncoder`, both without a prefix."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def freeze_batch_norm(module: nn.Module) -> None:
    """Put every BatchNorm inside `module` into eval mode: its statistics stay, its weights may still learn.

    With one patch per step, batch statistics would be those of that patch.
    """
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()


@torch.no_grad()
def measure_batch_norm(module: nn.Module, inputs: Iterable[torch.Tensor]) -> None:
    """Set the BatchNorm statistics of a module to the mean over inputs; everything else stays as it is.

    Freshly initialised weights need this: their statistics say nothing about their activations.

    Parameters
    ----------
    module
        Called with each input; its mode is left as it was.
    inputs
        What `module` takes.
    """
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm.training, norm.momentum) for norm in norms]
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all inputs
    for batch in inputs:
        module(batch)
    for norm, (training, momentum) in zip(norms, kept, strict=True):
        norm.train(training)
        norm.momentum = momentum


class TinyViTEncoder(nn.Module):
    """The image encoder of ``vit_t``.

    `state_dict` and `load_state_dict` speak MobileSAM's names. BatchNorm statistics are frozen in every mode, and
    attention always uses the biases that the module holds now (MobileSAM caches them when `eval()` is called).

    Parameters
    ----------
    img_size
        Side of the square input, in px, that the rest of SAM is built for. There are no absolute positions, so any
        square whose side is a multiple of 16 can be encoded.
    """

    def __init__(self, img_size: int = 1024) -> None:
        super().__init__()
        self.img_size = img_size
        self.in_chans = 3
        vit: Any = TinyVit(
            embed_dims=(64, 128, 160, 320), num_heads=(2, 4, 5, 10), window_sizes=(7, 7, 14, 7), drop_path_rate=0.0
        )
        vit.stages[-1].downsample.conv2.conv.stride = (1, 1)
        _use_current_biases(vit)
        self.patch_embed: Any = vit.patch_embed
        self.patch_embed.proj = SimpleNamespace(in_channels=3)  # where torch-em's UNETR looks for the input channels
        self.stages = vit.stages
        self.head = nn.ModuleDict({"norm": nn.LayerNorm(320), "fc": nn.Linear(320, 1000)})
        self.neck = nn.Sequential(
            nn.Conv2d(320, 256, kernel_size=1, bias=False),
            upstream.LayerNorm2d(256),
            nn.Conv2d(256, 256, kernel_size=3, padding=1, bias=False),
            upstream.LayerNorm2d(256),
        )
        self.register_state_dict_post_hook(_to_mobile_sam)
        self.register_load_state_dict_pre_hook(_from_mobile_sam)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Encode preprocessed images.

        Parameters
        ----------
        images
            BCYX float, 3 channels, square, side a multiple of 16 px.

        Returns
        -------
        torch.Tensor
            BCYX float, 256 channels, a sixteenth of the side.

        Raises
        ------
        ModelError
            For another shape.
        """
        height, width = images.shape[-2:]
        if height != width or height % 16:
            raise ModelError(
                f"vit_t: input of {height} x {width} px; expected a square whose side is a multiple of 16 px"
            )
        features: torch.Tensor = self.neck(self.stages(self.patch_embed(images)))
        return features

    def train(self, mode: bool = True) -> TinyViTEncoder:
        """Set the mode of everything but the BatchNorms, which stay in eval mode."""
        super().train(mode)
        freeze_batch_norm(self)
        return self


class _Attention(Attention):
    """timm's attention without its cache of biases.

    The cache outlives `load_state_dict` and optimizer steps in eval mode, and keeps a graph that was already used.
    """

    def get_attention_biases(self, device: torch.device) -> torch.Tensor:
        indices: Any = self.attention_bias_idxs
        # As an embedding: on a CPU the gradient of indexing adds up in any order, and differs in its last bit.
        return F.embedding(indices, self.attention_biases.t()).permute(2, 0, 1)


def _use_current_biases(vit: Any) -> None:
    for stage in list(vit.stages)[1:]:
        for block in stage.blocks:
            old = block.attn
            block.attn = _Attention(
                old.proj.out_features, old.key_dim, old.num_heads, attn_ratio=1, resolution=old.resolution
            )
            block.attn.load_state_dict(old.state_dict())


def _to_mobile_sam(
    module: nn.Module, state: MutableMapping[str, torch.Tensor], prefix: str, local_metadata: dict[str, Any]
) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        state[prefix + mobile_sam_name(key[len(prefix) :])] = state.pop(key)


def _from_mobile_sam(module: nn.Module, state: MutableMapping[str, torch.Tensor], prefix: str, *_: Any) -> None:
    own = [name for name, _ in module.named_parameters()] + [name for name, _ in module.named_buffers()]
    ours = {mobile_sam_name(name): name for name in own}
    for key in [key for key in state if key.startswith(prefix)]:
        name = key[len(prefix) :]
        state[prefix + ours.get(name, name)] = state.pop(key)
