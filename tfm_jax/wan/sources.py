"""Finds the weights of each network in a directory, in one of three layouts.

- diffusers: `transformer/`, `vae/`, `text_encoder/`, `tokenizer/`, each with its config.json and safetensors.
- original (Wan-AI): config.json and safetensors of the transformer, `.pth` files of the other two, `google/umt5-xxl/`.
- tfm_jax: like diffusers, but with our names, axes and stacked layers. `tfm-convert --to=tfm_jax` writes it.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange
from flax import nnx

from tfm_jax.errors import InputError
from tfm_jax.inputs import read_json, short_repr
from tfm_jax.wan import names
from tfm_jax.wan.components import TRANSFORMER, Component, named_parameters
from tfm_jax.wan.config_json import SCHEMAS, build_config, class_name, read_config
from tfm_jax.wan.names import Layout, Row, Shapes
from tfm_jax.wan.pth import open_pth
from tfm_jax.wan.tensors import LazyTensor, Tensors, open_tensors, safetensors_in

SIDECAR_SUFFIX = ".tfm_jax.json"
ORIGINAL_FILES = {"vae": "Wan2.1_VAE.pth", "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth"}


class Source(NamedTuple):
    """The weights of one network: found and identified, not yet read."""

    component: Component
    layout: Layout
    config: Any
    file: Path
    """The config.json or .pth file that identifies the network; error messages start with it."""
    tensors: Tensors

    def read(self, row: Row, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor of a row, or the part of it that `index` selects, with our axes less that of stacked layers."""
        tensor = self.tensors[row.name(self.layout)]
        if self.layout == "tfm_jax":
            stacked = () if row.layer is None else (row.layer,)
            return tensor.read((*stacked, *(index or ())) or ...)
        if index is None:
            return rearrange(tensor.read(...), row.axes)
        part = tuple(slice(None) if axis == "1" else index[row.our_axes.index(axis)] for axis in row.torch_axes)
        return rearrange(tensor.read(part), row.axes)

    def not_finite(self, row: Row) -> str:
        """The error message for a tensor that contains a NaN or an infinite value."""
        name = row.name(self.layout)
        return f"{self.tensors[name].file}: {name} has a NaN or infinite value; expected finite numbers"

    def outermost(self, row: Row) -> int:
        """The index of the axis that varies slowest in the file, among our axes less that of stacked layers."""
        if self.layout == "tfm_jax":
            return 0
        return row.our_axes.index(next(axis for axis in row.torch_axes if axis != "1"))


def find_source(path: Path, component: Component) -> Source:
    """The weights of `component` under `path`, the directory of a whole model or of that network alone.

    Raises:
        InputError: nothing there looks like this network, or it is a variant that this library does not support.
    """
    source = find_source_or_none(path, component)
    if not source:
        original = ORIGINAL_FILES.get(component.name, "config.json of a WanModel")
        raise InputError(
            f"{path}: no {component.name} found; expected {component.name}/config.json (Diffusers layout) "
            f"or {original} (original layout)"
        )
    return source


def find_source_or_none(path: Path, component: Component) -> Source | None:
    """Like `find_source`, but returns None if nothing there looks like this network."""
    if not path.is_dir():
        raise InputError(f"{path}: no such directory; expected Wan2.1 weights")
    if component is TRANSFORMER and (path / "transformer_2").exists():
        raise InputError(f"{path}: has two transformers, as in Wan2.2; expected Wan2.1, which has one")
    for directory in (path / component.name, path):
        config = directory / "config.json"
        if config.is_file():
            found = _from_config(config, component)
            if found:
                return found
    pth = path / ORIGINAL_FILES.get(component.name, "-")
    return _from_pth(pth, component) if pth.is_file() else None


def source_from_module(module: nnx.Module, component: Component) -> Source:
    """A network in memory, as a source in our own layout."""
    tensors = {
        name: LazyTensor(variable.shape, Path("memory"), np.asarray(variable.get_value()).__getitem__)
        for name, variable in named_parameters(module).items()
    }
    return Source(component, "tfm_jax", module.config, Path("memory"), tensors)  # type: ignore[attr-defined]


def _from_config(file: Path, component: Component) -> Source | None:
    """The network that a config.json describes; None if that is another component."""
    values = read_json(file)
    found = class_name(values, file)
    classes = {schema.class_name: key for key, schema in SCHEMAS.items()}
    if found not in classes:
        raise InputError(f"{file}: model class is {short_repr(found)}; expected one of {', '.join(classes)}")
    name, layout = classes[found]
    if name != component.name:
        return None
    tensors = _without_aliases(open_tensors(safetensors_in(file.parent)))
    inferred = _infer_sizes(file, names.transformer_sizes, tensors) if found == "WanModel" else {}
    config = read_config(values, file, SCHEMAS[name, layout], component.architecture, inferred)
    return Source(component, layout, config, file, tensors)


def _from_pth(file: Path, component: Component) -> Source:
    """The network in a .pth file. Its sizes come from the tensors and, if there is one, from its sidecar file."""
    tensors = _without_aliases(open_pth(file))
    fields = _infer_sizes(file, _PTH_SIZES[component.name], tensors)
    named_in, sidecar = file, sidecar_file(file)
    if sidecar.exists():
        named_in = sidecar
        fields |= read_json(sidecar)
    return Source(component, "original", build_config(fields, named_in, component.architecture), file, tensors)


_PTH_SIZES = {"vae": names.vae_sizes, "text_encoder": names.text_encoder_sizes}


def sidecar_file(pth: Path) -> Path:
    """Our own JSON file beside a .pth file, for the fields of the architecture that cannot be inferred from it."""
    return pth.with_suffix(SIDECAR_SUFFIX)


def sidecar_fields(component: Component, config: Any, shapes: Shapes) -> dict[str, Any]:
    """The content of the sidecar file: the fields of `config` that neither `shapes` nor Wan2.1's defaults give."""
    inferred = _PTH_SIZES[component.name](shapes)
    return {
        field.name: value
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) != inferred.get(field.name, field.default)
    }


def _infer_sizes(file: Path, sizes: Callable[[Shapes], dict[str, Any]], tensors: Tensors) -> dict[str, Any]:
    try:
        return sizes({name: tensor.shape for name, tensor in tensors.items()})
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def _without_aliases(tensors: Tensors) -> Tensors:
    """Each tensor under one name: some files hold the text encoder's embedding under two."""
    return {
        names.TEXT_ENCODER_ALIASES.get(name, name): tensor
        for name, tensor in tensors.items()
        if names.TEXT_ENCODER_ALIASES.get(name) not in tensors
    }
