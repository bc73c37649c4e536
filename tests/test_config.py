"""The configuration: one object, every problem at once, the same through YAML."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from napari_resfinetune.config import (
    DataConfig,
    FinetuneConfig,
    TrainingConfig,
    make_config,
    merge,
    parse_overrides,
    read_config,
    write_config,
)
from napari_resfinetune.errors import ConfigError


def test_all_problems_are_in_one_message():
    with pytest.raises(ConfigError) as caught:
        make_config(
            {
                "training": {"epochs": -1, "epoch": 3},
                "strategy": {"kind": "ful"},
                "data": {"percentiles": [5, 1]},
                "colour": "blue",
            }
        )
    assert len(caught.value.problems) == 5
    text = str(caught.value)
    assert "training.epochs: found -1" in text
    assert "unknown key 'training.epoch'; did you mean 'training.epochs'?" in text
    assert "unknown key 'colour'" in text
    assert "percentiles: found 5.0 and 1.0" in text


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        FinetuneConfig().model = "vit_t"  # type: ignore[misc]


@given(
    epochs=st.integers(1, 1000),
    rate=st.floats(1e-8, 1e-1),
    channels=st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple),
    images=st.none() | st.text(min_size=1, max_size=20) | st.lists(st.text(max_size=9), max_size=3).map(tuple),
    kind=st.sampled_from(["full", "frozen", "late", "lora", "late_lora"]),
)
@example(epochs=1, rate=1e-5, channels=None, images="a\x85b", kind="lora")
@settings(deadline=None)
def test_yaml_gives_the_same_config_back(tmp_path_factory, epochs, rate, channels, images, kind):
    config = FinetuneConfig(
        data=DataConfig(images=images, channels=channels),
        training=TrainingConfig(epochs=epochs, learning_rate=rate),
        strategy={"kind": kind},  # type: ignore[arg-type]
    )
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    write_config(config, path)
    assert read_config(path) == config


def test_overrides_reach_every_section_and_win_over_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: vit_t\ntraining: {epochs: 5, seed: 3}\nstrategy: {kind: full}\n", encoding="utf-8")
    config = read_config(path, ["training.epochs=7", "strategy.kind=frozen", "data.channels=[0, 2]"])
    assert (config.model, config.training.epochs, config.training.seed) == ("vit_t", 7, 3)
    assert config.strategy.kind == "frozen"
    assert config.data.channels == (0, 2)


@pytest.mark.parametrize("override", ["epochs", "=3", "training.epochs=[1", "training.epochs=many", "trainig.epochs=3"])
def test_a_wrong_override_is_refused(override):
    with pytest.raises(ConfigError, match=r"expected|valid|unknown"):
        make_config(parse_overrides([override]))


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "just words"])
def test_a_file_that_is_no_config_is_refused(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        read_config(path)


def test_another_kind_of_strategy_replaces_the_section():
    assert merge({"strategy": {"kind": "lora", "rank": 4}}, {"strategy": {"kind": "full"}}) == {
        "strategy": {"kind": "full"}
    }
    assert merge({"strategy": {"kind": "lora", "rank": 4}}, {"strategy": {"rank": 8}}) == {
        "strategy": {"kind": "lora", "rank": 8}
    }
