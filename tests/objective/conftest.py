"""The settings of JAX for the tests of the objective."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _strict_types():
    with jax.numpy_dtype_promotion("strict"):
        yield
