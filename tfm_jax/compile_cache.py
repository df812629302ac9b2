"""The disk cache of compiled programs, so that a program that is started again does not compile again."""

import os
from pathlib import Path

import jax

from tfm_jax.errors import InputError


def enable() -> None:
    """Let JAX keep compiled programs in ~/.cache/tfm_jax/compiled ($XDG_CACHE_HOME instead of ~/.cache, if it is set).

    JAX_COMPILATION_CACHE_DIR names another folder; JAX_ENABLE_COMPILATION_CACHE=false disables the cache.

    Raises:
        InputError: there is no home directory.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise InputError("HOME is not set; expected it, or JAX_COMPILATION_CACHE_DIR") from None
    jax.config.update("jax_compilation_cache_dir", str(cache / "tfm_jax" / "compiled"))
