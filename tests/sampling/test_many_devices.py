"""Sampling on several devices and in several processes: the same videos as on one device."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import virtual_devices
from helpers.launching import PATIENCE, Launcher, wait_for
from helpers.paths import ROOT
from helpers.sampling_runs import LATENTS, VIDEOS, content
from safetensors.numpy import load_file

from tfm_jax.video import read_clip

ON_EIGHT_DEVICES = """
import sys
from pathlib import Path
import jax
from tfm_jax.config import load
from tfm_jax.sampling import pipeline, writing
from tfm_jax.sampling.pipeline import SampleRun, sample

decode, encode = writing.decode, pipeline.encode_prompts
used = set()

def decode_on_four(vae, latents, *rest):
    assert len(latents) == len(vae.quant_conv.kernel.sharding.device_set) == 4
    used.add("decode")
    return decode(vae, latents, *rest)

def encode_on_eight(tokenizer, encoder, prompts, mesh):
    assert len(prompts) == 4
    kernel = encoder.blocks.ffn.up.kernel
    assert kernel.addressable_shards[0].data.shape == (2, 64 // 4, 128)
    used.add("encode")
    return encode(tokenizer, encoder, prompts, mesh)

writing.decode, pipeline.encode_prompts = decode_on_four, encode_on_eight
folder = Path(sys.argv[1])
fields = {"sampling.output": folder / "eight", "mesh.data": 2, "mesh.fsdp": 2, "mesh.sequence": 2}
run = load(SampleRun, folder / "finished/config.yaml", fields)
sample(run)
assert used == {"decode", "encode"}
before = {path.name: path.read_bytes() for path in (folder / "eight").iterdir()}
for name in ("000.mp4", "001.mp4", "001.safetensors"):
    (folder / "eight" / name).unlink()
sample(run)
assert {path.name: path.read_bytes() for path in (folder / "eight").iterdir()} == before
"""
"""Program that samples on a mesh of 2 x 2 x 2 devices, and then again what it has removed."""

IN_PROCESSES = """
import errno, sys
import jax
from tfm_jax import video
from tfm_jax.cli import command, sample

write, (log, no_room, *arguments) = video.write_clip, sys.argv[1:]

def watched(path, *rest):
    index = jax.process_index()
    if (index, path.stem) == (1, no_room):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    write(path, *rest)
    with open(log, "a") as lines:
        lines.write(f"{index} wrote {path.name}\\n")

video.write_clip = watched
sys.argv = ["tfm-sample", *arguments]
command.run(sample.execute)
"""
"""The program tfm-sample that logs which process writes which video, and whose process 1 has no room for one video.

Arguments: the log, the stem of the video for which there is no room, and the arguments of tfm-sample.
"""


@pytest.fixture
def launch():
    launcher = Launcher()
    yield launcher
    launcher.kill()


def assert_equal(ours: Path, one: Path) -> None:
    """Latents agree to 1e-5 of the largest, and frames to one grey level."""
    assert content(ours).keys() == content(one).keys()
    for name in LATENTS:
        a, b = (load_file(folder / name)["latents"] for folder in (ours, one))
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
    a, b = (np.int16([read_clip(folder / name, 5, 32, 48, 16) for name in VIDEOS]) for folder in (ours, one))
    assert np.abs(a - b).max() <= 1


def test_eight_devices_make_the_videos_of_one(finished, model):
    """Four videos at a time, each decoded by one device. Videos that are made again have the same bytes."""
    command = [sys.executable, "-c", ON_EIGHT_DEVICES, model.parent]
    done = subprocess.run(command, env=virtual_devices.environment(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_equal(model.parent / "eight", finished)


@pytest.mark.slow
def test_two_processes_make_the_videos_of_one(finished, model, launch, tmp_path):
    """The first run ends with an error of process 1, and the second one makes what is missing. Each process writes its
    own videos."""
    output, log = tmp_path / "two", tmp_path / "log"
    options = ["--config", str(finished / "config.yaml"), f"--sampling.output={output}"]
    meshes = ["--mesh.data=2", "--mesh.sequence=2", "--mesh.tensor=2"], ["--mesh.fsdp=2", "--mesh.sequence=4"]
    two = launch(2, ["-c", IN_PROCESSES, str(log), "001", *options, *meshes[0]])
    errors = [process.communicate(timeout=PATIENCE)[1] for process in two]
    assert [process.returncode for process in two] == [2, 2], errors
    assert re.findall("error: .*", "".join(errors)) == [
        f"error: process 1 of 2: {output / '001.mp4'}: No space left on device"
    ]
    assert not (output / "002.safetensors").exists()

    (output / "000.safetensors").unlink()  # of the first process; its video is there or not
    (output / "000.mp4").unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    two = launch(2, ["-c", IN_PROCESSES, str(log), "none", *options, *meshes[0]])
    (out, err), (out_of_other, err_of_other) = (process.communicate(timeout=PATIENCE) for process in two)
    assert [process.returncode for process in two] == [0, 0], err + err_of_other
    assert sorted(log.read_text().splitlines()) == ["0 wrote 000.mp4", "0 wrote 002.mp4", "1 wrote 001.mp4"]
    assert out.endswith(f"{output}: 3 videos and contact_sheet.png\n")
    assert "devices: 8 x cpu in 2 processes" in err
    assert "videos" not in out_of_other + err_of_other
    assert_equal(output, finished)

    other = [*options[:2], *meshes[1], f"--sampling.output={tmp_path / 'three'}"]
    weights_apart = launch(2, [str(ROOT / "scripts/sample.py"), *other])
    errors = [process.communicate(timeout=PATIENCE)[1] for process in weights_apart]
    assert [process.returncode for process in weights_apart] == [0, 0], errors
    assert_equal(tmp_path / "three", finished)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both(finished, launch, tmp_path):
    output = tmp_path / "stopped"
    options = ["--config", str(finished / "config.yaml"), f"--sampling.output={output}", "--sampling.steps=100000"]
    two = launch(2, [str(ROOT / "scripts/sample.py"), *options])
    wait_for((output / "samples.json").exists, two)
    two[1].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=PATIENCE)[1] for process in two]
    assert [process.returncode for process in two] == [75, 75], errors
    assert "".join(errors).count("stopped: 0 of 3 videos are done; to continue, run the same command again\n") == 1
