"""The settings of JAX for the tests of the objective."""

import jax
import pytest
from helpers.compiling import fast_compilation


@pytest.fixture(scope="module", autouse=True)
def _fast_compilation(tmp_path_factory):
    with fast_compilation(tmp_path_factory.mktemp("compilations")):
        yield


@pytest.fixture(autouse=True)
def _strict_types():
    with jax.numpy_dtype_promotion("strict"):
        yield
