"""Segmentation: cutting, scaling, padding, joining, stacks, files, errors."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

from napari_resfinetune.data.sources import open_array
from napari_resfinetune.errors import ConfigError, DataError, ModelError
from napari_resfinetune.evaluation import score
from napari_resfinetune.inference import (
    check_mode,
    link_slices,
    pad_to_field,
    plan_tiles,
    segment_files,
    segment_plane,
    segment_source,
    write_labels,
)
from napari_resfinetune.inference.tiling import embed_plane, whole_field
from napari_resfinetune.models import load_model, upstream
from napari_resfinetune.models.preprocess import PIXEL_MEAN
from see_through import disks, paint, see_through_model

EXACT = (0.0, 100.0)


@pytest.mark.parametrize("shape", [(64, 64), (512, 512), (768, 600), (769, 100), (1300, 2049), (5000, 300)])
def test_cores_cover_every_pixel_once_and_windows_have_the_scale_of_training(shape: tuple[int, int]) -> None:
    tiles = plan_tiles(shape, 512)
    covered = np.zeros(shape, int)
    for tile in tiles:
        covered[tile.core] += 1
        assert tile.y[0] >= 0 and tile.x[0] >= 0 and tile.y[1] <= shape[0] and tile.x[1] <= shape[1]
        assert covered[tile.window][tile.core_in_window].shape == covered[tile.core].shape
        if len(tiles) > 1:
            assert max(tile.shape) == 512
            for (start, stop), (first, last), length in zip(
                (tile.y, tile.x), (tile.core_y, tile.core_x), shape, strict=True
            ):
                assert first - start >= 64 or start == 0
                assert stop - last >= 64 or stop == length
    assert (covered == 1).all()
    assert (len(tiles) == 1) == (max(shape) <= 768)


def test_patch_smaller_than_its_halos() -> None:
    assert len(plan_tiles((200, 200), 64)) > 1
    with pytest.raises(ConfigError, match="halo"):
        plan_tiles((200, 200), 128, 64)


@pytest.mark.parametrize(("architecture", "side_px", "input_px"), [("vit_b", 128, 1024), ("vit_t", 96, 768)])
def test_small_images_are_padded_not_enlarged(architecture: str, side_px: int, input_px: int) -> None:
    """Up to a patch, or, without absolute positions, to a part of it in steps of 128 px of the input."""
    image = np.full((60, 90, 3), 200, np.float32)
    model = see_through_model()
    model.architecture = architecture
    padded = pad_to_field(model, image, 128)
    assert padded.shape == (side_px, side_px, 3)
    assert np.array_equal(padded[:60, :90], image)
    assert padded[80, 92] == pytest.approx((123.675, 116.28, 103.53))
    assert pad_to_field(model, image, 80) is image
    segment_plane(model, image, patch_px=128)
    (seen,) = model.sam.image_encoder.calls
    assert seen.shape == (1, 3, input_px, input_px)
    assert (seen[0, :, : 60 * 8 - 8, : 90 * 8 - 8] > 1).all(), "a factor of 1024 / 128 = 8"
    assert seen[0, :, 60 * 8 + 8 :].abs().max() < 1e-4, "padding is zero once normalised"


def test_a_small_field_is_what_the_encoder_makes_of_it_in_a_padded_patch() -> None:
    """Of `starter`, on 200 x 180 px of a patch of 512 px: 32 of 64 columns and rows are computed."""
    model = load_model("starter").eval()
    image = paint(disks((200, 180)))
    (small,) = embed_plane(model, image)
    padded = np.broadcast_to(np.array(PIXEL_MEAN, np.float32), (512, 512, 3)).copy()
    padded[:200, :180] = image
    (whole,) = embed_plane(model, padded)
    assert small.features.shape[-2:] == (32, 32)
    put_in_place = whole_field(model, small)
    assert put_in_place.tile == whole.tile and put_in_place.input_size == whole.input_size == (1024, 1024)
    difference = (put_in_place.features - whole.features).abs().amax(1)[0] / whole.features.std()
    assert difference[:25, :22].median() < 0.05, "of the image itself"
    assert difference[36:46, 36:46].max() < 0.5, "of padding, away from the rims of both"


@pytest.mark.parametrize("shape", [(100, 130), (160, 190), (300, 420)])
def test_ais_finds_what_the_decoder_sees(shape: tuple[int, int]) -> None:
    """Padded, in one piece, and in windows."""
    true = disks(shape)
    found = segment_plane(see_through_model(), paint(true), mode="ais", patch_px=160)
    assert found.shape == shape and found.dtype == np.uint32
    assert sorted(np.unique(found)) == list(range(found.max() + 1))
    result = score(true, found)
    assert result["n_true"] == result["n_pred"]
    assert result["sa75"] == 1
    assert result["msa"] > 0.9


def test_no_seams() -> None:
    image = paint(disks((300, 300)))
    whole = segment_plane(see_through_model(), image, patch_px=256)
    cut = segment_plane(see_through_model(), image, patch_px=160)
    assert score(whole, cut)["msa"] > 0.95


@pytest.mark.parametrize("shape", [(100, 100), (240, 200)])
@pytest.mark.parametrize("mode", ["amg", "apg"])
def test_mask_decoder_modes(mode: str, shape: tuple[int, int]) -> None:
    """Points give squares of 20 px, in a patch of 128 px, whichever window they are asked in."""
    model = see_through_model(point_px=80)
    options = {"points_per_side": 3, "stability_score_thresh": 0.5} if mode == "amg" else {}
    found = segment_plane(model, paint(disks(shape)), mode=mode, patch_px=128, parameters=options)
    assert found.shape == shape and found.dtype == np.uint32 and found.max() > 2
    areas = np.bincount(found.ravel())[1:]
    if mode == "apg":
        assert score(disks(shape), found)["sa50"] == 1
        assert ((areas > 350) & (areas < 450)).all()
    else:
        assert areas.max() == pytest.approx(400, rel=0.15)


@pytest.mark.parametrize(("parameters", "objects"), [({}, 1), ({"with_background": False}, 2)])
def test_the_largest_region_of_amg_is_dropped_and_padding_is_none(
    parameters: dict, objects: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Generator:
        def __init__(self, predictor: Any) -> None:
            pass

        def initialize(self, image: np.ndarray, image_embeddings: Any) -> None:
            self.shape = image.shape[:2]

        def generate(self, with_background: bool) -> np.ndarray:
            assert not with_background
            labels = np.zeros(self.shape, np.uint32)
            labels[:70, :90], labels[10:40, 10:40] = 1, 2
            return labels

    monkeypatch.setattr(upstream, "AutomaticMaskGenerator", Generator)
    image = np.full((70, 90, 3), 100, np.float32)
    found = segment_plane(see_through_model(), image, mode="amg", patch_px=256, parameters=parameters)
    assert len(np.unique(found[found > 0])) == objects
    assert (found[10:40, 10:40] > 0).all()


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    host = socket.gethostname()
    left = [f".a.tif.{host}-{gone.stdout.strip()}.partial", f".maps-x.{host}-{gone.stdout.strip()}.partial"]
    kept = [f".b.tif.{host}-{os.getpid()}.partial", ".c.tif.elsewhere-1234567.partial", ".partial"]
    for name in (*left, *kept):
        (tmp_path / name).mkdir()
    image = open_array(paint(disks((100, 100))), axes="YXC", name="image")
    (made,) = segment_files(see_through_model(), [image], tmp_path, patch_px=128, percentiles=EXACT)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, made.labels.name])


@pytest.mark.parametrize("value", [0.0, 60000.0, np.nan])
def test_an_image_of_one_value_or_none_has_no_objects_and_no_model_is_asked(value: float) -> None:
    model = see_through_model()
    found = segment_source(model, open_array(np.full((80, 90), value, np.float32), axes="YX"), patch_px=128)
    assert found.shape == (80, 90) and not found.any()
    assert not model.sam.image_encoder.calls


@pytest.mark.parametrize("mode", ["ais", "apg", "amg"])
def test_nothing_there(mode: str) -> None:
    options = {"points_per_side": 2, "pred_iou_thresh": 0.95} if mode == "amg" else {}
    found = segment_plane(
        see_through_model(), np.zeros((90, 70, 3), np.float32), mode=mode, patch_px=128, parameters=options
    )
    assert found.shape == (90, 70) and found.dtype == np.uint32 and not found.any()


def test_small_objects_are_dropped() -> None:
    true = disks((100, 100), radius=8)
    assert segment_plane(see_through_model(), paint(true), patch_px=128).max() == true.max()
    options = {"min_size": 400}
    assert segment_plane(see_through_model(), paint(true), patch_px=128, parameters=options).max() == 0


def test_deterministic_and_leaves_the_model_as_it_was() -> None:
    model = see_through_model()
    model.train()
    image = paint(disks((180, 220)))
    before = image.copy()
    first, second = (segment_plane(model, image, patch_px=128) for _ in range(2))
    assert np.array_equal(first, second)
    assert np.array_equal(image, before)
    assert model.training and model.sam.training


def test_objects_of_a_stack_keep_their_id_and_those_of_frames_do_not() -> None:
    """Disks that move a little, one that ends, and one that is missing in the middle slice."""
    first = disks((100, 100))
    second, third = np.roll(first, 3, axis=1), np.roll(first, 6, axis=1)
    second[second == 2] = 0
    third[third == 3] = 0
    stack = np.stack([paint(plane) for plane in (first, second, third)]).transpose(3, 0, 1, 2)
    how = {"channels": (0, 1, 2), "percentiles": EXACT, "patch_px": 128}

    def ids(found: np.ndarray, number: int) -> list[int]:
        return [int(np.bincount(plane[true == number]).argmax()) for plane, true in zip(found, shifted, strict=True)]

    shifted = [first, np.roll(first, 3, axis=1), np.roll(first, 6, axis=1)]
    model = see_through_model()
    linked = segment_source(model, open_array(stack, axes="CZYX"), **how)
    assert linked.shape == (3, 100, 100) and linked.dtype == np.uint32
    assert set(ids(linked, 1)) == {ids(linked, 1)[0]} != {0}
    one, gap, other = ids(linked, 2)
    assert gap == 0 and one != other and one > 0 and other > 0
    assert ids(linked, 3)[0] == ids(linked, 3)[1] > 0 == ids(linked, 3)[2]
    assert sorted(np.unique(linked)) == list(range(linked.max() + 1))

    closed = segment_source(model, open_array(stack, axes="CZYX"), gap_closing=1, **how)
    assert set(ids(closed, 2)) == {ids(closed, 2)[0]} != {0}
    long = segment_source(model, open_array(stack, axes="CZYX"), min_z_extent=3, **how)
    assert ids(long, 3) == [0, 0, 0] and ids(long, 1)[0] > 0

    for source, options in ((open_array(stack, axes="CTYX"), {}), (open_array(stack, axes="CZYX"), {"link": False})):
        apart = segment_source(model, source, **options, **how)
        assert len(set(ids(apart, 1))) == 3
        assert apart.max() == first.max() + 2 * (first.max() - 1)
    tracked = segment_source(model, open_array(stack, axes="CTYX"), link=True, **how)
    assert np.array_equal(tracked, linked)


def test_linking_is_micro_sams_own() -> None:
    from micro_sam.multi_dimensional_segmentation import merge_instance_segmentation_3d

    rng = np.random.default_rng(0)
    slices = np.stack([np.roll(disks((120, 120)), rng.integers(-9, 9, 2), (0, 1)) for _ in range(4)]).astype(np.uint32)
    for z in range(1, 4):
        slices[z][slices[z] > 0] += slices[z - 1].max()
    ours, theirs = link_slices(slices.copy()), merge_instance_segmentation_3d(slices.copy(), verbose=False)
    pairs = np.unique(np.stack([ours.ravel(), theirs.ravel()]), axis=1)
    assert len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]
    assert ours.max() < slices.max()


@pytest.mark.parametrize(
    ("axes", "options", "said"),
    [
        ("ZYX", {"gap_closing": -1}, "gap_closing: found -1"),
        ("ZYX", {"link": False, "min_z_extent": 2}, "not linked over slices"),
        ("TYX", {"gap_closing": 2}, "not linked over slices"),
    ],
)
def test_options_of_linking_are_checked(axes: str, options: dict, said: str) -> None:
    source = open_array(np.zeros((2, 64, 64), np.uint8), axes=axes)
    with pytest.raises(ConfigError, match=said):
        segment_source(see_through_model(), source, patch_px=128, **options)


def test_one_slice_stays_a_stack_and_a_plane_a_plane() -> None:
    image = paint(disks((100, 100)))
    plane = segment_source(see_through_model(), open_array(image, axes="YXC"), percentiles=EXACT, patch_px=128)
    assert plane.shape == (100, 100) and plane.max() > 0
    stack = segment_source(see_through_model(), open_array(image[None], axes="ZYXC"), percentiles=EXACT, patch_px=128)
    assert stack.shape == (1, 100, 100)
    assert np.array_equal(stack[0], plane)


def test_written_labels_read_back(tmp_path: Path) -> None:
    for labels in (disks((60, 80)).astype(np.uint32), np.full((2, 50, 50), 70_000, np.uint32)):
        write_labels(labels, tmp_path / "a.tif")
        with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
            assert tiff.series[0].axes == "ZYX"[-labels.ndim :]
            assert tiff.series[0].dtype == np.uint32
            assert np.array_equal(tiff.asarray(), labels)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]
    with pytest.raises(DataError, match=r"missing.*cannot be written"):
        write_labels(labels, tmp_path / "missing" / "a.tif")


def test_errors_say_what_to_do() -> None:
    image = np.zeros((32, 32, 3), np.float32)
    with pytest.raises(ModelError, match="choose mode 'amg'"):
        segment_plane(see_through_model(decoder=False), image, mode="ais")
    with pytest.raises(ConfigError, match="ais, apg, amg"):
        segment_plane(see_through_model(), image, mode="watershed")
    with pytest.raises(ConfigError, match="did you mean 'min_size'"):
        check_mode("ais", {"minsize": 3})
    with pytest.raises(DataError, match="3 channels"):
        segment_plane(see_through_model(), image[..., 0])
    with pytest.raises(DataError, match="0 to 255"):
        segment_plane(see_through_model(), image + 300)
    with pytest.raises(DataError, match="0 to 255"):
        segment_plane(see_through_model(), image * np.nan)


@pytest.mark.slow
def test_real_networks() -> None:
    """Untrained, so that only types and shapes can be looked at; autocast gives bfloat16 inside."""
    model = load_model("random:vit_t", decoder="new")
    image = np.random.default_rng(0).uniform(0, 255, (100, 120, 3)).astype(np.float32)
    for mode, options in (
        ("ais", {}),
        ("amg", {"points_per_side": 2, "pred_iou_thresh": -9, "stability_score_thresh": 0}),
    ):
        found = segment_plane(model, image, mode=mode, patch_px=128, precision=torch.bfloat16, parameters=options)
        assert found.shape == (100, 120) and found.dtype == np.uint32
