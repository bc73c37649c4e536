"""From a name to a model that can be trained, and between image and model pixels."""

from __future__ import annotations

import copy
import functools
import hashlib
import http.server
import subprocess
import sys
import threading

import numpy as np
import pooch
import pytest
import torch

from napari_resfinetune import models
from napari_resfinetune.config import FrozenStrategy, FullStrategy
from napari_resfinetune.errors import ModelError
from napari_resfinetune.models import upstream
from napari_resfinetune.models.instance_decoder import run_instance_decoder


@pytest.fixture(scope="module")
def vit_t() -> models.SamModel:
    return models.load_model("random:vit_t", seed=3)


@pytest.fixture
def fresh(vit_t) -> models.SamModel:
    return copy.deepcopy(vit_t)


@pytest.fixture(scope="module")
def run_dir(vit_t, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "my-cells"
    models.save_model(folder / "model.pt", vit_t, {"epoch": 1})
    return folder


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# names


def test_names_need_no_torch():
    code = (
        "import sys; from napari_resfinetune.models import KNOWN_MODELS, is_downloaded, near_names;"
        "is_downloaded('vit_b'); sys.exit(bool({'torch', 'micro_sam', 'napari', 'timm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_known_names_are_those_of_micro_sam():
    registry = upstream.models().registry
    downloads = [known for known in models.KNOWN_MODELS if not known.embedded]
    assert {known.name for known in downloads} == {name for name in registry if not name.endswith("_decoder")}
    for known in downloads:
        assert known.has_decoder == (f"{known.name}_decoder" in registry)
        assert known.name.startswith(known.architecture)
        assert str(models.model_path_in_cache(known.name).parent) == str(upstream.models().abspath)


def test_downloaded_means_model_and_decoder(tmp_path, monkeypatch):
    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path))
    (tmp_path / "models").mkdir()
    assert not models.is_downloaded("vit_t_lm")
    (tmp_path / "models" / "vit_t_lm").touch()
    assert not models.is_downloaded("vit_t_lm")
    (tmp_path / "models" / "vit_t_lm_decoder").touch()
    assert models.is_downloaded("vit_t_lm")
    assert not models.is_downloaded("no_such_model")


def test_every_upstream_name_is_there():
    for name in upstream.NAMES:
        assert getattr(upstream, name) is not None
    with pytest.raises(AttributeError):
        _ = upstream.no_such_name


# finding a model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("vit_b_lmm", "did you mean 'vit_b_lm'"),
        ("cyto3", "not a known name"),
        ("random:vit_x", "random:vit_t"),
        ("runs/none/model.pt", "no such file"),
    ],
)
def test_wrong_model_is_told(model, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=message):
        models.resolve_model(model)


def test_run_folder_and_checkpoint_are_found(run_dir):
    assert models.resolve_model(run_dir) == models.ModelLocation(run_dir / "model.pt", None, "my-cells", "vit_t")
    assert models.resolve_model(str(run_dir / "model.pt")).name == "model"


def test_unfinished_run_and_other_folder_are_told(tmp_path):
    with pytest.raises(ModelError, match=r"no model\.pt in it"):
        models.resolve_model(tmp_path)
    (tmp_path / "checkpoints" / "best").mkdir(parents=True)
    with pytest.raises(ModelError, match=f"resfinetune resume {tmp_path}"):
        models.resolve_model(tmp_path)


def test_download_without_network_names_files_and_ways_out(tmp_path, monkeypatch):
    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        models.resolve_model("vit_b_lm")
    text = str(caught.value)
    urls = upstream.models().urls
    for part in (
        urls["vit_b_lm"],
        urls["vit_b_lm_decoder"],
        str(tmp_path / "models" / "vit_b_lm"),
        str(tmp_path / "models" / "vit_b_lm_decoder"),
        "MICROSAM_CACHEDIR",
        "'starter'",
    ):
        assert part in text
    assert len(caught.value.problems) == 1


@pytest.fixture
def server(tmp_path):
    """A folder, and its address on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_args):
            pass

    folder = tmp_path / "served"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    ) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{listening.server_address[1]}/"
        listening.shutdown()
        thread.join()


def test_download_brings_model_and_decoder(vit_t, server, tmp_path, monkeypatch, capsys):
    served, address = server
    torch.save(vit_t.sam.state_dict(), served / "vit_t_lm")
    torch.save(vit_t.instance_decoder.state_dict(), served / "vit_t_lm_decoder")
    checksums = {path.name: f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" for path in served.iterdir()}
    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path / "cache"))
    registry = pooch.create(path=tmp_path / "cache" / "models", base_url=address, registry=checksums)
    monkeypatch.setattr(upstream, "models", lambda: registry)
    loaded = models.load_model("vit_t_lm", decoder="required")
    assert loaded.name == "vit_t_lm"
    assert same_weights(loaded, vit_t)
    assert models.is_downloaded("vit_t_lm")
    assert capsys.readouterr().out == ""

    models.model_path_in_cache("vit_t_lm").write_bytes(b"half")
    (served / "vit_t_lm").unlink()
    with pytest.raises(ModelError, match="incomplete or of another version"):
        models.load_model("vit_t_lm")


# building


def test_fresh_weights_follow_the_seed_and_leave_torchs(vit_t):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    again, other = models.load_model("random:vit_t", seed=3), models.load_model("random:vit_t", seed=4)
    assert torch.equal(torch.rand(1), expected)
    assert same_weights(again, vit_t)
    assert not same_weights(other, vit_t)
    assert not again.training


def test_saved_model_comes_back(vit_t, run_dir):
    assert same_weights(models.load_model(run_dir, decoder="required"), vit_t)


def test_decoder_is_required_new_or_left_out(vit_t, tmp_path):
    path = tmp_path / "sam.pth"
    torch.save(vit_t.sam.state_dict(), path)
    assert models.load_model(path, decoder="none").instance_decoder is None
    first, second = models.load_model(path, seed=1), models.load_model(path, seed=1)
    assert same_weights(first, second)
    assert same_weights(first.sam, vit_t.sam)
    for model in (path, "random:vit_t"):
        with pytest.raises(ModelError, match="no decoder for automatic instance segmentation"):
            models.load_model(model, decoder="required")


def test_decoder_with_transposed_convolutions_is_kept(vit_t, tmp_path):
    unetr = upstream.UNETR(
        encoder=vit_t.sam.image_encoder, out_channels=3, use_skip_connection=False, use_conv_transpose=True
    )
    state = {name: tensor for name, tensor in unetr.state_dict().items() if not name.startswith("encoder.")}
    torch.save({"model_state": vit_t.sam.state_dict(), "decoder_state": state}, tmp_path / "model.pt")
    loaded = models.load_model(tmp_path / "model.pt", decoder="required").instance_decoder.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_foreign_decoder_is_told(vit_t, tmp_path):
    state = dict(vit_t.instance_decoder.state_dict())
    state["out_conv.weight"] = torch.zeros(7, 64, 1, 1)
    torch.save({"model_state": vit_t.sam.state_dict(), "decoder_state": state}, tmp_path / "model.pt")
    with pytest.raises(ModelError, match=r"(?s)decoder.*out_conv\.weight"):
        models.load_model(tmp_path / "model.pt")


def test_every_parameter_is_in_exactly_one_part(vit_t):
    inside = [id(tensor) for part in models.parts(vit_t).values() for tensor in part.parameters()]
    assert sorted(inside) == sorted(id(tensor) for tensor in vit_t.parameters())
    assert len(set(inside)) == len(inside)


def test_copy_shares_nothing(vit_t, fresh):
    with torch.no_grad():
        for tensor in fresh.parameters():
            tensor.add_(1)
    assert not {tensor.data_ptr() for tensor in fresh.parameters()} & {
        tensor.data_ptr() for tensor in vit_t.parameters()
    }


def test_predictor_segments_and_knows_its_weights(vit_t, fresh):
    predictor = models.predictor(vit_t)
    assert (predictor.model_type, predictor.model_name) == ("vit_t", "vit_t")
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    predictor.set_image(image)
    masks, scores, _ = predictor.predict(point_coords=np.array([[20, 20]]), point_labels=np.array([1]))
    assert masks.shape == (3, 48, 64)
    assert np.isfinite(scores).all()
    with torch.no_grad():
        fresh.sam.mask_decoder.iou_token.weight.add_(1)
    assert models.predictor(fresh)._hash != predictor._hash


# image pixels and model pixels


@pytest.mark.parametrize("size", [(512, 512), (300, 417), (1100, 700), (1024, 33)])
def test_preprocessing_equals_upstream(vit_t, size):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 255
    expected, expected_size = upstream.TrainableSAM(vit_t.sam).preprocess(images)
    ours, input_size = models.to_model_input(images)
    assert input_size == tuple(expected_size) == models.resized_shape(size)
    assert torch.equal(ours, expected)

    masks = torch.randn(2, 1, 256, 256, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        models.masks_to_image(masks, input_size, size), vit_t.sam.postprocess_masks(masks, input_size, size)
    )

    resize = upstream.ResizeLongestSide(1024)
    points = torch.tensor([[[0, 0], [3, 5]], [[size[1] - 1, size[0] - 1], [7, 2]]])
    boxes = torch.tensor([[1.0, 2.0, 30.5, 40.0], [0.0, 0.0, size[1], size[0]]])
    assert torch.equal(models.scale_coords(points, size), resize.apply_coords_torch(points, size))
    assert torch.equal(models.scale_boxes(boxes, size), resize.apply_boxes_torch(boxes, size))


# what learns


@pytest.mark.parametrize("strategy", [FullStrategy(), FrozenStrategy()])
@pytest.mark.parametrize("targets", ["both", "masks", "instances"])
def test_strategy_chooses_parts(fresh, strategy, targets):
    report = models.apply_strategy(fresh, strategy, targets)
    learns = {name for name, count in report.trainable.items() if count}
    expected = {"image_encoder"} if strategy.kind == "full" else set()
    expected |= {"prompt_encoder", "mask_decoder"} if targets != "instances" else set()
    expected |= {"instance_decoder"} if targets != "masks" else set()
    assert learns == expected
    assert sum(report.trainable.values()) == sum(
        tensor.numel() for tensor in fresh.parameters() if tensor.requires_grad
    )
    assert sum(report.total.values()) == sum(tensor.numel() for tensor in fresh.parameters())
    assert report.share == pytest.approx(sum(report.trainable.values()) / sum(report.total.values()))
    assert not any(tensor.requires_grad for tensor in fresh.sam.image_encoder.head.parameters())


def test_strategy_can_be_changed(fresh):
    full = models.apply_strategy(fresh, FullStrategy(), "both")
    models.apply_strategy(fresh, FrozenStrategy(), "instances")
    assert models.apply_strategy(fresh, FullStrategy(), "both") == full


def test_everything_that_learns_gets_a_gradient(fresh):
    models.apply_strategy(fresh, FullStrategy(), "instances")
    fresh.train()
    embedding = fresh.sam.image_encoder(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    fresh.instance_decoder._forward_impl(embedding).mean().backward()
    assert [name for name, tensor in fresh.named_parameters() if tensor.requires_grad and tensor.grad is None] == []


def test_instances_need_a_decoder(vit_t):
    bare = models.SamModel(vit_t.sam, None, "vit_t", "bare")
    with pytest.raises(ModelError, match="no instance decoder"):
        models.apply_strategy(bare, FullStrategy(), "both")
    assert "instance_decoder" not in models.apply_strategy(copy.deepcopy(bare), FullStrategy(), "masks").total


def test_the_instance_decoder_predicts_as_it_does_in_micro_sam_and_keeps_its_statistics():
    model = models.new_model("vit_t", seed=4)
    embedding = torch.randn(1, 256, 8, 8)
    theirs = copy.deepcopy(model.instance_decoder).train()
    before = {name: value.clone() for name, value in model.instance_decoder.state_dict().items()}
    with torch.no_grad():
        expected = run_instance_decoder(theirs, embedding, (128, 128), (64, 64))
        found = run_instance_decoder(model.eval().instance_decoder, embedding, (128, 128), (64, 64))
    torch.testing.assert_close(found, expected)
    assert all(torch.equal(value, before[name]) for name, value in model.instance_decoder.state_dict().items())
