"""The dock widget opens, by itself and from napari's menu, and brings no torch into the window's process."""

from __future__ import annotations

import subprocess
import sys

from napari_resfinetune.widgets.finetune import HINT, FinetuneWidget


def test_widget_shows_a_hint(qtbot):
    from qtpy.QtWidgets import QLabel

    widget = FinetuneWidget()
    qtbot.addWidget(widget)
    widget.show()
    assert [label.text() for label in widget.findChildren(QLabel)] == [HINT]


def test_widget_opens_in_napari(make_napari_viewer, npe2pm, package_manifest):
    with npe2pm.tmp_plugin(manifest=package_manifest):
        viewer = make_napari_viewer(strict_qt="raise")
        dock, widget = viewer.window.add_plugin_dock_widget("napari-resfinetune", "Finetune")
        assert isinstance(widget, FinetuneWidget)
        assert dock.name.startswith("Finetune")


def test_widgets_import_no_torch():
    code = "import sys, napari_resfinetune.widgets.finetune; print('torch' in sys.modules, 'qtpy' in sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert child.stdout.split() == ["False", "True"]
