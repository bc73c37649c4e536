"""Reading: what is written in any format is read back, whole and in windows; what cannot be read says why."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import imagecodecs
import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from napari_resfinetune.data.pairs import find_images, find_pairs, to_channels
from napari_resfinetune.data.sources import ArraySource, open_array, read_plane, shape_yx
from napari_resfinetune.errors import DataError

DEV = Path(__file__).parents[1].parent / "shared" / "data" / "dev"
needs_dev = pytest.mark.skipif(not DEV.is_dir(), reason=f"real images of shared are not at {DEV}")

RNG = np.random.default_rng(0)


def sent(source: ArraySource) -> ArraySource:
    """Return the source as a loader process gets it."""
    result: ArraySource = pickle.loads(pickle.dumps(source))  # noqa: S301
    return result


def numbers(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if dtype.startswith("float"):
        return RNG.normal(size=shape).astype(dtype)
    return RNG.integers(0, 2 if dtype == "bool" else 200, shape).astype(dtype)


def write_tiff(folder: Path, array: np.ndarray) -> Path:
    tifffile.imwrite(folder / "a.tif", array, photometric="minisblack", compression="zlib")
    return folder / "a.tif"


def write_plain_tiff(folder: Path, array: np.ndarray) -> Path:
    tifffile.imwrite(folder / "a.tif", array, photometric="minisblack", byteorder=">")
    return folder / "a.tif"


def write_bigtiff_tiles(folder: Path, array: np.ndarray) -> Path:
    tifffile.imwrite(folder / "a.btf", array, photometric="minisblack", bigtiff=True, tile=(16, 16))
    return folder / "a.btf"


def write_ome_tiff(folder: Path, array: np.ndarray) -> Path:
    tifffile.imwrite(folder / "a.ome.tif", array, metadata={"axes": "ZYX"[-array.ndim :]}, photometric="minisblack")
    return folder / "a.ome.tif"


def write_hdf5(folder: Path, array: np.ndarray) -> Path:
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("deep/raw", data=array, chunks=True)
    return folder / "a.h5"


def write_zarr(folder: Path, array: np.ndarray, version: int = 3) -> Path:
    stored = zarr.create_array(
        folder / "a.zarr", shape=array.shape, dtype=array.dtype, chunks=(5,) * array.ndim, zarr_format=version
    )
    stored[...] = array
    return folder / "a.zarr"


def write_zarr2(folder: Path, array: np.ndarray) -> Path:
    return write_zarr(folder, array, 2)


def write_ome_zarr(folder: Path, array: np.ndarray, version: int = 3) -> Path:
    group = zarr.open_group(folder / "a.ome.zarr", mode="w", zarr_format=version)
    full = np.expand_dims(array, tuple(range(5 - array.ndim)))
    for level, values in (("s0", full), ("s1", full[..., ::2, ::2])):
        group.create_array(level, shape=values.shape, dtype=values.dtype)[...] = values
    scales = {
        "axes": [{"name": name} for name in "tczyx"],
        "datasets": [{"path": "s0"}, {"path": "s1"}],
    }
    if version == 3:
        group.attrs["ome"] = {"version": "0.5", "multiscales": [scales]}
    else:
        group.attrs["multiscales"] = [{**scales, "version": "0.4"}]
    return folder / "a.ome.zarr"


def write_ome_zarr2(folder: Path, array: np.ndarray) -> Path:
    return write_ome_zarr(folder, array, 2)


def write_npy(folder: Path, array: np.ndarray) -> Path:
    np.save(folder / "a.npy", array)
    return folder / "a.npy"


WRITERS = [
    write_tiff,
    write_plain_tiff,
    write_bigtiff_tiles,
    write_ome_tiff,
    write_hdf5,
    write_zarr,
    write_zarr2,
    write_ome_zarr,
    write_ome_zarr2,
    write_npy,
]


@pytest.mark.parametrize("write", WRITERS)
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_windows_are_read_as_written(
    tmp_path_factory: pytest.TempPathFactory, write: Callable[[Path, np.ndarray], Path], data: st.DataObject
) -> None:
    ndim = data.draw(st.sampled_from([2, 3]))
    shape = tuple(data.draw(st.integers(5, 24)) for _ in range(ndim))
    array = numbers(shape, data.draw(st.sampled_from(["uint8", "uint16", "int32", "float32"])))
    source = open_array(write(tmp_path_factory.mktemp("a"), array))
    assert source.shape == shape
    assert source.dtype == array.dtype
    assert source.axes == "ZYX"[-ndim:]
    assert source.name == "a"
    assert not source.guessed_axes
    index = tuple(
        data.draw(st.slices(size).filter(lambda item: (item.step or 1) > 0)) if data.draw(st.booleans()) else size - 1
        for size in shape
    )
    copy = sent(source)
    np.testing.assert_array_equal(copy.read(), array)
    np.testing.assert_array_equal(copy.read(index), array[index])
    y, x = slice(1, 4), slice(2, 5)
    plane = None if ndim == 2 else shape[0] - 1
    np.testing.assert_array_equal(read_plane(source, plane, (y, x)), array[..., y, x] if ndim == 2 else array[-1, y, x])


@pytest.mark.parametrize(
    ("name", "array", "shape", "axes"),
    [
        ("a.png", numbers((9, 7), "uint8"), (9, 7), "YX"),
        ("a.png", numbers((9, 7), "uint16"), (9, 7), "YX"),
        ("a.png", numbers((9, 7), "bool"), (9, 7), "YX"),
        ("a.png", numbers((9, 7, 3), "uint8"), (9, 7, 3), "YXC"),
        ("a.png", numbers((9, 7, 4), "uint8"), (9, 7, 3), "YXC"),
        ("a.png", numbers((9, 7, 2), "uint8"), (9, 7), "YX"),
        ("a.bmp", numbers((9, 7, 3), "uint8"), (9, 7, 3), "YXC"),
        ("a.PNG", numbers((9, 7), "uint8"), (9, 7), "YX"),
    ],
)
def test_pictures(tmp_path: Path, name: str, array: np.ndarray, shape: tuple[int, ...], axes: str) -> None:
    Image.fromarray(array).save(tmp_path / name)
    source = open_array(tmp_path / name)
    assert (source.shape, source.axes, source.dtype) == (shape, axes, array.dtype)
    expected = array[..., 0] if array.shape[-1] == 2 else array[..., :3] if array.ndim == 3 else array
    np.testing.assert_array_equal(source.read(), expected)


def test_colour_png_of_16_bit_keeps_them(tmp_path: Path) -> None:
    array = RNG.integers(0, 65535, (9, 7, 4)).astype(np.uint16)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(array))
    np.testing.assert_array_equal(open_array(tmp_path / "a.png").read(), array[..., :3])


def test_palette_gives_colours_to_images_and_ids_to_labels(tmp_path: Path) -> None:
    ids = np.zeros((8, 8), np.uint8)
    ids[2:5, 2:5] = 3
    image = Image.fromarray(ids, mode="P")
    image.putpalette([value for number in range(256) for value in (255 - number, number, 9)])
    image.save(tmp_path / "a.png")
    assert open_array(tmp_path / "a.png").axes == "YXC"
    np.testing.assert_array_equal(open_array(tmp_path / "a.png", indexed=True).read(), ids)


def test_axes_of_tiff_metadata_and_rgb(tmp_path: Path) -> None:
    channels = numbers((2, 12, 11), "uint16")
    tifffile.imwrite(tmp_path / "ij.tif", channels, imagej=True, metadata={"axes": "CYX"})
    tifffile.imwrite(tmp_path / "z.tif", channels, imagej=True, metadata={"axes": "ZYX"})
    tifffile.imwrite(tmp_path / "plain.tif", channels, photometric="minisblack")
    tifffile.imwrite(
        tmp_path / "rgba.tif", numbers((12, 11, 4), "uint8"), photometric="rgb", extrasamples=["unassalpha"]
    )
    tifffile.imwrite(tmp_path / "zrgb.tif", numbers((5, 12, 11, 3), "uint8"), photometric="rgb")
    assert (open_array(tmp_path / "ij.tif").axes, open_array(tmp_path / "ij.tif").guessed_axes) == ("CYX", False)
    assert (open_array(tmp_path / "z.tif").axes, open_array(tmp_path / "z.tif").guessed_axes) == ("ZYX", False)
    assert (open_array(tmp_path / "plain.tif").axes, open_array(tmp_path / "plain.tif").guessed_axes) == ("ZYX", True)
    forced = open_array(tmp_path / "plain.tif", axes="cyx")
    assert (forced.axes, forced.guessed_axes) == ("CYX", False)
    np.testing.assert_array_equal(
        read_plane(forced, None, (slice(3), slice(4))), channels[:, :3, :4].transpose(1, 2, 0)
    )
    assert open_array(tmp_path / "rgba.tif").shape == (12, 11, 3)
    stack = open_array(tmp_path / "zrgb.tif")
    assert (stack.axes, shape_yx(stack), stack.plane_count) == ("ZYXC", (12, 11), 5)
    assert read_plane(stack, 4).shape == (12, 11, 3)


@pytest.mark.parametrize(
    ("shape", "dtype", "axes", "read_shape"),
    [
        ((9, 8), "bool", "YX", (9, 8)),
        ((9, 8, 3), "float32", "YXC", (9, 8, 3)),
        ((9, 8, 4), "uint8", "YXC", (9, 8, 3)),
        ((9, 8, 4), "uint16", "YXC", (9, 8, 4)),
        ((9, 8, 1), "uint16", "YX", (9, 8)),
        ((1, 9, 8), "uint16", "ZYX", (1, 9, 8)),
        ((1, 1, 9, 8), "uint16", "YX", (9, 8)),
        ((1, 6, 9, 8), "uint16", "ZYX", (6, 9, 8)),
        ((6, 9, 8, 3), "uint8", "ZYXC", (6, 9, 8, 3)),
    ],
)
def test_axes_of_plain_arrays(shape: tuple[int, ...], dtype: str, axes: str, read_shape: tuple[int, ...]) -> None:
    array = numbers(shape, dtype)
    source = open_array(array)
    assert (source.name, source.path, source.axes, source.shape) == ("array 1", None, axes, read_shape)
    assert source.read().shape == read_shape
    np.testing.assert_array_equal(sent(source).read(), source.read())


def test_array_objects(tmp_path: Path) -> None:
    array = numbers((6, 9, 8), "uint16")
    stored = zarr.create_array(tmp_path / "c.zarr", shape=(2, 9, 8), dtype="u2", dimension_names=["c", "y", "x"])
    assert open_array(stored).axes == "CYX"
    with h5py.File(write_hdf5(tmp_path, array), "r") as file:
        source = open_array(file["deep/raw"])
        np.testing.assert_array_equal(source.read((2,)), array[2])
    np.testing.assert_array_equal(source.read((2,)), array[2])
    np.testing.assert_array_equal(sent(source).read((2,)), array[2])


def test_ome_zarr_channels_and_labels_by_key(tmp_path: Path) -> None:
    path = write_ome_zarr(tmp_path, numbers((2, 1, 12, 10), "uint16"))
    assert (open_array(path).axes, open_array(path).shape) == ("CYX", (2, 12, 10))
    assert open_array(path, "s1").shape == (2, 6, 5)
    group = zarr.open_group(tmp_path / "b.zarr", mode="w")
    group.create_array("x/raw", shape=(4, 5), dtype="u1")
    assert open_array(tmp_path / "b.zarr").key == "x/raw"
    group.create_array("y", shape=(4, 5), dtype="u1")
    with pytest.raises(DataError, match=r"2 arrays.*x/raw, y"):
        open_array(tmp_path / "b.zarr")
    assert open_array(tmp_path / "b.zarr", "x").key == "x/raw"
    with pytest.raises(DataError, match=r"no array 'q'.*x/raw, y"):
        open_array(tmp_path / "b.zarr", "q")


def test_changed_stack_is_read_anew(tmp_path: Path) -> None:
    path = write_tiff(tmp_path, np.zeros((5, 8, 8), np.uint8))
    source = open_array(path)
    assert source.read((3,)).max() == 0
    write_tiff(tmp_path, np.full((5, 8, 8), 7, np.uint8))
    assert source.read((3,)).min() == 7


def cut(path: Path, keep: float = 0.5) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


def bad_file(folder: Path, kind: str) -> Path:
    noise = numbers((64, 64), "uint8")
    path = folder / "a.tif"
    if kind == "missing":
        pass
    elif kind == "zero bytes":
        path.touch()
    elif kind == "not a tiff":
        path.write_text("hello")
    elif kind == "cut tiff":
        cut(write_plain_tiff(folder, noise))
    elif kind == "cut packed tiff":
        cut(write_tiff(folder, noise))
    elif kind == "cut stack":
        cut(write_tiff(folder, numbers((6, 64, 64), "uint8")))
    elif kind == "cut png":
        path = folder / "a.png"
        Image.fromarray(noise).save(path)
        cut(path)
    elif kind == "cut hdf5":
        path = cut(write_hdf5(folder, noise))
    elif kind == "broken zarr":
        path = write_zarr(folder, noise)
        (path / "zarr.json").write_text("{")
    elif kind == "empty zarr":
        path = folder / "a.zarr"
        path.mkdir()
    elif kind == "zarr without arrays":
        path = folder / "a.zarr"
        zarr.open_group(path, mode="w")
    elif kind == "broken ome-zarr":
        path = write_ome_zarr2(folder, noise)
        (path / ".zattrs").write_text(json.dumps({"multiscales": [{"datasets": []}]}))
    elif kind == "4D":
        tifffile.imwrite(path, numbers((2, 3, 20, 20), "uint8"), photometric="minisblack")
    elif kind == "time and depth":
        tifffile.imwrite(path, numbers((2, 3, 20, 20), "uint8"), imagej=True, metadata={"axes": "TZYX"})
    elif kind == "two images":
        with tifffile.TiffWriter(path, ome=True) as writer:
            writer.write(noise)
            writer.write(noise)
    elif kind == "objects":
        path = folder / "a.npy"
        np.save(path, np.array([{}, 1], object), allow_pickle=True)
    elif kind == "text suffix":
        path = folder / "a.txt"
        path.write_text("1 2")
    elif kind == "text in hdf5":
        path = folder / "a.h5"
        with h5py.File(path, "w") as file:
            file["x"] = ["a", "b"]
    return path


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "does not exist"),
        ("zero bytes", "0 bytes"),
        ("not a tiff", "cannot be read"),
        ("cut tiff", "cut off"),
        ("cut packed tiff", "cut off|cannot be read"),
        ("cut stack", "cut off|cannot be read"),
        ("cut png", "truncated"),
        ("cut hdf5", "cannot be read"),
        ("broken zarr", "cannot be read"),
        ("empty zarr", "cannot be read"),
        ("zarr without arrays", "no array"),
        ("broken ome-zarr", "cannot be read"),
        ("4D", "4D array of shape"),
        ("time and depth", "TZYX"),
        ("two images", "2 images"),
        ("objects", "cannot be read"),
        ("text suffix", "is not an image"),
        ("text in hdf5", "not numbers"),
    ],
)
def test_bad_files_say_why(tmp_path: Path, kind: str, says: str) -> None:
    path = bad_file(tmp_path, kind)
    with pytest.raises(DataError, match=says) as raised:
        open_array(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert "; " in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), complex),
        np.array([["a"]]),
        np.zeros((4, 4), object),
        np.zeros((0, 4)),
        np.zeros(4),
        np.float32(1),
        np.zeros((2, 2, 2, 4, 4)),
        {"not": "an array"},
        3,
    ],
)
def test_bad_arrays_say_why(array: Any) -> None:
    with pytest.raises(DataError, match="array 1: "):
        open_array(array)


@pytest.mark.parametrize(
    ("axes", "says"), [("YXQ", "choose one of"), ("YX", "2D|does not have the axes"), ("", "choose")]
)
def test_bad_axes_say_why(axes: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        open_array(np.zeros((5, 6, 7)), axes=axes)


def test_stacks_need_an_existing_plane() -> None:
    source = open_array(np.zeros((5, 16, 17)))
    for plane in (None, 5, -1):
        with pytest.raises(DataError, match="plane"):
            read_plane(source, plane)


def test_file_that_vanishes_is_a_data_error(tmp_path: Path) -> None:
    source = open_array(write_tiff(tmp_path, np.zeros((8, 8), np.uint8)))
    (tmp_path / "a.tif").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        source.read()


# Pairs


def folder_of(path: Path, *names: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name.endswith((".tif", ".png")):
            write = tifffile.imwrite if name.endswith(".tif") else lambda p, a: Image.fromarray(a).save(p)
            write(path / name, np.ones((8, 8), np.uint8))
        else:
            (path / name).write_text("x")
    return path


def test_pairs_by_stem_whatever_the_suffix(tmp_path: Path) -> None:
    images = folder_of(tmp_path / "i", "a.ome.tif", "b.tif", "c_mask.tif", "d.tif", "e.png", ".hidden.tif", "notes.txt")
    labels = folder_of(tmp_path / "l", "a_label.tif", "b_masks.png", "c_mask.tif", "d_seg.tif", "e.tif")
    found = find_pairs(images, labels)
    assert not found.problems
    assert {pair.image.path.name: pair.labels.path.name for pair in found.pairs} == {
        "a.ome.tif": "a_label.tif",
        "b.tif": "b_masks.png",
        "c_mask.tif": "c_mask.tif",
        "d.tif": "d_seg.tif",
        "e.png": "e.tif",
    }
    globbed = find_pairs(str(images / "*.tif"), [labels / "d_seg.tif", str(labels / "b_masks.png")])
    assert [pair.name for pair in globbed.pairs] == ["b", "d"]


def test_unmatched_and_duplicate_files_are_listed(tmp_path: Path) -> None:
    images = folder_of(tmp_path / "i", "a.tif", "a.png", "b.tif", "c.tif")
    labels = folder_of(tmp_path / "l", "a.tif", "b.tif", "x.tif")
    (labels / "b.tif").write_bytes(b"broken")
    found = find_pairs(images, labels)
    assert {(problem.code, problem.level) for problem in found.problems} == {
        ("duplicate-stem", "error"),
        ("image-without-labels", "error"),
        ("labels-without-image", "error"),
        ("unusable-file", "error"),
    }
    (labels / "x.tif").unlink()
    levels = {problem.code: problem.level for problem in find_pairs(images, labels).problems}
    assert levels["image-without-labels"] == "warning"


def test_arrays_and_single_files_pair_by_position(tmp_path: Path) -> None:
    array = np.ones((8, 8), np.uint8)
    folder_of(tmp_path, "x.tif", "y.tif")
    for images, labels in [
        (array, array),
        ([array, array], [array, array]),
        ([array, array], [tmp_path / "x.tif", array]),
        (tmp_path / "x.tif", str(tmp_path / "y.tif")),
    ]:
        found = find_pairs(images, labels)
        assert found.pairs
        assert not found.problems
    assert find_pairs(array, array, channels=[0]).pairs[0].channels == (0,)
    with pytest.raises(DataError, match="2 images and 1 label"):
        find_pairs([array, array], [array])


def test_planes_are_the_annotated_ones() -> None:
    labels = np.zeros((6, 20, 20), np.uint16)
    labels[[1, 4], 3:9, 3:9] = 1
    assert find_pairs(np.zeros((6, 20, 20)), labels, axes="TYX").pairs[0].planes == (1, 4)
    assert find_pairs(np.zeros((20, 20)), labels[1]).pairs[0].planes == (None,)
    assert find_pairs(np.zeros((20, 20)), labels[0]).pairs[0].planes == ()
    assert find_pairs(np.zeros((1, 20, 20)), labels[1]).pairs[0].planes == (None,)


def test_axes_hold_for_images_and_for_labels_where_they_fit() -> None:
    pair = find_pairs(np.zeros((3, 20, 20)), np.zeros((20, 20), int), axes="CYX").pairs[0]
    assert (pair.image.axes, pair.labels.axes) == ("CYX", "YX")
    pair = find_pairs(np.zeros((5, 3, 20, 20)), np.zeros((5, 20, 20), int), axes="TCYX").pairs[0]
    assert (pair.image.axes, pair.labels.axes) == ("TCYX", "TYX")


def test_locations_that_hold_nothing_say_what_was_expected(tmp_path: Path) -> None:
    empty, texts = folder_of(tmp_path / "e"), folder_of(tmp_path / "t", "a.csv", "b.txt")
    nested = tmp_path / "n"
    folder_of(nested / "inner", "a.tif")
    for location, says in [
        (empty, "is empty"),
        (texts, r"\.csv, \.txt"),
        (nested, "only folders .inner."),
        (tmp_path / "none", "does not exist"),
        (str(tmp_path / "e" / "*.tif"), "matches no file"),
        (str(tmp_path / "t" / "*"), "matches 2 files, none"),
        ([], "list is empty"),
        (None, "none given"),
    ]:
        with pytest.raises(DataError, match=says):
            find_images(location)
    with pytest.raises(DataError) as raised:
        find_pairs(empty, tmp_path / "none")
    assert len(raised.value.problems) == 2


def test_find_images_lists_all_that_is_wrong(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "i", "a.tif", "b.tif", "c.tif")
    assert [source.name for source in find_images(folder)] == ["a", "b", "c"]
    assert [source.name for source in find_images([np.zeros((4, 4)), np.zeros((4, 4))])] == ["array 1", "array 2"]
    cut(folder / "a.tif", 0)
    cut(folder / "b.tif", 0.9)
    with pytest.raises(DataError) as raised:
        find_images(folder)
    assert len(raised.value.problems) == 2


def test_channels_become_three() -> None:
    gray, two, rgb, many = (numbers((4, 5, count), "uint16") for count in (1, 2, 3, 6))
    np.testing.assert_array_equal(to_channels(gray[..., 0]), np.repeat(gray, 3, -1))
    np.testing.assert_array_equal(to_channels(gray), np.repeat(gray, 3, -1))
    np.testing.assert_array_equal(to_channels(two)[..., 2], two.mean(-1, dtype=np.float32))
    np.testing.assert_array_equal(to_channels(rgb), rgb)
    np.testing.assert_array_equal(to_channels(many, (5, 0, 2)), many[..., [5, 0, 2]])
    np.testing.assert_array_equal(to_channels(many, (4,)), many[..., [4, 4, 4]])
    assert to_channels(many, (4, 1)).dtype == np.float32
    with pytest.raises(DataError, match=r"6 channels.*data\.channels"):
        to_channels(many)
    for channels in ((6,), (-1,), (), (0, 1, 2, 3)):
        with pytest.raises(DataError, match=r"data\.channels"):
            to_channels(many, channels)


@needs_dev
def test_real_images_pair_and_read() -> None:
    axes = {}
    for folder in sorted(path for path in DEV.iterdir() if path.is_dir()):
        found = find_pairs(folder / "images", folder / "labels")
        assert not found.problems
        for pair in found.pairs[:2]:
            assert pair.planes
            plane = pair.planes[-1]
            whole, window = read_plane(pair.image, plane), read_plane(pair.image, plane, (slice(7, 50), slice(20, 90)))
            np.testing.assert_array_equal(window, whole[7:50, 20:90])
            assert whole.shape[:2] == shape_yx(pair.labels)
            stored = tifffile.imread(pair.image.path)
            np.testing.assert_array_equal(whole, stored if plane is None else stored[plane])
        axes[folder.name] = found.pairs[0].image.axes
    assert axes["histology"] == "YXC"
    assert axes["stack3d"] == "ZYX"
    assert axes["timelapse"] == "TYX"
    assert axes["fluo_u2os"] == "YX"
