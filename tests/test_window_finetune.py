"""The Finetune widget through what a person does; the engine's answers are scripted (tests/test_window_session.py has
the real one)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from napari.components import ViewerModel
from qtpy.compat import isalive
from qtpy.QtCore import QEvent, Qt
from qtpy.QtGui import QCloseEvent
from qtpy.QtWidgets import QApplication, QMainWindow, QMessageBox, QPushButton

from napari_resfinetune.events import Message
from napari_resfinetune.search.candidates import LeftOut
from napari_resfinetune.widgets import controller as controller_module
from napari_resfinetune.widgets.draft import PairItem
from napari_resfinetune.widgets.engine_status import EngineStatus
from napari_resfinetune.widgets.finetune import FinetuneWidget
from napari_resfinetune.widgets.parts import Words
from napari_resfinetune.widgets.training_run import State
from window_helpers import COMPUTER, ScriptedEngine, an_epoch, checked, finished, plan, problem, row, started


@pytest.fixture
def viewer(monkeypatch, tmp_path):
    """A viewer without its window: layers, camera and theme are all that the widget needs."""
    monkeypatch.setattr(controller_module, "EngineClient", ScriptedEngine)
    monkeypatch.setattr(controller_module, "RUNS_FOLDER", tmp_path / "runs")
    monkeypatch.setattr(QMessageBox, "question", lambda *args: QMessageBox.StandardButton.Close)
    return ViewerModel()


@pytest.fixture
def widget(viewer, qtbot):
    window = QMainWindow()
    widget = FinetuneWidget(viewer)
    window.setCentralWidget(widget)
    qtbot.addWidget(window)
    window.resize(360, 760)
    window.show()
    widget.controller.engine.answer("computer", COMPUTER)
    yield widget
    widget.controller.close()


def click(qtbot, button: QPushButton) -> None:
    assert button.isEnabled(), button.text()
    assert button.isVisible(), button.text()
    qtbot.mouseClick(button, Qt.MouseButton.LeftButton)


def with_sample(widget: FinetuneWidget, qtbot, *rows) -> None:
    """Load the sample cells and let the engine say about them what is given."""
    engine = widget.controller.engine
    click(qtbot, widget.images.sample_button)
    qtbot.waitUntil(lambda: any(request["verb"] == "check" for request in engine.requests))
    qtbot.waitUntil(lambda: any(request["verb"] == "plan" for request in engine.requests))
    engine.answer("check", checked(*(rows or (row(48), row(11), row(4, "held out")))))
    engine.answer("plan", plan())


def train(widget: FinetuneWidget, qtbot) -> str:
    """Start a run and return its folder."""
    click(qtbot, widget.start_button)
    qtbot.waitUntil(lambda: widget.controller.training.state is State.STARTING)
    return widget.controller.engine.sent("train")["config"]["output"]


def end(widget: FinetuneWidget, run_dir: str, status: str = "finished", comparison: dict | None = None) -> None:
    Path(run_dir).mkdir(parents=True)
    (Path(run_dir) / "model.pt").write_bytes(b"")
    if comparison is not None:
        (Path(run_dir) / "comparison.json").write_text(json.dumps(comparison))
    event, result = finished(run_dir, status)
    widget.controller.engine.tell(event)
    widget.controller.engine.answer("train", result)


def test_an_empty_widget_says_what_to_do_and_does_not_start(widget):
    assert widget.images.hint.text() == "Add an image with labels to begin."
    assert widget.reason.text() == "Next: add images."
    assert not widget.start_button.isEnabled()
    assert widget.findChild(EngineStatus).text() == "Engine: ready, CPU, 20.0 GB free"


def test_an_image_without_labels_leads_to_segment(widget, viewer, qtbot):
    viewer.add_image(np.zeros((64, 64)))
    assert widget.images.hint.text().startswith("No labels yet?")
    assert widget.images.segment_button.isVisible()


def test_sample_cells_are_checked_planned_and_can_be_started(widget, qtbot):
    with_sample(widget, qtbot)
    tree = widget.images.tree
    assert [tree.topLevelItem(i).text(2) for i in range(3)] == ["train", "train", "held out"]
    assert tree.topLevelItem(0).text(1) == "48 objects"
    assert widget.computer.gauge.text == "6.1 of 16.0 GB"
    assert widget.computer.gauge.level == "good"
    assert widget.computer.time.text() == "1 h to 6 h 40 min (4 min an epoch)"
    assert widget.start_button.isEnabled()


def test_problems_stand_at_their_pair_and_a_fix_makes_a_new_layer(widget, viewer, qtbot, tmp_path):
    mask = problem("error", "foreground-mask", "one id covers 40 separate objects")
    specks = problem("warning", "small-objects", "2 objects below 25 px")
    with_sample(widget, qtbot, row(0, None, specks, mask), row(11, None), row(4, None))
    assert widget.reason.text() == "Next: mend what is marked above."
    assert not widget.start_button.isEnabled()
    first = widget.images.tree.topLevelItem(0)
    holders = [widget.images.tree.itemWidget(first.child(i), 0) for i in range(first.childCount())]
    buttons = [holder.findChild(QPushButton) for holder in holders]
    assert [button.text() for button in buttons] == ["Separate objects", "Drop specks"]  # the worst first
    before = viewer.layers["labels 1"].data.copy()
    click(qtbot, buttons[0])
    new = tmp_path / "mended.npy"
    np.save(new, np.ones((256, 256), np.uint32))
    widget.controller.engine.answer("mend", {"labels": str(new), "note": "40 objects now"})
    assert widget.controller.draft.pairs[0].labels is viewer.layers["labels 1 mended"]
    np.testing.assert_array_equal(viewer.layers["labels 1"].data, before)


def test_painting_on_labels_has_them_checked_again(widget, viewer, qtbot):
    with_sample(widget, qtbot)
    count = sum(request["verb"] == "check" for request in widget.controller.engine.requests)
    first = widget.controller.engine.sent("check")["pairs"][0]["labels"]
    viewer.layers["labels 1"].paint((10, 10), 7)
    qtbot.waitUntil(lambda: sum(r["verb"] == "check" for r in widget.controller.engine.requests) > count)
    assert widget.controller.engine.sent("check")["pairs"][0]["labels"] != first


def test_all_layers_are_paired_by_name_and_what_is_left_out_is_said(widget, viewer, qtbot):
    for name in ("unlabelled", "well_B02", "well_C03"):
        viewer.add_image(np.zeros((64, 64)), name=name)
    for name in ("well_B02 labels", "well_C03 labels"):
        viewer.add_labels(np.ones((64, 64), int), name=name)
    click(qtbot, widget.images.add_all_button)
    pairs = widget.controller.draft.pairs
    assert [(pair.image.name, pair.labels.name) for pair in pairs] == [
        ("well_B02", "well_B02 labels"),
        ("well_C03", "well_C03 labels"),
    ]
    qtbot.waitUntil(lambda: any(request["verb"] == "check" for request in widget.controller.engine.requests))
    widget.controller.engine.answer("check", checked(row(1), row(1, "held out")))
    assert "Left out: unlabelled" in widget.images.note.text()
    viewer.layers["well_B02"].name = "renamed"
    assert widget.images.image_combo.findText("renamed") >= 0
    assert widget.images.tree.topLevelItem(0).text(0).startswith("renamed")


def test_layers_that_cannot_be_paired_are_said(widget, viewer, qtbot):
    viewer.add_image(np.zeros((64, 64)), name="cells")
    viewer.add_labels(np.ones((32, 32), int), name="labels")
    click(qtbot, widget.images.add_all_button)
    assert widget.images.note.text() == "Left out: cells, without labels of its size."
    click(qtbot, widget.images.add_button)
    assert "none has its size" in widget.images.note.text()


def test_a_long_path_does_not_widen_the_window(widget, qtbot):
    before = widget.minimumSizeHint().width()
    path = "/".join(["a_folder_with_a_long_name"] * 12)
    widget.reason.say(path)
    assert widget.reason.text() == path
    assert widget.minimumSizeHint().width() == before


def test_only_what_was_painted_on_is_copied_again(widget, viewer, qtbot, monkeypatch):
    with_sample(widget, qtbot)
    copied, engine = [], widget.controller.engine
    export = widget.controller.exporter.export
    monkeypatch.setattr(
        widget.controller.exporter, "export", lambda layers, then: copied.append(layers) or export(layers, then)
    )
    viewer.layers["labels 1"].paint((10, 10), 7)
    qtbot.waitUntil(lambda: bool(copied))
    assert copied == [[viewer.layers["labels 1"]]]
    qtbot.waitUntil(lambda: any(asked.topic == "check" for asked in engine._asked.values()))
    engine.answer("check", checked(row(48), row(11), row(4, "held out")))
    widget.controller.draft.change_config({"training": {"epochs": 7}})
    qtbot.wait(400)
    assert len(copied) == 1  # the number of epochs changes nothing about images
    widget.controller.draft.change_config({"data": {"min_object_px": 40}})
    qtbot.waitUntil(lambda: engine.sent("check")["data"]["min_object_px"] == 40)


def test_what_could_not_be_looked_at_is_said_and_looked_at_again(widget, qtbot):
    engine = widget.controller.engine
    click(qtbot, widget.images.sample_button)
    qtbot.waitUntil(lambda: any(request["verb"] == "check" for request in engine.requests))
    engine.refuse("check", "the engine was killed")
    assert widget.reason.text() == "The images could not be looked at."
    assert not widget.start_button.isEnabled()
    before = len(engine.requests)
    click(qtbot, widget.images.again_button)
    qtbot.waitUntil(lambda: any(request["verb"] == "check" for request in engine.requests[before:]))
    engine.answer("check", checked(row(48), row(11), row(4, "held out")))
    assert widget.start_button.isEnabled()


def test_a_mend_finds_its_pair_though_another_was_removed(widget, viewer, qtbot, tmp_path):
    mask = problem("error", "foreground-mask", "one id covers 40 separate objects")
    with_sample(widget, qtbot, row(11, None), row(0, None, mask), row(4, None))
    viewer.layers["labels 2"].scale = (0.5, 0.5)
    item = widget.images.tree.topLevelItem(1)
    button = widget.images.tree.itemWidget(item.child(0), 0).findChild(QPushButton)
    click(qtbot, button)
    assert not button.isEnabled()
    _first, second, third = widget.controller.draft.pairs
    widget.controller.draft.set_pairs((second, third))
    np.save(tmp_path / "mended.npy", np.ones((256, 256), np.uint32))
    widget.controller.engine.answer("mend", {"labels": str(tmp_path / "mended.npy"), "note": "40 objects now"})
    mended = viewer.layers["labels 2 mended"]
    assert [pair.labels for pair in widget.controller.draft.pairs] == [mended, third.labels]
    assert list(mended.scale) == [0.5, 0.5]


def test_two_clicks_start_one_run(widget, qtbot):
    with_sample(widget, qtbot)
    click(qtbot, widget.start_button)
    widget.computer.planned.emit(None)  # any answer that comes while layers are copied
    assert not widget.start_button.isEnabled()
    widget.start()
    qtbot.waitUntil(lambda: widget.controller.training.state is State.STARTING)
    qtbot.wait(100)
    assert sum(request["verb"] == "train" for request in widget.controller.engine.requests) == 1


def test_a_plan_of_other_settings_says_nothing_about_these(widget, qtbot):
    with_sample(widget, qtbot)
    widget.controller.draft.change_config({"training": {"epochs": 7}})
    assert widget.computer.current_plan is None
    qtbot.waitUntil(lambda: widget.computer.time.text() == "…")
    widget.controller.engine.answer("plan", plan())
    assert widget.computer.time.text() == "1 h to 6 h 40 min (4 min an epoch)"


def test_the_log_goes_on_after_its_first_lines_are_gone(widget, qtbot):
    with_sample(widget, qtbot)
    run_dir = train(widget, qtbot)
    widget.controller.engine.tell(started(run_dir), *(Message(f"line {number}") for number in range(600)))
    assert widget.running.log.toPlainText().splitlines()[-1] == "line 599"


def test_a_click_moves_an_image_to_the_other_side_and_delete_removes_it(widget, qtbot):
    with_sample(widget, qtbot)
    tree = widget.images.tree
    widget.images._clicked(tree.topLevelItem(0), 2)
    assert [pair.held_out for pair in widget.controller.draft.pairs] == [True, False, True]
    tree.setCurrentItem(tree.topLevelItem(2))
    qtbot.keyClick(tree, Qt.Key.Key_Delete)
    assert [pair.image_name for pair in widget.controller.draft.pairs] == ["cells 1", "cells 2"]


def test_removing_a_layer_removes_its_pair(widget, viewer, qtbot):
    with_sample(widget, qtbot)
    viewer.layers.remove("cells 2")
    assert len(widget.controller.draft.pairs) == 2


def test_folders_that_are_dropped_are_paired(widget, qtbot, tmp_path):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    widget.images.drop([tmp_path])
    asked = widget.controller.engine.sent("open_folders")
    assert [Path(asked[name]).name for name in ("images", "labels")] == ["images", "labels"]
    pair = {"name": "a", "image": str(tmp_path / "images" / "a.tif"), "labels": str(tmp_path / "labels" / "a.tif")}
    widget.controller.engine.answer("open_folders", {"pairs": [pair], "problems": []})
    assert [pair.image_name for pair in widget.controller.draft.pairs] == ["a.tif"]


def test_what_folders_leave_out_stays_in_sight(widget, qtbot, tmp_path):
    widget.images.add_folders("images", "labels")
    pair = {"name": "a", "image": "images/a.tif", "labels": "labels/a.tif"}
    skipped = problem("warning", "no-labels", "no label image")
    engine = widget.controller.engine
    engine.answer("open_folders", {"pairs": [pair], "problems": [skipped]})
    qtbot.waitUntil(lambda: any(request["verb"] == "check" for request in engine.requests))
    engine.answer("check", {**checked(row(9, "both")), "note": "1 image to train on"})
    assert widget.images.note.text() == "1 image to train on\nlabels: no label image; mend it"


def test_an_image_has_one_place_in_the_list_with_its_newest_labels(widget, viewer, qtbot):
    with_sample(widget, qtbot)
    draft = widget.controller.draft
    draft.set_pairs(replace(pair, held_out=number == 1) for number, pair in enumerate(draft.pairs))
    image = viewer.layers["cells 2"]
    corrected = viewer.add_labels(viewer.layers["labels 2"].data.copy(), name="corrected")
    assert draft.add([PairItem(image, corrected)]) == 1
    assert [pair.labels_name for pair in draft.pairs] == ["labels 1", "corrected", "labels 3"]
    assert draft.pairs[1].held_out
    assert draft.add([PairItem(image, corrected)]) == 0


def test_a_pair_that_nothing_mends_can_be_left_out(widget, qtbot):
    broken = problem("error", "float-labels", "float64 labels with fractions")
    with_sample(widget, qtbot, row(0, None, broken), row(11, None), row(4, None))
    first = widget.images.tree.topLevelItem(0)
    button = widget.images.tree.itemWidget(first.child(0), 0).findChild(QPushButton)
    assert button.text() == "Leave out"
    click(qtbot, button)
    assert [pair.image_name for pair in widget.controller.draft.pairs] == ["cells 2", "cells 3"]


def test_problems_name_layers_not_files(widget, viewer, qtbot):
    with_sample(widget, qtbot)
    viewer.layers["cells 1"].data = viewer.layers["cells 1"].data + 1
    viewer.layers["cells 1"].name = "my cells, 1"
    engine = widget.controller.engine
    count = len(engine.requests)
    qtbot.waitUntil(
        lambda: any(r["verb"] == "check" and "my_cells" in r["pairs"][0]["image"] for r in engine.requests[count:])
    )
    copy = Path(engine.sent("check")["pairs"][0]["image"])
    found = f"shape (9, 9) differs from {copy.parent.name}/{copy.name} (8, 8)"
    engine.answer("check", checked(row(0, None, problem("error", "axis-mismatch", found)), row(11, None), row(4, None)))
    first = widget.images.tree.topLevelItem(0)
    words = widget.images.tree.itemWidget(first.child(0), 0).findChild(Words)
    assert words.text() == "Shape (9, 9) differs from my cells, 1 (8, 8)"
    assert widget.controller.exporter.in_words(f"only one image ({copy.stem})") == "only one image (my cells, 1)"


def test_what_does_not_fit_offers_the_smallest_change(widget, qtbot):
    with_sample(widget, qtbot)
    smaller = widget.value().model_copy(update={"model": "vit_t_lm"}).model_dump(mode="json")
    widget.computer.plan_again()
    count = len(widget.controller.engine.requests)
    qtbot.waitUntil(lambda: len(widget.controller.engine.requests) > count)
    offer = {"label": "Start from vit_t_lm instead", "peak_gb": 3.2, "config": smaller}
    widget.controller.engine.answer("plan", plan(21.0, smaller=offer))
    assert widget.computer.gauge.level == "bad"
    assert widget.reason.text() == "Next: choose something that fits."
    assert widget.computer.fix.text() == "Start from vit_t_lm instead: 3.2 GB"
    click(qtbot, widget.computer.fix)
    assert widget.value().model == "vit_t_lm" == widget.model.model.combo.currentData()


def test_the_form_edits_the_one_configuration_and_refuses_nonsense(widget, qtbot):
    fields = widget.computer.advanced.fields
    fields["training.epochs"].value = 7
    fields["training.objects"].value = "4"
    fields["training.learning_rate"].value = "0.001"
    config = widget.value()
    assert (config.training.epochs, config.training.objects, config.training.learning_rate) == (7, 4, 0.001)
    fields["training.learning_rate"].value = "fast"
    assert "learning_rate" in widget.computer.complaint.text()
    assert widget.value() == config
    fields["training.epochs"].value = 9  # another field, which does not hide the complaint
    assert "learning_rate" in widget.computer.complaint.text()
    with_sample(widget, qtbot)
    assert widget.reason.text() == "Next: correct in Advanced: training.learning_rate."
    assert not widget.start_button.isEnabled()
    fields["training.learning_rate"].value = ""
    assert widget.computer.complaint.text() == ""
    assert widget.value().training.learning_rate == 1e-5
    assert fields["data.patch_px"].min == 64 and fields["training.epochs"].min == 1
    fields["training.early_stopping"].value = ""
    assert widget.value().training.early_stopping is None
    widget.set_value(config.model_copy(update={"model": "vit_t"}))
    assert widget.model.model.combo.currentData() == "vit_t"


def test_a_run_from_start_to_better(widget, viewer, qtbot):
    with_sample(widget, qtbot)
    run_dir = train(widget, qtbot)
    asked = widget.controller.engine.sent("train")
    config = asked["config"]
    assert len(config["data"]["images"]) == len(config["data"]["labels"]) == 3
    copied = {target for _, target in asked["copy"]}
    assert copied == {*config["data"]["images"], *config["data"]["labels"]}  # what the run names is its own
    assert not any(path.startswith(run_dir + "/") for path in copied)
    engine = widget.controller.engine
    assert widget.pages.currentIndex() == 1
    engine.tell(started(run_dir), *an_epoch(0, 0.9, 0), *an_epoch(1, 0.5, 1))
    assert widget.running.where.text() == "Epoch 3 of up to 3 · best so far: 2"
    assert widget.running.gauge.text == "5.8 of 16.0 GB"
    assert "left" in widget.running.left.text()
    assert [len(line) for line in widget.running.curve.lines.values()] == [8, 2]
    images = [{"name": "cells 3", "before": 0.5, "after": 0.8}]
    better = {"verdict": "better", "sentence": "S.", "before": {"sa50": 0.5}, "after": {"sa50": 0.8}, "images": images}
    end(widget, run_dir, comparison=better)
    assert widget.pages.currentIndex() == 2
    assert widget.outcome.headline.text() == "Better: SA50 0.50 → 0.80 on 1 held-out image."
    assert widget.outcome.buttons["segment"].isVisible()
    assert not widget.outcome.buttons["resume"].isVisible()
    assert widget.controller.last_model == run_dir


def test_a_model_that_got_worse_is_called_so(widget, qtbot):
    with_sample(widget, qtbot)
    run_dir = train(widget, qtbot)
    widget.controller.engine.tell(started(run_dir), *an_epoch(0, 0.9, 0))
    worse = {"verdict": "worse", "sentence": "S.", "before": {"sa50": 0.7}, "after": {"sa50": 0.6}, "images": [{}, {}]}
    end(widget, run_dir, "early_stopped", worse)
    assert widget.outcome.headline.text() == "Not better: SA50 0.70 → 0.60 on 2 held-out images."
    assert "Usual reasons" in widget.outcome.details.text()


def test_without_a_comparison_nothing_is_claimed(widget, qtbot):
    with_sample(widget, qtbot)
    run_dir = train(widget, qtbot)
    widget.controller.engine.tell(started(run_dir), *an_epoch(0, 0.9, 0))
    end(widget, run_dir)
    said = widget.outcome.headline.text() + widget.outcome.details.text()
    assert "SA50" not in said and "etter:" not in said
    assert widget.outcome.headline.text() == f"The model is ready: {Path(run_dir).name}."


def test_pause_and_go_on_and_stop(widget, qtbot):
    with_sample(widget, qtbot)
    run_dir = train(widget, qtbot)
    engine = widget.controller.engine
    engine.tell(started(run_dir), *an_epoch(0, 0.9, 0))
    click(qtbot, widget.running.pause_button)
    assert engine.sent("stop")["job"] == engine.sent("train")["id"]
    assert not widget.running.pause_button.isEnabled()
    event, result = finished(run_dir, "stopped", 0)
    engine.tell(event)
    engine.answer("train", result)
    assert widget.outcome.headline.text() == "Paused in epoch 2 of up to 3."
    click(qtbot, widget.outcome.buttons["resume"])
    again = engine.sent("train")
    assert again["run_dir"] == run_dir and "config" not in again
    engine.tell(started(run_dir, 1, 0), *an_epoch(1, 0.5, 1))
    assert len(widget.running.curve.lines["validation"]) == 2  # what was there stays
    click(qtbot, widget.running.stop_button)
    end(widget, run_dir, "stopped")
    assert "Stopped by you" in widget.outcome.details.text()


def test_a_failure_says_what_happened_and_goes_on_from_the_checkpoint(widget, qtbot):
    with_sample(widget, qtbot)
    run_dir = train(widget, qtbot)
    engine = widget.controller.engine
    engine.tell(started(run_dir), *an_epoch(0, 0.9, 0))
    (Path(run_dir) / "checkpoints" / "latest").mkdir(parents=True)
    (Path(run_dir) / "config.yaml").touch()
    engine.refuse("train", "the training process was killed (SIGKILL)")
    assert widget.outcome.headline.text() == "It could not go on."
    assert "SIGKILL" in widget.outcome.details.text()
    click(qtbot, widget.outcome.buttons["resume"])
    assert engine.sent("train")["run_dir"] == run_dir


def test_a_second_run_in_one_session_has_a_folder_of_its_own(widget, qtbot):
    with_sample(widget, qtbot)
    first = train(widget, qtbot)
    widget.controller.engine.tell(started(first), *an_epoch(0, 0.9, 0))
    end(widget, first)
    click(qtbot, widget.outcome.buttons["new"])
    assert widget.pages.currentIndex() == 0
    second = train(widget, qtbot)
    assert second != first
    widget.controller.engine.tell(started(second), *an_epoch(0, 0.9, 0))
    end(widget, second)
    assert [each.name for each in widget.controller.draft.rounds] == [Path(first).name, Path(second).name]
    assert widget.outcome.rounds.isVisible()


def test_a_run_outlives_its_widget(widget, viewer, qtbot):
    with_sample(widget, qtbot)
    run_dir = train(widget, qtbot)
    widget.window().takeCentralWidget().deleteLater()
    widget.controller.engine.tell(started(run_dir), *an_epoch(0, 0.9, 0))
    again = FinetuneWidget(viewer)
    qtbot.addWidget(again)
    assert again.pages.currentIndex() == 1
    assert again.running.where.text().startswith("Epoch 2")


@pytest.mark.parametrize("answer", [QMessageBox.StandardButton.Cancel, QMessageBox.StandardButton.Close])
def test_closing_the_window_while_training_asks(widget, viewer, qtbot, monkeypatch, answer):
    with_sample(widget, qtbot)
    train(widget, qtbot)
    asked = []
    monkeypatch.setattr(QMessageBox, "question", lambda *args: asked.append(args) or answer)
    close = QCloseEvent()
    ignored = widget.controller.eventFilter(widget.window(), close)
    assert len(asked) == 1
    assert ignored is (answer == QMessageBox.StandardButton.Cancel)
    widget.controller.training._set(State.DONE)
    assert not widget.controller.eventFilter(widget.window(), QEvent(QEvent.Type.Close))


@pytest.mark.parametrize("answer", [QMessageBox.StandardButton.Yes, QMessageBox.StandardButton.No])
def test_closing_the_widget_while_training_asks(widget, viewer, qtbot, monkeypatch, answer):
    with_sample(widget, qtbot)
    train(widget, qtbot)
    asked = []
    monkeypatch.setattr(QMessageBox, "question", lambda *args: asked.append(args) or answer)
    controller = widget.controller
    widget.setParent(None)  # as napari does with the widget of a dock that is closed
    qtbot.waitUntil(lambda: len(asked) == 1)
    assert "goes on in the background" in asked[0][2]
    wanted = State.STOPPING if answer == QMessageBox.StandardButton.Yes else State.STARTING
    qtbot.waitUntil(lambda: controller.training.state is wanted)
    qtbot.waitUntil(lambda: not isalive(widget))  # it would go on listening to layers


def found(*models: tuple[str, float], **changes) -> dict:
    ranked = [{"model": model, "score": score} for model, score in models]
    answer = {"ranked": ranked, "left_out": [], "downloads": [], "status": "finished", "start_from": ranked[0]["model"]}
    answer |= {"notes": ["2 images to train on, 1 held out"]}
    return {**answer, "advice": f"start from {ranked[0]['model']}: it does best on your images", **changes}


def test_a_suggested_model_is_chosen_and_the_reason_said(widget, qtbot):
    suggestion, engine = widget.model.suggestion, widget.controller.engine
    assert not suggestion.button.isEnabled()
    with_sample(widget, qtbot)
    click(qtbot, suggestion.button)
    qtbot.waitUntil(lambda: any(request["verb"] == "suggest" for request in engine.requests))
    request = engine.sent("suggest")
    assert "starter" in request["candidates"]
    assert len(request["images"]) == len(request["labels"]) == len(widget.controller.draft.pairs)
    event = {"event": "Searched", "model": "starter", "done": 3, "total": 16, "seconds_left": 65.0}
    engine._take(engine._generation, {"id": request["id"], "event": event})
    assert suggestion.words.text() == "Comparing models, now starter: 19 %, 1 min left"
    missing = [{"model": "vit_b_lm", "size_mb": 415, "advice": ""}, {"model": "vit_h", "size_mb": 2565, "advice": ""}]
    reason = "not a whole checkpoint (0.1 MB, PytorchStreamReader failed); expected a file written by torch.save"
    broken = [LeftOut("/runs/broken", f"/runs/broken/model.pt: {reason}").to_dict()]
    engine.answer("suggest", found(("starter", 0.61), ("/runs/first", 0.5), downloads=missing, left_out=broken))
    assert widget.model.model.value() == widget.value().model == "starter"
    assert "Start from starter: it does best on your images (starter 0.61, first 0.50)" in suggestion.words.text()
    assert "Left out: broken (not a whole checkpoint)." in suggestion.words.text()
    assert suggestion.words.text().endswith("Not on this computer yet: vit_b_lm.")
    assert "1 held out" in suggestion.words.toolTip() and reason in suggestion.words.toolTip()
    assert suggestion.button.text() == "Suggest"


def test_a_suggestion_can_be_stopped_and_may_fail(widget, qtbot):
    suggestion, engine = widget.model.suggestion, widget.controller.engine
    with_sample(widget, qtbot)
    before = widget.value().model
    click(qtbot, suggestion.button)
    qtbot.waitUntil(lambda: any(request["verb"] == "suggest" for request in engine.requests))
    assert suggestion.button.text() == "Stop"
    click(qtbot, suggestion.button)
    assert engine.requests[-1] == {"verb": "stop", "job": engine.sent("suggest")["id"]}
    engine.answer("suggest", found(("starter", 0.6), status="stopped"))
    assert suggestion.words.text() == "Stopped; nothing was changed."
    click(qtbot, suggestion.button)
    qtbot.waitUntil(lambda: sum(request["verb"] == "suggest" for request in engine.requests) == 2)
    engine.refuse("suggest", "labels: no object")
    assert suggestion.words.text() == "labels: no object"
    assert suggestion.button.text() == "Suggest"
    assert widget.value().model == before


def test_a_preview_leaves_the_active_layer_and_the_camera_alone(widget, viewer, qtbot, tmp_path):
    with_sample(widget, qtbot)
    run_dir = train(widget, qtbot)
    widget.running.preview.setCurrentIndex(widget.running.preview.findText("cells 2"))
    viewer.layers.selection = {viewer.layers["labels 1"]}
    viewer.scene.camera.zoom = 3.3
    widget.controller.engine.tell(started(run_dir), *an_epoch(0, 0.9, 0))
    qtbot.waitUntil(lambda: any(request["verb"] == "preview" for request in widget.controller.engine.requests))
    file = tmp_path / "preview.npy"
    np.save(file, np.ones((256, 256), np.uint32))
    widget.controller.engine.answer("preview", {"labels": str(file), "objects": 1})
    assert "preview of the training" in viewer.layers
    assert viewer.layers.selection == {viewer.layers["labels 1"]}
    assert viewer.scene.camera.zoom == pytest.approx(3.3)


def test_colours_follow_the_theme(widget, viewer):
    dark = widget.computer.gauge.colours.text
    viewer.theme = "light"
    QApplication.processEvents()
    assert widget.computer.gauge.colours.text != dark
    viewer.theme = "dark"
