"""The doctor: every problem at once, each with its fix, and nothing to say about good data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from napari_resfinetune.data.doctor import CheckReport, check_pairs
from napari_resfinetune.data.pairs import Problem, find_pairs
from napari_resfinetune.errors import DataError

DEV = Path(__file__).parents[1].parent / "shared" / "data" / "dev"
needs_dev = pytest.mark.skipif(not DEV.is_dir(), reason=f"real images of shared are not at {DEV}")
FOLDERS = ("fluo_u2os", "phase_t98g", "histology", "fluo_mixed", "brightfield_cytology", "stack3d", "timelapse")

NOISE = np.random.default_rng(0).integers(20, 220, (64, 80)).astype(np.uint8)


def squares(count: int = 6) -> np.ndarray:
    """Return a label image with up to 20 squares of 64 px."""
    labels = np.zeros((64, 80), np.uint16)
    for number in range(count):
        y, x = 12 * (number // 5) + 2, 15 * (number % 5) + 2
        labels[y : y + 8, x : x + 8] = number + 1
    return labels


def check(image: Any, labels: Any, patch_px: int = 64, **options: Any) -> CheckReport:
    return check_pairs(find_pairs(image, labels, **options), patch_px=patch_px)


def codes(problems: tuple[Problem, ...]) -> set[str]:
    return {problem.code for problem in problems}


def with_piece(labels: np.ndarray, number: int, side: int = 8) -> np.ndarray:
    labels = labels.copy()
    labels[52 : 52 + side, 60 : 60 + side] = number
    return labels


def test_good_data_have_no_problem() -> None:
    report = check([NOISE, NOISE[::-1]], [squares(), squares(12)])
    assert report == CheckReport()
    assert report.ok
    report.raise_for_errors()


CLASSES = np.where(squares(20) % 2, 1, 2) * (squares(20) > 0)
BAD_NAN = NOISE.astype(np.float32)
BAD_NAN[3, 3:5] = np.nan, np.inf


@pytest.mark.parametrize(
    ("image", "labels", "code"),
    [
        (NOISE, squares()[:50], "shape-mismatch"),
        (NOISE, squares().T, "shape-mismatch"),
        (np.stack([NOISE] * 5), squares(), "axis-mismatch"),
        (NOISE, np.stack([squares()] * 5), "axis-mismatch"),
        (NOISE, squares() + 0.5, "float-labels"),
        (NOISE, np.where(squares() == 1, np.nan, squares()), "float-labels"),
        (NOISE, squares().astype(int) - 1, "negative-labels"),
        (NOISE, np.stack([squares()] * 3, axis=-1).astype(np.uint8), "rgb-labels"),
        (NOISE, np.zeros_like(squares()), "no-objects"),
        (NOISE, squares() > 0, "foreground-mask"),
        (NOISE, (squares() > 0) * np.uint8(255), "foreground-mask"),
        (NOISE, CLASSES, "semantic-labels"),
        (squares(), NOISE, "swapped"),
        (squares(), np.stack([NOISE] * 3, axis=-1), "swapped"),
        (squares(), NOISE / 255, "swapped"),
        (NOISE, NOISE[::-1], "intensity-labels"),
        (np.stack([NOISE] * 5), np.stack([squares()] * 4), "axis-mismatch"),
        (np.stack([NOISE] * 4, axis=-1).astype(np.uint16), squares(), "channels"),
        (np.zeros((2, 2, 2, 64, 80)), squares(), "unusable-file"),
        (NOISE.astype(complex), squares(), "unusable-file"),
        (np.full(NOISE.shape, np.nan), squares(), "constant-image"),
    ],
)
def test_errors(image: np.ndarray, labels: np.ndarray, code: str) -> None:
    report = check(image, labels)
    assert codes(report.errors) == {code}
    assert not report.ok
    with pytest.raises(DataError) as raised:
        report.raise_for_errors()
    assert raised.value.problems == tuple(str(problem) for problem in report.errors)
    for problem in report.errors:
        assert problem.where
        assert problem.found
        assert problem.fix


@pytest.mark.parametrize(
    ("image", "labels", "code", "found"),
    [
        (NOISE, squares().astype(np.float32), "float-labels", "used as integers"),
        (NOISE, with_piece(squares(), 2), "split-objects", "1 id is in several pieces"),
        (NOISE, with_piece(squares(), 9, side=4), "small-objects", "1 object below 25 px"),
        (NOISE, np.ones_like(squares()), "huge-object", "100% of the image"),
        (np.full_like(NOISE, 9), squares(), "constant-image", "constant image"),
        (np.full_like(NOISE, 255), squares(), "constant-image", "constant image"),
        (np.where(NOISE > 190, 255, NOISE).astype(np.uint8), squares(), "saturated", "saturated"),
        (BAD_NAN, squares(), "not-finite", "2 values are NaN or infinite"),
        (np.stack([NOISE] * 3), np.stack([squares()] * 3), "ambiguous-axes", "taken as ZYX"),
    ],
)
def test_warnings(image: np.ndarray, labels: np.ndarray, code: str, found: str) -> None:
    report = check(image, labels)
    assert report.ok
    assert code in codes(report.warnings)
    assert found in next(problem.found for problem in report.warnings if problem.code == code)


def test_small_images_are_padded_not_refused() -> None:
    report = check([NOISE, NOISE[::-1]], [squares(), squares()], patch_px=512)
    assert report.ok
    assert [str(problem) for problem in report.warnings] == [
        "image array 1 and 1 more: 64 x 80 px, smaller than the patch of 512 px, padded; "
        "nothing to do, or lower data.patch_px"
    ]


def test_the_same_image_twice_is_told() -> None:
    report = check([NOISE, NOISE[::-1], NOISE.copy()], [squares(), squares(), squares(2)])
    assert report.ok
    assert [(problem.code, problem.where, problem.found) for problem in report.warnings] == [
        ("same-image", "image array 3", "has the same pixels as image array 1")
    ]


def test_one_empty_label_image_among_others_is_a_warning() -> None:
    report = check([NOISE, NOISE[::-1]], [squares(), squares(0)])
    assert report.ok
    assert codes(report.warnings) == {"empty-labels"}


def test_large_and_unsigned_ids_are_fine() -> None:
    labels = squares().astype(np.uint64)
    labels[labels == 3] = 2**40
    assert check(NOISE, labels) == CheckReport()


def test_objects_of_a_stack_may_be_cut_twice_by_a_slice() -> None:
    labels = np.stack([with_piece(squares(), 2)] * 6)
    image = np.stack([NOISE] * 6)
    assert check(image, labels, axes="ZYX") == CheckReport()
    assert codes(check(image, labels, axes="TYX").warnings) == {"split-objects"}


def test_channels_mistaken_for_slices_say_how_to_tell() -> None:
    image = np.stack([NOISE] * 3)
    report = check(image, squares())
    assert codes(report.errors) == {"axis-mismatch"}
    assert "data.axes to CYX" in report.errors[0].fix
    assert check(image, squares(), axes="CYX") == CheckReport()
    wrong = check(image, squares(), axes="CYX", channels=(5,))
    assert codes(wrong.errors) == {"channels"}


def test_all_problems_of_files_at_once(tmp_path: Path) -> None:
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.mkdir()
    labels.mkdir()
    for name in ("a", "b", "c", "d"):
        tifffile.imwrite(images / f"{name}.tif", NOISE)
        tifffile.imwrite(labels / f"{name}.tif", squares())
    tifffile.imwrite(labels / "a.tif", squares()[:40])
    (labels / "b.tif").write_bytes(b"II*")
    (labels / "c.tif").unlink()
    Image.fromarray(squares().astype(np.uint8)).save(labels / "c.jpg")
    (images / "d.tif").rename(images / "e.tif")
    report = check(images, labels)
    assert codes(report.errors) == {
        "shape-mismatch",
        "unusable-file",
        "lossy-labels",
        "image-without-labels",
        "labels-without-image",
    }
    shown = next(str(problem) for problem in report.errors if problem.code == "shape-mismatch")
    assert shown == (
        "labels/a.tif: shape (40, 80) differs from images/a.tif (64, 80); crop or re-export the label image"
    )
    plain = report.to_dict()
    assert set(plain) == {"errors", "warnings"}
    assert plain["errors"][0]["message"] == str(report.errors[0])


def test_damage_that_shows_only_on_reading_is_reported(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", NOISE, compression="zlib")
    tifffile.imwrite(tmp_path / "b.tif", squares(), compression="zlib")
    content = bytearray((tmp_path / "b.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "b.tif") as tiff:
        start = tiff.pages[0].dataoffsets[0]
    content[start : start + 20] = b"\0" * 20
    (tmp_path / "b.tif").write_bytes(content)
    assert codes(check(tmp_path / "a.tif", tmp_path / "b.tif").errors) == {"unusable-file"}


def test_same_folder_for_images_and_labels(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", NOISE)
    assert "same-file" in codes(check(tmp_path, tmp_path).errors)


@needs_dev
@pytest.mark.parametrize("folder", FOLDERS)
def test_real_data_pass_and_swapped_ones_do_not(folder: str) -> None:
    images, labels = DEV / folder / "images", DEV / folder / "labels"
    report = check(images, labels, patch_px=512)
    assert report.ok
    assert codes(report.warnings) <= {"small-objects", "small-image", "split-objects"}
    swapped = check(labels, images, patch_px=512)
    assert codes(swapped.errors) == {"swapped"}
    assert len(swapped.errors) == 1


@needs_dev
@pytest.mark.parametrize("folder", ["fluo_u2os", "phase_t98g", "stack3d"])
def test_real_labels_as_a_mask(tmp_path: Path, folder: str) -> None:
    image, labels = (sorted((DEV / folder / part).iterdir())[0] for part in ("images", "labels"))
    tifffile.imwrite(tmp_path / "mask.tif", (tifffile.imread(labels) > 0).astype(np.uint8), photometric="minisblack")
    assert codes(check(image, tmp_path / "mask.tif").errors) == {"foreground-mask"}
