"""The layers that the networks share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tfm_jax.wan.layers import Linear


@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("features_out", [3, 9])
def test_gradients_of_a_linear_layer(shape, features_out):
    """The layer has its own gradient, which must be that of the plain product, for wide and for narrow outputs."""
    graph, state = nnx.split(Linear(5, features_out, rngs=nnx.Rngs(0), bias=False))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(*shape[:-1], features_out)), jnp.float32)

    def loss(x, state):
        return jnp.sum(jnp.sin(nnx.merge(graph, state)(x)) * weights)

    def plain(x, state):
        return jnp.sum(jnp.sin(x @ jax.tree.leaves(state)[0]) * weights)

    ours, expected = (jax.tree.leaves(jax.grad(f, (0, 1))(x, state)) for f in (loss, plain))
    for mine, theirs in zip(ours, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
