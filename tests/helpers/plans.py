"""Runs, plans and topologies for the tests of planning."""

from pathlib import Path
from types import SimpleNamespace

from helpers.configured import configured

from tfm_jax.config import load
from tfm_jax.planning.chips import GIB, Topology
from tfm_jax.planning.hlo import Traffic
from tfm_jax.planning.plan import Plan
from tfm_jax.planning.programs import TrainPlan

TINY = """\
model: {path: none, dim: 64, ffn_dim: 160, heads: 2, layers: 3, dtype: float32}
clip: {frames: 13, height: 128, width: 128}
objective: {kind: fm}
train: {output: none, steps: 1, batch_size: 2}
lora: {rank: 4}
sampling: {output: none, steps: 3}
"""


def parse_run(kind: type, file: Path, *fields: str):
    """Read a TrainPlan or SamplePlan from a file and `--section.field=value` options."""
    return configured(kind, ["--config", str(file), *fields])


def run_14b(batch: int = 4) -> TrainPlan:
    return load(TrainPlan, "wan2.1_t2v_14b", {"train.batch_size": batch})


def fake_topology(kind: str, devices: int) -> Topology:
    """Return a topology for which nothing can be compiled."""
    return Topology(f"{kind}:{devices}", kind, (SimpleNamespace(platform="cpu"),) * devices)


def fake_plan(mesh=(1, 4, 2, 1), needed=10 * GIB, recomputed=5, sent=7, **values) -> Plan:
    known = {
        "program": "training step", "topology": "v5e:2x4", "chips": 8, "devices": 8,
        "mesh": dict(zip(("data", "fsdp", "sequence", "tensor"), mesh, strict=True)), "remat": "full", "clips": 4,
        "tokens": 32760, "flops": {"forward": 1, "backward": 2, "recomputed": recomputed, "scores": 3},
        "peak_flops": 197e12, "arguments": GIB, "needed": needed, "available": round(15.75 * GIB),
        "compile_seconds": 1.0, "cpu_seconds": 2.0, "compiler_memory": 3 * 10**9, "temporaries": 8 * GIB,
        "code": GIB // 8, "host": 0, "collectives": {"all-gather": Traffic(2, sent)},
    }  # fmt: skip
    return Plan(**{**known, **values})
