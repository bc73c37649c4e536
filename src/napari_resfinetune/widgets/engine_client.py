"""The window's side of the conversation with the engine process.

A plain thread puts lines into a queue, which a timer of the window empties. (A signal from that thread would crash when
the window goes meanwhile. With a `thread_worker` napari would ask "still running,
close?" even when the engine merely waits, and napari waits for workers without end.)
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtpy.compat import isalive
from qtpy.QtCore import QObject, QTimer, Signal

logger = logging.getLogger(__name__)

COMMAND = ("-P", "-m", "napari_resfinetune.engine")
# How long what a crashed engine left running may take to save, before it is ended.
SAVE_SECONDS = 60.0
LOOK_MS = 200
# Topic of requests that have a process of their own, which saves when the engine crashes.
TRAINING = "training"
EMPTY_MS = 15

OnResult = Callable[[dict[str, Any]], None]
OnError = Callable[[list[str]], None]


@dataclass
class _Asked:
    owner: QObject | None
    on_result: OnResult | None
    on_error: OnError | None
    on_event: OnResult | None
    topic: str | None


class EngineClient(QObject):
    """Starts the engine when it is needed, asks it, and notices when it is gone.

    Parameters
    ----------
    folder
        For its log.
    idle_seconds
        The engine ends after so long without a request, and is started again by the next.
    parent
        Qt parent.
    """

    status_changed = Signal(str)
    """One of "off", "starting", "ready", "crashed"."""
    crashed = Signal(str)
    """What happened, in words."""

    def __init__(self, folder: Path, idle_seconds: float = 20 * 60, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self.status = "off"
        self.log_file = folder / "engine.log"
        self._idle_seconds = idle_seconds
        self._process: subprocess.Popen[str] | None = None
        self._generation = 0
        self._asked: dict[int, _Asked] = {}
        self._waiting: dict[str, tuple[Any, ...]] = {}
        self._next = 1
        self._closed = False
        self._received: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._timer = QTimer(self)
        self._timer.timeout.connect(self._take_all)

    @property
    def pid(self) -> int | None:
        """Process id of the engine; `None` when there is none."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start the engine, unless it is there."""
        if self._process is not None or self._closed:
            return
        self._generation += 1
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *COMMAND, str(self._idle_seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        reader = threading.Thread(
            target=_read, args=(self._process, self._generation, self._received), name="engine reader", daemon=True
        )
        reader.start()
        self._timer.start(EMPTY_MS)
        self._set_status("starting")

    def ask(
        self,
        verb: str,
        *,
        owner: QObject | None = None,
        on_result: OnResult | None = None,
        on_error: OnError | None = None,
        on_event: OnResult | None = None,
        topic: str | None = None,
        **request: Any,
    ) -> int:
        """Send a request; exactly one of `on_result` and `on_error` is called later, unless it is superseded.

        Parameters
        ----------
        verb
            As the engine knows it.
        owner
            Nothing is called any more once this object is gone.
        on_result, on_error, on_event
            Called in this thread; `on_error` with sentences.
        topic
            Requests of the same topic supersede each other: while one is under way only the newest is kept, and answers
            to older ones are dropped.
        **request
            What the engine takes with that verb.

        Returns
        -------
        Its number, for `stop`.
        """
        number, self._next = self._next, self._next + 1
        asked = _Asked(owner, on_result, on_error, on_event, topic)
        if topic is not None and any(other.topic == topic for other in self._asked.values()):
            self._waiting[topic] = (number, verb, request, asked)
            return number
        self._send_request(number, verb, request, asked)
        return number

    def stop(self, number: int) -> None:
        """Ask a request to end early; one that still waits is dropped, and the older one of its topic ends."""
        for topic, (waiting, _, _, asked) in list(self._waiting.items()):
            if waiting == number:
                del self._waiting[topic]
                for older, other in self._asked.items():
                    if other.topic == topic:
                        other.on_result = None
                        self._send({"verb": "stop", "job": older})
                if _there(asked):
                    _deliver(asked, {"error": "ResFinetuneError", "problems": ["stopped"]})
                return
        if number in self._asked:
            self._send({"verb": "stop", "job": number})

    def close(self, wait_seconds: float = 0.0) -> None:
        """Let the engine end: a training saves first, and nobody waits for it but `wait_seconds`."""
        self._closed = True
        self._asked.clear()
        self._waiting.clear()
        process, self._process = self._process, None
        if process is None:
            return
        self._generation += 1
        self._timer.stop()
        with contextlib.suppress(OSError):
            if process.stdin is not None:
                process.stdin.close()
        if wait_seconds:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(wait_seconds)
        else:
            # Somebody must take its exit status, or it stays as a zombie.
            threading.Thread(target=process.wait, name="engine end", daemon=True).start()

    def _send_request(self, number: int, verb: str, request: dict[str, Any], asked: _Asked) -> None:
        self.start()
        self._asked[number] = asked
        self._send({"id": number, "verb": verb, **request})

    def _send(self, message: dict[str, Any]) -> None:
        if self._process is None or self._process.stdin is None:
            return
        with contextlib.suppress(OSError):  # it has ended; the reader tells how
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _take_all(self) -> None:
        while not self._received.empty():
            self._take(*self._received.get())

    def _take(self, generation: int, message: dict[str, Any] | None) -> None:
        if generation != self._generation:
            return
        if message is None:
            self._gone()
        elif "ready" in message:
            self._set_status("ready")
        elif "event" in message:
            asked = self._asked.get(message["id"])
            if asked is not None and asked.on_event is not None and _there(asked):
                asked.on_event(message["event"])
        else:
            self._answered(message)

    def _answered(self, message: dict[str, Any]) -> None:
        asked = self._asked.pop(message["id"], None)
        if asked is None:
            return
        next_one = self._waiting.pop(asked.topic, None) if asked.topic is not None else None
        if next_one is not None:
            self._send_request(*next_one)
        elif _there(asked):
            _deliver(asked, message)

    def _gone(self) -> None:
        """Understand why the engine has ended: idle, or not."""
        process, self._process = self._process, None
        if process is None:
            return
        self._timer.stop()
        code = process.wait()
        with contextlib.suppress(OSError):
            if process.stdin is not None:
                process.stdin.close()
        asked, self._asked = self._asked, {}
        waiting, self._waiting = self._waiting, {}
        if code == 0 and not asked:
            self._set_status("off")
            return
        text = f"{_how_it_ended(code)}. Your layers are as they were; it starts again when you next use it."
        self._set_status("crashed")
        self.crashed.emit(text)
        unanswered = [*asked.values(), *(entry[-1] for entry in waiting.values())]
        # A training has a child that saves what it has; only then can it be gone on with.
        trainings = [each for each in unanswered if each.topic == TRAINING]
        left = _Left(process.pid)
        _tell([each for each in unanswered if each.topic != TRAINING], text)
        if trainings and left.is_alive():
            left.wait(self, lambda: _tell(trainings, text))
        else:
            _tell(trainings, text)

    def _set_status(self, status: str) -> None:
        self.status = status
        self.status_changed.emit(status)


class _Left:
    """What a crashed engine has left running: a training, which saves and ends by itself."""

    def __init__(self, group: int) -> None:
        self.group = group
        self._since = time.monotonic()

    def is_alive(self) -> bool:
        if not hasattr(os, "killpg"):
            return False
        try:
            os.killpg(self.group, 0)
        except OSError:
            return False
        return True

    def wait(self, parent: QObject, then: Callable[[], None]) -> None:
        """Look again and again, without blocking; end the group when it takes too long."""
        timer = QTimer(parent)

        def look() -> None:
            if self.is_alive() and time.monotonic() - self._since < SAVE_SECONDS:
                return
            timer.stop()
            timer.deleteLater()
            with contextlib.suppress(OSError):
                os.killpg(self.group, signal.SIGKILL)
            then()

        timer.timeout.connect(look)
        timer.start(LOOK_MS)


def _there(asked: _Asked) -> bool:
    return asked.owner is None or isalive(asked.owner)


def _tell(unanswered: list[_Asked], text: str) -> None:
    for each in unanswered:
        if _there(each):
            _deliver(each, {"error": "ResFinetuneError", "problems": [text]})


def _deliver(asked: _Asked, message: dict[str, Any]) -> None:
    if "traceback" in message:
        logger.error("%s", message["traceback"])
    if "result" in message:
        if asked.on_result is not None:
            asked.on_result(message["result"])
    elif asked.on_error is not None:
        asked.on_error(message["problems"])


def _read(process: subprocess.Popen[str], generation: int, received: queue.SimpleQueue[tuple[int, Any]]) -> None:
    """Hand lines on until there are no more; then `None`."""
    for line in process.stdout or ():
        with contextlib.suppress(ValueError):  # the last line of one that was killed while it wrote
            received.put((generation, json.loads(line)))
    received.put((generation, None))
    if process.stdout is not None:
        process.stdout.close()


def _how_it_ended(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        why = ", perhaps because memory ran out" if name == "SIGKILL" else ""
        return f"The engine was killed ({name}{why})"
    return f"The engine ended unexpectedly (status {code})"
