"""What the frozen part of the image encoder computes, kept on disk, so that it is computed once for each patch.

One folder holds a subfolder for each frozen part and way of preprocessing, and in it a zarr array for each patch, named
by the hash of its pixels. So nothing stale can be read: other weights, pixels or settings have another name. An array
is written beside its name and then renamed, and ends with a checksum; what is missing or damaged is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import zarr
from torch import Tensor, nn
from zarr.codecs import BloscCodec, Crc32cCodec

from napari_resfinetune.models.encoder import Unit
from napari_resfinetune.models.weights import weights_hash
from napari_resfinetune.planning.memory import GB

logger = logging.getLogger(__name__)

FORMAT = 1
# Left free for checkpoints and for everybody else on the machine.
RESERVE_GB = 2.0
UNUSED_SECONDS = 3600.0
SUBFOLDER = "resfinetune-features"
_PART_NAME = re.compile("[0-9a-f]{32}")
_LARGEST = float(np.finfo(np.float16).max)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


class FeatureCache:
    """Tokens by the pixels that they come from. It never raises: without room or access it keeps nothing.

    Parameters
    ----------
    folder
        Where; made when it is first needed. Several runs may share it, and other files in it are left alone.
    part
        Name of the frozen part and preprocessing, from `name_of_part`.
    max_gb
        Most room that all parts take together. Parts that nobody has used for an hour make room, the oldest first.
    say
        Told once when nothing more can be kept.
    """

    def __init__(self, folder: Path, part: str, max_gb: float, say: Callable[[str], None]) -> None:
        self.folder = folder / SUBFOLDER
        self.part = self.folder / part
        self.max_gb = max_gb
        self.hits = self.misses = 0
        self._say = say
        self._writes = True
        self._touched = 0.0
        _remove_abandoned(self.part)
        self._used_gb = _size_gb(self.folder)

    @property
    def room_gb(self) -> float:
        """What may still be written: inside the bound and on the disk."""
        free_gb = self.max_gb - self._used_gb
        with contextlib.suppress(OSError):
            free_gb = min(free_gb, shutil.disk_usage(_existing(self.folder)).free / GB - RESERVE_GB)
        return free_gb

    def get(self, pixels: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """Return the tokens of a patch, as they come out of 16 bit whether they were here or not.

        Parameters
        ----------
        pixels
            The patch, by which its tokens are found.
        compute
            Called when they are not here.
        """
        entry = self.part / _hash_of(pixels)
        kept = _read(entry)
        if kept is not None:
            self.hits += 1
            self._touch()
            return kept
        self.misses += 1
        tokens = compute().detach()
        if not bool((tokens.abs() <= _LARGEST).all()):  # also false for what is not a number
            return tokens
        rounded = tokens.to(torch.float16)
        if self._writes and self._has_room(rounded.nbytes / GB):
            self._keep(entry, rounded, tokens.dtype)
        return rounded.to(tokens.dtype).contiguous()  # as it comes from disk, so that not even rounding differs

    def _keep(self, entry: Path, tokens: Tensor, dtype: torch.dtype) -> None:
        new = self.part / f".{uuid.uuid4().hex}"
        try:
            self.part.mkdir(parents=True, exist_ok=True)
            shape = tuple(tokens.shape)
            array = zarr.create_array(
                str(new),
                shape=shape,
                chunks=shape,
                dtype="float16",
                zarr_format=3,
                compressors=[BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"), Crc32cCodec()],
                fill_value=float("nan"),
                attributes={"dtype": str(dtype).removeprefix("torch.")},
            )
            array[...] = tokens.cpu().numpy()
            if _read(entry) is None:  # else another run was quicker
                shutil.rmtree(entry, ignore_errors=True)
                os.replace(new, entry)
                self._used_gb += _size_gb(entry)
        except Exception as error:  # zarr and its codecs have errors of many kinds
            # A folder that is gone was removed by somebody: the next entry makes it anew.
            if not isinstance(error, FileNotFoundError) and not os.path.isdir(entry):
                self._stop(f"{self.folder}: cannot be written ({getattr(error, 'strerror', None) or error})")
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def _has_room(self, size_gb: float) -> bool:
        if self.room_gb < size_gb:
            self._used_gb = _size_gb(self.folder)  # other runs write and remove too
        while self.room_gb < size_gb:
            if not self._drop_oldest_unused_part():
                self._stop(
                    f"{self.folder}: full; it may take {self.max_gb:g} GB (resources.feature_cache_gb) and leaves "
                    f"{RESERVE_GB:g} GB of its disk free"
                )
                return False
        return True

    def _stop(self, why: str) -> None:
        self._writes = False
        self._say(f"{why}; features that are not kept yet are computed in every epoch")

    def _touch(self) -> None:
        """Leave a trace that this part is in use, now and then."""
        if time.monotonic() - self._touched > 60:
            self._touched = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(self.part)

    def _drop_oldest_unused_part(self) -> bool:
        others = [path for path in _folders(self.folder) if path != self.part and _PART_NAME.fullmatch(path.name)]
        unused = [path for path in others if time.time() - _last_used(path) > UNUSED_SECONDS]
        if not unused:
            return False
        oldest = min(unused, key=_last_used)
        shutil.rmtree(oldest, ignore_errors=True)
        self._used_gb = _size_gb(self.folder)
        return not oldest.exists()


def name_of_part(units: Sequence[Unit], **preprocessing: object) -> str:
    """Return the name of a frozen part: a hash of its weights and of how images are brought to it.

    Parameters
    ----------
    units
        The frozen units of the image encoder.
    **preprocessing
        Plain values that change what the units compute for the same pixels.
    """
    state: dict[str, Tensor] = {}
    for index, unit in enumerate(units):
        for number, part in enumerate(unit.parts):
            prefix = f"{index}.{number}"
            if isinstance(part, nn.Module):
                state |= {f"{prefix}.{name}": tensor for name, tensor in part.state_dict().items()}
            else:
                state[prefix] = part
    described = json.dumps([FORMAT, weights_hash(state), preprocessing], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:32]


def _hash_of(pixels: Tensor) -> str:
    digest = hashlib.blake2b(f"{pixels.dtype} {tuple(pixels.shape)}".encode(), digest_size=20)
    digest.update(pixels.contiguous().numpy().data)
    return digest.hexdigest()


def _read(entry: Path) -> Tensor | None:
    if not os.path.isdir(entry):
        return None
    try:
        array = zarr.open_array(str(entry), mode="r", zarr_format=3)
        tokens = np.asarray(array[...])
        # Zarr fills in for a chunk that is gone; what is kept has no such values.
        if tokens.dtype != np.float16 or tokens.size == 0 or np.isnan(tokens.flat[0]):
            return None
        return torch.from_numpy(tokens).to(_DTYPES[str(array.attrs["dtype"])])
    except Exception:  # whatever a damaged file makes zarr, its codecs or json say
        logger.debug("%s cannot be read", entry, exc_info=True)
        return None


def _remove_abandoned(part: Path) -> None:
    """Remove what a crash left half-written."""
    for path in _folders(part):
        if path.name.startswith(".") and time.time() - _last_used(path) > UNUSED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _folders(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if os.path.isdir(path)]
    except OSError:
        return []


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _size_gb(folder: Path) -> float:
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except OSError:  # another run removed it
                continue
    return total / GB


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
