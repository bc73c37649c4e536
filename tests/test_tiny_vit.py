"""vit_t from timm's parts: MobileSAM's names, current biases, frozen statistics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from napari_resfinetune.errors import ModelError
from napari_resfinetune.models import TinyViTEncoder, freeze_batch_norm, measure_batch_norm, new_model

SHAPES = json.loads((Path(__file__).parent / "data" / "mobile_sam_shapes.json").read_text())


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def encoder() -> TinyViTEncoder:
    return TinyViTEncoder().eval()


def noisy(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same names with other numbers that still give a sensible network."""
    return {
        name: tensor + 0.1 * torch.rand_like(tensor) if tensor.is_floating_point() else tensor + 3
        for name, tensor in state.items()
    }


def test_names_and_shapes_are_those_of_mobile_sam():
    state = new_model("vit_t", decoder=False).sam.state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == SHAPES


def test_state_dict_goes_round(encoder):
    given = noisy(encoder.state_dict())
    encoder.load_state_dict(given, strict=True)
    back = encoder.state_dict()
    assert back.keys() == given.keys()
    assert all(torch.equal(back[name], given[name]) for name in given)


def test_unknown_and_missing_names_are_noticed(encoder):
    state = dict(encoder.state_dict())
    state["layers.9.c.weight"] = state.pop("neck.0.weight")
    with pytest.raises(RuntimeError, match=r"neck\.0\.weight"):
        encoder.load_state_dict(state, strict=True)


@pytest.mark.parametrize("mode", [True, False])
def test_biases_that_were_loaded_are_used(encoder, mode):
    encoder.train(mode)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = encoder(image)
        state = encoder.state_dict()
        for name in state:
            if name.endswith("attention_biases"):
                state[name] = torch.randn_like(state[name])
        encoder.load_state_dict(state)
        after = encoder(image)
        other = TinyViTEncoder().eval()
        other.load_state_dict(state)
        assert not torch.allclose(before, after, atol=1e-3)
        assert torch.equal(after, other(image))
        for name, parameter in encoder.named_parameters():
            if name.endswith("attention_biases"):
                parameter.zero_()
        assert torch.allclose(encoder(image), before, atol=1e-6)


def test_two_backward_passes_in_eval_mode(encoder):
    for _ in range(2):
        encoder(torch.randn(1, 3, 64, 64)).mean().backward()
    biases = [p for name, p in encoder.named_parameters() if name.endswith("attention_biases")]
    assert len(biases) == 10
    assert all(bias.grad is not None for bias in biases)


def test_embedding_is_a_sixteenth_of_the_side(encoder):
    with torch.no_grad():
        assert encoder(torch.zeros(1, 3, 1024, 1024)).shape == (1, 256, 64, 64)
        assert encoder(torch.zeros(2, 3, 128, 128)).shape == (2, 256, 8, 8)
        assert encoder(torch.zeros(1, 3, 48, 48)).shape == (1, 256, 3, 3)


@pytest.mark.parametrize("shape", [(64, 128), (100, 100)])
def test_other_shapes_are_refused(encoder, shape):
    with pytest.raises(ModelError, match="multiple of 16"):
        encoder(torch.zeros(1, 3, *shape))


def test_batch_norm_learns_weights_and_keeps_statistics(encoder):
    encoder.train()
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    encoder(torch.randn(1, 3, 64, 64)).mean().backward()
    assert encoder.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in encoder.named_buffers())
    assert encoder.patch_embed.conv1.bn.weight.grad is not None


def test_freeze_batch_norm_leaves_other_modules():
    module = torch.nn.Sequential(torch.nn.BatchNorm2d(2), torch.nn.Dropout()).train()
    freeze_batch_norm(module)
    assert [part.training for part in module] == [False, True]


def test_measured_statistics_are_those_of_the_inputs_and_nothing_else_changes():
    torch.manual_seed(0)
    encoder = TinyViTEncoder(img_size=64).eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    inputs = [torch.randn(1, 3, 64, 64) * 3 + 1 for _ in range(3)]
    first = encoder.patch_embed.conv1.conv
    measure_batch_norm(encoder, inputs)
    expected = torch.stack([first(x).mean((0, 2, 3)) for x in inputs]).mean(0)
    after = encoder.state_dict()
    torch.testing.assert_close(after["patch_embed.seq.0.bn.running_mean"], expected)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert all(name.rsplit(".", 1)[1] in ("running_mean", "running_var", "num_batches_tracked") for name in changed)
    assert not any(part.training for part in encoder.modules())
