"""A floor of the house imports only from floors below it; heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "napari_resfinetune"
FLOORS = (
    {"config", "errors", "events", "words"},
    {"data", "models"},
    {"planning"},
    {"training"},
    {"inference"},
    {"evaluation"},
    {"library"},
    {"reporting"},
    {"search"},
    {"experiments"},
    {"api", "cli", "engine", "__init__", "__main__"},
    {"widgets"},
)
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
STRANGERS = ({"data", "models"},)  # on one floor, and yet apart
GUI = {"napari", "qtpy", "PyQt5", "PyQt6", "PySide6", "magicgui", "superqt", "pyqtgraph"}
UPSTREAM = {"micro_sam", "segment_anything", "mobile_sam"}
UPSTREAM_FILE = "models/upstream.py"
LIGHT = {"config", "errors", "events", "words", "__init__", "widgets"}  # never torch, not even inside a function
TORCH = {"torch", "torchvision", "torch_em", "timm"}


def imports(path: Path, package_dir: Path, typing_too: bool = True) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything a file imports, wherever in the file it does so.

    Without `typing_too`, what stands under ``if TYPE_CHECKING`` is left out.
    """
    folder = [PACKAGE, *path.relative_to(package_dir).parent.parts]
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))))
    if not typing_too:
        blocks = [
            node for node in nodes if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        ]
        typing_only = {id(inner) for block in blocks for statement in block.body for inner in ast.walk(statement)}
        nodes = [node for node in nodes if id(node) not in typing_only]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from package import name`: name may be a module of ours.
            names = [alias.name for alias in node.names] if base == PACKAGE else [""]
            yield from ((node.lineno, f"{base}.{name}".rstrip(".")) for name in names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                name = f"{'.'.join(folder)}{first.value}" if first.value.startswith(".") else first.value
                yield node.lineno, name


def violations(package_dir: Path) -> list[str]:
    """One line per import that breaks a rule of the house."""
    found = []
    for path in sorted(package_dir.rglob("*.py")):
        inside = path.relative_to(package_dir)
        here = inside.parts[0].removesuffix(".py")
        if here not in LEVEL:
            found.append(f"{inside.as_posix()}: is on no floor")
            continue
        for line, name in imports(path, package_dir):
            found += [f"{inside.as_posix()}:{line}: {what}" for what in judge(here, name)]
        for line, name in imports(path, package_dir, typing_too=False):
            # A class may be named in an annotation anywhere in models/; what runs is fetched in one file.
            if here == "models" and inside.as_posix() != UPSTREAM_FILE and name.split(".")[0] in UPSTREAM:
                found.append(f"{inside.as_posix()}:{line}: {name.split('.')[0]} outside {UPSTREAM_FILE}")
    return found


def judge(here: str, name: str) -> Iterator[str]:
    """What is wrong with floor `here` importing `name`."""
    root, _, rest = name.partition(".")
    if root == PACKAGE:
        other = rest.partition(".")[0] or "__init__"
        # The package itself only hands on what api holds, apart from names such as __version__.
        if re.fullmatch(r"__\w+__", rest):
            return
        if LEVEL.get(other, len(FLOORS)) > LEVEL[here]:
            yield f"{here} imports {other}, a floor above it"
        if here != other and any({here, other} <= pair for pair in STRANGERS):
            yield f"{here} imports {other}, which it must not know"
    if root in GUI and here != "widgets":
        yield f"{root} outside widgets/"
    if root in UPSTREAM and here != "models":
        yield f"{root} outside models/"
    if root in TORCH and here in LIGHT:
        yield f"{root} in {here}"


def test_the_house_keeps_its_floors():
    assert violations(ROOT / "src" / PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "code", "found"),
    [
        ("config/schema.py", "from napari_resfinetune.data import images", "config imports data, a floor above it"),
        ("data/images.py", "from ..models import registry", "data imports models, which it must not know"),
        ("models/registry.py", "import napari_resfinetune.data", "models imports data, which it must not know"),
        ("planning/probe.py", "def f():\n    from napari_resfinetune import training", "planning imports training"),
        ("training/loop.py", "from napari_resfinetune import train", "training imports train, a floor above it"),
        ("training/loop.py", "import napari_resfinetune", "training imports __init__, a floor above it"),
        (
            "inference/tiles.py",
            "import importlib\nimportlib.import_module('napari_resfinetune.api')",
            "inference imports",
        ),
        ("api.py", "from napari_resfinetune.widgets.finetune import FinetuneWidget", "api imports widgets"),
        ("cli.py", "import napari.layers", "napari outside widgets/"),
        ("data/images.py", "from qtpy.QtCore import Qt", "qtpy outside widgets/"),
        ("evaluation/scores.py", "from micro_sam.evaluation import x", "micro_sam outside models/"),
        (
            "inference/tiles.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import micro_sam",
            "micro_sam outside models/",
        ),
        ("models/registry.py", "import segment_anything", "segment_anything outside models/upstream.py"),
        ("widgets/finetune.py", "def f():\n    import torch", "torch in widgets"),
        ("helpers.py", "", "is on no floor"),
    ],
)
def test_a_planted_violation_is_noticed(tmp_path, file, code, found):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(code, encoding="utf-8")
    (message,) = violations(tmp_path)
    assert message.startswith(file)
    assert found in message


@pytest.mark.parametrize(
    ("file", "code"),
    [
        (
            "models/upstream.py",
            "from micro_sam.util import get_sam_model\nfrom napari_resfinetune.errors import ModelError",
        ),
        ("models/decoder.py", "import typing\nif typing.TYPE_CHECKING:\n    from segment_anything.modeling import Sam"),
        ("training/loop.py", "from napari_resfinetune import __version__, errors\nfrom . import steps\nimport torch"),
        ("widgets/finetune.py", "from qtpy.QtWidgets import QWidget\nimport napari_resfinetune.api"),
        ("__init__.py", "def __getattr__(name):\n    from napari_resfinetune import api"),
    ],
)
def test_what_the_floors_allow(tmp_path, file, code):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(code, encoding="utf-8")
    assert violations(tmp_path) == []


def plain(distribution: str) -> str:
    """A distribution's name as the registry compares it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_every_imported_package_is_a_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["qlora"], *extras["dask"]]
    declared = {plain(re.split(r"[\s<>=!~;\[]", text, maxsplit=1)[0]) for text in asked}
    distributions = importlib.metadata.packages_distributions()
    missing = {
        f"{path.relative_to(ROOT).as_posix()}:{line}: {root}"
        for path in (ROOT / "src").rglob("*.py")
        for line, name in imports(path, ROOT / "src" / PACKAGE)
        if (root := name.split(".")[0]) not in sys.stdlib_module_names and root != PACKAGE
        if declared.isdisjoint(plain(name) for name in [root, *distributions.get(root, [])])
    }
    assert missing == set()
