"""The section "Images": pairs from layers or folders, their problems with what mends them, and the split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from magicgui.types import FileDialogMode
from magicgui.widgets import Container, FileEdit
from napari.layers import Image, Labels
from qtpy.compat import isalive
from qtpy.QtCore import QEvent, QObject, QSize, Qt, Signal
from qtpy.QtGui import QDragEnterEvent, QDropEvent, QIcon, QImage, QKeyEvent, QPixmap
from qtpy.QtWidgets import (
    QComboBox,
    QGridLayout,
    QHBoxLayout,
    QHeaderView,
    QLabel,
    QPushButton,
    QTreeWidget,
    QTreeWidgetItem,
    QVBoxLayout,
    QWidget,
)

from napari_resfinetune.widgets.controller import Controller
from napari_resfinetune.widgets.draft import PairItem
from napari_resfinetune.widgets.finetune.pair_check import PairCheck
from napari_resfinetune.widgets.pairing import add_sample_cells, best_labels, pairs_of_layers
from napari_resfinetune.widgets.parts import Words, heading
from napari_resfinetune.widgets.theme import connect_for_life, follow_layers
from napari_resfinetune.words import counted

# Heights in the list: a pair, a problem, and all of it.
ROW_PX, PROBLEM_PX, MOST_PX = 31, 52, 250
NUMBER = Qt.ItemDataRole.UserRole
# What can be mended without a doubt, and what the button says.
MENDABLE = {
    "foreground-mask": "Separate objects",
    "semantic-labels": "Separate objects",
    "split-objects": "Separate pieces",
    "small-objects": "Drop specks",
    "shape-mismatch": "Crop both",
}
EMPTY = "Add an image with labels to begin."
NO_LABELS = (
    "No labels yet? Segment an image first, correct the result, then come back. Labels that were opened as an image: "
    "right-click the layer, Convert to Labels."
)


class ImagesSection(QWidget):
    """Edits the pairs of the draft.

    Parameters
    ----------
    controller
        Of the viewer.
    """

    checked = Signal(object)
    """What the engine said about the pairs: see `check` of the engine."""
    failed = Signal()
    """They could not be looked at: see `problem`."""

    def __init__(self, controller: Controller, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._controller, self._draft = controller, controller.draft
        self.report: dict[str, Any] | None = None
        # Why the pairs could not be looked at.
        self.problem = ""
        # What could not be paired when images were last added, in words.
        self._left_out = ""
        self.setAcceptDrops(True)
        self._check = PairCheck(controller, self)
        self._check.answered.connect(self._answered)
        self._check.failed.connect(self._fail)
        self._build()
        self._draft.pairs_changed.connect(self._pairs_changed)
        follow_layers(controller.viewer, self._layers_changed)
        connect_for_life(controller.viewer.layers.events.renamed, self._show_rows)
        self._layers_changed()
        self._pairs_changed()

    def _build(self) -> None:
        viewer = self._controller.viewer
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(4)
        layout.addWidget(heading("Images"))
        self.hint = Words(viewer, EMPTY)
        layout.addWidget(self.hint)
        self.sample_button = QPushButton("Load sample cells")
        self.sample_button.setToolTip("Three made-up images of cells with labels, to try everything out")
        self.sample_button.clicked.connect(self._load_sample)
        self.segment_button = QPushButton("Segment first…")
        self.segment_button.clicked.connect(self._segment_first)
        first = QHBoxLayout()
        first.addWidget(self.sample_button)
        first.addWidget(self.segment_button)
        layout.addLayout(first)
        layout.addWidget(self._build_tree())
        self.note = Words(viewer, tone="muted")
        layout.addWidget(self.note)
        self.again_button = QPushButton("Look again")
        self.again_button.setVisible(False)
        self.again_button.clicked.connect(self._pairs_changed)
        layout.addWidget(self.again_button)
        layout.addLayout(self._build_adding())

    def _build_tree(self) -> QTreeWidget:
        self.tree = QTreeWidget()
        self.tree.setColumnCount(3)
        self.tree.setHeaderHidden(True)
        self.tree.setRootIsDecorated(False)
        self.tree.setIndentation(0)
        self.tree.setIconSize(QSize(28, 28))
        self.tree.setAccessibleName("training images")
        self.tree.setToolTip("Click train / held out to move an image to the other side; Delete removes it")
        self.tree.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        header = self.tree.header()
        header.setStretchLastSection(False)
        header.setSectionResizeMode(0, QHeaderView.ResizeMode.Stretch)
        for column in (1, 2):
            header.setSectionResizeMode(column, QHeaderView.ResizeMode.ResizeToContents)
        self.tree.itemClicked.connect(self._clicked)
        self.tree.itemActivated.connect(self._clicked)
        self.tree.installEventFilter(self)
        return self.tree

    def _build_adding(self) -> QGridLayout:
        self.image_combo, self.labels_combo = QComboBox(), QComboBox()
        for combo, name in ((self.image_combo, "image layer"), (self.labels_combo, "labels layer")):
            combo.setAccessibleName(name)
            combo.setToolTip(f"the {name} of a pair")
            combo.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
            combo.setMinimumContentsLength(6)
        self.image_combo.currentIndexChanged.connect(self._suggest_labels)
        self.add_button = QPushButton("Add pair")
        self.add_button.setToolTip("Add this image with these labels to the training images")
        self.add_button.clicked.connect(self._add_pair)
        self.add_all_button = QPushButton("Add all layers")
        self.add_all_button.setToolTip("Add every image layer that has a labels layer of its size")
        self.add_all_button.clicked.connect(self._add_all)
        self.folders_button = QPushButton("Folders…")
        self.folders_button.setCheckable(True)
        self.folders_button.setToolTip("Images and labels from two folders, paired by file name; or drop folders here")
        images, labels = (
            FileEdit(mode=FileDialogMode.EXISTING_DIRECTORY, name=name, label=name) for name in ("images", "labels")
        )
        self.folders = Container(widgets=[images, labels])
        self.folders.native.setVisible(False)
        self.folders_button.toggled.connect(self.folders.native.setVisible)
        self.folders.changed.connect(self._folders_chosen)
        grid = QGridLayout()
        grid.setSpacing(4)
        grid.addWidget(self.image_combo, 0, 0)
        grid.addWidget(self.labels_combo, 0, 1)
        grid.addWidget(self.add_button, 0, 2)
        buttons = QHBoxLayout()
        buttons.addWidget(self.add_all_button)
        buttons.addWidget(self.folders_button)
        grid.addLayout(buttons, 1, 0, 1, 3)
        grid.addWidget(self.folders.native, 2, 0, 1, 3)
        grid.setColumnStretch(0, 1)
        grid.setColumnStretch(1, 1)
        return grid

    def has_errors(self) -> bool:
        """Whether something must be mended before a training can start."""
        if self.report is None:
            return False
        rows = [problem for row in self.report["pairs"] for problem in row["problems"]]
        return any(problem["level"] == "error" for problem in [*rows, *self.report["problems"]])

    # What changes the pairs

    def _load_sample(self) -> None:
        self.sample_button.setEnabled(False)
        self.note.say("Making sample cells…", "muted")

        def add(found: dict[str, Any]) -> None:
            self.sample_button.setEnabled(True)
            self._draft.add(add_sample_cells(self._controller.viewer, found["samples"]))

        def failed(problems: list[str]) -> None:
            self.sample_button.setEnabled(True)
            self.note.say("\n".join(problems), "bad")

        arrays = str(self._controller.arrays)
        self._controller.engine.ask("samples", owner=self, on_result=add, on_error=failed, output=arrays)

    def _segment_first(self) -> None:
        self._controller.open("Segment")

    def _in_words(self, text: str) -> str:
        return self._controller.exporter.in_words(text)

    def _add_pair(self) -> None:
        image, labels = self.image_combo.currentData(), self.labels_combo.currentData()
        if image is not None and labels is not None:
            self._left_out = ""
            self._draft.add([PairItem(image, labels)])
        else:
            self.note.say("Choose the labels of this image; none has its size.", "warning")

    def _add_all(self, *_: Any) -> None:
        pairs, left_out = pairs_of_layers(self._controller.viewer.layers)
        self._left_out = f"Left out: {', '.join(left_out)}, without labels of its size." if left_out else ""
        if not self._draft.add(pairs):
            self.note.say(self._left_out or "All of them are there already.", "warning")

    def _folders_chosen(self) -> None:
        images, labels = self.folders["images"].value, self.folders["labels"].value
        if all(str(path) not in ("", ".") and Path(str(path)).is_dir() for path in (images, labels)):
            self.add_folders(str(images), str(labels))

    def add_folders(self, images: str, labels: str) -> None:
        """Add the pairs of two folders."""

        def add(found: dict[str, Any]) -> None:
            self._left_out = "\n".join(problem["message"] for problem in found["problems"])
            if not self._draft.add([PairItem(pair["image"], pair["labels"]) for pair in found["pairs"]]):
                self.note.say(self._left_out or "All of them are there already.", "warning")

        self._controller.engine.ask(
            "open_folders",
            owner=self,
            on_result=add,
            on_error=lambda problems: self.note.say("\n".join(problems), "bad"),
            images=images,
            labels=labels,
        )

    def dragEnterEvent(self, event: QDragEnterEvent) -> None:
        """Take files and folders."""
        if event.mimeData().hasUrls():
            event.acceptProposedAction()

    def dropEvent(self, event: QDropEvent) -> None:
        """Take a folder with "images" and "labels" in it, or those two."""
        self.drop([Path(url.toLocalFile()) for url in event.mimeData().urls()])
        event.acceptProposedAction()

    def drop(self, paths: list[Path]) -> None:
        """Find images and labels among what was dropped."""
        folders = [path for path in paths if path.is_dir()]
        if len(folders) == 1:
            folders = [path for path in folders[0].iterdir() if path.is_dir()]
        labels = [path for path in folders if any(word in path.name.lower() for word in ("label", "mask", "seg"))]
        images = [path for path in folders if path not in labels]
        if len(labels) == 1 and len(images) == 1:
            self.add_folders(str(images[0]), str(labels[0]))
        else:
            self.note.say("Drop two folders, one with images and one called labels or masks.", "warning")

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        """Remove the chosen pair with the Delete key."""
        deleting = isinstance(event, QKeyEvent) and event.type() == QEvent.Type.KeyPress
        if deleting and event.key() in (Qt.Key.Key_Delete, Qt.Key.Key_Backspace):
            item = self.tree.currentItem()
            if item is not None:
                self._remove(item.data(0, NUMBER))
            return True
        return False

    def _remove(self, number: int) -> None:
        self._draft.set_pairs(pair for place, pair in enumerate(self._draft.pairs) if place != number)

    def _clicked(self, item: QTreeWidgetItem, column: int) -> None:
        """Move a pair to the other side of the split."""
        if column != 2 or item.parent() is not None or self.report is None:
            return
        parts = [row["part"] for row in self.report["pairs"]]
        if None in parts or "both" in parts or len(parts) != len(self._draft.pairs):
            return
        # Once one is chosen by hand, all are.
        sides = [part == "held out" for part in parts]
        number = item.data(0, NUMBER)
        sides[number] = not sides[number]
        self._draft.set_pairs(
            PairItem(pair.image, pair.labels, side, pair.round)
            for pair, side in zip(self._draft.pairs, sides, strict=True)
        )

    # What follows from a change

    def _layers_changed(self, event: Any = None) -> None:
        layers = list(self._controller.viewer.layers)
        for combo, kind in ((self.image_combo, Image), (self.labels_combo, Labels)):
            chosen = combo.currentData()
            combo.clear()
            for layer in layers:
                if type(layer) is kind:
                    combo.addItem(layer.name, layer)
            combo.setCurrentIndex(max(0, combo.findData(chosen)))
        there = [pair for pair in self._draft.pairs if all(layer in layers for layer in pair.layers)]
        if len(there) != len(self._draft.pairs):
            self._draft.set_pairs(there)
        self._suggest_labels()
        self._show_what_is_possible()

    def _suggest_labels(self, index: int = 0) -> None:
        image = self.image_combo.currentData()
        if image is not None:
            best = best_labels(image, self._controller.viewer.layers)
            self.labels_combo.setCurrentIndex(self.labels_combo.findData(best) if best is not None else -1)

    def _show_what_is_possible(self) -> None:
        images, labels = self.image_combo.count() > 0, self.labels_combo.count() > 0
        for widget in (self.image_combo, self.labels_combo, self.add_button, self.add_all_button):
            widget.setVisible(images and labels)
        empty = not self._draft.pairs
        self.tree.setVisible(not empty)
        self.sample_button.setVisible(empty)
        self.segment_button.setVisible(empty and images and not labels)
        self.hint.say((NO_LABELS if images and not labels else EMPTY) if empty else "")

    def _pairs_changed(self, *_: Any) -> None:
        self.report, self.problem = None, ""
        self.again_button.setVisible(False)
        self._show_rows()
        self._show_what_is_possible()
        self.note.say("")
        self._check.pairs_changed()

    def check_again(self) -> None:
        """Check soon, if settings have changed that matter."""
        self._check.settings_changed()

    def _fail(self, problems: list[str]) -> None:
        """Say why the pairs could not be looked at, and let that be tried again."""
        self.problem = "The images could not be looked at."
        self.note.say(self._in_words("\n".join(problems)), "bad")
        self.again_button.setVisible(True)
        self.failed.emit()

    def _answered(self, report: dict[str, Any]) -> None:
        self.report, self.problem = report, ""
        self.again_button.setVisible(False)
        self._show_rows()
        problems = report["problems"]
        said = problems[0]["message"] if problems else report["note"]
        tone = "bad" if problems else "warning" if self._left_out else "muted"
        self.note.say(self._in_words("\n".join(each for each in (said, self._left_out) if each)), tone)
        self.checked.emit(report)

    # What is shown

    def _show_rows(self, event: Any = None) -> None:
        self.tree.clear()
        rows = self.report["pairs"] if self.report is not None else [None] * len(self._draft.pairs)
        for number, (pair, row) in enumerate(zip(self._draft.pairs, rows, strict=True)):
            objects = "…" if row is None else counted(row["objects"], "object") if row["objects"] else ""
            part = "" if row is None or row["part"] is None else row["part"]
            item = QTreeWidgetItem([f"{pair.image_name}\n{pair.labels_name}", objects, part])
            item.setData(0, NUMBER, number)
            if row is not None:
                item.setIcon(0, _thumbnail(row["thumbnail"]))
                shape = " x ".join(map(str, row["shape"]))
                item.setToolTip(0, f"{pair.image_name}: {shape} ({row['axes']})")
            item.setToolTip(2, "click to move it to the other side")
            item.setTextAlignment(1, Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter)
            self.tree.addTopLevelItem(item)
            for problem in sorted(row["problems"] if row else [], key=lambda problem: problem["level"]):
                self._add_problem(item, number, problem)
            item.setExpanded(True)
        height = sum(ROW_PX for _ in rows) + sum(PROBLEM_PX * len(row["problems"]) for row in rows if row) + 6
        self.tree.setFixedHeight(max(44, min(MOST_PX, height)))

    def _add_problem(self, item: QTreeWidgetItem, number: int, problem: dict[str, Any]) -> None:
        child = QTreeWidgetItem()
        child.setData(0, NUMBER, number)
        item.addChild(child)
        child.setFirstColumnSpanned(True)
        holder = QWidget()
        row = QHBoxLayout(holder)
        row.setContentsMargins(8, 2, 2, 2)
        tone = "bad" if problem["level"] == "error" else "warning"
        mark = QLabel("✕" if problem["level"] == "error" else "!")
        mark.setFixedWidth(16)
        found = self._in_words(problem["found"])
        words = Words(self._controller.viewer, f"{found[:1].upper()}{found[1:]}", tone)
        words.setToolTip(self._in_words(problem["message"]))
        row.addWidget(mark)
        row.addWidget(words, 1)
        if problem["code"] in MENDABLE:
            button = QPushButton(MENDABLE[problem["code"]])
            button.setToolTip("Makes a new layer; yours stays as it is")
            button.clicked.connect(lambda: self._mend(number, problem["code"], button))
            row.addWidget(button)
        elif problem["level"] == "error":  # the way out that there always is
            button = QPushButton("Leave out")
            button.setToolTip("Takes the pair out of the list; your layers and files stay as they are")
            button.clicked.connect(lambda: self._remove(number))
            row.addWidget(button)
        child.setSizeHint(0, QSize(100, PROBLEM_PX))
        self.tree.setItemWidget(child, 0, holder)

    def _mend(self, number: int, code: str, button: QPushButton) -> None:
        pair = self._draft.pairs[number]
        image, labels = self._check.files[number]
        button.setEnabled(False)

        def mended(answer: dict[str, Any]) -> None:
            if pair not in self._draft.pairs:  # it was removed meanwhile
                return
            viewer = self._controller.viewer
            new = {"image": pair.image, "labels": pair.labels}
            for name, add in (("image", viewer.add_image), ("labels", viewer.add_labels)):
                if name in answer:
                    made = np.load(answer[name])
                    Path(answer[name]).unlink(missing_ok=True)
                    old = new[name]
                    placed = {} if isinstance(old, str) else {"scale": old.scale, "translate": old.translate}
                    title = pair.image_name if name == "image" else pair.labels_name
                    new[name] = add(made, name=f"{Path(title).stem} mended", **placed)
            self._draft.change_pair(self._draft.pairs.index(pair), **new)
            self.note.say(answer["note"])

        def failed(problems: list[str]) -> None:
            self.note.say("\n".join(problems), "bad")
            if isalive(button):
                button.setEnabled(True)

        self._controller.engine.ask(
            "mend",
            owner=self,
            on_result=mended,
            on_error=failed,
            code=code,
            image=image,
            labels=labels,
            output=str(self._controller.arrays),
            min_object_px=self._draft.config.data.min_object_px,
        )


def _thumbnail(rows: list[list[int]] | None) -> QIcon:
    if not rows:
        return QIcon()
    gray = np.ascontiguousarray(rows, np.uint8)
    image = QImage(gray.data, gray.shape[1], gray.shape[0], gray.strides[0], QImage.Format.Format_Grayscale8)
    return QIcon(QPixmap.fromImage(image.copy()))
