"""Features of the frozen part are computed once, are those of this image and these weights, and never wrong."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr

from napari_resfinetune import models
from napari_resfinetune.training import feature_cache
from napari_resfinetune.training.feature_cache import SUBFOLDER, FeatureCache, name_of_part
from napari_resfinetune.training.step import StepSettings, backward_samples, frozen_units
from test_step import INPUT_PX, Losses, gradients, plan, sample, small_model
from test_strategies import strategy

SETTINGS = StepSettings(input_px=INPUT_PX)
OLD, NEW = "a" * 32, "b" * 32


def cache(folder: Path, part: str = "part", max_gb: float = 1.0) -> tuple[FeatureCache, list[str]]:
    said: list[str] = []
    return FeatureCache(folder, part, max_gb, said.append), said


def pixels(seed: int) -> torch.Tensor:
    return torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(100 + seed)).to(dtype)


def never() -> torch.Tensor:
    raise AssertionError("computed again")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_kept_comes_back_as_it_was_given(tmp_path, dtype):
    kept, said = cache(tmp_path)
    first = kept.get(pixels(0), lambda: tokens(0, dtype))
    assert first.dtype == dtype
    torch.testing.assert_close(first, tokens(0, dtype), rtol=1e-3, atol=1e-4)
    again, _ = cache(tmp_path)
    assert torch.equal(again.get(pixels(0), never), first)
    assert (kept.misses, again.hits, said) == (1, 1, [])


def test_other_pixels_and_other_parts_are_not_taken(tmp_path):
    kept, _ = cache(tmp_path)
    kept.get(pixels(0), lambda: tokens(0))
    changed = pixels(0)
    changed[0, 0, 0] += 1e-6
    assert torch.allclose(kept.get(changed, lambda: tokens(1)), tokens(1), atol=1e-2)
    other, _ = cache(tmp_path, "other part")
    assert torch.allclose(other.get(pixels(0), lambda: tokens(2)), tokens(2), atol=1e-2)
    assert (kept.misses, other.misses) == (2, 1)


@pytest.mark.parametrize("architecture", ["vit_b", "vit_t"])
def test_a_part_is_its_weights_and_its_preprocessing(architecture):
    model, _ = small_model(architecture)
    models.apply_strategy(model, strategy("frozen"), "masks")
    units = frozen_units(model, SETTINGS)
    name = name_of_part(units, input_px=80)
    assert name == name_of_part(frozen_units(model, SETTINGS), input_px=80)
    assert name != name_of_part(units, input_px=64)
    assert name != name_of_part(units[:-1], input_px=80)
    for key, tensor in model.sam.image_encoder.state_dict().items():
        if tensor.dtype == torch.float32:
            old = tensor.clone()
            tensor.view(-1)[0] += 1e-3
            changed = name_of_part(units, input_px=80)
            tensor.copy_(old)
            # No embedding depends on the head that vit_t carries for other tools.
            assert (changed == name) == key.startswith(("head.", "norm_head.")), key
    assert name == name_of_part(units, input_px=80)


@pytest.mark.parametrize("damage", ["bit", "half", "gone", "header", "no dtype"])
def test_a_damaged_entry_is_computed_again_and_mended(tmp_path, damage):
    kept, said = cache(tmp_path)
    expected = kept.get(pixels(0), lambda: tokens(0))
    (entry,) = (path for path in (tmp_path / SUBFOLDER / "part").iterdir())
    (chunk,) = (path for path in entry.rglob("*") if path.is_file() and path.name != "zarr.json")
    content = chunk.read_bytes()
    if damage == "bit":
        chunk.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    elif damage == "half":
        chunk.write_bytes(content[: len(content) // 2])
    elif damage == "gone":
        chunk.unlink()
    elif damage == "header":
        (entry / "zarr.json").write_text("{")
    else:
        zarr.open_array(str(entry)).attrs.clear()
    assert torch.equal(kept.get(pixels(0), lambda: tokens(0)), expected)
    assert kept.misses == 2
    assert torch.equal(kept.get(pixels(0), never), expected)
    assert said == []


def test_a_deleted_cache_starts_again(tmp_path):
    kept, said = cache(tmp_path / "features")
    kept.get(pixels(0), lambda: tokens(0))
    shutil.rmtree(tmp_path / "features")
    kept.get(pixels(0), lambda: tokens(0))
    assert torch.equal(kept.get(pixels(0), never), tokens(0).half().float())
    assert said == []


def test_a_full_disk_is_said_once_and_nothing_is_lost(tmp_path, monkeypatch):
    kept, said = cache(tmp_path)
    kept.get(pixels(0), lambda: tokens(0))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(feature_cache.zarr, "create_array", full)
    for seed in (1, 2):
        assert torch.equal(kept.get(pixels(seed), lambda seed=seed: tokens(seed)), tokens(seed).half().float())
    assert torch.equal(kept.get(pixels(0), never), tokens(0).half().float())
    assert len(said) == 1 and "No space left" in said[0] and "every epoch" in said[0]


def test_some_of_the_disk_stays_free(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=int(1e9))
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: usage)
    kept, said = cache(tmp_path)
    kept.get(pixels(0), lambda: tokens(0))
    assert "2 GB of its disk free" in said[0]
    assert not (tmp_path / SUBFOLDER / "part").exists()


def test_it_stays_inside_its_bound_and_old_parts_make_room(tmp_path):
    size_gb = tokens(0).half().nbytes / 1e9
    old, _ = cache(tmp_path, OLD)
    old.get(pixels(0), lambda: tokens(0))
    os.utime(tmp_path / SUBFOLDER / OLD, (0, 0))
    for foreign in (tmp_path / "images", tmp_path / SUBFOLDER / "notes"):
        foreign.mkdir()
        (foreign / "a.tif").write_bytes(b"cells")
        os.utime(foreign, (0, 0))
    grown = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) / 1e9
    new, said = cache(tmp_path, NEW, max_gb=grown + 2 * size_gb)
    for seed in range(1, 9):
        new.get(pixels(seed), lambda seed=seed: tokens(seed))
    assert not (tmp_path / SUBFOLDER / OLD).exists()
    assert len(said) == 1 and "resources.feature_cache_gb" in said[0]
    assert (tmp_path / "images" / "a.tif").exists() and (tmp_path / SUBFOLDER / "notes" / "a.tif").exists()
    kept = len(list((tmp_path / SUBFOLDER / NEW).iterdir()))
    assert 1 <= kept < 8


def test_a_part_in_use_is_not_removed_for_another(tmp_path):
    used, _ = cache(tmp_path, OLD)
    used.get(pixels(0), lambda: tokens(0))
    size_gb = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) / 1e9
    other, said = cache(tmp_path, NEW, max_gb=1.1 * size_gb)
    other.get(pixels(1), lambda: tokens(1))
    assert len(said) == 1
    assert torch.equal(used.get(pixels(0), never), tokens(0).half().float())


def test_values_beyond_16_bit_are_not_kept(tmp_path):
    kept, said = cache(tmp_path)
    large = tokens(0)
    large[0, 0, 0, 0] = 1e6
    assert torch.equal(kept.get(pixels(0), lambda: large), large)
    assert torch.equal(kept.get(pixels(0), lambda: large), large)
    assert (kept.misses, said) == (2, [])


def test_what_a_crash_left_is_removed(tmp_path):
    left = tmp_path / SUBFOLDER / "part" / ".half-written"
    left.mkdir(parents=True)
    cache(tmp_path)
    assert left.exists()  # another run may be writing it
    os.utime(left, (0, 0))
    cache(tmp_path)
    assert not left.exists()


def test_several_runs_share_one_cache(tmp_path):
    errors: list[Exception] = []

    def one_run() -> None:
        try:
            kept, said = cache(tmp_path)
            for turn in range(3):
                for seed in range(6):
                    found = kept.get(pixels(seed), lambda seed=seed: tokens(seed))
                    assert torch.equal(found, tokens(seed).half().float()), (turn, seed)
            assert said == []
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=one_run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len([path for path in (tmp_path / SUBFOLDER / "part").iterdir() if not path.name.startswith(".")]) == 6


def test_a_killed_writer_leaves_nothing_that_is_read(tmp_path):
    program = (
        "import sys, torch; from pathlib import Path\n"
        "from napari_resfinetune.training.feature_cache import FeatureCache\n"
        "cache = FeatureCache(Path(sys.argv[1]), 'part', 1.0, print)\n"
        "print('ready', flush=True)\n"
        "for i in range(100000):\n"
        "    cache.get(torch.full((3, 8, 8), float(i)), lambda: torch.full((1, 64, 64, 64), float(i % 100)))\n"
    )
    child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    threading.Event().wait(0.7)
    child.kill()
    child.wait()
    child.stdout.close()
    kept, _ = cache(tmp_path)
    for i in range(50):
        wanted = torch.full((1, 64, 64, 64), float(i % 100))
        assert torch.equal(kept.get(torch.full((3, 8, 8), float(i)), lambda wanted=wanted: wanted), wanted)
    assert kept.hits > 0


# in a step


@pytest.mark.parametrize("architecture", ["vit_b", "vit_t"])
@pytest.mark.parametrize("kind", ["frozen", "late", "late_lora"])
def test_cached_and_uncached_steps_agree(architecture, kind, tmp_path):
    settings = {} if kind == "frozen" else {"blocks": 1}
    model, _ = small_model(architecture)
    models.apply_strategy(model, strategy(kind, **settings), "both")
    patch = sample()
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def step(features: Any) -> tuple[Losses, dict[str, torch.Tensor]]:
        model.load_state_dict(state)
        model.zero_grad()
        losses = backward_samples(model, [patch], [plan(patch, 1)], SETTINGS, train_instances=False, features=features)[
            0
        ]
        return losses, gradients(model)

    plain, _ = step(None)
    expected, rounded = step(InSixteenBit())
    kept, _ = cache(tmp_path)
    for found, read in (step(kept), step(kept)):
        assert found == expected
        assert read.keys() == rounded.keys()
        assert all(torch.equal(read[name], rounded[name]) for name in rounded)
    assert (kept.misses, kept.hits) == (1, 1)
    assert expected.total == pytest.approx(plain.total, rel=2e-3)


class InSixteenBit:
    """Keeps nothing, and rounds."""

    def get(self, pixels: torch.Tensor, compute: Any) -> torch.Tensor:
        tokens = compute()
        return tokens.half().to(tokens.dtype).contiguous()


@pytest.mark.parametrize("kind", ["frozen", "late"])
def test_with_features_at_hand_no_frozen_unit_runs(kind, tmp_path):
    settings = {} if kind == "frozen" else {"blocks": 1}
    model, _ = small_model("vit_b")
    models.apply_strategy(model, strategy(kind, **settings), "both")
    ran: list[str] = []
    for name, module in model.sam.image_encoder.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    patch = sample()
    kept, _ = cache(tmp_path)
    for _ in range(2):
        ran.clear()
        backward_samples(model, [patch], [plan(patch, 0)], SETTINGS, train_instances=True, features=kept)
    frozen = {"patch_embed", "blocks.0", "blocks.1"} | ({"blocks.2", "neck"} if kind == "frozen" else set())
    assert not any(name == part or name.startswith(f"{part}.") for name in ran for part in frozen)
    assert bool(ran) == (kind == "late")
