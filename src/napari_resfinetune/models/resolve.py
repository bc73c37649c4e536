"""From what a person types as ``model`` to files on this machine, downloading them when that is what it takes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from napari_resfinetune.errors import ModelError
from napari_resfinetune.models import upstream
from napari_resfinetune.models.adapter_files import ORIGIN, is_adapter, read_origin
from napari_resfinetune.models.names import (
    ARCHITECTURES,
    KNOWN_MODELS,
    RANDOM_NAMES,
    RANDOM_PREFIX,
    decoder_path_in_cache,
    known_model,
    model_path_in_cache,
    near_names,
    starter_path,
)
from napari_resfinetune.models.weights import load_state

_log = logging.getLogger(__name__)

# Files that may be models.
MODEL_SUFFIXES = frozenset({".pt", ".pth", ".safetensors", ".ckpt", ".zip"})


@dataclass(frozen=True)
class ModelLocation:
    """Where a model's weights are.

    Attributes
    ----------
    path
        The checkpoint, or `None` for freshly initialised weights.
    decoder_path
        The decoder's own file, if it is not inside the checkpoint.
    name
        The known name, the run folder's name, or the file's stem.
    architecture
        ``"vit_t"``, ``"vit_b"``, ``"vit_l"`` or ``"vit_h"``.
    adapter, base
        The folder of an adapter, and the model that it changes; `path` is then that model's.
    """

    path: Path | None
    decoder_path: Path | None
    name: str
    architecture: str
    adapter: Path | None = None
    base: ModelLocation | None = None


def resolve_model(model: str | Path, *, above: tuple[Path, ...] = ()) -> ModelLocation:
    """Find a model, and download it through micro-sam's registry if it is a known name that is not here yet.

    Parameters
    ----------
    model
        ``"starter"``, which comes with this package; one of micro-sam's names; ``"random:vit_t"`` (or another
        architecture) for freshly initialised weights; the path of a checkpoint or of a bioimage.io package; a run
        folder, whose ``model.pt`` is meant; one of its checkpoints; or the folder of an adapter, whose base is found by
        the name that the adapter gives.
    above
        Adapters whose base is being looked for.

    Raises
    ------
    ModelError
        For an unknown name, a path with no model, or a download that failed.
    """
    if isinstance(model, str):
        known = known_model(model)
        if known is not None:
            path, decoder_path = (starter_path(), None) if known.embedded else _download(known.name)
            return ModelLocation(path, decoder_path, known.name, known.architecture)
        if model.startswith(RANDOM_PREFIX):
            architecture = model.removeprefix(RANDOM_PREFIX)
            if architecture not in ARCHITECTURES:
                raise ModelError(f"model '{model}': unknown architecture; expected one of {', '.join(RANDOM_NAMES)}")
            return ModelLocation(None, None, model, architecture)
        if not Path(model).expanduser().exists() and not _looks_like_path(model):
            raise ModelError(_unknown(model))
    path = Path(model).expanduser()
    if path.is_dir() and is_adapter(path):
        return _with_base(path, above)
    if (path / "state.json").is_file():  # checkpoints/best and the like
        weights, decoder = path / "model.safetensors", path / "instance_decoder.safetensors"
        return ModelLocation(
            weights, decoder if decoder.is_file() else None, path.resolve().name, load_state(weights).architecture
        )
    name = path.resolve().name if path.is_dir() else path.stem
    file = _in_run_folder(path) if path.is_dir() else path
    return ModelLocation(file, None, name, load_state(file).architecture)


def _with_base(folder: Path, above: tuple[Path, ...]) -> ModelLocation:
    origin = read_origin(folder)
    if folder.resolve() in above:
        raise ModelError(f"{folder}: is its own base; write the model that it was trained on into {folder / ORIGIN}")
    try:
        base = resolve_model(origin.base_model, above=(*above, folder.resolve()))
    except ModelError as error:
        raise ModelError(
            f"{folder}: an adapter for {origin.base_model}, which is not here ({error}); put it there, or write where "
            f"it is into base_model of {folder / ORIGIN}"
        ) from None
    return ModelLocation(base.path, base.decoder_path, folder.resolve().name, base.architecture, folder, base)


def _in_run_folder(folder: Path) -> Path:
    file = folder / "model.pt"
    if file.is_file():
        return file
    if (folder / "checkpoints" / "best").exists() or (folder / "checkpoints" / "latest").exists():
        raise ModelError(
            f"{folder}: no model.pt in it, though checkpoints; 'resfinetune resume {folder}' finishes the run, or "
            "writes it again"
        )
    raise ModelError(f"{folder}: no model.pt in it; expected a run folder or the path of a checkpoint file")


def _looks_like_path(model: str) -> bool:
    return "/" in model or "\\" in model or Path(model).suffix.lower() in MODEL_SUFFIXES


def _unknown(model: str) -> str:
    near = near_names(model)
    names = ", ".join(known.name for known in KNOWN_MODELS)
    hint = f"did you mean {' or '.join(repr(name) for name in near)}?" if near else f"the names are {names};"
    return f"model '{model}': not a known name and no such file; {hint} or give the path of a checkpoint or run folder"


def _download(name: str) -> tuple[Path, Path | None]:
    registry: Any = upstream.models()
    decoder_path = decoder_path_in_cache(name)
    wanted = [name] if decoder_path is None else [name, f"{name}_decoder"]
    for position, file in enumerate(wanted):
        try:
            registry.fetch(file, progressbar=True)
        except (
            OSError,
            ValueError,
            RuntimeError,
        ) as error:  # requests' errors are OSErrors, a wrong checksum a ValueError
            _log.debug("download of %s failed", file, exc_info=True)
            raise ModelError(_say_download(name, wanted[position:], registry, error)) from None
    return model_path_in_cache(name), decoder_path


def _say_download(name: str, missing: list[str], registry: Any, error: Exception) -> str:
    folder = model_path_in_cache(name).parent
    steps = " and ".join(f"download {registry.get_url(file)} and save it as {folder / file}" for file in missing)
    stale = " (the file that is there is incomplete or of another version)" if (folder / missing[0]).exists() else ""
    return (
        f"model '{name}': cannot be downloaded{stale}: {_reason(error)}. Without network here: {steps} (no suffix; the "
        "environment variable MICROSAM_CACHEDIR moves the folder above 'models'), or give the path of any checkpoint "
        "on this machine as model, or model 'starter', which comes with this package"
    )


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "resolve" in text or "Max retries" in text or "timed out" in text or "Connection" in type(error).__name__:
        return "the server cannot be reached"
    return text[:200] or type(error).__name__
