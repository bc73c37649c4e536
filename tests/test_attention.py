"""The image encoder gives what segment_anything gives, folded or not, checkpointed or not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from segment_anything.modeling.image_encoder import Attention, ImageEncoderViT
from torch import Tensor, nn

from napari_resfinetune.models import attention as attention_module
from napari_resfinetune.models.attention import vit_attention
from napari_resfinetune.models.encoder import encode, encoder_units, first_that_learns, run_units
from napari_resfinetune.models.tiny_vit import TinyViTEncoder

Gradients = dict[str, Tensor]


def _randomize(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def _encoder() -> ImageEncoderViT:
    torch.manual_seed(0)
    encoder = ImageEncoderViT(
        img_size=128,
        embed_dim=64,
        depth=3,
        num_heads=4,
        out_chans=32,
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(1, 2),
    )
    _randomize(encoder)
    return encoder


def _run(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Gradients]:
    module.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = forward(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    (y * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return y.detach(), gradients | {"x": x.grad}


def _assert_equal(ours: tuple[Tensor, Gradients], theirs: tuple[Tensor, Gradients]) -> None:
    assert (ours[0] - theirs[0]).norm() <= 1e-5 * theirs[0].norm()
    assert ours[1].keys() == theirs[1].keys()
    for name, expected in theirs[1].items():
        assert (ours[1][name] - expected).norm() <= 1e-5 * expected.norm() + 1e-6, name


# As on the grids of real inputs, which are larger than those here: in chunks on a CPU, fused on a card.
WAYS = {"few tokens": {}, "in chunks": {"FEW_TOKENS": 0}, "fused": {"FEW_TOKENS": 0, "DEVICES_IN_CHUNKS": frozenset()}}


@pytest.mark.parametrize("grid", [(8, 8), (6, 10)])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_folded_attention_equals_the_module(
    grid: tuple[int, int], relative: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"QUERIES_AT_ONCE": 10, **WAYS[way]}.items():
        monkeypatch.setattr(attention_module, name, value)
    torch.manual_seed(0)
    attention = Attention(64, num_heads=4, use_rel_pos=relative, input_size=grid)
    _randomize(attention)
    x = torch.randn(2, *grid, 64)
    _assert_equal(_run(attention, lambda x: vit_attention(attention, x), x), _run(attention, attention, x))


def test_a_part_of_the_field_of_view_keeps_the_relative_positions_of_the_whole() -> None:
    torch.manual_seed(0)
    whole = Attention(64, num_heads=4, use_rel_pos=True, input_size=(8, 8))
    _randomize(whole)
    part = Attention(64, num_heads=4, use_rel_pos=True, input_size=(5, 5))
    cut = {name: value[3:12] if "rel_pos" in name else value for name, value in whole.state_dict().items()}
    part.load_state_dict(cut)
    x = torch.randn(1, 5, 5, 64)
    torch.testing.assert_close(vit_attention(whole, x), part(x))


def _tiny_encoder() -> TinyViTEncoder:
    torch.manual_seed(0)
    encoder = TinyViTEncoder(img_size=128).train()
    _randomize(encoder)
    return encoder


def _encode(encoder: nn.Module, x: Tensor, checkpoint_units: bool = False, **how: bool) -> Tensor:
    return run_units(encoder_units(encoder, **how), x, checkpoint_units=checkpoint_units)


@pytest.mark.parametrize("make", [_encoder, _tiny_encoder])
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("checkpoint_units", [True, False])
def test_the_units_in_a_row_are_the_encoder(
    make: Callable[[], nn.Module], folded: bool, checkpoint_units: bool
) -> None:
    encoder, x = make().double(), torch.randn(1, 3, 128, 128, dtype=torch.float64)
    ours = _run(encoder, lambda x: _encode(encoder, x, checkpoint_units, folded=folded), x)
    _assert_equal(ours, _run(encoder, encoder, x))


@pytest.mark.parametrize("make", [_encoder, _tiny_encoder])
def test_every_weight_is_in_exactly_one_unit(make: Callable[[], nn.Module]) -> None:
    encoder = make()
    found = [id(parameter) for unit in encoder_units(encoder) for parameter in unit.parameters()]
    head = {id(p) for name, p in encoder.named_parameters() if name.startswith("head.")}  # carried, never used
    assert sorted(found) == sorted({id(p) for p in encoder.parameters()} - head)


@pytest.mark.parametrize("make", [_encoder, _tiny_encoder])
@pytest.mark.parametrize("checkpoint_units", [True, False])
def test_late_training_gives_the_same_gradients(make: Callable[[], nn.Module], checkpoint_units: bool) -> None:
    encoder, x = make().requires_grad_(False), torch.randn(1, 3, 128, 128)
    units = encoder_units(encoder)
    for unit in units[-3:]:
        for parameter in unit.parameters():
            parameter.requires_grad_(True)
    expected = copy.deepcopy(encoder)
    expected(x).square().sum().backward()
    first = first_that_learns(units)
    assert first == len(units) - 3
    tokens = run_units(units[:first], x)
    assert not tokens.requires_grad
    run_units(units[first:], tokens, checkpoint_units=checkpoint_units).square().sum().backward()
    for (name, ours), theirs in zip(encoder.named_parameters(), expected.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None and theirs.grad is not None:
            assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm() + 1e-6, name


def test_checkpointed_units_keep_less() -> None:
    for encoder in (_encoder(), _tiny_encoder()):
        kept = []
        for checkpoint_units in (False, True):
            sizes: dict[int, int] = {}

            def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
                if not isinstance(tensor, nn.Parameter):
                    sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                embedding = _encode(encoder, torch.randn(1, 3, 128, 128), checkpoint_units)
            assert embedding.requires_grad
            kept.append(sum(sizes.values()))
        assert kept[1] < 0.4 * kept[0]


def test_frozen_encoder_has_no_graph() -> None:
    encoder = _encoder().requires_grad_(False)
    assert not encode(encoder, torch.randn(1, 3, 128, 128)).requires_grad


def test_other_encoders_are_one_unit() -> None:
    encoder, x = nn.Conv2d(3, 4, 1), torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(encode(encoder, x), encoder(x))


def test_gradients_of_looked_up_positions_are_the_same_bits_every_time():
    encoder = TinyViTEncoder(img_size=224)
    attention = next(
        m for m in encoder.modules() if hasattr(m, "attention_biases") and m.attention_bias_idxs.numel() > 32768
    )
    weights = torch.randn(attention.attention_biases.shape[0], *attention.attention_bias_idxs.shape)
    seen = []
    for _ in range(8):
        attention.attention_biases.grad = None
        (attention.get_attention_biases(torch.device("cpu")) * weights).sum().backward()
        seen.append(attention.attention_biases.grad.clone())
    assert all(torch.equal(gradient, seen[0]) for gradient in seen)
