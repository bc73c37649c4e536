"""Segment, Evaluate and Models through what a person does, with scripted answers; and all four in a real window."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from napari.components import ViewerModel
from napari.utils.colormaps.standardize_color import transform_color
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QApplication, QFileDialog, QMessageBox, QPushButton, QWidget

from napari_resfinetune.config import FinetuneConfig, write_config
from napari_resfinetune.widgets import controller as controller_module
from napari_resfinetune.widgets.evaluate import ERRORS, EvaluateWidget
from napari_resfinetune.widgets.finetune.running import shown_slice
from napari_resfinetune.widgets.models import ModelsWidget
from napari_resfinetune.widgets.samples import fluorescence_nuclei, stained_tissue
from napari_resfinetune.widgets.segment import SegmentWidget
from window_helpers import COMPUTER, ScriptedEngine


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """Two runs, an older and a newer one; what the window remembers lies in a folder of the test's own."""
    monkeypatch.setenv("RESFINETUNE_CACHEDIR", str(tmp_path / "cache"))
    monkeypatch.setattr(controller_module, "EngineClient", ScriptedEngine)
    monkeypatch.setattr(controller_module, "RUNS_FOLDER", tmp_path / "runs")
    for name in ("first", "second"):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        write_config(FinetuneConfig(model="vit_b_lm"), run / "config.yaml")
        (run / "model.pt").write_bytes(b"weights")
        (run / "events.jsonl").write_text(json.dumps({"event": "Finished", "status": "finished"}) + "\n")
    return tmp_path / "runs"


@pytest.fixture
def viewer(runs) -> ViewerModel:
    viewer = ViewerModel()
    viewer.add_image(np.random.default_rng(0).random((64, 64)), name="cells")
    return viewer


def shown(widget: QWidget, qtbot) -> QWidget:
    qtbot.addWidget(widget)
    widget.show()
    widget.controller.engine.answer("computer", COMPUTER)
    return widget


def click(qtbot, button: QPushButton) -> None:
    assert button.isEnabled() and button.isVisible(), button.text()
    qtbot.mouseClick(button, Qt.MouseButton.LeftButton)


def count(widget, verb: str) -> int:
    return sum(request["verb"] == verb for request in widget.controller.engine.requests)


def segmented(widget: SegmentWidget, qtbot, folder: Path, value: int = 1) -> None:
    """Wait for a request and answer it with a square."""
    qtbot.waitUntil(lambda: bool(widget.controller.engine._asked))
    labels = np.zeros((64, 64), np.uint32)
    labels[10:30, 10:30] = value
    np.save(folder / "labels.npy", labels)
    answer = {"labels": str(folder / "labels.npy"), "objects": 1, "seconds": 0.5, "model": "m"}
    widget.controller.engine.answer("segment", answer)


@pytest.fixture
def segment(viewer, qtbot):
    widget = shown(SegmentWidget(viewer), qtbot)
    yield widget
    widget.controller.close()


def test_own_models_come_first(segment, runs):
    names = [segment.model.combo.itemText(index) for index in range(3)]
    assert sorted(names[:2]) == ["first  (yours)", "second  (yours)"]
    assert segment.model.value() in {str(runs / "first"), str(runs / "second")}


def test_a_result_follows_parameters_until_it_is_corrected(segment, viewer, qtbot, tmp_path):
    click(qtbot, segment.button)
    segmented(segment, qtbot, tmp_path)
    layer = viewer.layers["cells segmented"]
    assert layer.data.max() == 1
    before = count(segment, "segment")
    segment.forms["ais"]["foreground_threshold"].value = 0.2
    qtbot.waitUntil(lambda: count(segment, "segment") > before)
    assert segment.controller.engine.sent("segment")["parameters"]["foreground_threshold"] == 0.2
    segmented(segment, qtbot, tmp_path, value=2)
    assert viewer.layers["cells segmented"].data.max() == 2 and len(viewer.layers) == 2
    layer.paint((50, 50), 9)
    before = count(segment, "segment")
    segment.forms["ais"]["foreground_threshold"].value = 0.4
    qtbot.waitUntil(lambda: count(segment, "segment") > before)
    segmented(segment, qtbot, tmp_path, value=3)
    assert layer.data[50, 50] == 9  # what was corrected stays
    assert viewer.layers["cells segmented 2"].data.max() == 3


def test_the_result_becomes_a_training_pair_and_the_model_the_next_start(segment, viewer, qtbot, tmp_path, monkeypatch):
    click(qtbot, segment.button)
    segmented(segment, qtbot, tmp_path)
    click(qtbot, segment.add_button)
    (pair,) = segment.controller.draft.pairs
    assert (pair.image.name, pair.labels.name) == ("cells", "cells segmented")
    assert segment.note.text() == "Added: 1 training image now."
    opened = []
    monkeypatch.setattr(segment.controller, "open", opened.append)
    click(qtbot, segment.continue_button)
    assert opened == ["Finetune"]
    assert segment.controller.draft.config.model == segment.model.value()


def test_another_file_can_be_chosen(segment, qtbot, tmp_path, monkeypatch):
    def choose(parent, *args):
        assert parent is None or isinstance(parent, QWidget)
        return str(tmp_path / "mine.pt"), ""

    monkeypatch.setattr(QFileDialog, "getOpenFileName", choose)
    combo = segment.model.combo
    combo.setCurrentIndex(combo.findText("Another file…"))
    combo.activated.emit(combo.currentIndex())
    assert segment.model.value() == str(tmp_path / "mine.pt")
    assert combo.currentText() == "mine"


def test_the_copies_in_use_stay_and_older_ones_go(segment, viewer, qtbot):
    layer, files = viewer.layers["cells"], []
    for value in (1, 2, 3, 1, 4):  # the fourth is as after an undo
        layer.data = np.full((64, 64), float(value))
        segment.controller.exporter.export([layer], lambda found: files.append(found[id(layer)]))
    qtbot.waitUntil(lambda: len(files) == 5)
    assert files[0] == files[3]
    assert [Path(file).is_file() for file in files] == [True, False, True, True, True]


def test_this_slice_is_the_one_that_is_shown(segment, viewer, qtbot):
    deep = viewer.add_image(np.zeros((10, 64, 64)), name="deep", scale=(2, 1, 1), translate=(4, 0, 0))
    viewer.add_image(np.zeros((40, 64, 64)), name="finer")
    viewer.dims.set_point(0, 12)
    assert shown_slice(viewer, deep) == 4
    segment.image.set_layer(deep)
    click(qtbot, segment.button)
    qtbot.waitUntil(lambda: count(segment, "segment") == 1)
    assert segment.controller.engine.sent("segment")["planes"] == [4]


def test_each_slice_has_a_result_of_its_own(segment, viewer, qtbot, tmp_path):
    deep = viewer.add_image(np.zeros((4, 64, 64)), name="deep")
    segment.image.set_layer(deep)
    for index in (0, 3):
        viewer.dims.set_current_step(0, index)
        click(qtbot, segment.button)
        qtbot.waitUntil(lambda index=index: count(segment, "segment") == 1 + index // 3)
        segmented(segment, qtbot, tmp_path, value=index + 1)
    assert viewer.layers["deep segmented (slice 0)"].data.max() == 1
    assert viewer.layers["deep segmented (slice 3)"].data.max() == 4


def test_messages_name_layers_and_not_their_copies(segment, viewer, qtbot):
    click(qtbot, segment.button)
    qtbot.waitUntil(lambda: count(segment, "segment") == 1)
    engine = segment.controller.engine
    engine.refuse("segment", f"{engine.sent('segment')['image']}: cannot be used")
    assert segment.note.text() == "cells: cannot be used"


def test_a_model_that_was_deleted_is_not_chosen_any_more(segment, runs):
    segment.model.set_value(str(runs / "first"))
    shutil.rmtree(runs / "first")
    segment.controller.models_changed.emit()
    assert segment.model.value() == str(runs / "second")


def test_cancel_also_ends_what_waits_behind_another(segment, qtbot, tmp_path):
    click(qtbot, segment.button)
    qtbot.waitUntil(lambda: count(segment, "segment") == 1)
    segment.segment()  # as after a change of a parameter
    engine = segment.controller.engine
    qtbot.waitUntil(lambda: bool(engine._waiting))
    click(qtbot, segment.cancel_button)
    assert engine.sent("stop")["job"] == engine.sent("segment")["id"]
    assert not engine._waiting
    segmented(segment, qtbot, tmp_path)  # it was too late to stop it
    assert segment.result is None and count(segment, "segment") == 1


def test_a_stroke_that_is_being_painted_is_not_lost(segment, viewer, qtbot, tmp_path):
    click(qtbot, segment.button)
    segmented(segment, qtbot, tmp_path)
    layer = viewer.layers["cells segmented"]
    with layer.block_history():
        layer.paint((50, 50), 9)
        segment._edited = False  # napari tells of the stroke when it ends
        segment.segment()
        segmented(segment, qtbot, tmp_path, value=3)
    assert layer.data[50, 50] == 9


def test_an_error_is_said_and_leaves_the_layers(segment, viewer, qtbot):
    click(qtbot, segment.button)
    qtbot.waitUntil(lambda: count(segment, "segment") == 1)
    segment.controller.engine.refuse("segment", "model 'vit_b_lm': cannot be downloaded")
    assert segment.note.text() == "model 'vit_b_lm': cannot be downloaded"
    assert [layer.name for layer in viewer.layers] == ["cells"]
    assert segment.button.isEnabled() and not segment.bar.isVisible()


def test_a_slice_of_a_stack_lies_where_it_was(segment, viewer, qtbot, tmp_path):
    stack = viewer.add_image(np.zeros((5, 64, 64)), name="stack")
    segment.image.set_layer(stack)
    assert segment.part.isVisible()
    viewer.dims.set_current_step(0, 3)
    click(qtbot, segment.button)
    qtbot.waitUntil(lambda: count(segment, "segment") == 1)
    asked = segment.controller.engine.sent("segment")
    assert (asked["planes"], asked["axes"]) == ([3], "ZYX")


@pytest.fixture
def evaluate(viewer, qtbot):
    viewer.add_labels(np.ones((64, 64), np.uint16), name="truth")
    viewer.add_labels(np.ones((64, 64), np.uint16), name="found")
    widget = shown(EvaluateWidget(viewer), qtbot)
    yield widget
    widget.controller.close()


def compared(widget: EvaluateWidget, qtbot, folder: Path, name: str, sa50: float) -> None:
    before = count(widget, "compare")
    click(qtbot, widget.button)
    qtbot.waitUntil(lambda: count(widget, "compare") > before)
    np.save(folder / "errors.npy", np.full((64, 64), 3, np.uint8))
    row = {
        "image": name,
        "plane": None,
        "mode": "layer",
        "sa50": sa50,
        "sa75": 0.4,
        "msa": 0.3,
        "n_true": 9,
        "n_pred": 8,
    }
    counts = {"right": 7, "extra": 1, "missed": 1, "merged": 0, "split": 0}
    answer = {"row": row, "errors": str(folder / "errors.npy"), "counts": counts, "curve": [[0.5, sa50], [0.55, 0.2]]}
    widget.controller.engine.answer("compare", answer)


def test_layers_are_scored_shown_sorted_and_saved(evaluate, viewer, qtbot, tmp_path):
    evaluate.truth.set_layer(viewer.layers["truth"])
    evaluate.prediction.set_layer(viewer.layers["found"])
    compared(evaluate, qtbot, tmp_path, "b", 0.5)
    compared(evaluate, qtbot, tmp_path, "a", 0.75)
    shown_errors = viewer.layers["errors of found"]
    assert shown_errors.data.max() == 3
    for value, colour, _ in ERRORS:
        np.testing.assert_allclose(shown_errors.get_color(value), transform_color(colour)[0], atol=1e-6)
    assert evaluate.legend.text().startswith("7 right, 1 extra, 1 missed")
    assert evaluate.table.rowCount() == 3  # and their mean
    evaluate.table.sortItems(1, Qt.SortOrder.DescendingOrder)
    assert [evaluate.table.item(row, 1).text() for row in range(3)] == ["0.75", "0.62", "0.50"]
    assert evaluate.table.item(0, 4).text() == "8 of 9"
    evaluate.save(tmp_path / "scores.csv")
    lines = (tmp_path / "scores.csv").read_text().splitlines()
    assert lines[0] == "image,mode,sa50,sa75,msa,n_true,n_pred"
    assert lines[-1].startswith("mean of 2,layer,0.625")
    click(qtbot, evaluate.copy_button)
    assert QApplication.clipboard().text().splitlines()[1].split("\t")[:3] == ["b", "layer", "0.5"]


def test_a_model_is_scored_on_an_image_and_its_labels(evaluate, viewer, qtbot, runs):
    evaluate.model.set_value(str(runs / "first"))
    assert evaluate.what.currentData() == "model"
    evaluate.truth.set_layer(viewer.layers["truth"])
    click(qtbot, evaluate.button)
    qtbot.waitUntil(lambda: count(evaluate, "evaluate") == 1)
    asked = evaluate.controller.engine.sent("evaluate")
    assert (asked["model"], asked["modes"]) == (str(runs / "first"), ["ais"])
    assert all(Path(asked[name]).is_file() for name in ("images", "labels"))
    scores = {"sa50": 0.5, "sa75": 0.4, "msa": 0.3, "n_true": 9, "n_pred": 8}
    row = {"image": "x", "plane": None, "mode": "ais", **scores}
    evaluate.controller.engine.answer("evaluate", {"rows": [row], "means": {}, "model": "first"})
    assert [evaluate.table.item(0, column).text() for column in range(2)] == ["cells", "0.50"]
    assert evaluate.table.item(0, 0).toolTip() == "cells: first ais"


def test_a_model_is_scored_on_folders_and_can_be_stopped(evaluate, qtbot, runs, tmp_path):
    engine = evaluate.controller.engine
    evaluate.what.setCurrentIndex(evaluate.what.findData("folders"))
    assert evaluate.note.text() == "Choose a folder of images and one of labels."
    for folder, name in ((evaluate.images_folder, "images"), (evaluate.truth_folder, "labels")):
        (tmp_path / name).mkdir()
        folder.value = tmp_path / name
    evaluate.model.set_value(str(runs / "first"))
    assert evaluate.what.currentData() == "folders"
    click(qtbot, evaluate.button)
    asked = engine.sent("evaluate")
    assert (asked["images"], asked["labels"]) == (str(tmp_path / "images"), str(tmp_path / "labels"))
    engine._take(engine._generation, {"id": asked["id"], "event": {"text": "b.tif", "done": 1, "total": 2}})
    assert evaluate.note.text() == "1 of 2: b.tif"
    scores = {"sa50": 0.5, "sa75": 0.4, "msa": 0.3, "n_true": 9, "n_pred": 8}
    rows = [{"image": f"{name}.tif", "plane": None, "mode": "ais", **scores} for name in "ab"]
    engine.answer("evaluate", {"rows": rows, "means": {}, "model": "first"})
    assert sorted(evaluate.table.item(row, 0).text() for row in range(3)) == ["a.tif", "b.tif", "mean of 2"]
    click(qtbot, evaluate.button)
    assert evaluate.button.text() == "Stop"
    click(qtbot, evaluate.button)
    assert engine.requests[-1] == {"verb": "stop", "job": engine.sent("evaluate")["id"]}
    engine.refuse("evaluate", "stopped")
    assert (evaluate.note.text(), evaluate.button.text()) == ("Stopped.", "Evaluate")


def test_what_is_missing_is_said(viewer, qtbot):
    widget = shown(EvaluateWidget(viewer), qtbot)
    assert widget.note.text() == "Open or paint a labels layer as the truth first."
    assert not widget.button.isEnabled()
    widget.controller.close()


@pytest.fixture
def models(viewer, qtbot):
    widget = shown(ModelsWidget(viewer), qtbot)
    yield widget
    widget.controller.close()


def row_of(widget: ModelsWidget, name: str) -> int:
    return [run.name for run in widget.runs].index(name)


def test_models_are_listed_renamed_noted_and_deleted(models, runs, qtbot, monkeypatch):
    assert sorted(run.name for run in models.runs) == ["first", "second"]
    models.table.item(row_of(models, "first"), 0).setText("nuclei")
    models.table.item(row_of(models, "nuclei"), 0).setText("second")
    assert "second" in models.note.text() and models.note.isVisible()
    models.table.selectRow(row_of(models, "nuclei"))
    assert models.details.text().startswith("nuclei: from vit_b_lm, full")
    models.remark.setText("good for mitosis")
    qtbot.keyClick(models.remark, Qt.Key.Key_Return)
    assert models.runs[row_of(models, "nuclei")].note == "good for mitosis"
    models.table.selectRow(row_of(models, "nuclei"))
    answers = [QMessageBox.StandardButton.No, QMessageBox.StandardButton.Yes]
    monkeypatch.setattr(QMessageBox, "question", lambda *args: answers.pop(0))
    click(qtbot, models.buttons["delete"])
    assert (runs / "first").is_dir()  # a name is no folder
    click(qtbot, models.buttons["delete"])
    assert not (runs / "first").exists() and [run.name for run in models.runs] == ["second"]


def test_a_run_without_a_model_yet_can_be_gone_on_with(models, runs, qtbot, monkeypatch):
    early = runs / "early"
    (early / "checkpoints" / "latest").mkdir(parents=True)
    write_config(FinetuneConfig(model="vit_b_lm"), early / "config.yaml")
    (early / "events.jsonl").write_text(json.dumps({"event": "Finished", "status": "stopped"}) + "\n")
    models.refresh()
    models.table.selectRow([run.name for run in models.runs].index("early"))
    assert not models.buttons["segment"].isEnabled()
    opened = []
    monkeypatch.setattr(models.controller, "open", opened.append)
    click(qtbot, models.buttons["resume"])
    assert opened == ["Finetune"]
    assert models.controller.engine.sent("train")["run_dir"] == str(early)
    assert not models.buttons["resume"].isEnabled()  # one training at a time


def test_models_are_exported_and_imported_by_the_engine(models, runs, qtbot, tmp_path, monkeypatch):
    monkeypatch.setattr(QFileDialog, "getSaveFileName", lambda *args: (str(tmp_path / "a.pt"), ""))
    monkeypatch.setattr(QFileDialog, "getOpenFileName", lambda *args: (str(tmp_path / "b.pt"), ""))
    models.table.selectRow(row_of(models, "second"))
    click(qtbot, models.buttons["export"])
    asked = models.controller.engine.sent("export_model")
    assert (asked["model"], asked["path"]) == (str(runs / "second"), str(tmp_path / "a.pt"))
    models.controller.engine.answer("export_model", {"path": asked["path"]})
    assert models.note.text() == "Exported to a.pt."
    click(qtbot, models.import_button)
    assert models.controller.engine.sent("import_model")["source"] == str(tmp_path / "b.pt")
    models.controller.engine.refuse("import_model", "b.pt: not a model")
    assert models.note.text() == "b.pt: not a model"


def test_continue_training_starts_from_that_model(models, runs, qtbot, monkeypatch):
    monkeypatch.setattr(models.controller, "open", lambda name: None)
    models.table.selectRow(row_of(models, "second"))
    click(qtbot, models.buttons["continue"])
    assert models.controller.draft.config.model == str(runs / "second")


def test_sample_data_are_pairs_of_image_and_labels():
    for sample, ndim in ((fluorescence_nuclei, 2), (stained_tissue, 3)):
        layers = sample()
        assert [kind for _, _, kind in layers] == ["image", "labels"] * 3
        assert layers[0][0].ndim == ndim
        assert all(data.max() > 3 for data, _, kind in layers if kind == "labels")


def test_all_widgets_open_in_napari_and_the_engine_ends_with_the_window(
    make_napari_viewer, npe2pm, package_manifest, runs, qtbot
):
    with npe2pm.tmp_plugin(manifest=package_manifest):
        viewer = make_napari_viewer(strict_qt="raise", show=True)
        widgets, docks = [], []
        for name in ("Finetune", "Segment", "Evaluate", "Models"):
            dock, widget = viewer.window.add_plugin_dock_widget("napari-resfinetune", name)
            widgets.append(widget)
            docks.append(dock)
        # One below the other they would not fit.
        qtbot.waitUntil(lambda: len(docks[0].parentWidget().tabifiedDockWidgets(docks[0])) == 3)
        qtbot.waitUntil(lambda: not docks[3].visibleRegion().isEmpty())
        (controller,) = {widget.controller for widget in widgets}
        qtbot.waitUntil(lambda: controller.engine.status == "ready")
        viewer.close()
        qtbot.waitUntil(lambda: controller._closed)
        assert not controller.folder.exists()


def test_widgets_import_no_torch():
    modules = ("finetune", "segment", "evaluate", "models", "samples")
    code = "import sys, " + ", ".join(f"napari_resfinetune.widgets.{name}" for name in modules)
    code += "; print('torch' in sys.modules, 'qtpy' in sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert child.stdout.split() == ["False", "True"]
