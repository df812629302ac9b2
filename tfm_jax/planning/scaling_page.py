"""Writes docs/scaling.md and its figure from plans."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from tfm_jax.markdown import table
from tfm_jax.planning.chips import GIB
from tfm_jax.planning.plan import Plan
from tfm_jax.planning.scaling import (
    FIXED_BATCH,
    REMAT_MESH,
    REMAT_TOPOLOGY,
    Case,
    Curves,
    QuantizedCase,
    QuantizedRows,
    Rows,
)
from tfm_jax.sharding import MESH_AXES


class Tables(NamedTuple):
    """The plans of each table of the page."""

    best: Rows
    quantized: QuantizedRows
    by_policy: Sequence[Plan]
    curves: Curves
    sampling: Rows


def write_document(tables: Tables, docs: Path, command: str) -> Path:
    """Write scaling.md and scaling.png to the folder `docs`, and return the path of the page."""
    docs.mkdir(parents=True, exist_ok=True)
    draw(tables.curves, docs / "scaling.png")
    file = docs / "scaling.md"
    file.write_text(_document(tables, command), encoding="utf-8")
    return file


COLUMNS = ("machine", "model", "resolution", "batch", "data x fsdp x sequence x tensor", "remat", "GiB per device",
           "GiB over", "PFLOP", "recomputed PFLOP", "GiB sent", "CPU s")  # fmt: skip

SAMPLING_COLUMNS = ("machine", "resolution", "transformer", "text encoder", "autoencoder", "encoding", "denoising",
                    "decoding", "GiB available", "GiB over", "PFLOP per video", "s per video")  # fmt: skip
QUANTIZED_COLUMNS = ("machine", "weights", *COLUMNS[3:8], "recomputed PFLOP", "GiB sent")

REMAT_COLUMNS = ("remat", "GiB per device", "GiB in host memory", "recomputed PFLOP")

PAGE = """\
# What fits where

Every row of the first table is the training step of `tfm-train`: LoRA of rank 32 on all linear layers, 81 frames,
AdamW, bfloat16 weights. [Sampling](#sampling) is at the end.

All programs were compiled without the hardware and not run, so there are no step times. This command makes the page;
after an interruption, the same command continues where it stopped:

    {command}

To compile a single row, pass its mesh and its remat policy to `tfm-plan`:

    tfm-plan --config wan2.1_t2v_14b --topology=v5e:4x4 --mesh.fsdp=4 --mesh.sequence=4 \\
        --train.remat=attention

Of the meshes and remat policies tried, a row shows the fitting plan with the fewest recomputed operations; ties are
broken by the fewest bytes sent. If no plan fits, the row shows the one closest to fitting.

- GiB per device: memory needed, of the memory available. A device is one chip, or half a chip on tpu7x.
- GiB over: memory needed beyond the memory available.
- PFLOP: operations of the matrix products in the forward and backward pass, summed over all devices.
- recomputed PFLOP: operations that the remat policy repeats in the backward pass, summed over all devices.
- GiB sent: data that each device sends in a step.
- CPU s: CPU time spent on compiling, in seconds.

The memory of GPUs is an estimate: without a GPU, XLA neither tunes its kernels nor asks cuDNN how much workspace it
needs. JAX uses 3/4 of a GPU's memory unless XLA_CLIENT_MEM_FRACTION sets another fraction.

{table}

## Weights in 8 bits

The option `model.quantize=int8` stores the kernels of the blocks in 8 bits ([training.md](training.md) says what that
costs). This table is for 14B at 480p; its plans are chosen like those above.

{quantized}

## What to save for the backward pass

The option `train.remat` selects what each block saves for the backward pass. The table is for one clip of 1.3B at 480p
on {topology} with {mesh}. It shows the memory of each chip, and the operations that all chips together
recompute in a step.

{by_policy}

## Scaling with the number of chips

These plans are for 14B at 480p on v5p with remat=full, in two series. The first has one clip per chip: fsdp is 8, and
data takes the remaining factor. The second has {batch} clips in total: first fsdp grows up to {batch}, then sequence
up to 8, then tensor.

![Memory per chip and bytes sent per chip, against the number of chips](scaling.png)

{curves}

## Sampling

These plans are for `tfm-sample` with 14B: 81 frames, 50 steps with guidance, bfloat16 weights, no LoRA, one video at a
time, whose tokens all devices share. To compile a single row:

    tfm-plan --sampling --config wan2.1_t2v_14b --topology=v5e:2x4 --mesh.sequence=8

All sizes are in GiB per device.

- transformer, text encoder, autoencoder: the weights.
- encoding, denoising, decoding: memory needed in each phase, with all weights that are then in memory. The autoencoder
  is always there, and the transformer also while frames are decoded, on the first device.
- GiB over: what the largest phase needs beyond the memory available.
- PFLOP per video: operations of the matrix products of the transformer in all steps, summed over all devices.
- s per video: these operations at the peak rate of the chips, a lower bound for the time.

{sampling}
"""


def _document(tables: Tables, command: str) -> str:
    plans = [plan for curve in tables.curves.values() for plan in curve]
    return PAGE.format(
        command=command,
        batch=FIXED_BATCH,
        topology=REMAT_TOPOLOGY,
        mesh=", ".join(f"{name}={value}" for name, value in REMAT_MESH.items()),
        table=table(COLUMNS, (_row(case, plan) for case, plan in tables.best)),
        quantized=table(QUANTIZED_COLUMNS, (_quantized_row(case, plan) for case, plan in tables.quantized)),
        by_policy=table(REMAT_COLUMNS, map(_policy_row, tables.by_policy)),
        curves=table(("chips", "clips", *COLUMNS[4:7], "GiB sent"), map(_curve_row, plans)),
        sampling=table(SAMPLING_COLUMNS, (_sampling_row(case, plan) for case, plan in tables.sampling)),
    )


def _row(case: Case, plan: Plan | None) -> tuple[str, ...]:
    names = (case.machine, case.model, case.resolution)
    if plan is None:
        return (*names, *("not compiled",) * (len(COLUMNS) - len(names)))
    flops = (plan.flops["forward"] + plan.flops["backward"]) / 1e15
    recomputed = plan.recomputed_flops / 1e15
    costs = (_over(plan), f"{flops:.1f}", f"{recomputed:.1f}", _gib_sent(plan), f"{plan.cpu_seconds:.0f}")
    return (*names, *_shared_cells(plan), *costs)


def _sampling_row(case: Case, plan: Plan | None) -> tuple[str, ...]:
    names = (case.machine, case.resolution)
    if plan is None or not plan.networks or not plan.phases:
        return (*names, *("not compiled",) * (len(SAMPLING_COLUMNS) - len(names)))
    sizes = [*plan.networks.values(), *(phase.needed for phase in plan.phases.values()), plan.available]
    bound = f"{(plan.flops_per_video or 0) / 1e15:.1f}", f"{plan.seconds_per_video:.0f}"
    return (*names, *(f"{size / GIB:.2f}" for size in sizes), _over(plan), *bound)


def _quantized_row(case: QuantizedCase, plan: Plan | None) -> tuple[str, ...]:
    if plan is None:
        return (*case, *("not compiled",) * (len(QUANTIZED_COLUMNS) - len(case)))
    return (*case, *_shared_cells(plan), _over(plan), f"{plan.recomputed_flops / 1e15:.1f}", _gib_sent(plan))


def _policy_row(plan: Plan) -> tuple[str, ...]:
    host, recomputed = (plan.host or 0) / GIB, plan.recomputed_flops / 1e15
    return str(plan.remat), f"{plan.needed / GIB:.2f}", f"{host:.2f}", f"{recomputed:.2f}"


def _curve_row(plan: Plan) -> tuple[str, ...]:
    return str(plan.chips), *_shared_cells(plan), _gib_sent(plan)


def _shared_cells(plan: Plan) -> tuple[str, ...]:
    """Return the batch size, mesh, remat policy and memory, in the order of `COLUMNS`."""
    mesh = " x ".join(str(plan.mesh[axis]) for axis in MESH_AXES)
    memory = f"{plan.needed / GIB:.2f} of {plan.available / GIB:.2f}"
    return str(plan.clips), mesh, str(plan.remat), memory


def _over(plan: Plan) -> str:
    return "fits" if plan.fits else f"{plan.over / GIB:.2f}"


def _gib_sent(plan: Plan) -> str:
    return "-" if plan.collectives is None else f"{plan.bytes_sent / GIB:.1f}"


def draw(curves: Curves, file: Path) -> None:
    """Plot the memory and the bytes sent per chip against the number of chips."""
    figure, (memory, sent) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for name, plans in curves.items():
        chips = [plan.chips for plan in plans]
        memory.plot(chips, [plan.needed / GIB for plan in plans], "o-", label=name)
        sent.plot(chips, [plan.bytes_sent / GIB for plan in plans], "o-", label=name)
    for axis, title in ((memory, "GiB needed per chip"), (sent, "GiB sent per chip and step")):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_ylim(bottom=0)
        axis.set_xlabel("v5p chips")
        axis.set_title(title, fontsize=10)
    memory.legend()
    figure.savefig(file, dpi=80)
    plt.close(figure)
