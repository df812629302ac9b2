"""Measure speed and memory on this machine. All reported timings come from here; the tests do not time anything.

    python scripts/benchmark.py convert --directory=/tmp
    python scripts/benchmark.py attention
    python scripts/benchmark.py data --directory=/tmp

convert: convert a random Wan2.1-1.3B transformer (5.7 GB of float32 in the Diffusers layout) with convert_weights.py,
and compare the speed with that of a plain copy of the same files. This runs on Linux only and needs 12 GB of free space
in --directory. All files are removed at the end.

attention: compare our attention in float32, with and without gradients, with three others: PyTorch's on all cores,
chunks of queries that JAX differentiates, and JAX's own, which keeps all scores in memory. The four take turns, so that
their ratios are meaningful even on a busy machine.

data: how fast tfm-prepare reads and encodes clips with the embedded model, beside a plain loop over the same clips;
how long it takes to open 40,000 records; and how fast clips of the size of Wan2.1 at 480p are read, beside what
training can use. This takes a minute and needs 0.5 GB of free space in --directory. All files are removed at the end.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from tfm_jax import video
from tfm_jax.arrays import DTYPES, Dtype
from tfm_jax.cli import command
from tfm_jax.config import ClipConfig, LoraConfig, load
from tfm_jax.data import format as files
from tfm_jax.data.batches import Batches
from tfm_jax.data.decoding import Pixels, read_clips
from tfm_jax.data.encoding import Encoders, Unencoded, encode
from tfm_jax.data.format import Manifest, Record
from tfm_jax.data.metadata import Clip
from tfm_jax.data.prepare import PrepareRun, read_list
from tfm_jax.data.records import open_records
from tfm_jax.data.survey import survey
from tfm_jax.flops import training_flops
from tfm_jax.moving_shapes import world
from tfm_jax.planning.chips import CHIPS
from tfm_jax.sharding import one_device_mesh
from tfm_jax.wan import load_text_encoder, load_tokenizer, load_vae
from tfm_jax.wan.attention import attention
from tfm_jax.wan.checks import expected_shapes
from tfm_jax.wan.components import TRANSFORMER, abstract_parameters
from tfm_jax.wan.config_json import config_json
from tfm_jax.wan.tensors import TensorWriter
from tfm_jax.wan.tokenizer import encode_prompts
from tfm_jax.wan.transformer import TransformerConfig, token_grid

WAN_1_3B = TransformerConfig(dim=1536, ffn_dim=8960, heads=12, layers=30)
WAN_14B = TransformerConfig(dim=5120, ffn_dim=13824, heads=40, layers=40)
CONVERT = Path(__file__).resolve().with_name("convert_weights.py")

ATTENTION_SHAPES = ((1, 1600, 1600, 8, 64), (1, 1600, 512, 8, 64), (2, 80, 512, 4, 32))
"""Batch size, number of queries, number of keys, number of heads, head width."""


class Usage(NamedTuple):
    """Time and memory of a child process."""

    seconds: float
    peak_memory: int
    """Peak of RssAnon in bytes, which does not include the pages of mapped files."""


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="benchmark")
    convert = commands.add_parser(
        "convert", help="measure speed and memory of convert_weights.py, and the speed of a plain copy"
    )
    convert.add_argument("--directory", type=Path, required=True, help="directory with 12 GB of free space")
    convert.set_defaults(run=lambda options: measure_conversion(options.directory))
    attend = commands.add_parser("attention", help="compare the speed of our attention with PyTorch's and JAX's")
    attend.add_argument(
        "--rounds", type=int, default=15, help="number of timed runs of each program (default: %(default)s)"
    )
    attend.set_defaults(run=lambda options: measure_attention(options.rounds))
    data = commands.add_parser("data", help="measure the speed of preparing, opening and reading clips")
    data.add_argument("--directory", type=Path, required=True, help="directory with 0.5 GB of free space")
    data.set_defaults(run=lambda options: measure_data(options.directory))
    options = parser.parse_args(argv)
    options.run(options)


def measure_conversion(directory: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="benchmark.", dir=directory) as scratch:
        source = Path(scratch, "model")
        write_checkpoint(source / "transformer", WAN_1_3B)
        size = sum(file.stat().st_size for file in source.rglob("*"))
        print(f"source: {size / 1e9:.2f} GB of float32, read from the page cache")
        start = time.monotonic()
        subprocess.run(["cp", "-r", source, f"{source}-copy"], check=True)
        _report("cp", size, time.monotonic() - start)
        flush(Path(f"{source}-copy"))
        _report("cp, flushed to disk", size, time.monotonic() - start)
        shutil.rmtree(f"{source}-copy")
        for layout in ("tfm_jax", "diffusers"):
            target = Path(scratch, layout)
            command = [sys.executable, str(CONVERT), str(source), str(target), f"--to={layout}", "--dtype=bfloat16"]
            seconds, peak_memory = run_and_watch(command)
            note = f", peak RssAnon {peak_memory / 1e9:.2f} GB"
            _report(f"convert_weights.py --to={layout} --dtype=bfloat16", size, seconds, note)
            shutil.rmtree(target)


def write_checkpoint(directory: Path, config: TransformerConfig) -> None:
    """Write a float32 transformer in the Diffusers layout. Each tensor repeats a rotation of one random block."""
    rows = TRANSFORMER.rows(config)
    shapes = {name: value.shape for name, value in abstract_parameters(TRANSFORMER, config, np.float32).items()}
    expected = expected_shapes("diffusers", rows, shapes)
    block = np.random.default_rng(0).standard_normal(1_000_003, np.float32)
    directory.mkdir(parents=True)
    values = config_json(TRANSFORMER.name, "diffusers", config)
    (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")
    content = {name: (shape, np.float32) for name, shape in expected.items()}
    with TensorWriter(directory, TRANSFORMER.stem, content) as writer:
        for number, name in enumerate(content):
            flat, rotated = writer[name].reshape(-1), np.roll(block, 7919 * number)
            for start in range(0, flat.size, block.size):
                part = flat[start : start + block.size]
                part[:] = rotated[: part.size]


def measure_attention(rounds: int) -> None:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    for batch, queries, keys, heads, width in ATTENTION_SHAPES:
        print(f"[{batch}, {queries}, {heads}, {width}] x {keys} keys", flush=True)
        rng = np.random.default_rng(0)
        lengths = (queries, keys, keys, queries)
        arrays = [rng.standard_normal((batch, n, heads, width), np.float32) for n in lengths]
        for passes, backward in (("forward", False), ("forward and backward", True)):
            programs = {
                "ours": _in_jax(attention, arrays, backward),
                "PyTorch": _in_torch(torch, arrays, backward),
                "chunks, differentiated by JAX": _in_jax(_mapped_attention, arrays, backward),
                "jax.nn.dot_product_attention": _in_jax(jax.nn.dot_product_attention, arrays, backward),
            }
            times = _take_turns(programs, rounds)
            for name, seconds in times.items():
                ratio = seconds / times["ours"]
                print(f"  {passes}: {name} {1e3 * seconds:.2f} ms, {ratio:.2f} x ours", flush=True)


def _in_jax(function: Callable, arrays: Sequence[np.ndarray], backward: bool) -> Callable[[], object]:
    def with_gradients(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        out, pullback = jax.vjp(function, *arrays[:3])
        return out, *pullback(arrays[3])

    run = jax.jit(with_gradients if backward else lambda *arrays: function(*arrays[:3]))
    inputs = [jnp.asarray(x) for x in arrays]
    return lambda: jax.block_until_ready(run(*inputs))


def _in_torch(torch, arrays: Sequence[np.ndarray], backward: bool) -> Callable[[], object]:
    """PyTorch's kernels expect heads before tokens, so transpose the inputs here, before the timing starts."""
    tensors = [torch.from_numpy(x).transpose(1, 2).contiguous() for x in arrays]
    inputs = [x.requires_grad_(backward) for x in tensors[:3]]

    def run() -> object:
        out = torch.nn.functional.scaled_dot_product_attention(*inputs)
        return torch.autograd.grad(out, inputs, tensors[3]) if backward else out

    return run


def _mapped_attention(query: jax.Array, key: jax.Array, value: jax.Array, size: int = 512) -> jax.Array:
    """Compute exact attention in linear memory the simplest way: chunks of queries, recomputed in the backward pass."""
    length = query.shape[1]
    chunks = -(-length // size)
    padded = jnp.pad(query, ((0, 0), (0, -length % chunks), (0, 0), (0, 0)))
    split = rearrange(padded, "b (i q) n k -> i b q n k", i=chunks)
    out = jax.lax.map(jax.checkpoint(lambda chunk: jax.nn.dot_product_attention(chunk, key, value)), split)
    return rearrange(out, "i b q n k -> b (i q) n k")[:, :length]


def _take_turns(programs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median time of each program in seconds, after two warm-up runs."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(rounds + 2):
        for name, run in programs.items():
            start = time.perf_counter()
            run()
            if number >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


# --- Data ------------------------------------------------------------------------------------------------------------

WARM_UP, TIMED = 8, 32
"""Numbers of clips that are encoded: those after the warm-up are timed."""

CLIP_480P, PROMPT_TOKENS = ClipConfig(frames=81, height=480, width=832), 300

HOST, HOST_CHIPS, UTILISATION = "h100", 8, 0.4
"""A machine that trains Wan2.1-14B, and the fraction of its peak that we assume training to reach."""


def measure_data(directory: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="benchmark.", dir=directory) as scratch:
        measure_preparation(Path(scratch))
        measure_opening(Path(scratch, "many"), 40_000)
        measure_reading(Path(scratch, "large"), steps=24)


def measure_preparation(scratch: Path) -> None:
    """Read and encode the same clips as tfm-prepare does, and one by one. Nothing is written."""
    world.write_clips(scratch / "clips", WARM_UP + TIMED)
    paths = {"data.source": str(scratch / "clips"), "data.path": str(scratch / "latents")}
    run = load(PrepareRun, "wan_tiny", paths)
    _, rows = read_list(run)
    ours, plain = (TIMED / _seconds(encoded) for encoded in (_encode_ahead(run, rows), _encode_one_by_one(run, rows)))
    print(f"tfm-prepare: {ours:.2f} clips/s; a plain loop: {plain:.2f} clips/s; ratio {ours / plain:.2f}", flush=True)


def _seconds(clips: Iterator[object]) -> float:
    """Return how long the clips after the warm-up take."""
    for _ in itertools.islice(clips, WARM_UP):
        pass
    start = time.monotonic()
    for _ in clips:
        pass
    return time.monotonic() - start


def _encode_ahead(run: PrepareRun, rows: Sequence[Clip]) -> Iterator[bytes]:
    decoded = read_clips(survey(rows, run.clip, run.data.seed), run.clip)
    clips = (
        Unencoded(found.video, row.prompt, found.pixels) for (row, *_), found in decoded if isinstance(found, Pixels)
    )
    return map(files.serialise, encode(clips, Encoders(run.model), run.data.dtype))


def _encode_one_by_one(run: PrepareRun, rows: Sequence[Clip]) -> Iterator[np.ndarray]:
    tokenizer, vae = load_tokenizer(run.model.path), load_vae(run.model.path)
    encoder = load_text_encoder(run.model.path, run.model.dtype)
    for row in rows:
        pixels = video.read_clip(row.path, run.clip.frames, run.clip.height, run.clip.width, run.clip.rate)
        encode_prompts(tokenizer, encoder, [row.prompt])
        yield np.asarray(vae.encode(jnp.asarray(video.from_uint8(pixels))[None]))


def measure_opening(folder: Path, count: int) -> None:
    """Open a folder of as many records, all of which have the same small content."""
    record = Record(np.zeros((1, 2, 2, 16), np.float32), np.zeros((1, 8), np.float32), "prompt", "name.mp4")
    write_records(folder, [record] * 64, "float32", copies=count // 64)
    seconds = _take_turns({"open": lambda: open_records(folder)}, rounds=3)["open"]
    print(f"opening {count:,} records: {seconds:.2f} s", flush=True)


def measure_reading(folder: Path, steps: int) -> None:
    """Read batches of records of the size of Wan2.1 at 480p, which are in the page cache."""
    rng, dtype = np.random.default_rng(0), DTYPES["bfloat16"]
    latents = rng.standard_normal((*CLIP_480P.latent_size, WAN_14B.channels), np.float32).astype(dtype)
    text = rng.standard_normal((PROMPT_TOKENS, WAN_14B.text_dim), np.float32).astype(dtype)
    write_records(folder, [Record(latents, text, "prompt", "name.mp4")] * 16, "bfloat16", copies=3)
    batches = Batches(open_records(folder), 4, 0, one_device_mesh())
    read = batches.iterate()
    for _ in range(4):  # those that were read ahead
        next(read)
    start = time.monotonic()
    for _ in range(steps):
        next(read)
    rate = steps * batches.batch_size / (time.monotonic() - start)
    size = (latents.nbytes + text.nbytes) / 1e6
    flops = sum(training_flops(WAN_14B, LoraConfig(), "full", 1, math.prod(token_grid(CLIP_480P.latent_size))))
    used = HOST_CHIPS * CHIPS[HOST].peak * UTILISATION / flops
    print(f"reading: {rate:.1f} clips/s of {size:.1f} MB each, {rate * size:.0f} MB/s", flush=True)
    machine = f"{HOST_CHIPS} {HOST} at {UTILISATION:.0%} of their peak"
    print(f"training Wan2.1-14B on {machine} uses {used:.2f} clips/s (81 frames of 480 x 832)", flush=True)


def write_records(folder: Path, records: Sequence[Record], dtype: Dtype, copies: int) -> None:
    """Write a folder as tfm-prepare does, but with copies of one shard. Its manifest names no encoders."""
    folder.mkdir()
    first, entries = files.write_shard(folder / files.shard_name(0, copies), records)
    shards = [first.model_copy(update={"file": files.shard_name(number, copies)}) for number in range(copies)]
    for shard in shards[1:]:
        shutil.copy(folder / first.file, folder / shard.file)
    latents, text, *_ = records[0]
    files.write_description(folder, dtype, latents.shape[-1], text.shape[-1], shards)
    files.write_index(folder, entries * copies)
    files.write_empty_prompt(folder, text[:1])
    files.write_manifest(
        folder, Manifest(encoders={}, dtype=dtype, clip={}, data_seed=0, model="", clips="", shards=shards)
    )


# --- Processes and files ---------------------------------------------------------------------------------------------


def run_and_watch(command: Sequence[str], interval: float = 0.05) -> Usage:
    """Run a program, and read its memory use every `interval` seconds.

    Raises:
        CalledProcessError: the program failed.
    """
    start, peak = time.monotonic(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, anonymous_memory(process.pid))
            time.sleep(interval)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Usage(time.monotonic() - start, peak)


def anonymous_memory(pid: int) -> int:
    """Return RssAnon of a process in bytes; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except ProcessLookupError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def flush(directory: Path) -> None:
    """Flush all safetensors files in `directory` to disk."""
    for file in directory.rglob("*.safetensors"):
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())


def _report(name: str, size: int, seconds: float, note: str = "") -> None:
    print(f"{name}: {seconds:.1f} s, {size / seconds / 1e6:.0f} MB/s of the source{note}", flush=True)


if __name__ == "__main__":
    command.run(main)
