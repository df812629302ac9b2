"""The settings of every program: frozen dataclasses, read from a YAML file and overridden field by field.

A program declares the sections that it uses as one dataclass (`class TrainRun: model: ModelConfig; ...`) and calls
`load(TrainRun, file, {"train.steps": 5})`. A YAML file may hold the sections of all programs.
"""

from tfm_jax.config.reading import dump, from_plain, load, plain
from tfm_jax.config.sections import (
    ClipConfig,
    Config,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    NonEmptyPath,
    ObjectiveConfig,
    OptimizerConfig,
    Positive,
    Remat,
    SamplingConfig,
    Seed,
    TrainConfig,
    TrainingSections,
    section,
)

__all__ = [
    "ClipConfig", "Config", "DataConfig", "LoraConfig", "MeshConfig", "ModelConfig", "NonEmptyPath", "ObjectiveConfig",
    "OptimizerConfig", "Positive", "Remat", "SamplingConfig", "Seed", "TrainConfig", "TrainingSections", "dump",
    "from_plain", "load", "plain", "section",
]  # fmt: skip
