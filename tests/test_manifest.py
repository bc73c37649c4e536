"""napari.yaml: right in the source tree, in an editable install and in a wheel."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from npe2 import PluginManifest

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTION = "napari-resfinetune"


def contributed_commands(manifest: PluginManifest) -> set[str]:
    """Ids of all commands that some contribution refers to."""
    contributions = manifest.contributions
    used = [*(contributions.widgets or []), *(contributions.readers or []), *(contributions.writers or [])]
    used += [sample for sample in contributions.sample_data or [] if hasattr(sample, "command")]
    used += [item for items in (contributions.menus or {}).values() for item in items if hasattr(item, "command")]
    return {contribution.command for contribution in used}


def test_name_is_the_distribution(package_manifest):
    assert package_manifest.name == DISTRIBUTION == importlib.metadata.metadata(DISTRIBUTION)["Name"]


def test_entry_point_finds_the_installed_manifest(package_manifest):
    assert PluginManifest.from_distribution(DISTRIBUTION).contributions == package_manifest.contributions


def test_every_command_resolves(package_manifest):
    for command in package_manifest.contributions.commands:
        module, name = command.python_name.split(":")
        assert callable(getattr(importlib.import_module(module), name)), command.id
        assert command.id.startswith(f"{DISTRIBUTION}."), command.id
        assert "-" not in command.id.removeprefix(f"{DISTRIBUTION}."), command.id


def test_every_contributed_command_is_declared(package_manifest):
    declared = {command.id for command in package_manifest.contributions.commands}
    assert contributed_commands(package_manifest) == declared


def test_top_of_the_repository_leads_to_the_same_file():
    top, inside = ROOT / "napari.yaml", ROOT / "src" / "napari_resfinetune" / "napari.yaml"
    if top.is_symlink():
        assert top.samefile(inside)
    else:  # git on Windows writes a link as a file that holds its target
        assert top.read_text(encoding="utf-8").strip() == inside.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    return folder / "unpacked"


def test_wheel_holds_manifest_and_type_marker(unpacked_wheel):
    package = unpacked_wheel / "napari_resfinetune"
    assert (package / "py.typed").is_file()
    inside = ROOT / "src" / "napari_resfinetune" / "napari.yaml"
    assert (package / "napari.yaml").read_bytes() == inside.read_bytes()
    assert not (package / "napari.yaml").is_symlink()


def test_wheel_passes_npe2_validate_with_imports(unpacked_wheel):
    manifest = unpacked_wheel / "napari_resfinetune" / "napari.yaml"
    check_place = "import napari_resfinetune as p, sys; sys.exit(not p.__file__.startswith(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": str(unpacked_wheel)}
    subprocess.run([sys.executable, "-c", check_place, str(unpacked_wheel)], check=True, env=environment)
    command = [sys.executable, "-m", "npe2", "validate", "--imports", str(manifest)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr


@pytest.mark.parametrize("what", ["napari.yaml", DISTRIBUTION])
def test_installed_package_passes_npe2_validate_with_imports(what):
    command = [sys.executable, "-m", "npe2", "validate", "--imports", what]
    child = subprocess.run(command, cwd=ROOT / "src" / "napari_resfinetune", capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
