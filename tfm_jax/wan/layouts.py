"""What a directory of Wan2.1 weights looks like: which files, which config.json, in each of three layouts.

- diffusers: `transformer/`, `vae/`, `text_encoder/`, `tokenizer/`, each with its config.json and safetensors.
- original (Wan-AI): config.json and safetensors of the transformer, `.pth` files of the other two, `google/umt5-xxl/`.
- tfm_jax: as diffusers, but with our names, axes and stacked layers: what `convert_weights.py --to=tfm_jax` writes.
"""

import dataclasses
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike

from tfm_jax.errors import InputError
from tfm_jax.inputs import read_json, shown
from tfm_jax.wan import names
from tfm_jax.wan.config_json import FORMATS, Layout, build_config, class_name, read_config
from tfm_jax.wan.pth import open_pth
from tfm_jax.wan.tensors import Entry, Shape, Tensors, open_tensors, safetensors_in
from tfm_jax.wan.text_encoder import TextEncoderConfig, UMT5Encoder
from tfm_jax.wan.transformer import TransformerConfig, WanTransformer
from tfm_jax.wan.vae import VaeConfig, WanVae


class Component(NamedTuple):
    """One of the three networks, whatever its layout."""

    name: str
    architecture: type
    build: Callable[..., nnx.Module]
    rows: Callable[[Any], list[names.Row]]
    files: str
    """Stem of its safetensors files in the Diffusers layout."""


TRANSFORMER = Component(
    "transformer",
    TransformerConfig,
    WanTransformer,
    lambda config: names.transformer_rows(config.layers),
    "diffusion_pytorch_model",
)
VAE = Component("vae", VaeConfig, WanVae, names.vae_rows, "diffusion_pytorch_model")
TEXT_ENCODER = Component(
    "text_encoder",
    TextEncoderConfig,
    UMT5Encoder,
    lambda config: names.text_encoder_rows(config.layers),
    "model",
)
COMPONENTS = (TRANSFORMER, VAE, TEXT_ENCODER)
SIDE_SUFFIX = ".tfm_jax.json"
ORIGINAL_FILES = {"vae": "Wan2.1_VAE.pth", "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth"}


class Source(NamedTuple):
    """The weights of one network, found and understood but not yet read."""

    component: Component
    layout: Layout
    config: Any
    place: Path
    tensors: Tensors

    def name(self, row: names.Row) -> str:
        """What the source calls the tensor of a row."""
        return row.ours if self.layout == "tfm_jax" else getattr(row, self.layout)

    def read(self, row: names.Row, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor of a row (or a part of it), with our axes, without the axis of stacked layers."""
        if self.layout == "tfm_jax":
            stacked = () if row.layer is None else (row.layer,)
            return self.tensors[row.ours].read((*stacked, *(index or ())) or ...)
        theirs = self.tensors[self.name(row)]
        if index is None:
            return rearrange(theirs.read(...), row.axes)
        before, after = (side.split() for side in row.axes.split("->"))
        piece = tuple(slice(None) if a == "1" else index[after.index(a)] for a in before)
        return rearrange(theirs.read(piece), row.axes)

    def not_finite(self, row: names.Row) -> str:
        """The message about the tensor of a row that has a NaN."""
        name = self.name(row)
        return f"{self.tensors[name].file}: {name} has a NaN or infinite value; expected finite numbers"

    def outermost(self, row: names.Row) -> int:
        """Which of our axes (without that of stacked layers) varies slowest in the file."""
        if self.layout == "tfm_jax":
            return 0
        before, after = (side.split() for side in row.axes.split("->"))
        return after.index(next(a for a in before if a != "1"))


# --- Finding ---------------------------------------------------------------------------------------------------------


def find(path: Path, component: Component) -> Source:
    """The network `component` under `path`: the directory of a model, or of that network alone.

    Raises:
        InputError: nothing that looks like it is there, or it is of a kind that this library does not run.
    """
    source = find_any(path, component)
    if not source:
        original = ORIGINAL_FILES.get(component.name, "config.json of a WanModel")
        raise InputError(
            f"{path}: no {component.name} found; expected {component.name}/config.json (Diffusers layout) "
            f"or {original} (original layout)"
        )
    return source


def find_any(path: Path, component: Component) -> Source | None:
    """As `find`, but None where there is nothing that looks like it."""
    if not path.is_dir():
        raise InputError(f"{path}: no such directory; expected Wan2.1 weights")
    if component is TRANSFORMER and (path / "transformer_2").exists():
        raise InputError(f"{path}: has two transformers, as Wan2.2; expected Wan2.1, which has one")
    for directory in (path / component.name, path):
        config = directory / "config.json"
        if config.is_file():
            found = _from_config(config, component)
            if found:
                return found
    pth = path / ORIGINAL_FILES.get(component.name, "-")
    return _from_pth(pth, component) if pth.is_file() else None


def _from_config(file: Path, component: Component) -> Source | None:
    """The network that a config.json describes; None if it is another one."""
    values = read_json(file)
    kind = class_name(values, file)
    classes = {form.class_name: place for place, form in FORMATS.items()}
    if kind not in classes:
        raise InputError(f"{file}: model class is {shown(kind)}; expected one of {', '.join(classes)}")
    name, layout = classes[kind]
    if name != component.name:
        return None
    tensors = _untied(open_tensors(safetensors_in(file.parent)))
    known = _sizes(file, names.transformer_sizes, tensors) if kind == "WanModel" else {}
    config = read_config(values, file, FORMATS[name, layout], component.architecture, known)
    return Source(component, layout, config, file, tensors)


def _from_pth(file: Path, component: Component) -> Source:
    """The network in a .pth file: its tensors say the sizes, and `side_file` what no tensor says."""
    tensors = _untied(open_pth(file))
    fields = _sizes(file, _PTH_SIZES[component.name], tensors)
    place, beside = file, side_file(file)
    if beside.exists():
        place = beside
        fields |= read_json(beside)
    return Source(component, "original", build_config(fields, place, component.architecture), file, tensors)


_PTH_SIZES = {"vae": names.vae_sizes, "text_encoder": names.text_encoder_sizes}


def side_file(pth: Path) -> Path:
    """Our own addition to the original layout: fields of the architecture that are not Wan2.1's and not in a .pth."""
    return pth.with_suffix(SIDE_SUFFIX)


def unsaid(component: Component, config: Any, shapes: dict[str, Shape]) -> dict[str, Any]:
    """The content of `side_file`: what a reader of tensors with these shapes would get wrong of `config`."""
    told = _PTH_SIZES[component.name](shapes)
    return {
        field.name: value
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) != told.get(field.name, field.default)
    }


def _sizes(file: Path, sizes: Callable[[names.Shapes], dict[str, Any]], tensors: Tensors) -> dict[str, Any]:
    try:
        return sizes({name: entry.shape for name, entry in tensors.items()})
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def _untied(tensors: Tensors) -> Tensors:
    """Without the second name under which some files hold the same tensor."""
    return {
        names.TEXT_ENCODER_ALIASES.get(name, name): entry
        for name, entry in tensors.items()
        if names.TEXT_ENCODER_ALIASES.get(name) not in tensors
    }


# --- Checking --------------------------------------------------------------------------------------------------------


def expected_tensors(source_layout: Layout, rows: list[names.Row], shapes: dict[str, Shape]) -> dict[str, Shape]:
    """Name -> shape of every tensor of a network in a layout, from the shapes of our parameters."""
    if source_layout == "tfm_jax":
        return dict(shapes)
    expected = {}
    for row in rows:
        ours = shapes[row.ours][0 if row.layer is None else 1 :]
        before, after = (side.split() for side in row.axes.split("->"))
        expected[getattr(row, source_layout)] = tuple(1 if a == "1" else ours[after.index(a)] for a in before)
    return expected


def check_tensors(place: Path, tensors: Tensors, expected: dict[str, Shape]) -> None:
    """Raise InputError, with the nearest candidates, unless the tensors are exactly those expected."""

    def nearest(name: str, others: set[str]) -> str:
        close = difflib.get_close_matches(name, sorted(others), n=3, cutoff=0.6)
        return f" (nearest: {', '.join(close)})" if close else ""

    missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing:
        name = min(missing)
        raise InputError(
            f"{place}: {len(missing)} of {len(expected)} tensors are missing, such as {name} "
            f"{list(expected[name])}{nearest(name, extra)}"
        )
    if extra:
        name = min(extra)
        raise InputError(
            f"{place}: {len(extra)} tensors are not of this model, such as {shown(name)} in "
            f"{tensors[name].file.name}{nearest(name, set(expected))}"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise InputError(
                f"{tensors[name].file}: tensor {name} has shape {list(tensors[name].shape)}; expected {list(shape)}"
            )


def source_of(module: nnx.Module, component: Component) -> Source:
    """A network in memory, as a source in our own layout."""
    tensors = {
        ".".join(map(str, path)): Entry(variable.shape, Path("memory"), np.asarray(variable.get_value()).__getitem__)
        for path, variable in nnx.to_flat_state(nnx.state(module))
    }
    return Source(component, "tfm_jax", module.config, Path("memory"), tensors)  # type: ignore[attr-defined]


def parameters(component: Component, config: Any, dtype: DTypeLike) -> dict[str, Any]:
    """Path -> abstract value (shape, dtype) of every parameter of a network whose kernels are in `dtype`."""
    module = abstract(component, config, dtype)
    return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(module))}


def abstract(component: Component, config: Any, dtype: DTypeLike) -> nnx.Module:
    """The network with shapes and types instead of numbers."""
    return nnx.eval_shape(lambda: component.build(config, rngs=nnx.Rngs(0), dtype=dtype))
