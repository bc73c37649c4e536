"""Freed memory is kept or returned as asked, and returned at the end."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys, numpy as np
from napari_resfinetune.planning import freed_memory, process_memory_gb

def fill_and_free():
    blocks = [np.ones(4_000_000) for _ in range(10)]  # 32 MB each
    del blocks

fill_and_free()
before = process_memory_gb()
with freed_memory(sys.argv[1]):
    fill_and_free()
    print(process_memory_gb() - before)
print(process_memory_gb() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be told")
@pytest.mark.parametrize("what", ["keep", "return"])
def test_freed_memory_is_kept_or_returned(what):
    done = subprocess.run([sys.executable, "-c", PROGRAM, what], capture_output=True, text=True, check=True)
    inside, after = (float(line) for line in done.stdout.split())
    assert (inside > 0.3) == (what == "keep")
    assert after < 0.05
