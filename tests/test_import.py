"""`import napari_resfinetune` is quick and loads nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import napari_resfinetune

HEAVY = {
    "torch",
    "qtpy",
    "PyQt5",
    "PyQt6",
    "PySide6",
    "napari",
    "micro_sam",
    "segment_anything",
    "timm",
    "zarr",
    "skimage",
}
SECONDS = 0.3

CHILD = """
import json, sys, time
before = time.process_time()
import {module}
seconds = time.process_time() - before
print(json.dumps({{"seconds": seconds, "modules": sorted({{name.split(".")[0] for name in sys.modules}})}}))
"""


def import_in_new_process(module: str = "napari_resfinetune") -> dict:
    command = [sys.executable, "-c", CHILD.format(module=module)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_import_loads_nothing_heavy():
    assert HEAVY.isdisjoint(import_in_new_process()["modules"])


def test_config_errors_and_events_load_nothing_heavy():
    modules = import_in_new_process("napari_resfinetune.config, napari_resfinetune.errors, napari_resfinetune.events")
    assert HEAVY.isdisjoint(modules["modules"])


def test_import_is_quick():
    # Processor time, and the best of five: what the import costs, rather than what else the machine was doing.
    assert min(import_in_new_process()["seconds"] for _ in range(5)) < SECONDS


def test_the_probe_sees_what_is_loaded():
    assert "zarr" in import_in_new_process("zarr")["modules"]


def test_no_name_of_the_api_is_that_of_a_module():
    """Importing a module of that name would put it in the name's place."""
    package = Path(napari_resfinetune.__file__).parent
    modules = {path.stem for path in package.iterdir()}
    assert modules.isdisjoint(napari_resfinetune.__all__)
