"""The engine's side of the conversation: lines of JSON in, lines of JSON out.

A request is ``{"id": 7, "verb": "plan", ...}``. Its answers carry the same id: any number of
``{"id": 7, "event": {..}}`` and then either ``"result"`` or ``"error"`` with ``"problems"``.
``{"verb": "stop", "job": 7}`` asks a request to end early. Requests wait for each other by lane: what looks at files
does not wait for a model, and a training does not wait for either. Arrays cross as ``.npy`` files that are put in place
whole.

The engine ends when its input does, since its window is gone then: a training is told to save first. It also ends when
nobody asked for anything for a while.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import IO, Any

from napari_resfinetune import errors
from napari_resfinetune.errors import ResFinetuneError
from napari_resfinetune.events import StopToken

Request = Mapping[str, Any]
Say = Callable[[dict[str, Any]], None]
Verb = Callable[[Request, Say, StopToken], dict[str, Any]]

STOP = "stop"
IDLE_SECONDS = 20 * 60.0
# Where each verb is found, and whom it waits for. Modules are loaded when they are first needed.
DATA, MODEL, TRAINING = "data", "model", "training"
VERBS: Mapping[str, tuple[str, str]] = {
    "open_folders": (DATA, "data_verbs"),
    "check": (DATA, "data_verbs"),
    "mend": (DATA, "data_verbs"),
    "samples": (DATA, "data_verbs"),
    "computer": (MODEL, "model_verbs"),
    "plan": (MODEL, "model_verbs"),
    "segment": (MODEL, "model_verbs"),
    "preview": (MODEL, "model_verbs"),
    "evaluate": (MODEL, "model_verbs"),
    "compare": (MODEL, "model_verbs"),
    "suggest": (MODEL, "model_verbs"),
    "import_model": (MODEL, "model_verbs"),
    "export_model": (MODEL, "model_verbs"),
    "train": (TRAINING, "training_verb"),
}


class Engine:
    """Takes requests and answers them.

    Parameters
    ----------
    out
        Where answers are written, one per line.
    idle_seconds
        End after so long without a request.
    """

    def __init__(self, out: IO[str], idle_seconds: float = IDLE_SECONDS) -> None:
        self._out = out
        self._writing = threading.Lock()
        self._idle_seconds = idle_seconds
        self._asked = time.monotonic()
        self._stops: dict[int, StopToken] = {}
        self._lanes: dict[str, queue.SimpleQueue[Request]] = {lane: queue.SimpleQueue() for lane in (DATA, MODEL)}
        self._trainings: list[threading.Thread] = []

    def serve(self, orders: IO[str]) -> None:
        """Answer until there is nobody to answer."""
        for lane in self._lanes:
            threading.Thread(target=self._work, args=(lane,), name=f"{lane} lane", daemon=True).start()
        threading.Thread(target=self._end_when_idle, name="idle watch", daemon=True).start()
        self._say({"ready": os.getpid()})
        for line in orders:
            with contextlib.suppress(ValueError):  # a window that was killed while it wrote
                self._take(json.loads(line))
        for stop in list(self._stops.values()):
            stop.stop()
        for training in self._trainings:
            training.join()

    def _take(self, request: Request) -> None:
        self._asked = time.monotonic()
        verb = str(request.get("verb"))
        if verb == STOP:
            stop = self._stops.get(request["job"])
            if stop is not None:
                stop.stop()
            return
        self._stops[request["id"]] = StopToken()
        lane = VERBS[verb][0] if verb in VERBS else DATA
        if lane == TRAINING:
            # Not a daemon: what it has learned is saved before the engine ends.
            training = threading.Thread(target=self._answer, args=(request,), name="training lane")
            self._trainings = [thread for thread in self._trainings if thread.is_alive()] + [training]
            training.start()
        else:
            self._lanes[lane].put(request)

    def _work(self, lane: str) -> None:
        while True:
            self._answer(self._lanes[lane].get())

    def _answer(self, request: Request) -> None:
        number, stop = request["id"], self._stops[request["id"]]
        try:
            result = _find(request["verb"])(request, lambda event: self._say({"id": number, "event": event}), stop)
            answer: dict[str, Any] = {"id": number, "result": result}
        except Exception as error:
            answer = {"id": number, **_in_words(error)}
        self._asked = time.monotonic()
        del self._stops[number]
        self._say(answer)

    def _say(self, message: dict[str, Any]) -> None:
        text = json.dumps(message)  # in ASCII, as names of files need not be UTF-8
        with self._writing, contextlib.suppress(OSError):  # the window is gone; the end of our input ends us
            self._out.write(text + "\n")
            self._out.flush()

    def _end_when_idle(self) -> None:
        while True:
            time.sleep(min(5.0, self._idle_seconds / 4))
            if not self._stops and time.monotonic() - self._asked > self._idle_seconds:
                os._exit(0)


def _find(verb: str) -> Verb:
    if verb not in VERBS:
        raise errors.ConfigError(f"{verb}: the engine knows no such request; it knows {', '.join(VERBS)}")
    function: Verb = getattr(importlib.import_module(f"napari_resfinetune.engine.{VERBS[verb][1]}"), verb)
    return function


def _in_words(error: Exception) -> dict[str, Any]:
    """Say an error as plain data; what nobody foresaw comes with its traceback."""
    if isinstance(error, ResFinetuneError):
        known = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
        return {"error": known.__name__, "problems": list(error.problems)}
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "alloc_cpu" in str(error):
        return {
            "error": "ResourceError",
            "problems": ["not enough memory for this; close other programs, or use a smaller model or image"],
        }
    problem = f"unforeseen {type(error).__name__}: {error}; please report it with what the terminal shows"
    return {"error": "ResFinetuneError", "problems": [problem], "traceback": traceback.format_exc()}


def main() -> None:
    """Be the engine: a process group of its own, so that it can be ended with all that it started."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM):  # both are the window's to understand
        signal.signal(number, signal.SIG_IGN)
    # Whatever libraries print goes to the log, and nobody but the engine reads its orders.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    orders = os.fdopen(os.dup(0), encoding="utf-8")
    sys.stdin = open(os.devnull)  # noqa: SIM115 - it stays
    Engine(out, float(sys.argv[1]) if len(sys.argv) > 1 else IDLE_SECONDS).serve(orders)
    # A model that is at work in another lane is not waited for.
    os._exit(0)
