"""Loading and converting a transformer of random float32 weights, and exporting a LoRA.

Loading and export are measured beside diffusers, a conversion beside a plain copy of the same files. The files are in
the page cache.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline

from benchmarks import peers
from benchmarks.sizes import Sizes
from benchmarks.timing import Row, pair, race, take_turns
from benchmarks.usage import run_and_watch
from benchmarks.weights import write_checkpoint
from tfm_jax.lora.files import Adapter, Lora, write_lora
from tfm_jax.wan import load_transformer
from tfm_jax.wan.names import BLOCK_LINEARS, BlockLinear

CONVERT = Path(__file__).resolve().parents[1] / "convert_weights.py"
RANK = 32


def measure(sizes: Sizes) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="benchmark.") as scratch:
        source = Path(scratch, "model")
        write_checkpoint(source / "transformer", sizes.files)
        yield measure_loading(source, sizes)
        yield from measure_conversion(source, sizes)
        yield measure_export(Path(scratch), sizes)


def measure_loading(source: Path, sizes: Sizes) -> Row:
    def theirs() -> object:
        model = WanTransformer3DModel.from_pretrained(source / "transformer", torch_dtype=torch.bfloat16)
        return model.to(peers.device_of(sizes))  # pyright: ignore[reportArgumentType]

    def ours() -> object:
        return jax.block_until_ready(jax.tree.leaves(load_transformer(source, jnp.bfloat16)))

    case = f"load {_gigabytes(source):.1f} GB of float32 as bfloat16"
    return race("files", case, ours, "diffusers", peers.program(sizes, theirs), sizes.budget)


def measure_conversion(source: Path, sizes: Sizes) -> Iterator[Row]:
    peaks: dict[str, int] = {}

    def convert(layout: str) -> Callable[[], None]:
        def run() -> None:
            target = source.with_name(layout)
            command = [sys.executable, str(CONVERT), str(source), str(target), f"--to={layout}", "--dtype=bfloat16"]
            peaks[layout] = run_and_watch(command).peak_memory
            shutil.rmtree(target)

        return run

    def copy() -> None:
        target = source.with_name("copy")
        subprocess.run(["cp", "-r", source, target], check=True)
        shutil.rmtree(target)

    layouts = ["tfm_jax", "diffusers"]
    times = take_turns({**{layout: convert(layout) for layout in layouts}, "cp -r": copy}, sizes.budget)
    case = f"tfm-convert {_gigabytes(source):.1f} GB of float32 to bfloat16, --to"
    for row in pair("files", case, times, layouts, ["cp -r"]):
        yield row._replace(note=f"peak RssAnon {peaks[row.ours] / 1e9:.2f} GB")


def measure_export(scratch: Path, sizes: Sizes) -> Row:
    """Write a LoRA in the dialect of diffusers in bfloat16."""
    config = sizes.files
    rng = np.random.default_rng(0)
    adapters: Any = {
        BlockLinear(layer, name): Adapter(
            rng.standard_normal((RANK, config.ffn_dim if name == "ffn.2" else config.dim), np.float32),
            rng.standard_normal((config.ffn_dim if name == "ffn.0" else config.dim, RANK), np.float32),
        )
        for layer in range(config.layers)
        for name in BLOCK_LINEARS
    }
    layers: Any = {f"{linear.diffusers}.lora_{factor.upper()}.weight": torch.from_numpy(getattr(adapter, factor))
              for linear, adapter in adapters.items() for factor in "ab"}  # fmt: skip

    def theirs() -> None:
        state = {name: value.to(torch.bfloat16) for name, value in layers.items()}
        WanPipeline.save_lora_weights(scratch / "lora", state)

    def ours() -> None:
        write_lora(scratch / "lora.safetensors", Lora(adapters, RANK, RANK), "diffusers", ml_dtypes.bfloat16)

    case = f"write a LoRA of rank {RANK} for {len(adapters)} linear layers"
    return race("files", case, ours, "diffusers", theirs, sizes.budget)


def _gigabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*")) / 1e9
