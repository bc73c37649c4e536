"""Planes larger than memory: block by block gives what one piece gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import zarr
from scipy.ndimage import distance_transform_edt, gaussian_filter

from napari_resfinetune.data.sources import open_array
from napari_resfinetune.errors import ConfigError, ModelError, ResourceError
from napari_resfinetune.inference import (
    blockwise,
    files,
    new_ome_zarr,
    read_made_by,
    segment_blockwise,
    segment_files,
    segment_plane,
)
from napari_resfinetune.models import load_model
from see_through import disks, paint, see_through_model

PATCH = {"patch_px": 160}
EXACT = (0.0, 100.0)


def same_partition(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two label images differ in nothing but numbers; background is 0 in both."""
    pairs = np.unique(np.stack([one.ravel(), other.ravel()]), axis=1)
    alone = len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]
    return alone and bool(((pairs[0] == 0) == (pairs[1] == 0)).all())


def crowded(shape: tuple[int, int]) -> np.ndarray:
    """Return an image whose decoder maps are rough: touching objects of all sizes, diagonal seeds, bridges."""
    rng = np.random.default_rng(5)
    noise = gaussian_filter(rng.standard_normal(shape), 5)
    inside = noise > np.quantile(noise, 0.35)
    depth = distance_transform_edt(inside)
    image = np.zeros((*shape, 3), np.float32)
    image[..., 0] = np.where(inside, 255, 0)
    image[..., 1] = image[..., 2] = 255 * np.clip(1 - depth / 8 + 0.2 * rng.standard_normal(shape), 0, 1)
    return image


def blocks(image: np.ndarray, tmp_path: Path, block_px: int, **options) -> tuple[int, np.ndarray]:
    out = np.zeros(image.shape[:2], np.uint32)
    count = segment_blockwise(
        see_through_model(), lambda window: image[window], image.shape[:2], out, tmp_path,
        block_px=block_px, **PATCH, **options,
    )  # fmt: skip
    return count, out


@pytest.mark.parametrize("block_px", [64, 100, 300])
@pytest.mark.parametrize("kind", ["disks", "crowded"])
def test_blocks_give_what_one_piece_gives(tmp_path: Path, kind: str, block_px: int) -> None:
    """Every object is the same to the pixel, wherever blocks and windows cut it."""
    image = paint(disks((300, 420), step=33)) if kind == "disks" else crowded((300, 420))
    whole = segment_plane(see_through_model(), image, **PATCH)
    count, found = blocks(image, tmp_path, block_px)
    assert count == found.max() == len(np.unique(found)) - 1 == whole.max()
    assert same_partition(whole, found)
    assert list(tmp_path.iterdir()) == []


def test_an_object_larger_than_block_and_halo_is_whole(tmp_path: Path) -> None:
    """A worm with one seed at its end: most blocks see its foreground and not its seed."""
    image = np.full((200, 640, 3), 255, np.float32)
    image[..., 0] = 0
    image[90:110, 10:630, 0] = 255
    image[95:105, 15:25, 1:] = 0
    whole = segment_plane(see_through_model(), image, **PATCH)
    assert whole.max() == 1
    assert np.count_nonzero(whole) > 600 * 18
    _, found = blocks(image, tmp_path, 64)
    assert same_partition(whole, found)


@pytest.mark.parametrize("mode", ["apg", "amg"])
def test_modes_with_prompts(tmp_path: Path, mode: str) -> None:
    image = paint(disks((240, 260)))
    options = {"mode": mode}
    if mode == "amg":
        options["parameters"] = {"points_per_side": 3, "stability_score_thresh": 0.5}
    whole = segment_plane(see_through_model(point_px=80), image, **PATCH, **options)
    out = np.zeros(image.shape[:2], np.uint32)
    segment_blockwise(
        see_through_model(point_px=80), lambda window: image[window], image.shape[:2], out, tmp_path,
        block_px=100, **PATCH, **options,
    )  # fmt: skip
    assert whole.max() > 2
    assert same_partition(whole, out)


@pytest.mark.slow
def test_a_real_network(tmp_path: Path) -> None:
    """Untrained, so its maps are rough; one object at least is there, since thresholds are wide open."""
    model = load_model("random:vit_t", decoder="new", seed=2)
    image = np.random.default_rng(0).uniform(0, 255, (96, 160, 3)).astype(np.float32)
    how = {
        "patch_px": 128,
        "parameters": {
            "foreground_threshold": 0.4,
            "center_distance_threshold": 0.55,
            "boundary_distance_threshold": 0.55,
            "min_size": 0,
        },
    }
    whole = segment_plane(model, image, **how)
    out = np.zeros(image.shape[:2], np.uint32)
    segment_blockwise(model, lambda window: image[window], (96, 160), out, tmp_path, block_px=96, **how)
    assert whole.any()
    assert same_partition(whole, out)


def test_nothing_there_small_objects_and_first_id(tmp_path: Path) -> None:
    assert blocks(np.zeros((200, 300, 3), np.float32), tmp_path, 64) == (0, pytest.approx(0))
    image = paint(disks((200, 300)))
    assert blocks(image, tmp_path, 64, parameters={"min_size": 10_000})[0] == 0
    count, found = blocks(image, tmp_path, 64, first_id=11)
    assert found[found > 0].min() == 11 and found.max() == 10 + count


def test_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "_SCRATCH_BYTES_PER_PX", 10**12)
    with pytest.raises(ResourceError, match=r"GB free; a plane of 200 x 300 px"):
        blocks(np.zeros((200, 300, 3), np.float32), tmp_path, 64)


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    """Return a zarr stack, CZYX, of two slices whose objects overlap."""
    labels = disks((240, 300))
    pixels = np.stack([paint(labels), paint(np.roll(labels, 3, 1))]).transpose(3, 0, 1, 2)
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "deep.zarr"
    array = zarr.create_array(
        path, shape=pixels.shape, chunks=(1, 1, 100, 100), dtype=np.uint8, dimension_names=list("czyx")
    )
    array[...] = pixels.astype(np.uint8)
    return path


SETTINGS = {"channels": (0, 1, 2), "percentiles": EXACT, **PATCH}


def segment(path: Path, output: Path, **changes):
    settings = {**SETTINGS, **changes}
    model = settings.pop("model", None) or see_through_model()
    return list(segment_files(model, [open_array(path)], output, **settings))


@pytest.mark.parametrize("form", ["tiff", "zarr"])
def test_files_large_and_small_are_the_same(tmp_path: Path, stack: Path, form: str) -> None:
    (small,) = segment(stack, tmp_path / "small", form=form)
    progress: list[tuple[str, int, int]] = []
    (large,) = segment(
        stack, tmp_path / "large", form=form, whole_up_to_px=1000, on_progress=lambda *at: progress.append(at)
    )
    one, other = (open_array(file.labels) for file in (small, large))
    assert one.axes == other.axes == "ZYX"
    assert one.dtype == np.uint32
    assert same_partition(one.read(), other.read())
    assert small.objects == large.objects == len(np.unique(one.read())) - 1 == disks((240, 300)).max()
    assert progress[-1] == ("deep", 12, 12)
    assert [path.name for path in (tmp_path / "large").iterdir()] == [large.labels.name]


def test_the_pyramid_is_ome_zarr_0_5(tmp_path: Path) -> None:
    labels = np.kron(disks((300, 280)), np.ones((2, 4), np.int32))
    with new_ome_zarr(tmp_path / "a.ome.zarr", labels.shape) as out:
        out[...] = labels
    group = zarr.open_group(tmp_path / "a.ome.zarr", mode="r")
    ome = group.attrs["ome"]
    (multiscale,) = ome["multiscales"]
    assert ome["version"] == "0.5" and "image-label" in ome
    assert [axis["name"] for axis in multiscale["axes"]] == ["y", "x"]
    levels = [group[dataset["path"]] for dataset in multiscale["datasets"]]
    assert [level.shape for level in levels] == [(600, 1120), (300, 560), (150, 280)]
    scales = [dataset["coordinateTransformations"][0]["scale"] for dataset in multiscale["datasets"]]
    assert scales == [[1, 1], [2, 2], [4, 4]]
    for number, level in enumerate(levels):
        assert np.array_equal(level[...], labels[:: 2**number, :: 2**number])
    assert open_array(tmp_path / "a.ome.zarr").shape == (600, 1120)
    from ome_zarr_models.v05 import Image

    assert Image.from_zarr(group).datasets


@pytest.mark.parametrize("shape", [(700, 1030), (3, 520, 400)])
def test_a_tiff_is_written_tile_by_tile(
    tmp_path: Path, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_TILED_FROM_PX", 1000)
    labels = np.random.default_rng(0).integers(0, 2**32, shape, np.uint32)
    chunks = (*[1] * (len(shape) - 2), 300, 300)
    stored = zarr.create_array(tmp_path / "labels", shape=shape, dtype=np.uint32, chunks=chunks)
    stored[...] = labels
    files.write_labels(stored, tmp_path / "a.tif", {"mode": "ais"}, axes="TZYX"[-len(shape) :])
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        assert tiff.pages[0].is_tiled
        assert np.array_equal(tiff.asarray(), labels)
    assert files.read_made_by(tmp_path / "a.tif") == {"mode": "ais"}
    assert np.array_equal(open_array(tmp_path / "a.tif").read(), labels)


def test_finished_files_are_kept_and_nothing_else_is(tmp_path: Path, stack: Path) -> None:
    output = tmp_path / "out"
    (first,) = segment(stack, output)
    stamp = first.labels.stat().st_mtime_ns
    (again,) = segment(stack, output)
    assert again.kept and not first.kept
    assert again.objects == first.objects
    assert first.labels.stat().st_mtime_ns == stamp
    assert read_made_by(first.labels)["settings"]["mode"] == "ais"

    with_weights = see_through_model()
    with_weights.sam.register_parameter("extra", torch.nn.Parameter(torch.ones(3)))
    for changes in ({"patch_px": 128}, {"mode": "apg"}, {"link": False}, {"model": with_weights}):
        with pytest.raises(ConfigError, match="by another model or with other settings"):
            segment(stack, output, **changes)
    assert first.labels.stat().st_mtime_ns == stamp
    (replaced,) = segment(stack, output, link=False, overwrite=True)
    assert replaced.objects == 2 * first.objects
    zarr.open_array(stack, mode="r+")[0, 0, 0, :3] = 1  # the image changes
    with pytest.raises(ConfigError, match="exists already"):
        segment(stack, output, link=False)


def test_a_file_of_somebody_else_is_never_taken_for_done(tmp_path: Path, stack: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    for content in (b"", b"text", None):
        if content is None:
            tifffile.imwrite(output / "deep.tif", np.zeros((2, 240, 300), np.uint32))
        else:
            (output / "deep.tif").write_bytes(content)
        before = (output / "deep.tif").read_bytes()
        with pytest.raises(ConfigError, match="--overwrite"):
            segment(stack, output)
        assert (output / "deep.tif").read_bytes() == before
    image = tmp_path / "in" / "x.tif"
    tifffile.imwrite(image, np.zeros((64, 64), np.uint8))
    with pytest.raises(ConfigError, match="never replaced"):
        segment(image, tmp_path / "in", channels=None, overwrite=True)
    with pytest.raises(ModelError, match="instance decoder"):
        segment(stack, tmp_path / "new", model=see_through_model(decoder=False))
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match="tiff, zarr"):
        segment(stack, tmp_path / "new", form="png")


def test_an_interruption_leaves_whole_files_only(tmp_path: Path, stack: Path) -> None:
    image = tmp_path / "in" / "second.tif"
    tifffile.imwrite(image, paint(disks((240, 300))).astype(np.uint8), photometric="rgb")
    output = tmp_path / "out"
    sources = [open_array(stack), open_array(image)]

    def interrupt(name: str, done: int, total: int) -> None:
        if name == "second" and done == 2:
            raise KeyboardInterrupt

    how = {"form": "zarr", "whole_up_to_px": 1000, **SETTINGS}
    with pytest.raises(KeyboardInterrupt):
        list(segment_files(see_through_model(), sources, output, on_progress=interrupt, **how))
    assert [path.name for path in output.iterdir()] == ["deep.ome.zarr"]
    files = list(segment_files(see_through_model(), sources, output, **how))
    assert [file.kept for file in files] == [True, False]
