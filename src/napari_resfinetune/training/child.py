"""Training in processes of its own: nothing that happens there can take the caller with it.

The child is this very module. It reads one request as a line of JSON, runs it inside its limits, and writes events as
lines of JSON, the result last. ``stop``, or the end of its input, asks it to save and stop, so a child whose parent is
gone ends by itself. Arrays cross as ``.npy`` files. Nothing here imports torch before the child has its request.
"""

from __future__ import annotations

import contextlib
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from napari_resfinetune import errors
from napari_resfinetune.config import FinetuneConfig, make_config
from napari_resfinetune.errors import DataError, ResFinetuneError, ResourceError, TrainingError
from napari_resfinetune.events import Event, Failed, OnEvent, StopToken, event_from_dict
from napari_resfinetune.training.ranks import check_processes
from napari_resfinetune.training.result import TrainResult
from napari_resfinetune.training.run_folder import RunFolder

LOOPBACK = {"linux": "lo", "darwin": "lo0"}
STOP = "stop"
LOOK_SECONDS = 0.1
END_SECONDS = 60.0

# Named and not imported: it stands above this floor, and is needed in the child alone.
END_RUN = "napari_resfinetune.reporting.ending:end_run"


def train_in_child(
    config: FinetuneConfig,
    images: Any = None,
    labels: Any = None,
    *,
    on_event: OnEvent | None = None,
    stop: StopToken | None = None,
    resume: bool = False,
    keep_levers: bool = True,
    processes: int = 1,
) -> TrainResult:
    """Train in a process of its own, which keeps the limits and gives all memory back when it ends.

    Parameters
    ----------
    config, images, labels, on_event, stop, resume, keep_levers
        As for `session.run_training`; `on_event` is called in this process and thread.
    processes
        So many share every step (`training.ranks`), on CPUs or with a card each. The first of them writes and speaks.

    Raises
    ------
    ResFinetuneError
        What a child raised; `TrainingError` when one was killed.
    """
    check_processes(config, processes)
    run_dir = Path(str(config.output))
    with tempfile.TemporaryDirectory(prefix="resfinetune-") as folder:
        request = {
            "config": config.model_dump(mode="json"),
            "images": _write_arrays(images, Path(folder), "images"),
            "labels": _write_arrays(labels, Path(folder), "labels"),
            "resume": resume,
            "keep_levers": keep_levers,
        }
        children = [_begin(environment) for environment in _environments(processes)]
        child = children[0]
        try:
            for each in children:
                _send(each, json.dumps(request))
            with _watching(stop, children):
                outcome = _listen(child, on_event)
        except KeyboardInterrupt:  # the second one: at once
            for each in children:
                each.kill()
            raise
        finally:
            for each in children:
                _end(each)
    if outcome is None:
        resumable = RunFolder(run_dir).can_resume
        failed = Failed(_killed(child.returncode, run_dir, resumable), resumable=resumable)
        _append_event(run_dir / "events.jsonl", failed)
        if on_event is not None:
            on_event(failed)
        raise TrainingError(failed.error)
    if "error" in outcome:
        raise getattr(errors, outcome["error"], TrainingError)(*outcome["problems"])
    result = outcome["result"]
    return TrainResult(**{**result, "run_dir": Path(result["run_dir"])})


def _environments(processes: int) -> list[dict[str, str] | None]:
    """Return what tells each of several processes where to meet, as torchrun does; `None` is the environment as it is.

    A single process must not take part in a meeting that this one takes part in.
    """
    if processes == 1:
        return [{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    # gloo would look for the address of the computer's name, which not every computer has.
    if sys.platform in LOOPBACK:
        shared["GLOO_SOCKET_IFNAME"] = LOOPBACK[sys.platform]
    return [
        {**os.environ, **{name: str(value) for name, value in {**shared, "RANK": r, "LOCAL_RANK": r}.items()}}
        for r in range(processes)
    ]


def _begin(environment: dict[str, str] | None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "napari_resfinetune.training.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=environment,
    )


def _listen(child: subprocess.Popen[str], on_event: OnEvent | None) -> dict[str, Any] | None:
    """Hand on events until the child is done; `None` when it ended without saying how."""
    for line in child.stdout or ():
        try:
            message = json.loads(line)
        except ValueError:  # the last line of a child that was killed while it wrote
            continue
        if "event" not in message:
            return dict(message)
        if on_event is not None:
            on_event(event_from_dict(message))
    return None


@contextlib.contextmanager
def _watching(stop: StopToken | None, children: Sequence[subprocess.Popen[str]]) -> Iterator[None]:
    """Tell the first child when a stop is asked for, and end it when it waits in vain for another that has ended."""
    done = threading.Event()

    def look() -> None:
        told, lost_since = False, None
        while not done.wait(LOOK_SECONDS):
            if stop is not None and stop.stopped and not told:
                told = True
                _send(children[0], STOP)
            if any(child.poll() not in (None, 0) for child in children[1:]):
                # It notices by itself and saves, unless it hangs in the driver of its card.
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > END_SECONDS:
                    children[0].kill()
                    return

    thread = threading.Thread(target=look, name="watch training", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _send(child: subprocess.Popen[str], line: str) -> None:
    if child.stdin is None:
        return
    with contextlib.suppress(OSError):  # it has ended; listening tells how
        child.stdin.write(line + "\n")
        child.stdin.flush()


def _end(child: subprocess.Popen[str]) -> None:
    """Let the child save and end, and kill it if it does not."""
    for pipe in (child.stdin, child.stdout):  # a child must not wait for somebody to read
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()
    try:
        child.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _killed(status: int | None, run_dir: Path, resumable: bool) -> str:
    what = f"ended with status {status}"
    if status is not None and status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        what = f"was killed ({name})"
        if -status == getattr(signal, "SIGKILL", None):
            what += ", by somebody or by the system, which does so when memory runs out"
    again = f"its last checkpoint is whole; go on with: resfinetune resume {run_dir}"
    if not resumable:
        again = f"there is no checkpoint yet; begin again with: resfinetune resume {run_dir}"
    if not (run_dir / "config.yaml").is_file():
        again = "nothing was written yet; start it again"
    return f"{run_dir}: the training process {what}; {again}"


def _append_event(path: Path, event: Event) -> None:
    """Add an event to a log whose last line may be torn."""
    with contextlib.suppress(OSError):
        if path.is_file():
            torn = path.read_bytes()[-1:] != b"\n"
            with path.open("a", encoding="utf-8") as file:
                file.write(("\n" if torn else "") + json.dumps(event.to_dict(), ensure_ascii=False) + "\n")


def _write_arrays(arrays: Any, folder: Path, name: str) -> list[str] | None:
    if arrays is None:
        return None
    import numpy as np

    files = []
    for number, array in enumerate(arrays if isinstance(arrays, Sequence) else [arrays]):
        file = folder / f"{name}-{number}.npy"
        try:
            np.save(file, np.asarray(array), allow_pickle=False)
        except ValueError as error:
            raise DataError(f"{name}: number {number + 1} is not an array of numbers ({error})") from None
        except OSError as error:
            raise ResourceError(f"{folder}: no room to hand {name} on ({error}); free disk space") from None
        files.append(str(file))
    return files


def _read_arrays(files: list[str] | None) -> Any:
    if files is None:
        return None
    import numpy as np

    return [np.load(file, allow_pickle=False) for file in files]


def main() -> None:
    """Be the child."""
    # Both are the parent's to understand; when it ends, so does our input, and we stop.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # Whatever libraries print goes where messages for people go.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # Loader processes close their standard input when they begin, and would wait for ever for one that is being read.
    orders = os.fdopen(os.dup(0), encoding="utf-8")
    sys.stdin = open(os.devnull)  # noqa: SIM115 - it stays
    line = orders.readline()
    if not line:
        return
    request = json.loads(line)
    stop = StopToken()
    threading.Thread(target=_obey, args=(orders, stop), name="parent", daemon=True).start()

    def say(message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the parent is gone; the end of our input stops the run
            out.write(json.dumps(message, ensure_ascii=False) + "\n")
            out.flush()

    try:
        from napari_resfinetune.training.session import run_training

        result = run_training(
            make_config(request["config"]),
            _read_arrays(request["images"]),
            _read_arrays(request["labels"]),
            on_event=lambda event: say(event.to_dict()),
            stop=stop,
            resume=request["resume"],
            keep_levers=request["keep_levers"],
            enforce=True,
            ending=pkgutil.resolve_name(END_RUN),
        )
        say({"result": result.to_dict()})
    except ResFinetuneError as error:
        known = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
        say({"error": known.__name__, "problems": list(error.problems)})


def _obey(orders: IO[str], stop: StopToken) -> None:
    """Stop when told to, and when nobody is there any more to tell."""
    for line in orders:
        if line.strip() == STOP:
            break
    stop.stop()


if __name__ == "__main__":
    main()
