"""The models that have a name: micro-sam's and the one in this package, in words, without loading any of them."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = ("vit_t", "vit_b", "vit_l", "vit_h")


@dataclass(frozen=True)
class KnownModel:
    """A model that micro-sam can download, or the one that comes with this package.

    Attributes
    ----------
    name
        What goes into ``model:``.
    architecture
        ``"vit_t"``, ``"vit_b"``, ``"vit_l"`` or ``"vit_h"``, from small to large.
    advice
        When to start from it, in one line.
    has_decoder
        Whether it comes with a decoder for automatic instance segmentation.
    size_mb
        Size of the download, about, in MB.
    embedded
        Whether it comes with this package, and needs no network.
    """

    name: str
    architecture: str
    advice: str
    has_decoder: bool
    size_mb: int
    embedded: bool = False


STARTER = "starter"
KNOWN_MODELS: tuple[KnownModel, ...] = (
    KnownModel(
        STARTER,
        "vit_t",
        "comes with this package and needs no network; made from generated images, so prefer an _lm model if you can",
        True,
        40,
        embedded=True,
    ),
    KnownModel("vit_t", "vit_t", "original MobileSAM; the smallest, for natural images and first tries", False, 41),
    KnownModel("vit_b", "vit_b", "original SAM; when your images are like none of the groups below", False, 375),
    KnownModel("vit_l", "vit_l", "original SAM, large; like vit_b with more memory to spend", False, 1250),
    KnownModel("vit_h", "vit_h", "original SAM, huge; rarely worth its memory for finetuning", False, 2565),
    KnownModel("vit_t_lm", "vit_t", "cells and nuclei in light microscopy, on a CPU or a small GPU", True, 80),
    KnownModel("vit_b_lm", "vit_b", "cells and nuclei in light microscopy; the usual start", True, 415),
    KnownModel("vit_l_lm", "vit_l", "cells and nuclei in light microscopy, with more memory to spend", True, 1290),
    KnownModel("vit_t_em_organelles", "vit_t", "mitochondria, nuclei and the like in EM, on a small machine", True, 80),
    KnownModel("vit_b_em_organelles", "vit_b", "mitochondria, nuclei and other compact organelles in EM", True, 415),
    KnownModel("vit_l_em_organelles", "vit_l", "compact organelles in EM, with more memory to spend", True, 1290),
    KnownModel("vit_b_histopathology", "vit_b", "nuclei in stained tissue sections (H&E, RGB)", True, 415),
    KnownModel(
        "vit_l_histopathology", "vit_l", "nuclei in stained tissue sections, with more memory to spend", True, 1290
    ),
    KnownModel("vit_h_histopathology", "vit_h", "nuclei in stained tissue sections, on a large GPU", True, 2605),
    KnownModel("vit_b_medical_imaging", "vit_b", "organs and lesions in radiology and other medical images", True, 415),
)
_BY_NAME = {known.name: known for known in KNOWN_MODELS}
RANDOM_PREFIX = "random:"
RANDOM_NAMES = tuple(RANDOM_PREFIX + architecture for architecture in ARCHITECTURES)


def known_model(name: str) -> KnownModel | None:
    """Return what is known about a model name, or `None`."""
    return _BY_NAME.get(name)


def near_names(name: str) -> list[str]:
    """Return up to three known names that look like `name`, best first."""
    names = [*_BY_NAME, *RANDOM_NAMES]
    return difflib.get_close_matches(name.strip().lower().replace("-", "_"), names, n=3, cutoff=0.5)


def models_folder() -> Path:
    """Return the folder where micro-sam keeps downloaded models (``MICROSAM_CACHEDIR`` moves it)."""
    import pooch

    return Path(os.environ.get("MICROSAM_CACHEDIR") or pooch.os_cache("micro_sam")) / "models"


def starter_path() -> Path:
    """Return where the weights of ``"starter"`` lie in this package."""
    return Path(__file__).with_name("starter.safetensors")


def model_path_in_cache(name: str) -> Path:
    """Return where the download of a known model lies or will lie. The file has no suffix."""
    return models_folder() / name


def decoder_path_in_cache(name: str) -> Path | None:
    """Return where the decoder of a known model lies or will lie, or `None` if it has none."""
    known = _BY_NAME.get(name)
    return models_folder() / f"{name}_decoder" if known and known.has_decoder else None


def is_downloaded(name: str) -> bool:
    """Whether a known model (and its decoder, if it has one) is on this machine. Contents are not checked."""
    known = _BY_NAME.get(name)
    if known is not None and known.embedded:
        return True
    paths = (model_path_in_cache(name), decoder_path_in_cache(name))
    return known is not None and all(path is None or path.is_file() for path in paths)
