"""Networks -> directories of weights in any layout, one layer of one tensor at a time."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike

from tfm_jax.errors import InputError
from tfm_jax.files import check_new_directory
from tfm_jax.inputs import read_json, shown
from tfm_jax.wan import layouts
from tfm_jax.wan.config_json import FORMATS, Layout, config_json
from tfm_jax.wan.layouts import ORIGINAL_FILES, VAE, Source
from tfm_jax.wan.names import Row
from tfm_jax.wan.tensors import TensorWriter, copy_into, take_space

PTH_OVERHEAD = 2**12
"""Bytes, more than a .pth file has for each tensor beside its numbers, and in all."""

SCHEDULER_FILE = "scheduler/scheduler_config.json"

# The first order of this solver is the Euler method on the noise levels that Wan's own sampling has; diffusers' Euler
# scheduler takes others, whose last level does not depend on the number of steps.
_SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "solver_order": 1,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 5.0,
}

Progress = Callable[[str, int], None]
"""Called with the name of a tensor and the bytes written for it."""


def save(source: Source, directory: Path, layout: Layout, dtype: DTypeLike, progress: Progress | None = None) -> None:
    """Write one network into the model directory `directory`, as `layout` has it.

    Kernels become `dtype`; what the network keeps in float32 (norms, modulation, time embedding) stays float32, so that
    loading the result equals loading the source in `dtype`.

    Raises:
        InputError: the tensors of the source are not those of its configuration, or not finite.
    """
    component = source.component
    rows = component.rows(source.config)
    ours = layouts.parameters(component, source.config, dtype)
    shapes = {name: value.shape for name, value in ours.items()}
    layouts.check_tensors(source.place, source.tensors, layouts.expected_tensors(source.layout, rows, shapes))

    dtypes = {row.ours if layout == "tfm_jax" else getattr(row, layout): ours[row.ours].dtype for row in rows}
    content = {name: (shape, dtypes[name]) for name, shape in layouts.expected_tensors(layout, rows, shapes).items()}
    pth = ORIGINAL_FILES.get(component.name) if layout == "original" else None
    folder = directory if layout == "original" else directory / component.name
    folder.mkdir(parents=True, exist_ok=True)
    if pth:
        with tempfile.TemporaryDirectory(dir=folder) as scratch, TensorWriter(Path(scratch), "all", content) as writer:
            _fill(writer, source, rows, layout, progress)
            _save_pth(folder / pth, {name: writer[name] for name in content})
        fields = layouts.unsaid(component, source.config, {name: shape for name, (shape, _) in content.items()})
        if fields:
            _write_json(layouts.side_file(folder / pth), fields)
        return
    stem = "model" if layout == "tfm_jax" else component.files
    with TensorWriter(folder, stem, content) as writer:
        _fill(writer, source, rows, layout, progress)
    _write_json(folder / "config.json", config_json(component.name, layout, source.config))


def _fill(writer: TensorWriter, source: Source, rows: list[Row], layout: Layout, progress: Progress | None) -> None:
    for row in rows:
        array = source.read(row)
        if not np.isfinite(array).all():
            raise InputError(source.not_finite(row))
        if layout == "tfm_jax":
            name = row.ours
            target = writer[name] if row.layer is None else writer[name][row.layer]
        else:
            name = getattr(row, layout)
            target = writer[name]
            after, before = row.axes.split("->")
            array = rearrange(array, f"{before} -> {after}")
        copy_into(target, array)
        if progress:
            progress(name, target.nbytes)


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _save_pth(file: Path, arrays: dict[str, np.ndarray]) -> None:
    torch = _torch(file)

    def tensor(array: np.ndarray) -> Any:
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    # On a full disk torch.save raises an error that does not say so.
    size = sum(array.nbytes + PTH_OVERHEAD for array in arrays.values()) + PTH_OVERHEAD
    with open(file, "wb") as stream:
        take_space(stream, size)
        stream.seek(0)
        torch.save({name: tensor(array) for name, array in arrays.items()}, stream)
        stream.truncate()


def _torch(file: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise InputError(f"{file.name}: writing it needs PyTorch; pip install 'tfm-jax[torch]'") from None
    return torch


def save_model(
    sources: list[Source],
    tokenizer: Path | None,
    directory: Path,
    layout: Layout,
    dtype: DTypeLike,
    *,
    scheduler: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the networks of a model, its tokenizer files and what names them as one, whole or not at all.

    The autoencoder stays float32 whatever `dtype` is, as it is run in float32.

    Args:
        tokenizer: a folder to copy.
        scheduler: a scheduler_config.json of diffusers to copy, which every layout holds in the same place. Without
            one, the Diffusers layout gets a scheduler that samples as this package does.

    Raises:
        InputError: `directory` exists and is not empty, or a network is not what its configuration says.
    """
    check_new_directory("target", directory)
    for source in sources:
        if layout == "original" and source.component.name in ORIGINAL_FILES:
            _torch(Path(ORIGINAL_FILES[source.component.name]))
    schedule = read_json(scheduler) if scheduler else _SCHEDULER
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        for source in sources:
            save(source, scratch, layout, jnp.float32 if source.component is VAE else dtype, progress)
        if tokenizer:
            shutil.copytree(tokenizer, scratch / ("google/umt5-xxl" if layout == "original" else "tokenizer"))
        whole = layout == "diffusers" and len(sources) == len(layouts.COMPONENTS)
        if scheduler or whole:
            (scratch / SCHEDULER_FILE).parent.mkdir()
            _write_json(scratch / SCHEDULER_FILE, schedule)
        if whole:
            _write_json(scratch / "model_index.json", _pipeline(schedule["_class_name"]))
        scratch.chmod(0o755)
        scratch.replace(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def find_scheduler(model: Path) -> Path | None:
    """The configuration of diffusers' scheduler in `model`; None where there is none.

    Raises:
        InputError: it does not say which scheduler it is for.
    """
    file = model / SCHEDULER_FILE
    if not file.is_file():
        return None
    kind = read_json(file).get("_class_name")
    if not isinstance(kind, str):
        raise InputError(f"{file}: _class_name is {shown(kind)}; expected a scheduler of diffusers")
    return file


def _pipeline(scheduler: str) -> dict[str, Any]:
    """model_index.json, with which `diffusers.WanPipeline` loads the directory."""
    return {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", FORMATS["text_encoder", "diffusers"].class_name],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", FORMATS["transformer", "diffusers"].class_name],
        "vae": ["diffusers", FORMATS["vae", "diffusers"].class_name],
    }
