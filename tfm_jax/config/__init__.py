"""The configuration of every program: frozen dataclasses that are read from a YAML file, then overridden by options.

A program declares a dataclass of the sections that it uses (`class TrainRun: model: ModelConfig; ...`) and calls
`load(TrainRun, file, {"train.steps": 5})`. A YAML file may contain the sections of all programs.
"""

from tfm_jax.config.fields import NonEmptyPath, Positive, Remat, Seed, Solver, section
from tfm_jax.config.reading import dump, from_plain, load, plain
from tfm_jax.config.sections import (
    ClipConfig,
    Config,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
    TrainingSections,
    latent_size,
)

__all__ = [
    "ClipConfig", "Config", "DataConfig", "LoraConfig", "MeshConfig", "ModelConfig", "NonEmptyPath", "ObjectiveConfig",
    "OptimizerConfig", "Positive", "Remat", "SamplingConfig", "Seed", "Solver", "TrainConfig", "TrainingSections",
    "dump", "from_plain", "latent_size", "load", "plain", "section",
]  # fmt: skip
