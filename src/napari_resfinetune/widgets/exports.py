"""Layers as files that the engine reads: copies, written beside the window's own thread, and only when they changed."""

from __future__ import annotations

import os
import re
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from qtpy.QtCore import QObject, QTimer

# Arrays up to this size are copied at once, so that nobody paints on them meanwhile.
COPIED_AT_ONCE_BYTES = 256_000_000
LOOK_MS = 10
KEPT_FILES = 3
Files = dict[int, str]


class Exporter(QObject):
    """Writes layers as TIFF files.

    Parameters
    ----------
    folder
        Where to.
    parent
        Qt parent.
    """

    def __init__(self, folder: Path, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._folder = folder
        # Of each layer the files used last, with a checksum; older ones are removed, as nobody reads them any more.
        self._known: dict[int, deque[tuple[int, Path]]] = {}
        self._names: dict[Path, str] = {}
        self._closed = False
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="export layers")
        self._waiting: list[tuple[Future[Files], Callable[[Files | Exception], None]]] = []
        self._timer = QTimer(self)
        self._timer.timeout.connect(self._look)

    def export(self, layers: Sequence[Any], then: Callable[[Files | Exception], None]) -> None:
        """Write layers; `then` gets the path of each by ``id(layer)``, or what went wrong, in this thread."""
        jobs = []
        for layer in layers:
            data = layer.data[0] if getattr(layer, "multiscale", False) else layer.data
            if isinstance(data, np.ndarray) and data.nbytes <= COPIED_AT_ONCE_BYTES:
                data = data.copy()
            jobs.append((id(layer), layer.name, data, axes_of(layer)))
        if self._closed:
            return
        self._waiting.append((self._pool.submit(self._write_all, jobs), then))
        self._timer.start(LOOK_MS)

    def in_words(self, text: str) -> str:
        """Return a message of the engine with names of layers in place of those of their copies."""
        for path, name in list(self._names.items()):
            for named in (str(path), f"{path.parent.name}/{path.name}"):
                text = text.replace(named, name)
            if "_" in path.stem and path.stem != name:  # by which sentences about splits call it
                text = name.join(re.split(rf"\b{re.escape(path.stem)}\b", text))
        return text

    def close(self) -> None:
        """Take no more work."""
        self._closed = True
        self._timer.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _look(self) -> None:
        while self._waiting and self._waiting[0][0].done():
            future, then = self._waiting.pop(0)
            error = future.exception()
            then(error if isinstance(error, Exception) else future.result())
        if not self._waiting:
            self._timer.stop()

    def _write_all(self, jobs: Sequence[tuple[int, str, Any, str]]) -> Files:
        return {number: self._write(number, name, np.asarray(data), axes) for number, name, data, axes in jobs}

    def _write(self, number: int, name: str, array: NDArray[Any], axes: str) -> str:
        if array.dtype == bool:
            array = array.astype(np.uint8)
        array = np.ascontiguousarray(array)
        print_ = zlib.crc32(array.view(np.uint8).reshape(-1).data, zlib.crc32(f"{name}{array.shape}{axes}".encode()))
        known = self._known.setdefault(number, deque())
        for entry in known:
            if entry[0] == print_ and entry[1].is_file():
                known.remove(entry)
                known.append(entry)  # the last one in use, as after an undo
                return str(entry[1])
        folder = self._folder / f"{number:x}-{print_:08x}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{file_stem(name)}.tif"
        partial = folder / ".partial.tif"
        colour = "C" in axes and array.shape[-1] in (3, 4)
        tifffile.imwrite(
            partial,
            array,
            photometric="rgb" if colour else "minisblack",
            metadata={"axes": axes.replace("C", "S" if colour else "C")},
            bigtiff=array.nbytes > 2**31,
        )
        os.replace(partial, path)
        self._names[path] = name
        known.append((print_, path))
        if len(known) > KEPT_FILES:
            old = known.popleft()[1]
            self._names.pop(old, None)
            shutil.rmtree(old.parent, ignore_errors=True)
        return str(path)


def axes_of(layer: Any) -> str:
    """Return a letter for each dimension of a layer's array; more than one beyond planes cannot be used."""
    channels = "C" if getattr(layer, "rgb", False) else ""
    return "QTZYX"[-layer.ndim :] + channels


def file_stem(name: str) -> str:
    """Make a file name of a layer's name."""
    kept = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name).strip("._")
    return kept[:80] or "layer"
