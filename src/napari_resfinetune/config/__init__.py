"""Floor 0: what a run is, without torch and without Qt."""

from napari_resfinetune.config.arguments import as_config, not_given
from napari_resfinetune.config.files import (
    make_config,
    merge,
    parse_overrides,
    read_config,
    read_yaml,
    validated,
    write_config,
)
from napari_resfinetune.config.schema import (
    AugmentConfig,
    DataConfig,
    FinetuneConfig,
    FrozenStrategy,
    FullStrategy,
    LateLoraStrategy,
    LateStrategy,
    LoraStrategy,
    ResourcesConfig,
    Strategy,
    TrainingConfig,
)

__all__ = [
    "AugmentConfig",
    "DataConfig",
    "FinetuneConfig",
    "FrozenStrategy",
    "FullStrategy",
    "LateLoraStrategy",
    "LateStrategy",
    "LoraStrategy",
    "ResourcesConfig",
    "Strategy",
    "TrainingConfig",
    "as_config",
    "make_config",
    "merge",
    "not_given",
    "parse_overrides",
    "read_config",
    "read_yaml",
    "validated",
    "write_config",
]
