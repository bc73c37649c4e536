"""The section "Computer": a preset, the predicted memory and time, and what could be done about them."""

from __future__ import annotations

from typing import Any

from qtpy.QtCore import QTimer, Signal
from qtpy.QtWidgets import QComboBox, QPushButton, QVBoxLayout, QWidget
from superqt import QCollapsible

from napari_resfinetune.config import FinetuneConfig
from napari_resfinetune.widgets.controller import Controller
from napari_resfinetune.widgets.finetune.advanced import AdvancedForm
from napari_resfinetune.widgets.parts import Gauge, Rows, Words, heading
from napari_resfinetune.words import gigabytes, time_range

PLAN_MS = 250
STARTING = "The engine is starting; the prediction follows."
PRESETS = ("cpu-8gb", "cpu-16gb", "cpu-32gb", "cpu-64gb", "gtx1080", "rtx5000", "v100", "rtx3090", "a100", "mps")

# Levers in few words; what they do in full is the tooltip.
LEVERS = {
    "resources.micro_batch": "fewer patches at once",
    "resources.checkpoint_instance_decoder": "some is computed twice",
    "resources.checkpoint_encoder": "some is computed twice",
    "resources.freed_memory": "freed memory returned at once",
    "resources.object_chunk": "fewer objects at once",
    "resources.workers": "fewer loader processes",
}


class ComputerSection(QWidget):
    """Shows the plan of the draft, made anew after each change.

    Parameters
    ----------
    controller
        Of the viewer.
    """

    planned = Signal(object)
    """The engine's plan, or `None` while there is none."""

    def __init__(self, controller: Controller, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._controller, self._draft = controller, controller.draft
        self.plan: dict[str, Any] | None = None
        self._planned_for: FinetuneConfig | None = None
        self.held_out = 2
        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.setInterval(PLAN_MS)
        self._timer.timeout.connect(self._ask)
        viewer = controller.viewer
        self.preset = QComboBox()
        self.preset.setAccessibleName("preset")
        self.preset.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
        self.preset.setToolTip("limits that training stays inside (resources.preset)")
        self.gauge = Gauge(viewer)
        self.gauge.setToolTip("predicted peak of the memory that decides, against what is allowed")
        self.time = Words(viewer)
        self.levers = Words(viewer, tone="muted")
        self.fix = QPushButton()
        self.fix.setVisible(False)
        self.complaint = Words(viewer, tone="bad")
        self.complaint.setVisible(False)
        self.advanced = AdvancedForm(self._draft, self.complaint)
        self._lay_out()
        self._show_presets()
        self.show_config()
        self._show_plan()
        self.preset.activated.connect(
            lambda index: self._draft.change_config({"resources": {"preset": self.preset.itemData(index)}})
        )
        self.fix.clicked.connect(self._make_it_fit)
        self._draft.config_changed.connect(self._config_changed)
        controller.computer_changed.connect(self._show_presets)
        self._timer.start()

    def _lay_out(self) -> None:
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(4)
        layout.addWidget(heading("Computer"))
        rows = Rows(layout)
        rows.add("Preset", self.preset)
        rows.add("Memory", self.gauge)
        rows.add("Time", self.time)
        layout.addWidget(self.levers)
        layout.addWidget(self.fix)
        folded = QCollapsible("Advanced")
        folded.addWidget(self.advanced.native)
        folded.layout().setContentsMargins(0, 0, 0, 0)
        layout.addWidget(folded)
        layout.addWidget(self.complaint)

    @property
    def current_plan(self) -> dict[str, Any] | None:
        """The plan, if it is that of the settings as they are now."""
        return self.plan if self._planned_for == self._draft.config else None

    def show_config(self) -> None:
        """Show what the draft says."""
        self.preset.setCurrentIndex(max(0, self.preset.findData(self._draft.config.resources.preset)))

    def set_held_out(self, regions: int) -> None:
        """Plan for so many regions to validate on."""
        if regions != self.held_out:
            self.held_out = regions
            self._timer.start()

    def plan_again(self) -> None:
        """Plan soon."""
        self._timer.start()

    def _config_changed(self) -> None:
        self.show_config()
        self._timer.start()

    def _show_presets(self) -> None:
        computer = self._controller.computer
        self.preset.clear()
        self.preset.addItem(f"Automatic: {computer['preset']}" if computer else "Automatic", "auto")
        reasons = {preset["name"]: preset["reason"] for preset in computer.get("presets", ())}
        for name in PRESETS:
            self.preset.addItem(name, name)
            self.preset.setItemData(self.preset.count() - 1, reasons.get(name, ""), 3)
        self.show_config()

    def _ask(self) -> None:
        config = self._draft.config
        self._controller.engine.ask(
            "plan",
            owner=self,
            topic="plan",
            on_result=lambda plan: self._planned(plan, config),
            on_error=self._not_planned,
            config=config.model_dump(mode="json"),
            held_out=self.held_out,
        )
        if self.current_plan is None:
            self.time.say("…")
            self.levers.say("Predicting what these settings take…" if self.plan else STARTING, "muted")

    def _planned(self, plan: dict[str, Any], config: FinetuneConfig) -> None:
        if config != self._draft.config:  # another one is on its way
            return
        self.plan, self._planned_for = plan, config
        self._show_plan()
        self.planned.emit(plan)

    def _not_planned(self, problems: list[str]) -> None:
        self.plan = None
        self._show_plan()
        self.time.say(problems[0], "bad")
        self.planned.emit(None)

    def _show_plan(self) -> None:
        plan = self.plan
        self.fix.setVisible(False)
        if plan is None:
            self.gauge.set_values(None, None)
            self.time.say("")
            self.levers.say(STARTING)
            return
        self.gauge.set_values(plan["peak_gb"], plan["limit_gb"])
        each = time_range(plan["seconds_per_epoch"], plan["seconds_per_epoch"])
        rough = "" if plan["measured"] else ", a rough guess"
        whole = time_range(plan["seconds_at_least"], plan["seconds_at_most"])
        self.time.say(f"{whole} ({each} an epoch{rough})", "text")
        self.time.setToolTip("The shorter time is that of a run that stops by itself, since it does not get better")
        self.levers.say(self._levers_in_words(plan), "muted")
        smaller = plan["smaller"]
        if not plan["fits"]:
            self.levers.say("This does not fit the memory that it may take.", "bad")
            if smaller is not None:
                self.fix.setText(f"{smaller['label']}: {gigabytes(smaller['peak_gb'])} GB")
                self.fix.setVisible(True)

    def _levers_in_words(self, plan: dict[str, Any]) -> str:
        formats = {"bf16": "16-bit numbers", "fp16": "16-bit numbers", "fp32": "32-bit numbers"}
        said = [formats[plan["precision"]], f"{plan['objects']} objects a step", f"{plan['disk_gb']:.1f} GB on disk"]
        levers = dict.fromkeys(LEVERS.get(lever["lever"], lever["lever"]) for lever in plan["levers"])
        self.levers.setToolTip("\n".join(f"{lever['lever']}: {lever['effect']}" for lever in plan["levers"]))
        text = ", ".join(said) + "."
        return text + (f" To fit: {', '.join(levers)}." if levers else "")

    def _make_it_fit(self) -> None:
        if self.plan is not None and self.plan["smaller"] is not None:
            self._draft.set_config(FinetuneConfig.model_validate(self.plan["smaller"]["config"]))
