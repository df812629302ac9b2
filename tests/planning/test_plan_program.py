"""tfm-plan: bad input, help, and the exit code of a program that does not fit. Needs the TPU compiler."""

import os
import re
import subprocess
import sys

import pytest
from helpers.paths import ROOT
from helpers.plans import fake_plan

from tfm_jax.planning.chips import GIB
from tfm_jax.planning.roofline import CLASSES, Roofline, Row

NINE_TOKENS = ("--clip.frames=1", "--clip.height=48", "--clip.width=48")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--topology=v9:2x2"], "--topology=v9:2x2: expected one of"),
        (["--topology=v5e:2x2", "--search", "--mesh.fsdp=2"], "--mesh.fsdp=2: --search chooses the mesh"),
        (["--topology=v5e:2x2", "--model.heads=7"], "--model.heads=7: expected a divisor of dim=64"),
        (["--topology=v5e:3x5"], "--topology=v5e:3x5: "),
        (["--topology=v5e:2x2", "--mesh.fsdp=3"], "mesh.fsdp=3 does not divide the 4 devices"),
        (["--topology=v5e:2x2", "--mesh.data=3"], "mesh.data=3 x "),
        (["--topology=v5e:2x4", "--mesh.tensor=8"], "mesh.tensor=8 does not divide the 2 heads"),
        (
            ["--topology=v5e:4x4", "--mesh.fsdp=2", "--mesh.sequence=8", *NINE_TOKENS],
            "mesh.sequence=8 does not divide the 9 tokens",
        ),
        (["--topology=v5e:2x2"], "train.batch_size=2: expected a multiple of"),
    ],
)
def test_bad_input_is_one_line(call, tiny_file, options, problem):
    done = call("plan", "--config", tiny_file, *options)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {problem}")
    assert done.err.count("\n") == 1


def test_the_topology_is_required(call, tiny_file):
    done = call("plan", "--config", tiny_file)
    assert (done.code, done.out) == (2, "")
    assert "--topology" in done.err
    assert "v5e:4x4" in done.err


def test_help_has_the_options_and_all_fields(call, tiny_file):
    done = call("plan", "--config", tiny_file, "--help")
    assert done.code == 0
    assert "--search" in done.out
    assert "--mesh.fsdp" in done.out


def test_the_roofline_is_shown_on_request(call, tiny_file, monkeypatch):
    rows = [Row(name, 1, 10**12, 10**9, 0, 0.5, 0.0, 0) for name in CLASSES]
    found = fake_plan(roofline=Roofline(3.0, rows, rows[:1], [], [], 1e12, 1e11))
    monkeypatch.setattr("tfm_jax.cli.plan.make_plan", lambda *_: found)
    options = ("plan", "--config", tiny_file, "--topology=v5e:2x2", "--mesh.fsdp=2", "--mesh.sequence=2")
    assert "roofline" not in call(*options).out
    done = call(*options, "--roofline")
    assert done.code == 0
    assert re.search(r"copies and layout +1 +1\.0", done.out)


def test_a_step_too_large_exits_with_1_and_the_bytes_over(tiny_file):
    sizes = ["--model.dim=5120", "--model.ffn_dim=13824", "--model.heads=40", "--model.layers=40"]
    clip = ["--clip.frames=81", "--clip.height=480", "--clip.width=832", "--model.dtype=bfloat16"]
    mesh = ["--topology=v5e:2x2", "--mesh.fsdp=2", "--mesh.sequence=2", "--train.batch_size=8"]
    command = [sys.executable, str(ROOT / "scripts/plan.py"), "--config", str(tiny_file), *mesh, *sizes, *clip]
    environment = {**os.environ, "JAX_PLATFORMS": "tpu"}  # plan.py must not use the one that the shell names
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    over = re.search(r"DOES NOT FIT: ([\d,]+) bytes", done.stdout)
    assert int(over[1].replace(",", "")) > GIB
