"""Checks that files contain exactly the tensors of a network."""

import difflib
from collections.abc import Mapping, Set

import jax

from tfm_jax.errors import InputError
from tfm_jax.inputs import short_repr
from tfm_jax.wan.names import Layout, Row, Shapes
from tfm_jax.wan.sources import Source
from tfm_jax.wan.tensors import Shape


def expected_shapes(layout: Layout, rows: list[Row], ours: Shapes) -> dict[str, Shape]:
    """Map the tensor names in a network's files to shapes. `ours` maps the dotted paths of our parameters to shapes."""
    if layout == "tfm_jax":
        return dict(ours)
    return {row.name(layout): row.torch_shape(ours[row.ours]) for row in rows}


def check_source(source: Source, parameters: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Check the names and shapes of the tensors in `source` against the `parameters` of its network.

    Raises:
        InputError: a tensor is missing or unexpected (the message lists similar names), or has the wrong shape.
    """
    tensors = source.tensors
    rows = source.component.rows(source.config)
    expected = expected_shapes(source.layout, rows, {name: value.shape for name, value in parameters.items()})
    missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing:
        name = min(missing)
        raise InputError(
            f"{source.file}: {len(missing)} of {len(expected)} tensors are missing, such as {name} "
            f"{list(expected[name])}{similar(name, extra)}"
        )
    if extra:
        name = min(extra)
        raise InputError(
            f"{source.file}: {len(extra)} of {len(tensors)} tensors do not belong to this model, such as "
            f"{short_repr(name)} in {tensors[name].file.name}{similar(name, expected.keys())}"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise InputError(
                f"{tensors[name].file}: tensor {name} has shape {list(tensors[name].shape)}; expected {list(shape)}"
            )


def similar(name: str, others: Set[str]) -> str:
    """Return the end of an error message that lists the names most similar to `name`, if there are any."""
    close = difflib.get_close_matches(name, sorted(others), n=3, cutoff=0.6)
    return f" (similar names: {', '.join(close)})" if close else ""
