"""Makes the tests compile faster: without most optimizations, and every program only once in a test run."""

import atexit
import os
import shutil
import tempfile

DEFAULTS = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
CACHE = "JAX_COMPILATION_CACHE_DIR"


def compile_fast() -> None:
    """Set the environment of this process and of its children. Call this before JAX is imported."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if CACHE not in os.environ:  # workers of pytest-xdist inherit the folder from their parent
        os.environ[CACHE] = tempfile.mkdtemp(prefix="tfm_jax_compiled_")
        atexit.register(shutil.rmtree, os.environ[CACHE], ignore_errors=True)


def settings() -> dict[str, str]:
    """Return the variables that `compile_fast` sets, for a process that inherits no environment."""
    return {name: os.environ[name] for name in (*DEFAULTS, CACHE) if name in os.environ}
