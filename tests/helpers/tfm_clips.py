"""Random and degenerate clips for the tests of the objective, and its path and loss as compiled functions."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from safetensors.numpy import load_file

from tfm_jax.objective import temporal_loss, temporal_path

BATCH, SIZE = 5, (3, 4, 6)  # almost all tests use this size, so that little must be compiled
SIGMA = jnp.asarray([0.999, 0.8, 0.5, 0.2, 0.005], jnp.float32)

# Results of the official implementation on eight clips (Euler path, loss, gradient), and the exact path in float64.
GOLDEN = load_file(Path(__file__).parents[1] / "objective" / "golden" / "tfm_objective.safetensors")
CASES = sorted({name.split("/")[0] for name in GOLDEN})

path = jax.jit(temporal_path, static_argnums=3)


@jax.jit
def loss(*at):
    """Return direction, residual, and the gradients of their sum by the four arguments of `temporal_loss`."""

    def total(*at):
        terms = temporal_loss(*at)
        return sum(jnp.sum(term) for term in terms), terms

    (_, terms), gradients = jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True)(*at)
    return *terms, gradients


def distance(actual, expected):
    """Return the relative L2 distance, computed in float64."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def clips(seed, count, kind="drift"):
    """Return the clean latents and the noise of BATCH different videos with `count` frames."""
    draw = np.random.default_rng(seed).normal
    steps = draw(size=(BATCH, count, *SIZE)) * (0.3 if kind == "drift" else 1.0)
    steps[:, 0] = draw(size=(BATCH, *SIZE))
    clean = np.cumsum(steps, axis=1) if kind == "drift" else steps
    return jnp.asarray(clean, jnp.float32), jnp.asarray(draw(size=clean.shape), jnp.float32)


DEGENERATE = (
    "ordinary",
    "identical frames",
    "identical noise",
    "both identical",
    "clean is noise",
    "one clean frame is noise",
    "all zero",
)


def degenerate(kind, count):
    clean, noise = clips(7, count)
    if kind == "identical frames":
        clean = jnp.broadcast_to(clean[:, :1], clean.shape)
    elif kind == "identical noise":
        noise = jnp.broadcast_to(noise[:, :1], noise.shape)
    elif kind == "both identical":
        clean, noise = jnp.broadcast_to(clean[:, :1], clean.shape), jnp.broadcast_to(noise[:, :1], noise.shape)
    elif kind == "clean is noise":
        noise = clean
    elif kind == "one clean frame is noise":
        noise = noise.at[:, 0].set(clean[:, 0])
    elif kind == "all zero":
        clean = noise = jnp.zeros_like(clean)
    return clean, noise


def golden(case):
    arrays = {name.split("/")[1]: array for name, array in GOLDEN.items() if name.startswith(case + "/")}
    return {k: rearrange(v, "b c f h w -> b f h w c") if v.ndim == 5 else v for k, v in arrays.items()}
