"""Write the weights of a transformer quickly."""

import json
from pathlib import Path

import numpy as np

from tfm_jax.wan.checks import expected_shapes
from tfm_jax.wan.components import TRANSFORMER, abstract_parameters
from tfm_jax.wan.config_json import config_json
from tfm_jax.wan.tensors import TensorWriter
from tfm_jax.wan.transformer import TransformerConfig


def write_checkpoint(directory: Path, config: TransformerConfig) -> None:
    """Write a float32 transformer in the Diffusers layout. Each tensor repeats a rotation of one random block."""
    rows = TRANSFORMER.rows(config)
    shapes = {name: value.shape for name, value in abstract_parameters(TRANSFORMER, config, np.float32).items()}
    expected = expected_shapes("diffusers", rows, shapes)
    block = np.random.default_rng(0).standard_normal(1_000_003, np.float32)
    directory.mkdir(parents=True)
    values = config_json(TRANSFORMER.name, "diffusers", config)
    (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")
    content = {name: (shape, np.float32) for name, shape in expected.items()}
    with TensorWriter(directory, TRANSFORMER.stem, content) as writer:
        for number, name in enumerate(content):
            flat, rotated = writer[name].reshape(-1), np.roll(block, 7919 * number)
            for start in range(0, flat.size, block.size):
                part = flat[start : start + block.size]
                part[:] = rotated[: part.size]
