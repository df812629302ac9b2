"""Networks -> directories of weights in any layout, one layer of one tensor at a time."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike

from tfm_jax.errors import InputError
from tfm_jax.wan import layouts
from tfm_jax.wan.layouts import ORIGINAL_FILES, TRANSFORMER, VAE, Layout, Source
from tfm_jax.wan.names import Row
from tfm_jax.wan.tensors import TensorWriter, copy_into

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
        return
    stem = "model" if layout == "tfm_jax" else component.files
    with TensorWriter(folder, stem, content) as writer:
        _fill(writer, source, rows, layout, progress)
    text = json.dumps(layouts.config_json(component, layout, source.config), indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def _fill(writer: TensorWriter, source: Source, rows: list[Row], layout: Layout, progress: Progress | None) -> None:
    for row in rows:
        array = source.read(row)
        if not np.isfinite(array).all():
            raise InputError(f"{source.place}: {source.name(row)} has a NaN or infinite value; expected numbers")
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


def _save_pth(file: Path, arrays: dict[str, np.ndarray]) -> None:
    try:
        import torch
    except ImportError:
        raise InputError(f"{file}: writing .pth files needs PyTorch; pip install torch") from None

    def tensor(array: np.ndarray) -> "torch.Tensor":
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    torch.save({name: tensor(array) for name, array in arrays.items()}, file)


def save_model(
    sources: list[Source],
    tokenizer: Path | None,
    directory: Path,
    layout: Layout,
    dtype: DTypeLike,
    progress: Progress | None = None,
) -> None:
    """Write the networks of a model, its tokenizer files and what names them as one, whole or not at all.

    The autoencoder stays float32 whatever `dtype` is, as it is run in float32.

    Raises:
        InputError: `directory` exists and is not empty, or a network is not what its configuration says.
    """
    if directory.exists() and any(directory.iterdir()):
        raise InputError(f"{directory}: already there and not empty; expected a new directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        for source in sources:
            save(source, scratch, layout, jnp.float32 if source.component is VAE else dtype, progress)
        if tokenizer:
            target = scratch / ("google/umt5-xxl" if layout == "original" else "tokenizer")
            shutil.copytree(tokenizer, target)
        if layout == "diffusers" and len(sources) == len(layouts.COMPONENTS):
            _write_pipeline(scratch)
        scratch.chmod(0o755)
        scratch.replace(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_pipeline(directory: Path) -> None:
    """model_index.json and the scheduler, with which `diffusers.WanPipeline` loads the directory."""
    index = {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", TRANSFORMER.class_name],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    # Its first order is the Euler method on the noise levels that Wan's own sampling has; diffusers' Euler scheduler
    # takes others, whose last level does not depend on the number of steps.
    scheduler = {
        "_class_name": "DPMSolverMultistepScheduler",
        "solver_order": 1,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 5.0,
    }
    (directory / "scheduler").mkdir()
    for file, values in (("model_index.json", index), ("scheduler/scheduler_config.json", scheduler)):
        (directory / file).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
