"""Export to other tools and back; nothing that a file brings is ever run."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import napari_resfinetune as rf
from napari_resfinetune.errors import ConfigError, ModelError
from napari_resfinetune.models import load_model, load_state, save_model, weights_hash

# bioimageio.spec 0.5.12 cannot write or read any model with pydantic 2.14; constraints.txt has a pair that works.
BROKEN = version("bioimageio.spec").startswith("0.5.12") and not version("pydantic") < "2.14"
META = {"patch_px": 256, "percentiles": [1.0, 99.0]}


# bioimageio.spec leaves files open.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of vit_t whose instance decoder sees one large object everywhere."""
    built = load_model("random:vit_t", decoder="new", seed=3)
    with torch.no_grad():
        convolution = built.instance_decoder.out_conv
        convolution.weight.zero_()
        convolution.bias.copy_(torch.tensor([5.0, -5.0, -5.0]))
    path = tmp_path_factory.mktemp("models") / "cells.pt"
    save_model(path, built, META)
    return path


@pytest.fixture(scope="module")
def package(model: Path) -> Path:
    if BROKEN:
        pytest.skip("bioimageio.spec 0.5.12 needs pydantic below 2.14")
    return rf.export_model(model, model.with_name("cells.zip"), authors=["A. Person"])


def same_weights(one: str | Path, other: str | Path) -> bool:
    first, second = load_state(one), load_state(other)
    return weights_hash(first.sam_state) == weights_hash(second.sam_state) and weights_hash(
        first.decoder_state or {}
    ) == weights_hash(second.decoder_state or {})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_package_passes_bioimageios_own_test(package: Path) -> None:
    """Offline: the network is refused in tests."""
    from bioimageio.core import test_model
    from bioimageio.spec import ValidationContext

    with ValidationContext(perform_io_checks=True):
        summary = test_model(package, weight_format="pytorch_state_dict", devices=["cpu"])
    assert summary.status == "passed", summary.format()
    described = yaml.safe_load(zipfile.ZipFile(package).read("rdf.yaml"))
    assert described["authors"] == [{"name": "A. Person"}]


@pytest.mark.skipif(not BROKEN, reason="the pair that does not work together is not installed")
def test_what_does_not_work_is_said(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"does not work with pydantic.*pydantic<2\.14"):
        rf.export_model(model, tmp_path / "a.zip")
    assert list(tmp_path.iterdir()) == []


def test_names_and_licences_are_those_of_the_specification(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="licen"):
        rf.export_model(model, tmp_path / "cells.zip", license="mine")


def test_there_and_back(model: Path, package: Path, tmp_path: Path) -> None:
    checkpoint = rf.export_model(package, tmp_path / "new" / "back.pt")
    assert same_weights(model, checkpoint)
    assert load_state(checkpoint).meta == META
    loaded = rf.load_model(package, decoder="required")
    assert loaded.meta == META and loaded.architecture == "vit_t"
    assert [path.name for path in checkpoint.parent.iterdir()] == ["back.pt"]
    without = tmp_path / "without.pt"
    save_model(without, load_model(model, decoder="none"))
    assert load_state(rf.export_model(without, tmp_path / "again.pt")).decoder_state is None
    with pytest.raises(ModelError, match="no instance decoder"):
        rf.export_model(without, tmp_path / "without.zip")
    assert not (tmp_path / "without.zip").exists()


def test_nothing_is_overwritten_and_the_kind_is_known(model: Path, tmp_path: Path) -> None:
    for name in ("a.pt", "a.zip", "a"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(ConfigError, match="exists already"):
            rf.export_model(model, tmp_path / name)
        assert (tmp_path / name).read_text() == "mine"
    with pytest.raises(ConfigError, match=r"\.onnx.*see docs/export\.md"):
        rf.export_model(model, tmp_path / "b.onnx")
    with pytest.raises(ConfigError, match="checkpoint, bioimageio, adapter"):
        rf.export_model(model, tmp_path / "b", kind="keras")
    with pytest.raises(ModelError, match="has no adapter"):
        rf.export_model(model.parent, tmp_path / "b")
    with pytest.raises(ConfigError, match="8 bit"):
        rf.export_model(model, tmp_path / "b.zip", test_image=np.zeros((64, 64), np.uint16))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.pt", "a.zip"]


class Bomb:
    def __reduce__(self):
        return os.mkdir, (str(Bomb.where),)


Bomb.where = Path("never")


def repack(package: Path, path: Path, content: bytes | None = None, **changes: object) -> Path:
    """Write the package anew, with other content of its weights or other entries in its description."""
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(path, "w") as new:
        described = yaml.safe_load(old.read("rdf.yaml"))
        source = described["weights"]["pytorch_state_dict"]["source"]
        described |= changes
        new.writestr("rdf.yaml", yaml.safe_dump(described))
        new.writestr(source, content if content is not None else old.read(source))
        new.writestr("evil.py", "import os; os.mkdir('never')")
    return path


def test_damage_is_said(package: Path, tmp_path: Path) -> None:
    (odd := tmp_path / "odd.zip").write_bytes(b"")
    with zipfile.ZipFile(odd, "w") as file:
        file.writestr("rdf.yaml", "timestamp: 2024-13-45")
    with pytest.raises(ModelError, match="describes no model"):
        load_state(odd)
    with zipfile.ZipFile(odd, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("rdf.yaml", yaml.safe_dump({"weights": {"pytorch_state_dict": {"source": "w.pt"}}}))
        file.writestr("w.pt", bytes(range(256)) * 500)
        start = file.getinfo("w.pt").header_offset + 40
    whole = odd.read_bytes()
    for at in (start, whole.rindex(b"PK\x01\x02")):
        odd.write_bytes(whole[:at] + b"\xff" * 8 + whole[at + 8 :])
        with pytest.raises(ModelError, match=r"odd\.zip"):
            load_state(odd)


def test_a_package_never_runs_code(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Bomb.where = tmp_path / "never"
    evil = {"source": "evil.py", "callable": "PackagedModel", "kwargs": {}}
    described = yaml.safe_load(zipfile.ZipFile(package).read("rdf.yaml"))
    weights = described["weights"]
    weights["pytorch_state_dict"]["architecture"] = evil
    assert same_weights(package, repack(package, tmp_path / "code.zip", weights=weights))
    with pytest.raises(ModelError, match="would run code"):
        load_state(repack(package, tmp_path / "pickle.zip", pickle.dumps({"model_state": Bomb()})))
    with zipfile.ZipFile(tmp_path / "yaml.zip", "w") as file:
        file.writestr("rdf.yaml", "!!python/object/apply:os.mkdir ['never']")
    with pytest.raises(ModelError, match="describes no model"):
        load_state(tmp_path / "yaml.zip")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"onnx": {"source": "a.onnx"}}, "has its weights as onnx"),
        ({"pytorch_state_dict": {"source": "../../etc/passwd"}}, "not in the package"),
        ({"pytorch_state_dict": {"source": "https://example.org/a.pt"}}, "not in the package"),
        ([], "describes no model"),
        ({"pytorch_state_dict": {"source": "rdf.yaml"}}, "not a whole checkpoint"),
    ],
)
def test_packages_that_cannot_be_used(package: Path, tmp_path: Path, weights: object, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        load_state(repack(package, tmp_path / "a.zip", weights=weights))


def test_a_damaged_package(package: Path, tmp_path: Path) -> None:
    content = bytearray(package.read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(ModelError, match="cannot be read"):
        load_state(tmp_path / "a.zip")
    (tmp_path / "b.zip").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=r"b\.zip"):
        load_state(tmp_path / "b.zip")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as file:
        file.writestr("notes.txt", json.dumps({}))
    with pytest.raises(ModelError, match=r"c\.zip"):
        load_state(tmp_path / "c.zip")
