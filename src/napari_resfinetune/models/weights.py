"""Weights from files and back: never unpickled, always whole.

Nothing here runs code that a file brings: ``torch.load(weights_only=True)`` or safetensors. Files are written beside
their name and then renamed, so that no crash leaves half of one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from napari_resfinetune.errors import ModelError
from napari_resfinetune.models.lora import without_lora
from napari_resfinetune.models.packages import is_package, unpacked_weights

if TYPE_CHECKING:
    from napari_resfinetune.models.build import SamModel

State = Mapping[str, torch.Tensor]

_WIDTHS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
_EXPECTED = "expected tensors with names such as 'image_encoder.patch_embed.proj.weight'"
_HOW_TO_EXPORT = (
    "in the environment where it was trained, write plain weights with "
    "micro_sam.util.export_custom_sam_model(checkpoint_path, model_type, save_path, with_segmentation_decoder=True)"
)


@dataclass(frozen=True)
class Weights:
    """What a checkpoint holds.

    Attributes
    ----------
    sam_state
        Tensors under the names of SAM (``vit_t``: of MobileSAM). They may be mapped from the file: copy before the
        file is replaced.
    decoder_state
        Tensors of the decoder for instance segmentation, or `None`.
    architecture
        ``"vit_t"``, ``"vit_b"``, ``"vit_l"`` or ``"vit_h"``, found from the shapes.
    meta
        What `save_model` was given; empty for files from elsewhere.
    """

    sam_state: State
    decoder_state: State | None
    architecture: str
    meta: Mapping[str, Any] = field(default_factory=dict)


def load_state(path: str | Path) -> Weights:
    """Read a checkpoint: SAM's own, micro-sam's (with or without decoder), torch-em's, or one of ours.

    Parameters
    ----------
    path
        A ``.safetensors`` file, or any other file written by ``torch.save``.

    Raises
    ------
    ModelError
        When it is missing, incomplete, brings code, is no checkpoint of SAM, or of an unknown architecture.
    """
    path = Path(path)
    content = _read(path)
    nested = content.get("model_state")
    tensors = nested if _is_state(nested) else {k: v for k, v in content.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise ModelError(f"{path}: no weights at its top (found {_few(content)}); {_EXPECTED}")
    prefix = "instance_decoder."
    decoder = content.get("decoder_state") or {
        k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)
    }
    if decoder and not _is_state(decoder):
        raise ModelError(f"{path}: its decoder_state is not a set of tensors; export the checkpoint again")
    state = OrderedDict((k.removeprefix("sam."), v) for k, v in tensors.items() if not k.startswith(prefix))
    for name, tensor in (*state.items(), *(decoder or {}).items()):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ModelError(f"{path}: its weights are not all numbers ({name}); training failed, take an earlier one")
    return Weights(state, decoder or None, find_architecture(state, path), _checked_meta(content, path))


def _checked_meta(content: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Return what a checkpoint of ours says of itself, which decides how images are shown to the model."""
    meta = content.get("resfinetune", {})
    meta = meta if isinstance(meta, dict) else {"": meta}
    known = {
        "patch_px": lambda value: type(value) is int and value > 0,
        "percentiles": lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)),
        "channels": lambda value: isinstance(value, list) and all(type(each) is int for each in value),
        "": lambda value: False,
    }
    wrong = [name for name, fits in known.items() if name in meta and not fits(meta[name])]
    if wrong:
        found = ", ".join(f"{name or 'all of it'}: {str(meta[name])[:40]!r}" for name in wrong)
        raise ModelError(f"{path}: what it says of itself cannot be used ({found}); export it again")
    return meta


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 100


def load_decoder_state(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a file that holds nothing but the decoder, as micro-sam downloads them.

    Raises
    ------
    ModelError
        When it cannot be read or holds something else.
    """
    path = Path(path)
    content = _read(path)
    state = content.get("decoder_state", content)
    if not _is_state(state) or "out_conv.weight" not in state:
        raise ModelError(f"{path}: no decoder for instance segmentation in it; delete the file to download it again")
    return dict(state)


def find_architecture(state: State, where: str | Path) -> str:
    """Return the architecture that a SAM state dict is of, from the shapes of its first layers.

    Raises
    ------
    ModelError
        When it is none that we know; `where` is named in the message.
    """
    patches = state.get("image_encoder.patch_embed.proj.weight")
    if patches is not None and patches.shape[0] in _WIDTHS:
        return _WIDTHS[patches.shape[0]]
    tiny = state.get("image_encoder.patch_embed.seq.2.c.weight")
    if tiny is not None and tiny.shape[0] == 64:
        return "vit_t"
    if "out_conv.weight" in state and not any(name.startswith("encoder.") for name in state):
        raise ModelError(f"{where}: holds only a decoder; give the checkpoint that also has the image encoder")
    if patches is not None or tiny is not None:
        width = (patches if patches is not None else tiny).shape[0]  # type: ignore[union-attr]
        raise ModelError(f"{where}: image encoder of width {width}; expected vit_t, vit_b, vit_l or vit_h of SAM 1")
    raise ModelError(f"{where}: not a Segment Anything checkpoint (found {_few(state)}); {_EXPECTED}")


def check_state(state: State, expected: State, where: str | Path) -> None:
    """Compare names and shapes with those of the module that shall take them.

    Raises
    ------
    ModelError
        With how many are missing, unexpected or of another shape, and the first few of each.
    """
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    misshapen = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    found = [
        f"{what} {_few(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if found:
        raise ModelError(
            f"{where}: tensors do not fit the model: {'; '.join(found)}; merge adapters and use SAM's standard parts "
            "before giving the checkpoint"
        )


def save_model(path: str | Path, model: SamModel, meta: Mapping[str, Any] | None = None) -> None:
    """Write a model as micro-sam reads it.

    Parameters
    ----------
    path
        The file to write; replaced as a whole if it is there.
    model
        Its `sam`, with adapters merged, goes under ``"model_state"``, its `instance_decoder`, if any, under
        ``"decoder_state"``.
    meta
        Plain values (text, numbers, lists, dicts) kept under ``"resfinetune"``.

    Raises
    ------
    ModelError
        When the file cannot be written.
    """
    content: dict[str, Any] = {"model_state": _on_cpu(without_lora(model.sam))}
    if model.instance_decoder is not None:
        content["decoder_state"] = _on_cpu(model.instance_decoder)
    content["resfinetune"] = json.loads(json.dumps(dict(meta or {})))
    _write(Path(path), lambda temporary: torch.save(content, temporary))


def save_safetensors(path: str | Path, tensors: State) -> None:
    """Write tensors by name, whole or not at all.

    Raises
    ------
    ModelError
        When the file cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _write(Path(path), lambda temporary: save_file(plain, temporary))


def load_safetensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Read what `save_safetensors` wrote, onto the CPU.

    Raises
    ------
    ModelError
        When it is missing, incomplete or something else.
    """
    path = Path(path)
    _must_be_file(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{path}: not a whole safetensors file ({_first_line(error)}); copy or write it again"
        ) from None


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Hand out an empty folder to write to, and put it in the place of `folder` when all went well."""
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        replace_folder(folder, new)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def replace_folder(folder: Path, new: Path) -> None:
    """Put `new` in the place of `folder`. At every moment one of ``folder`` and ``.folder.old`` is whole."""
    old = old_folder(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def old_folder(folder: Path) -> Path:
    """Return where `replace_folder` keeps what was there until the new one is in its place."""
    return folder.with_name(f".{folder.name}.old")


def weights_hash(state: State) -> str:
    """Return the sha256 of names, types, shapes and bytes, the same in whatever order the tensors come."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    _must_be_file(path)
    if path.suffix.lower() == ".safetensors":
        return dict(load_safetensors(path))
    if is_package(path):
        with unpacked_weights(path) as (weights, meta):
            return {**_read_torch(weights, path, mapped=False), **({"resfinetune": meta} if meta else {})}
    return _read_torch(path, path, mapped=zipfile.is_zipfile(path))


def _read_torch(file: Path, path: Path, *, mapped: bool) -> dict[str, Any]:
    """Read what `torch.save` wrote into `file`; messages name `path`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on old pickle protocols; what matters is raised
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ModelError(_say_unpickling(file, path, str(error))) from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from None
    except (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(
            f"{path}: not a whole checkpoint ({file.stat().st_size / 1e6:.1f} MB{_detail(error)}); expected a "
            "file written by torch.save; copy or download it again"
        ) from None
    if isinstance(content, dict) and all(isinstance(key, str) for key in content):
        return dict(content)
    raise ModelError(f"{path}: holds a {type(content).__name__}; expected weights by name, as written by torch.save")


def _must_be_file(path: Path) -> None:
    if path.is_dir():
        raise ModelError(f"{path}: is a folder; expected a checkpoint file")
    if not path.is_file():
        raise ModelError(f"{path}: no such file; give the path of a checkpoint (.pt, .pth or .safetensors)")


def _say_unpickling(file: Path, path: Path, message: str) -> str:
    wanted = re.search(r"GLOBAL:? ([\w.]+)", message)
    with file.open("rb") as content:
        pickled = zipfile.is_zipfile(file) or content.read(1) == pickle.PROTO
    if wanted or (pickled and ("nsupported operand" in message or "nsupported class" in message)):
        what = f" (it wants {wanted[1]})" if wanted else ""
        return f"{path}: would run code when opened{what}, so it was not opened; if you trust it, {_HOW_TO_EXPORT}"
    return f"{path}: not a checkpoint; expected a file written by torch.save or a .safetensors file"


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(entry, torch.Tensor) for entry in value.values())


def _few(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:3])
    return f"{len(names)}: {shown}{', ...' if len(names) > 3 else ''}"


def _on_cpu(module: nn.Module) -> OrderedDict[str, torch.Tensor]:
    return OrderedDict((name, tensor.detach().cpu().contiguous()) for name, tensor in module.state_dict().items())


def _write(path: Path, save: Callable[[Path], None]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be written ({_reason(error)}); free space or choose another folder") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # What torch's writer says is about its own source code.
    return "the disk is full, or takes no files" if "inline_container" in str(error) else _first_line(error)


def _detail(error: Exception) -> str:
    """Return what an error says, behind a comma, unless it says nothing."""
    said = _first_line(error)
    return "" if said == type(error).__name__ else f", {said}"


def _first_line(error: Exception) -> str:
    said = str(error).partition("\n")[0].partition(". ")[0].strip()
    return said if any(character.isalpha() for character in said) else type(error).__name__
