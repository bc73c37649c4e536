"""The guard in conftest.py: what it refuses and what it lets through."""

from __future__ import annotations

import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest


def test_other_machines_are_refused():
    with socket.socket() as connection, pytest.raises(OSError, match="tests do not use the network"):
        connection.connect(("192.0.2.1", 80))


def test_names_are_not_looked_up():
    with pytest.raises(OSError, match="tests do not use the network"):
        socket.create_connection(("example.org", 80))


def test_this_machine_may_talk_to_itself():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()


def test_a_child_process_cannot_download():
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen("http://example.org", timeout=5)
    code = "import urllib.request; urllib.request.urlopen('http://example.org', timeout=5)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode != 0
    assert "refused" in child.stderr or "actively" in child.stderr
