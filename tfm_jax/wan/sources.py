"""Find the weights of each network in a directory that has one of four layouts, or in a single file.

- diffusers: `transformer/`, `vae/`, `text_encoder/`, `tokenizer/`, each with its config.json and safetensors.
- original (Wan-AI): config.json and safetensors of the transformer, `.pth` files of the other two networks, and the
  tokenizer in `google/umt5-xxl/`.
- comfy (ComfyUI): one safetensors file for each network, without config.json, in `diffusion_models/`, `vae/` and
  `text_encoders/` or directly in the directory, and the tokenizer in a folder as above. The names of its tensors tell
  which network a file contains.
- tfm_jax: like diffusers, but with our names, axes and stacked layers. `tfm-convert --to=tfm_jax` writes it.

A directory may mix them: for each network, the layouts are tried in the order diffusers or tfm_jax, original, comfy.
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
from tfm_jax.wan.components import TRANSFORMER, Component, named_parameters
from tfm_jax.wan.config_json import SCHEMAS, build_config, class_name, read_config
from tfm_jax.wan.names import SINGLE_FILES, TEXT_ENCODER_ALIASES, Layout, Row, Shapes
from tfm_jax.wan.pth import open_pth
from tfm_jax.wan.sizes import SIZES
from tfm_jax.wan.tensors import LazyTensor, Shape, Tensors, safetensors_in, safetensors_names
from tfm_jax.wan.weights import PREFIXES, open_tensors

SIDECAR_SUFFIX = ".tfm_jax.json"
ORIGINAL_FILES = {"vae": "Wan2.1_VAE.pth", "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth"}
COMFY_FILES = {
    "transformer": "diffusion_models/wan2.1_t2v.safetensors",
    "vae": "vae/wan_2.1_vae.safetensors",
    "text_encoder": "text_encoders/umt5_xxl.safetensors",
}
"""Where the files are written. When reading, they may have any name, and be in any of these folders or in none."""


Change = Callable[[Row, Callable[[], np.ndarray]], np.ndarray | None]
"""Returns what is added to the tensor of a row, in float32 and with our axes; None for nothing. The second argument
reads the tensor as it is without the change."""


def no_change(row: Row, read: Callable[[], np.ndarray]) -> None:
    """The `Source.change` of weights that are used as they are."""


class Source(NamedTuple):
    """The weights of one network, which have been found and identified but not read."""

    component: Component
    layout: Layout
    config: Any
    file: Path
    """The config.json or the file of weights that identifies the network; error messages start with its path."""
    tensors: Tensors
    change: Change = no_change
    """What is added to a tensor when it is read."""

    def read(self, row: Row, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Read the tensor of a row, or the part that `index` selects.

        The result and `index` have our axes, without the axis of stacked layers.
        """
        change = self.change(row, lambda: self._read(row, None))
        if change is None:
            return self._read(row, index)
        return self._read(row, index).astype(np.float32) + change[index or ...]

    def _read(self, row: Row, index: tuple[slice, ...] | None) -> np.ndarray:
        tensor = self.tensors[row.name(self.layout)]
        if self.layout == "tfm_jax":
            stacked = () if row.layer is None else (row.layer,)
            return tensor.read((*stacked, *(index or ())) or ...)
        if index is None:
            return rearrange(tensor.read(...), row.axes)
        part = tuple(slice(None) if axis == "1" else index[row.our_axes.index(axis)] for axis in row.torch_axes)
        return rearrange(tensor.read(part), row.axes)

    def shape(self, row: Row) -> Shape:
        """Return the shape of the tensor of a row, with our axes, without the axis of stacked layers."""
        shape = self.tensors[row.name(self.layout)].shape
        if self.layout == "tfm_jax":
            return shape if row.layer is None else shape[1:]
        lengths = dict(zip(row.torch_axes, shape, strict=True))
        return tuple(lengths[axis] for axis in row.our_axes)

    def not_finite(self, row: Row) -> str:
        """Return the error message for a tensor that contains a NaN or an infinite value."""
        name = row.name(self.layout)
        return f"{self.tensors[name].file}: {name} has a NaN or infinite value; expected finite numbers"

    def outermost(self, row: Row) -> int:
        """Return the index, among the same axes as in `read`, of the axis that varies slowest in the file."""
        if self.layout == "tfm_jax":
            return 0
        return row.our_axes.index(next(axis for axis in row.torch_axes if axis != "1"))


def find_source(path: Path, component: Component) -> Source:
    """Find the weights of `component` in `path`: the directory of a whole model or of this network alone, or one file
    of weights.

    Raises:
        InputError: nothing there looks like this network, or the network is damaged or of an unsupported variant.
    """
    source = find_source_or_none(path, component)
    if not source:
        single = f"a safetensors file with {' or '.join(SINGLE_FILES[component.name].values())} (ComfyUI)"
        original = ORIGINAL_FILES.get(component.name, "config.json of a WanModel")
        folder = f"{component.name}/config.json (Diffusers layout), {original} (original layout) or "
        raise InputError(f"{path}: no {component.name} found; expected {'' if path.is_file() else folder}{single}")
    return source


def find_source_or_none(path: Path, component: Component) -> Source | None:
    """Like `find_source`, but returns None if nothing there looks like this network."""
    if path.is_file():
        return _from_single_files(path, [path], component)
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
    if pth.is_file():
        return _from_file(pth, component, "original", open_pth(pth))
    folders = [path, *(path / Path(file).parent for file in COMFY_FILES.values())]
    files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    return _from_single_files(path, files, component)


def source_from_module(module: nnx.Module, component: Component) -> Source:
    """Return a network in memory as a source in our own layout."""
    tensors = {
        name: LazyTensor(variable.shape, Path("memory"), np.asarray(variable.get_value()).__getitem__)
        for name, variable in named_parameters(module).items()
    }
    return Source(component, "tfm_jax", module.config, Path("memory"), tensors)  # type: ignore[attr-defined]


def _from_config(file: Path, component: Component) -> Source | None:
    """Return the network that a config.json describes, or None if that is another component."""
    values = read_json(file)
    found = class_name(values, file)
    classes = {schema.class_name: key for key, schema in SCHEMAS.items()}
    if found not in classes:
        raise InputError(f"{file}: model class is {short_repr(found)}; expected one of {', '.join(classes)}")
    name, layout = classes[found]
    if name != component.name:
        return None
    tensors = _without_aliases(open_tensors(safetensors_in(file.parent)))
    inferred = _infer_sizes(file, component, tensors) if found == "WanModel" else {}
    config = read_config(values, file, SCHEMAS[name, layout], component.architecture, inferred)
    return Source(component, layout, config, file, tensors)


def _from_single_files(path: Path, files: list[Path], component: Component) -> Source | None:
    """Return the network in the file among `files` that contains it, or None if there is no such file.

    Raises:
        InputError: several files do.
    """
    found: dict[Path, Layout] = {}
    for file in files:
        present = set(safetensors_names(file))
        for layout, name in SINGLE_FILES[component.name].items():
            if any(prefix + name in present for prefix in ("", *PREFIXES)):
                found[file] = layout
    if len(found) > 1:
        several = ", ".join(str(file.relative_to(path)) for file in found)
        raise InputError(f"{path}: has {len(found)} files with a {component.name}, {several}; expected one")
    return next((_from_file(file, component, layout, open_tensors([file])) for file, layout in found.items()), None)


def _from_file(file: Path, component: Component, layout: Layout, tensors: Tensors) -> Source:
    """Return the network in one file. Its sizes come from the tensors and from the sidecar file, if there is one."""
    tensors = _without_aliases(tensors)
    fields = _infer_sizes(file, component, tensors)
    named_in, sidecar = file, sidecar_file(file)
    if sidecar.exists():
        named_in = sidecar
        fields |= read_json(sidecar)
    return Source(component, layout, build_config(fields, named_in, component.architecture), file, tensors)


def sidecar_file(file: Path) -> Path:
    """Return the path of our JSON file beside a file of weights, for the fields that the tensors do not determine."""
    return file.with_suffix(SIDECAR_SUFFIX)


def sidecar_fields(component: Component, config: Any, shapes: Shapes) -> dict[str, Any]:
    """Return the content of the sidecar file: the fields of `config` that neither `shapes` nor the defaults give."""
    inferred = SIZES[component.name](shapes)
    return {
        field.name: value
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) != inferred.get(field.name, field.default)
    }


def _infer_sizes(file: Path, component: Component, tensors: Tensors) -> dict[str, Any]:
    try:
        return SIZES[component.name]({name: tensor.shape for name, tensor in tensors.items()})
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def _without_aliases(tensors: Tensors) -> Tensors:
    """Keep one name per tensor: some files hold the embedding of the text encoder under two names."""
    return {
        TEXT_ENCODER_ALIASES.get(name, name): tensor
        for name, tensor in tensors.items()
        if TEXT_ENCODER_ALIASES.get(name) not in tensors
    }
