"""What holds for every test: no network, no settings or caches of the person who runs it, few threads."""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import ipaddress
import os
import shutil
import socket
import tempfile
from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "dev"
OPENGL_FIXTURES = {"make_napari_viewer", "make_napari_viewer_proxy"}

# Before anything reads them: napari reads its path at import, torch its threads. Child processes inherit all of it.
_SCRATCH = Path(tempfile.mkdtemp(prefix="resfinetune-tests-"))
atexit.register(shutil.rmtree, _SCRATCH, ignore_errors=True)
os.environ.update(
    NAPARI_CONFIG=str(_SCRATCH / "napari" / "settings.yaml"),
    MICROSAM_CACHEDIR=str(_SCRATCH / "micro_sam"),
    RESFINETUNE_CACHEDIR=str(_SCRATCH / "resfinetune"),
    HF_HOME=str(_SCRATCH / "huggingface"),
    HF_HUB_OFFLINE="1",
    TORCH_HOME=str(_SCRATCH / "torch"),
    # Training sets its own number of threads; more of them than cores must not wait for each other by spinning.
    OMP_WAIT_POLICY="PASSIVE",
    # Nobody listens there, so a child process that tries to download fails at once.
    HTTP_PROXY="http://127.0.0.1:9",
    HTTPS_PROXY="http://127.0.0.1:9",
    NO_PROXY="localhost,127.0.0.1,::1",
)
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    # Test files run side by side in `make test`, one thread each; a worker inherits what was set before it.
    os.environ[_name] = "1" if "PYTEST_XDIST_WORKER" in os.environ else os.environ.get(_name, "2")
for _name in ("http_proxy", "https_proxy", "no_proxy"):
    os.environ[_name] = os.environ[_name.upper()]


class NetworkRefused(OSError):
    """A test reached for the network. An OSError, as a machine without network would raise."""


def _is_loopback(host: object) -> bool:
    if host in (None, "", "localhost", b"localhost"):
        return True
    try:
        return ipaddress.ip_address(str(host).split("%")[0]).is_loopback
    except ValueError:
        return False


def _refuse_network() -> None:
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(place: object) -> None:
        if isinstance(place, tuple) and not _is_loopback(place[0]):
            raise NetworkRefused(f"tests do not use the network, but one connects to {place[0]}")

    def guarded_connect(self, address):
        check(address)
        return connect(self, address)

    def guarded_connect_ex(self, address):
        check(address)
        return connect_ex(self, address)

    def guarded_getaddrinfo(host, *args, **kwargs):
        check((host,))
        return getaddrinfo(host, *args, **kwargs)

    socket.socket.connect = guarded_connect
    socket.socket.connect_ex = guarded_connect_ex
    socket.getaddrinfo = guarded_getaddrinfo


def pytest_configure(config: pytest.Config) -> None:
    _refuse_network()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Load triton before the first napari window.

    Mesa's software OpenGL and triton each carry an LLVM; a process in which OpenGL's came first dies when torch loads
    triton's. Loading triton alone takes a third of a second, and only sessions with a napari window pay it.
    """
    opens_window = any(OPENGL_FIXTURES & set(getattr(item, "fixturenames", ())) for item in session.items)
    if opens_window and not session.config.option.collectonly and importlib.util.find_spec("triton"):
        importlib.import_module("triton")


@pytest.fixture(scope="session")
def dev_data() -> Path:
    """Folder with the real images for development."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the real images in {SHARED_DATA}, the folder shared beside the repository")
    return SHARED_DATA


@pytest.fixture(autouse=True)
def _keeps_its_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that trains in the test's own process would leave it, and all that it starts, nice for ever."""
    monkeypatch.setattr("napari_resfinetune.planning.limits._give_way", lambda nice: None)


@pytest.fixture(scope="session")
def cells(tmp_path_factory) -> Path:
    """Folders with three small images of bright squares and their labels, and a start model."""
    from small_runs import make_cells

    return make_cells(tmp_path_factory.mktemp("cells"))


@pytest.fixture(scope="session")
def package_manifest():
    """The plugin's manifest, as npe2 reads it from the source tree."""
    from npe2 import PluginManifest

    return PluginManifest.from_file(Path(__file__).resolve().parents[1] / "src" / "napari_resfinetune" / "napari.yaml")
