"""Write networks to directories of weights in any layout, reading one layer of one tensor at a time."""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike

from tfm_jax.errors import InputError
from tfm_jax.files import check_new_directory
from tfm_jax.inputs import read_json, short_repr
from tfm_jax.wan.checks import check_source, expected_shapes
from tfm_jax.wan.components import COMPONENTS, TEXT_ENCODER, TRANSFORMER, VAE, abstract_parameters
from tfm_jax.wan.config_json import SCHEMAS, config_json
from tfm_jax.wan.names import SINGLE_FILES, Layout, ModelLayout, Row
from tfm_jax.wan.sources import COMFY_FILES, ORIGINAL_FILES, Source, sidecar_fields, sidecar_file
from tfm_jax.wan.tensors import Shape, TensorWriter, allocate, copy_into
from tfm_jax.wan.weights import SPIECE_MODEL

PTH_OVERHEAD = 2**12
"""Upper bound, in bytes, on what a .pth file stores per tensor besides the numbers, and on the rest of the file."""

COMFY_PREFIX = "model.diffusion_model."
"""Start of the names of a transformer's tensors in a single file for ComfyUI."""

SPIECE_FILE = "spiece.model"
"""The SentencePiece model in the folder of the tokenizer. ComfyUI reads it from the file of the text encoder."""

SCHEDULER_FILE = "scheduler/scheduler_config.json"

# At order 1, this solver is the Euler method on the same noise levels as in Wan's own sampling. The Euler scheduler of
# diffusers uses other noise levels, the last of which does not depend on the number of steps.
_SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "solver_order": 1,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 5.0,
}

Progress = Callable[[str, int], None]
"""Called with the name of a tensor and the number of bytes just written for it."""


def save(
    source: Source,
    directory: Path,
    layout: ModelLayout,
    dtype: DTypeLike,
    progress: Progress | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Write one network in `layout` into the model directory `directory`.

    Parameters are converted to `dtype`, except those that the network always keeps in float32, such as norms and the
    time embedding. Loading the result therefore gives the same network as loading the source in `dtype`.

    Args:
        tokenizer: the folder of the tokenizer, for a text encoder in layout comfy.

    Raises:
        InputError: the tensors of the source do not match its configuration or are not finite, or PyTorch, which
            writes .pth files, is not installed.
    """
    component = source.component
    if layout == "comfy":
        save_single_file(source, directory / COMFY_FILES[component.name], dtype, progress, tokenizer)
        return
    rows, content = _content(source, layout, dtype)
    folder = directory if layout == "original" else directory / component.name
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "original" and component.name in ORIGINAL_FILES:
        pth = folder / ORIGINAL_FILES[component.name]
        with tempfile.TemporaryDirectory(dir=folder) as scratch, TensorWriter(Path(scratch), "all", content) as writer:
            _fill(writer, source, rows, layout, progress)
            _save_pth(pth, {name: writer[name] for name in content})
        _save_sidecar(source, pth, content)
        return
    with TensorWriter(folder, "model" if layout == "tfm_jax" else component.stem, content) as writer:
        _fill(writer, source, rows, layout, progress)
    _write_json(folder / "config.json", config_json(component.name, layout, source.config))


def save_single_file(
    source: Source,
    file: Path,
    dtype: DTypeLike,
    progress: Progress | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Write one network to one safetensors file for ComfyUI. On failure, nothing is written.

    The arguments and errors are those of `save`.
    """
    layout = next(iter(SINGLE_FILES[source.component.name]))
    rows, content = _content(source, layout, dtype)
    prefix = COMFY_PREFIX if source.component is TRANSFORMER else ""
    named = {prefix + name: about for name, about in content.items()}
    pieces = np.frombuffer(_spiece_model(tokenizer) if source.component is TEXT_ENCODER else b"", np.uint8)
    if pieces.size:
        named[SPIECE_MODEL] = (pieces.shape, pieces.dtype)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as scratch:
        with TensorWriter(Path(scratch), "model", named, max_bytes=sys.maxsize) as writer:
            _fill(writer, source, rows, layout, progress, prefix)
            if pieces.size:
                writer[SPIECE_MODEL][...] = pieces
        _save_sidecar(source, file, content)
        Path(scratch, "model.safetensors").replace(file)


def _spiece_model(tokenizer: Path | None) -> bytes:
    """Return the SentencePiece model in the folder of a tokenizer, or nothing if there is none."""
    file = Path(tokenizer or "", SPIECE_FILE)
    return file.read_bytes() if tokenizer and file.is_file() else b""


def _save_sidecar(source: Source, file: Path, content: Mapping[str, tuple[Shape, DTypeLike]]) -> None:
    """Write the sidecar file of a file of weights, if some field of the network needs it."""
    if fields := sidecar_fields(source.component, source.config, {name: shape for name, (shape, _) in content.items()}):
        _write_json(sidecar_file(file), fields)


def _content(source: Source, layout: Layout, dtype: DTypeLike) -> tuple[list[Row], dict[str, tuple[Shape, DTypeLike]]]:
    """Check a source. Return its rows, and the shape and dtype of every tensor in files of `layout`."""
    component = source.component
    rows = component.rows(source.config)
    parameters = abstract_parameters(component, source.config, dtype)
    check_source(source, parameters)
    dtypes = {row.name(layout): parameters[row.ours].dtype for row in rows}
    shapes = expected_shapes(layout, rows, {name: value.shape for name, value in parameters.items()})
    return rows, {name: (shape, dtypes[name]) for name, shape in shapes.items()}


def _fill(
    writer: TensorWriter,
    source: Source,
    rows: list[Row],
    layout: Layout,
    progress: Progress | None,
    prefix: str = "",
) -> None:
    """Copy every tensor of `source` into the files of `writer`, where names have this prefix."""
    for row in rows:
        array = source.read(row)
        if not np.isfinite(array).all():
            raise InputError(source.not_finite(row))
        name = row.name(layout)
        target = writer[prefix + name]
        if layout != "tfm_jax":
            array = rearrange(array, f"{' '.join(row.our_axes)} -> {' '.join(row.torch_axes)}")
        elif row.layer is not None:
            target = target[row.layer]
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

    # Allocate the space first, because on a full disk torch.save raises an error that does not mention the disk.
    size = sum(array.nbytes + PTH_OVERHEAD for array in arrays.values()) + PTH_OVERHEAD
    with open(file, "wb") as stream:
        allocate(stream, size)
        stream.seek(0)
        torch.save({name: tensor(array) for name, array in arrays.items()}, stream)
        stream.truncate()


def _torch(file: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise InputError(f"{file.name}: writing this file needs PyTorch; run pip install 'tfm-jax[torch]'") from None
    return torch


def save_model(
    sources: list[Source],
    tokenizer: Path | None,
    directory: Path,
    layout: ModelLayout,
    dtype: DTypeLike,
    *,
    scheduler: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a model: its networks, its tokenizer and its scheduler. On failure, `directory` stays as it was.

    The autoencoder is always written in float32, because it runs in float32. A complete model in the Diffusers layout
    also gets the model_index.json that diffusers needs.

    Args:
        tokenizer: the folder of the tokenizer, or None to write none.
        scheduler: a scheduler_config.json of diffusers, written to SCHEDULER_FILE in every layout. If it is None, a
            complete model in the Diffusers layout gets a scheduler that samples as this package does.

    Raises:
        InputError: `directory` exists and is not empty, or a network cannot be written (see `save`).
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
            save(source, scratch, layout, jnp.float32 if source.component is VAE else dtype, progress, tokenizer)
        if tokenizer:
            shutil.copytree(tokenizer, scratch / ("google/umt5-xxl" if layout == "original" else "tokenizer"))
        whole = layout == "diffusers" and len(sources) == len(COMPONENTS)
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
    """Return the scheduler_config.json of diffusers in the directory `model`, or None if there is none.

    Raises:
        InputError: the file does not name a scheduler class.
    """
    file = model / SCHEDULER_FILE
    if not file.is_file():
        return None
    name = read_json(file).get("_class_name")
    if not isinstance(name, str):
        raise InputError(f"{file}: _class_name is {short_repr(name)}; expected the name of a diffusers scheduler")
    return file


def _pipeline(scheduler: str) -> dict[str, Any]:
    """Return the content of model_index.json, which `diffusers.WanPipeline` needs to load the directory."""
    return {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", SCHEMAS["text_encoder", "diffusers"].class_name],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", SCHEMAS["transformer", "diffusers"].class_name],
        "vae": ["diffusers", SCHEMAS["vae", "diffusers"].class_name],
    }
