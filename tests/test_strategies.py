"""What learns under each strategy, and adapters: put in, merged, written, read, refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT

from napari_resfinetune import models
from napari_resfinetune.config import FinetuneConfig
from napari_resfinetune.errors import ConfigError, ModelError, ResFinetuneError, ResourceError
from napari_resfinetune.models.build import SamModel, assemble_sam, load_model, new_instance_decoder
from napari_resfinetune.models.encoder import encode
from napari_resfinetune.models.lora import SplitProjection, has_lora, merge_lora
from napari_resfinetune.models.tiny_vit import TinyViTEncoder

PX = 64
ALL_TARGETS = ("q", "k", "v", "proj", "mlp")


def strategy(kind: str, **settings: Any) -> Any:
    return FinetuneConfig.model_validate({"strategy": {"kind": kind, **settings}}).strategy


def small_model(architecture: str, seed: int = 0) -> SamModel:
    """Return a model of a few small blocks with random weights."""
    torch.manual_seed(seed)
    if architecture == "vit_t":
        encoder: Any = TinyViTEncoder(img_size=PX)
    else:
        encoder = ImageEncoderViT(
            img_size=PX,
            embed_dim=32,
            depth=3,
            num_heads=4,
            out_chans=256,
            use_rel_pos=True,
            window_size=3,
            global_attn_indexes=(1,),
        )
    model = SamModel(assemble_sam(encoder), new_instance_decoder(encoder), architecture, "small")
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


def shake_adapters(model: SamModel) -> None:
    """Give fresh adapters, which change nothing, weights that do."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def learning(model: SamModel) -> set[str]:
    return {name for name, parameter in model.sam.image_encoder.named_parameters() if parameter.requires_grad}


def images() -> torch.Tensor:
    return torch.randn(1, 3, PX, PX, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("architecture", ["vit_b", "vit_t"])
def test_full_and_frozen_are_all_and_nothing_of_the_encoder(architecture):
    model = small_model(architecture)
    report = models.apply_strategy(model, strategy("full"), "both")
    everything = {n for n, _ in model.sam.image_encoder.named_parameters() if not n.startswith("head.")}
    assert learning(model) == everything
    assert report.trainable["image_encoder"] > 0
    report = models.apply_strategy(model, strategy("frozen"), "both")
    assert learning(model) == set()
    assert report.trainable["image_encoder"] == 0
    assert report.trainable["mask_decoder"] == report.total["mask_decoder"]


def test_late_is_the_last_blocks_and_the_neck():
    model = small_model("vit_b")
    models.apply_strategy(model, strategy("late", blocks=2), "both")
    starts = {".".join(name.split(".")[:2]) for name in learning(model)}
    assert starts == {"blocks.1", "blocks.2", "neck.0", "neck.1", "neck.2", "neck.3"}
    model = small_model("vit_t")
    models.apply_strategy(model, strategy("late", blocks=3), "both")
    starts = {".".join(name.split(".")[:4]) for name in learning(model) if name.startswith("stages")}
    assert {start for start in starts if "downsample" not in start} == {
        "stages.2.blocks.5",
        "stages.3.blocks.0",
        "stages.3.blocks.1",
    }
    assert any(name.startswith("stages.3.downsample") for name in learning(model))
    assert any(name.startswith("neck") for name in learning(model))


@pytest.mark.parametrize("architecture", ["vit_b", "vit_t"])
@pytest.mark.parametrize("kind", ["lora", "late_lora"])
@pytest.mark.parametrize("targets", [("q", "v"), ("k",), ("proj",), ("mlp",), ALL_TARGETS])
def test_lora_is_two_small_matrices_for_each_target(architecture, kind, targets):
    model = small_model(architecture)
    late = {"blocks": 2} if kind == "late_lora" else {}
    report = models.apply_strategy(model, strategy(kind, rank=3, targets=targets, **late), "both")
    names = learning(model)
    assert all(".lora_A.default.weight" in name or ".lora_B.default.weight" in name for name in names)
    blocks = (
        2 if kind == "late_lora" else {"vit_b": 3, "vit_t": 10}[architecture]
    )  # of vit_t's 12, two have no attention
    layers = sum({"mlp": 2}.get(target, 1) for target in targets)
    assert len(names) == 2 * layers * blocks
    for name, parameter in model.sam.image_encoder.named_parameters():
        if name in names:
            assert 3 in parameter.shape
    assert report.trainable["image_encoder"] < 0.2 * report.total["image_encoder"]
    assert report.trainable["instance_decoder"] == report.total["instance_decoder"]


@pytest.mark.parametrize("architecture", ["vit_b", "vit_t"])
def test_taking_a_projection_apart_changes_nothing(architecture):
    encoder = small_model(architecture).sam.image_encoder
    attentions = [part for part in encoder.modules() if hasattr(part, "qkv")]
    expected, state = encode(encoder, images()), {k: v.clone() for k, v in encoder.state_dict().items()}
    for attention in attentions:
        groups = 1 if architecture == "vit_b" else attention.num_heads
        attention.qkv = SplitProjection(attention.qkv, groups)
    torch.testing.assert_close(encode(encoder, images()), expected, rtol=1e-5, atol=1e-5)
    merge_lora(encoder)
    assert encoder.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize("architecture", ["vit_b", "vit_t"])
@pytest.mark.parametrize("settings", [{"targets": ALL_TARGETS}, {"targets": ("q", "v"), "alpha": 12.0, "rank": 2}])
def test_merged_equals_unmerged(architecture, settings):
    model = small_model(architecture)
    before = encode(model.sam.image_encoder, images())
    models.apply_strategy(model, strategy("lora", **settings), "both")
    torch.testing.assert_close(encode(model.sam.image_encoder, images()), before, rtol=1e-5, atol=1e-5)
    shake_adapters(model)
    with torch.no_grad():
        unmerged = encode(model.sam.image_encoder, images())
        assert (unmerged - before).norm() > 1e-2 * before.norm()
        model.merge_adapters()
        merged = encode(model.sam.image_encoder, images())
    assert not has_lora(model)
    assert float((merged - unmerged).norm() / unmerged.norm()) < 1e-5


@pytest.mark.parametrize("architecture", ["vit_b", "vit_t"])
def test_a_saved_model_has_its_adapters_merged_and_keeps_them_itself(architecture, tmp_path):
    model = small_model(architecture)
    names = set(model.sam.state_dict())
    models.apply_strategy(model, strategy("lora"), "both")
    shake_adapters(model)
    models.save_model(tmp_path / "model.pt", model)
    assert has_lora(model)
    saved = torch.load(tmp_path / "model.pt", weights_only=True)["model_state"]
    assert set(saved) == names
    with torch.no_grad():
        expected = encode(model.sam.image_encoder, images())
        model.merge_adapters()
        model.sam.load_state_dict(saved)
        torch.testing.assert_close(encode(model.sam.image_encoder, images()), expected, rtol=1e-4, atol=1e-4)


def test_too_many_blocks_are_told():
    with pytest.raises(ConfigError, match="has 3; choose fewer"):
        models.apply_strategy(small_model("vit_b"), strategy("late", blocks=4), "both")
    with pytest.raises(ConfigError, match="has 12"):
        models.apply_strategy(small_model("vit_t"), strategy("late_lora", blocks=13), "both")


def test_four_bit_weights_need_a_card():
    with pytest.raises(ResourceError, match="CUDA card"):
        models.apply_strategy(small_model("vit_b"), strategy("lora", quantize=True), "both")


def test_dropout_is_drawn_again_as_it_was_when_a_block_is_computed_twice():
    model = small_model("vit_b").train()
    models.apply_strategy(model, strategy("lora", dropout=0.5), "masks")
    shake_adapters(model)
    found = []
    for checkpoint_units in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        units = models.encoder_units(model.sam.image_encoder)
        models.run_units(units, images(), checkpoint_units=checkpoint_units).square().sum().backward()
        found.append([p.grad.clone() for p in model.sam.image_encoder.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*found, strict=True))


# adapters as files


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Return a checkpoint of vit_t to start from."""
    path = tmp_path_factory.mktemp("base") / "base.pt"
    models.save_model(path, load_model("random:vit_t", decoder="new", seed=3), {"patch_px": 256})
    return path


@pytest.fixture(scope="module")
def trained(base) -> SamModel:
    """Return the base with adapters and decoders that are no longer its own."""
    model = load_model(base)
    models.apply_strategy(model, strategy("lora", rank=2), "both")
    shake_adapters(model)
    for part in (model.sam.mask_decoder, model.instance_decoder):
        for parameter in part.parameters():
            parameter.data *= 1.1
    return model


@pytest.fixture(scope="module")
def adapter(base, trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "adapter"
    models.save_adapter(folder, trained, str(base), {"patch_px": 300})
    return folder


def test_an_adapter_comes_back_as_the_merged_model(trained, adapter):
    loaded = load_model(adapter)
    merged = copy.deepcopy(trained)
    merged.merge_adapters()
    expected = merged.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7, msg=name)
    assert loaded.meta["patch_px"] == 300
    assert loaded.name == "adapter"
    assert not loaded.training
    assert load_model(adapter, decoder="none").instance_decoder is None


def test_adapters_are_in_pefts_own_format(tmp_path):
    from peft import LoraConfig, PeftModel

    model = small_model("vit_b")
    encoder = copy.deepcopy(model.sam.image_encoder)
    models.apply_strategy(model, strategy("lora", rank=2, targets=ALL_TARGETS), "both")
    shake_adapters(model)
    models.save_adapter(tmp_path / "adapter", model, "small")
    config = LoraConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (2, 2, "small")
    for block in encoder.blocks:
        block.attn.qkv = SplitProjection(block.attn.qkv, 1)
    theirs = PeftModel.from_pretrained(encoder, str(tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(theirs(images()), encode(model.sam.image_encoder, images()), rtol=1e-4, atol=1e-4)


def test_an_adapter_is_small(adapter):
    assert (adapter / "adapter_model.safetensors").stat().st_size < 0.5e6


def test_another_base_is_refused(adapter, tmp_path):
    other = tmp_path / "other.pt"
    models.save_model(other, load_model("random:vit_t", decoder="new", seed=4))
    copied = copy_adapter(adapter, tmp_path / "adapter", base_model=str(other))
    with pytest.raises(ModelError, match=r"was trained on .*but this model is other"):
        load_model(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model": "nowhere.pt"}, "which is not here"),
        ({"format": 7}, "format 7"),
        ({"strategy": {"kind": "full"}}, "has no adapter"),
        ({"strategy": {"kind": "lora", "rank": -1}}, "damaged"),
        ({"strategy": {"kind": "lora", "rank": 3}}, "do not fit"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_adapters_are_told(adapter, tmp_path, change, message):
    with pytest.raises(ResFinetuneError, match=message):
        load_model(copy_adapter(adapter, tmp_path / "adapter", **change))


def test_an_adapter_that_is_its_own_base_is_told(adapter, tmp_path):
    copied = copy_adapter(adapter, tmp_path / "adapter", base_model=str(tmp_path / "adapter"))
    with pytest.raises(ModelError, match="is its own base"):
        load_model(copied)


def test_an_adapter_of_unknown_origin_and_a_damaged_one_are_told(adapter, tmp_path):
    copied = copy_adapter(adapter, tmp_path / "a")
    (copied / "resfinetune.json").unlink()
    with pytest.raises(ModelError, match="which model the adapter belongs to"):
        load_model(copied)
    copied = copy_adapter(adapter, tmp_path / "b")
    (copied / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        load_model(copied)


def copy_adapter(adapter: Path, to: Path, **changes: Any) -> Path:
    to.mkdir()
    for path in adapter.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    origin = json.loads((to / "resfinetune.json").read_text())
    (to / "resfinetune.json").write_text(json.dumps({**origin, **changes}))
    return to


def test_training_goes_on_from_an_adapter_with_another_strategy(adapter, tmp_path):
    model = load_model(adapter)
    before = {name: value.clone() for name, value in model.sam.state_dict().items()}
    models.apply_strategy(model, strategy("late", blocks=1), "both")
    models.apply_strategy(model, strategy("late_lora", blocks=1), "both")
    models.save_adapter(tmp_path / "second", model, str(adapter))
    again = load_model(tmp_path / "second")
    assert all(torch.equal(value, before[name]) for name, value in again.sam.state_dict().items())


@pytest.mark.slow
def test_a_merged_vit_b_opens_in_micro_sam(tmp_path):
    model = load_model("random:vit_b", decoder="new", seed=0)
    models.apply_strategy(model, strategy("lora", rank=2), "both")
    shake_adapters(model)
    models.save_model(tmp_path / "model.pt", model)
    pixels = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(1))
    torch.save(pixels, tmp_path / "pixels.pt")
    program = (
        "import sys, torch; from micro_sam.util import get_sam_model\n"
        "from micro_sam.instance_segmentation import get_predictor_and_decoder\n"
        "predictor, decoder = get_predictor_and_decoder('vit_b', sys.argv[1] + '/model.pt', device='cpu')\n"
        "with torch.no_grad(): out = predictor.model.image_encoder(torch.load(sys.argv[1] + '/pixels.pt'))\n"
        "assert 'napari_resfinetune' not in sys.modules\n"
        "torch.save(out, sys.argv[1] + '/out.pt')"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program, str(tmp_path)], check=True)
    with torch.no_grad():
        ours = encode(model.sam.image_encoder, pixels)
    theirs = torch.load(tmp_path / "out.pt", weights_only=True)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4
