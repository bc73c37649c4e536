"""Names as people say them."""

from __future__ import annotations

from pathlib import Path

from napari_resfinetune.words import short_names


def test_names_are_as_short_as_they_may_be():
    assert short_names(["starter"]) == {"starter": "starter"}
    assert short_names(["/runs/a", "/runs/b", "vit_b"]) == {"/runs/a": "a", "/runs/b": "b", "vit_b": "vit_b"}
    assert short_names(["/one/run", "/two/run"]) == {
        "/one/run": str(Path("one", "run")),
        "/two/run": str(Path("two", "run")),
    }
    assert short_names([]) == {}
