"""Weights from files and back, and what bad files lead to."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch

from napari_resfinetune import models
from napari_resfinetune.errors import ModelError


@pytest.fixture(scope="module")
def vit_t() -> models.SamModel:
    return models.new_model("vit_t", seed=3)


@pytest.fixture(scope="module")
def saved(vit_t, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model.pt"
    models.save_model(path, vit_t, {"epoch": 4, "percentiles": (0.1, 99.9), "strategy": {"kind": "full"}})
    return path


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Code:
    def __reduce__(self):
        return os.makedirs, ("made-by-the-checkpoint",)


def test_saved_model_is_read_again(vit_t, saved):
    weights = models.load_state(saved)
    assert weights.architecture == "vit_t"
    assert weights.meta == {"epoch": 4, "percentiles": [0.1, 99.9], "strategy": {"kind": "full"}}
    assert same(weights.sam_state, vit_t.sam.state_dict())
    assert same(weights.decoder_state, vit_t.instance_decoder.state_dict())
    assert os.listdir(saved.parent) == ["model.pt"]


def test_plain_old_and_training_checkpoints_are_read(vit_t, tmp_path):
    sam, decoder = vit_t.sam.state_dict(), vit_t.instance_decoder.state_dict()
    torch.save(sam, tmp_path / "plain.pth")
    torch.save(sam, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    prefixed = OrderedDict((f"sam.{name}", tensor) for name, tensor in sam.items())
    torch.save({"model_state": prefixed, "decoder_state": decoder, "epoch": 3}, tmp_path / "training.pt")
    models.save_safetensors(tmp_path / "ours.safetensors", vit_t.state_dict())
    for name in ("plain.pth", "old.pth", "training.pt", "ours.safetensors"):
        weights = models.load_state(tmp_path / name)
        assert same(weights.sam_state, sam), name
        assert (weights.decoder_state is not None) == (name in ("training.pt", "ours.safetensors"))
        assert weights.decoder_state is None or same(weights.decoder_state, decoder)


def test_safetensors_go_round(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "step": torch.tensor(7)}
    models.save_safetensors(tmp_path / "new" / "x.safetensors", tensors)
    assert same(models.load_safetensors(tmp_path / "new" / "x.safetensors"), tensors)


def test_hash_is_of_contents_not_of_order():
    tensors = {"a": torch.ones(2), "b": torch.tensor(3), "c": torch.ones(2, dtype=torch.bfloat16)}
    turned = dict(reversed(tensors.items()))
    assert models.weights_hash(tensors) == models.weights_hash(turned)
    assert models.weights_hash(tensors) != models.weights_hash({**tensors, "a": torch.tensor([1.0, 2.0])})
    assert models.weights_hash(tensors) != models.weights_hash({**tensors, "a": torch.ones(2, 1)})


def write_bad(kind: str, path) -> None:
    good = {"image_encoder.patch_embed.proj.weight": torch.zeros(768, 3, 16, 16)}
    contents = {
        "code": {**good, "x": Code()},
        "module": torch.nn.Linear(2, 2),
        "list": [torch.zeros(2)],
        "numbers": {1: torch.zeros(2)},
        "wrapped": {"state_dict": good},
        "other": {"layer.weight": torch.zeros(2)},
        "width": {"image_encoder.patch_embed.proj.weight": torch.zeros(384, 3, 16, 16)},
        "decoder": {"out_conv.weight": torch.zeros(3), "base.block.1.weight": torch.zeros(3)},
        "mixed": {"model_state": good, "decoder_state": {"out_conv.weight": 3}},
    }
    if kind in contents:
        torch.save(contents[kind], path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"x": Code()}))
    elif kind == "text":
        path.write_text("these are not weights")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "folder":
        path.mkdir()
    elif kind == "truncated":
        torch.save(good, path)
        path.write_bytes(path.read_bytes()[:1_000_000])
    elif kind == "truncated old":
        torch.save(good, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:1_000_000])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such file"),
        ("folder", "is a folder"),
        ("empty", "not a whole checkpoint"),
        ("text", "not a whole checkpoint|not a checkpoint"),
        ("truncated", "not a whole checkpoint"),
        ("truncated old", "not a whole checkpoint"),
        ("code", "would run code.*export_custom_sam_model"),
        ("module", "would run code.*Linear"),
        ("pickle", "would run code"),
        ("list", "holds a list"),
        ("numbers", "holds a dict"),
        ("wrapped", "no weights at its top.*state_dict"),
        ("other", "not a Segment Anything checkpoint.*layer.weight"),
        ("width", "width 384"),
        ("decoder", "only a decoder"),
        ("mixed", "decoder_state"),
    ],
)
def test_bad_file_is_told(kind, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pt"
    write_bad(kind, path)
    with pytest.raises(ModelError, match=message) as caught:
        models.load_state(path)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "made-by-the-checkpoint").exists()


def test_bad_safetensors_are_told(tmp_path):
    path = tmp_path / "bad.safetensors"
    models.save_safetensors(path, {"a": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        models.load_state(path)


def test_decoder_file_is_read_and_checked(vit_t, saved, tmp_path):
    state = vit_t.instance_decoder.state_dict()
    torch.save(state, tmp_path / "decoder")
    assert same(models.load_decoder_state(tmp_path / "decoder"), dict(state))
    torch.save(vit_t.sam.state_dict(), tmp_path / "sam")
    with pytest.raises(ModelError, match="no decoder"):
        models.load_decoder_state(tmp_path / "sam")


def test_failed_write_leaves_the_old_file(vit_t, saved, tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    path.write_text("old")

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ModelError, match="No space left"):
        models.save_model(path, vit_t)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["model.pt"]


def test_tensors_that_do_not_fit_are_counted(vit_t, tmp_path):
    state = dict(vit_t.sam.state_dict())
    state["mask_decoder.adapter.weight"] = state.pop("mask_decoder.iou_token.weight")
    state["image_encoder.head.weight"] = torch.zeros(5, 320)
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(ModelError) as caught:
        models.load_model(tmp_path / "odd.pt")
    for part in (
        "missing 1: mask_decoder.iou_token",
        "unexpected 1: mask_decoder.adapter",
        "(5, 320) instead of (1000, 320)",
    ):
        assert part in str(caught.value)


MICRO_SAM_OPENS = """
import json, sys
import torch
from micro_sam.instance_segmentation import get_predictor_and_decoder
from micro_sam.util import get_sam_model
path = sys.argv[1]
torch.set_num_threads(1)
predictor = get_sam_model("vit_b", checkpoint_path=path, device="cpu")
second, decoder = get_predictor_and_decoder("vit_b", checkpoint_path=path, device="cpu")
total = lambda module: float(sum(t.double().sum() for t in module.state_dict().values()))
weights = total(decoder)  # micro-sam predicts in training mode, which moves running statistics
with torch.no_grad():
    out = decoder._forward_impl(torch.linspace(-1, 1, 256 * 64).reshape(1, 256, 8, 8))
print(json.dumps({
    "sam": total(predictor.model), "second": total(second.model), "decoder": weights, "out": float(out.sum()),
    "ours": "napari_resfinetune" in sys.modules,
}))
"""


@pytest.mark.slow
def test_unmodified_micro_sam_opens_a_saved_vit_b(tmp_path):
    path = tmp_path / "model.pt"
    model = models.new_model("vit_b", seed=1)
    models.save_model(path, model, {"epoch": 1})
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MICRO_SAM_OPENS, str(path)], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    seen = json.loads(child.stdout.splitlines()[-1])
    with torch.no_grad():
        out = model.instance_decoder._forward_impl(torch.linspace(-1, 1, 256 * 64).reshape(1, 256, 8, 8))
    total = {
        name: float(sum(tensor.double().sum() for tensor in module.state_dict().values()))
        for name, module in (("sam", model.sam), ("decoder", model.instance_decoder))
    }
    assert not seen["ours"]
    assert seen["sam"] == seen["second"] == pytest.approx(total["sam"], rel=1e-12)
    assert seen["decoder"] == pytest.approx(total["decoder"], rel=1e-12)
    assert seen["out"] == pytest.approx(float(out.sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"resfinetune": {"patch_px": "big"}}, "patch_px: 'big'"),
        ({"resfinetune": {"percentiles": [1, 200]}}, "percentiles"),
        ({"resfinetune": "x"}, "all of it: 'x'"),
    ],
)
def test_a_checkpoint_that_says_nonsense_of_itself_is_refused(saved, tmp_path, damage, said):
    path = tmp_path / "model.pt"
    torch.save({**torch.load(saved, weights_only=True), **damage}, path)
    with pytest.raises(ModelError, match=said):
        models.load_state(path)


def test_weights_that_are_no_numbers_are_refused(saved, tmp_path):
    path = tmp_path / "model.pt"
    content = torch.load(saved, weights_only=True)
    content["model_state"]["image_encoder.neck.1.weight"][3] = torch.nan
    torch.save(content, path)
    with pytest.raises(ModelError, match=r"not all numbers \(image_encoder\.neck\.1\.weight\)"):
        models.load_state(path)
