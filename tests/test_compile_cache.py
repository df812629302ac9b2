"""The folder of compiled programs."""

from pathlib import Path

import jax
import pytest

from tfm_jax import compile_cache
from tfm_jax.errors import InputError


def test_the_folder_of_compiled_programs(monkeypatch):
    chosen = []
    monkeypatch.setattr(jax.config, "update", lambda *option: chosen.append(option))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/own")
    compile_cache.enable()
    assert not chosen  # JAX has read the variable
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    compile_cache.enable()
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    compile_cache.enable()
    name = "jax_compilation_cache_dir"
    assert chosen == [(name, "/home/me/.cache/tfm_jax/compiled"), (name, "/caches/tfm_jax/compiled")]


def test_no_home(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="HOME is not set; expected it, or JAX_COMPILATION_CACHE_DIR"):
        compile_cache.enable()
