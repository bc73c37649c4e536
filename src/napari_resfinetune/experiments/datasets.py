"""Data of a study by name: found in a folder, and downloaded there only on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from napari_resfinetune.data.pairs import Pairs, find_pairs
from napari_resfinetune.errors import ConfigError, DataError

# The study trains on the first ten images, holds one out while training, and scores on the others.
COVID_IF_TRAINING, COVID_IF_HELD_OUT = 10, 11


def dataset_values(name: str, folder: Path, *, download: bool) -> tuple[dict[str, Any], list[str]]:
    """Return the ``data`` section of a run on a data set, and the files to score on.

    Covid IF holds immunofluorescence of cells with labels of all of them (Pape et al. 2021,
    doi 10.1002/bies.202000257), in HDF5 files that hold both images and labels.

    Parameters
    ----------
    name
        ``"covid_if"``.
    folder
        The data lies in, or goes to, a subfolder of that name.
    download
        Whether it may be fetched, through torch-em.

    Raises
    ------
    ConfigError
        When it is not there and may not be downloaded.
    DataError
        When the download failed or is not whole.
    """
    target = folder / name
    files = _files(target)
    if not files and not download:
        raise ConfigError(
            f"dataset {name}: no files in {target}; add --download to fetch it (Zenodo 5092850, about 0.3 GB), or put "
            "its gt_image_*.h5 there"
        )
    if not files:
        files = _download(target)
    if len(files) <= COVID_IF_HELD_OUT:
        raise DataError(
            f"{target}: found {len(files)} gt_image_*.h5, expected 49; delete the folder and download again"
        )
    training, held_out = files[:COVID_IF_TRAINING], files[COVID_IF_TRAINING:COVID_IF_HELD_OUT]
    data = {
        "images": training,
        "labels": training,
        "validation_images": held_out,
        "validation_labels": held_out,
        "image_key": "raw/serum_IgG/s0",
        "label_key": "labels/cells/s0",
    }
    return data, files[COVID_IF_HELD_OUT:]


def pairs_to_score(images: Any, labels: Any, **where: Any) -> Pairs:
    """Find images and their labels as `find_pairs` does, all of which can be used.

    Raises
    ------
    DataError
        When something is wrong with some of them, since fewer would be scored than was meant.
    """
    found = find_pairs(images, labels, **where)
    problems = [str(problem) for problem in found.problems if problem.level == "error"]
    if problems:
        raise DataError(*problems)
    return found


def _files(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.glob("gt_image_*.h5"))


def _download(target: Path) -> list[str]:
    from torch_em.data.datasets.light_microscopy.covid_if import get_covid_if_data

    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()  # the downloader takes any folder that exists for the data
    try:
        get_covid_if_data(target, download=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(
            f"{target}: covid_if cannot be downloaded ({type(error).__name__}); without network here, unpack "
            "covid-if-groundtruth.zip of Zenodo record 5092850 into it"
        ) from None
    return _files(target)
