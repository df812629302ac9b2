"""Training on several devices."""

import subprocess
import sys

import jax
import pytest
from helpers import virtual_devices
from helpers.paths import ROOT

from tfm_jax.errors import InputError
from tfm_jax.sharding import check_batch
from tfm_jax.train.metrics import read_metrics


def test_eight_devices_train_as_one_does(options, tmp_path):
    """Run the program on one device and on 2 x 4, and check that its parameters are split."""
    script = ROOT / "scripts" / "train.py"
    program = """
import sys, runpy, jax
from tfm_jax.train import loop
step = loop.make_step
def watched(*arguments):
    inner = step(*arguments)
    def shards(state, frozen, batch):
        q = frozen["blocks"]["self_attn"]["q"]["kernel"].get_value()
        a = state.lora["blocks"]["self_attn"]["q"]["lora_a"].get_value()
        mu = state.optimizer[1].mu["blocks"]["ffn"]["up"]["lora_a"].get_value()
        print("shards", *(x.addressable_shards[0].data.shape for x in (q, a, mu, batch.latents)), file=sys.stdout)
    class Step:
        def lower(self, *arguments):
            lowered = inner.lower(*arguments)
            class Lowered:
                def compile(self):
                    program = lowered.compile()
                    return lambda *arguments: shards(*arguments) or program(*arguments)
            return Lowered()
    return Step()
loop.make_step = watched
script = sys.argv[1]
sys.argv = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""
    losses = {}
    for devices, mesh, shards in (
        (1, [], "shards (3, 96, 96) (3, 96, 4) (3, 96, 4) (8, 3, 4, 6, 16)"),
        (8, ["--mesh.data=2", "--mesh.fsdp=4"], "shards (3, 24, 96) (3, 24, 4) (3, 24, 4) (1, 3, 4, 6, 16)"),
    ):
        output = tmp_path / str(devices)
        arguments = [*options, *mesh, f"--train.output={output}", "--train.steps=10", "--train.batch_size=8"]
        done = subprocess.run(
            [sys.executable, "-c", program, str(script), *arguments],
            env=virtual_devices.environment(devices),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert [line for line in done.stdout.splitlines() if line.startswith("shards")] == [shards] * 10
        losses[devices] = [line["loss"] for line in read_metrics(output / "metrics.jsonl")]
    assert len(losses[1]) == 10
    assert losses[8] == pytest.approx(losses[1], rel=1e-5)


def test_devices_that_cannot_share_the_batch():
    with pytest.raises(
        InputError, match=r"train\.batch_size=4: expected a multiple of mesh\.data=3 x mesh\.fsdp=1; use 6"
    ):
        check_batch(4, jax.sharding.AbstractMesh((3, 1), ("data", "fsdp")))
