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
from helpers.sampling_runs import LATENTS, content
from safetensors.numpy import load_file

from tfm_jax.config import load
from tfm_jax.sampling.decoding import decode
from tfm_jax.sampling.latents import read_latents
from tfm_jax.sampling.outputs import SampleRun
from tfm_jax.wan import load_vae

PROGRAM = """
import errno, sys
from pathlib import Path
import jax
import numpy as np
from tfm_jax import video
from tfm_jax.cli import command, sample

write, (folder, no_room, *arguments) = video.write_clip, sys.argv[1:]

def recorded(path, frames, *rest):
    index, frames = jax.process_index(), np.stack(list(frames))
    if (index, path.stem) == (1, no_room):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    np.save(Path(folder, f"{index}_{path.stem}.npy"), frames)
    write(path, frames, *rest)

video.write_clip = recorded
sys.argv = ["tfm-sample", *arguments]
"""
"""The start of a program that runs tfm-sample. It saves the frames of each video under the number of the process.

Arguments: the folder for the frames; the stem of a video for which process 1 has no room; those of tfm-sample.
"""

IN_PROCESSES = f"{PROGRAM}\ncommand.run(sample.execute)\n"

ON_EIGHT_DEVICES = (
    PROGRAM
    + """
from tfm_jax.sampling import pipeline, writing

decode, encode = writing.decode, pipeline.encode_prompts
used = set()

def decode_on_four(vae, latents, *rest):
    assert len(latents) == len(vae.quant_conv.kernel.sharding.device_set) == 4
    used.add("decode")
    return decode(vae, latents, *rest)

def encode_on_eight(tokenizer, encoder, prompts, mesh, length):
    assert len(prompts) == 4
    assert encoder.blocks.ffn.up.kernel.addressable_shards[0].data.shape == (2, 64 // 4, 128)
    used.add("encode")
    return encode(tokenizer, encoder, prompts, mesh, length)

writing.decode, pipeline.encode_prompts = decode_on_four, encode_on_eight
sample.execute(arguments)
assert used == {"decode", "encode"}
output = Path(arguments[-1].partition("=")[2])
before = {path.name: path.read_bytes() for path in output.iterdir()}
for name in ("000.mp4", "001.mp4", "001.safetensors"):
    (output / name).unlink()
sample.execute(arguments)
assert {path.name: path.read_bytes() for path in output.iterdir()} == before
"""
)
"""Program that samples on a mesh of 2 x 2 x 2 devices, and then again what it has removed."""


@pytest.fixture
def launch():
    launcher = Launcher()
    yield launcher
    launcher.kill()


@pytest.fixture(scope="module")
def frames_of_one(finished, model) -> list[np.ndarray]:
    """The frames of the videos of one device, before they are compressed."""
    run = load(SampleRun, finished / "config.yaml")
    latents = np.concatenate([read_latents(finished / name, (2, 4, 6, 16)) for name in LATENTS])
    decoded = [decode(load_vae(model), video[None], [number], run)[number] for number, video in enumerate(latents)]
    return [np.stack(list(frames)) for frames in decoded]


def assert_equal(output: Path, frames: Path, finished: Path, frames_of_one: list[np.ndarray]) -> None:
    """Latents agree to 1e-5 of the largest, and frames to one grey level. Compression may enlarge the difference."""
    assert content(output).keys() == content(finished).keys()
    for name in LATENTS:
        ours, one = (load_file(folder / name)["latents"] for folder in (output, finished))
        assert np.abs(ours - one).max() <= 1e-5 * np.abs(one).max()
    for number, one in enumerate(frames_of_one):
        [file] = frames.glob(f"*_{number:03}.npy")
        assert np.abs(np.int16(np.load(file)) - one).max() <= 1


def test_eight_devices_make_the_videos_of_one(finished, frames_of_one, tmp_path):
    """Four videos at a time, each decoded by one device. Videos that are made again have the same bytes."""
    mesh = ["--mesh.data=2", "--mesh.fsdp=2", "--mesh.sequence=2", f"--sampling.output={tmp_path / 'eight'}"]
    command = [sys.executable, "-c", ON_EIGHT_DEVICES, tmp_path, "", "--config", finished / "config.yaml", *mesh]
    done = subprocess.run(command, env=virtual_devices.environment(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_equal(tmp_path / "eight", tmp_path, finished, frames_of_one)


@pytest.mark.slow
def test_two_processes_make_the_videos_of_one(finished, frames_of_one, launch, tmp_path):
    """The first run ends with an error of process 1, and the second one makes what is missing. Each process writes its
    own videos."""
    output = tmp_path / "two"
    mesh = ["--mesh.data=2", "--mesh.sequence=2", "--mesh.tensor=2", f"--sampling.output={output}"]
    config = ["--config", str(finished / "config.yaml")]
    two = launch(2, ["-c", IN_PROCESSES, str(tmp_path), "001", *config, *mesh])
    errors = [process.communicate(timeout=PATIENCE)[1] for process in two]
    assert [process.returncode for process in two] == [2, 2], errors
    message = f"error: process 1 of 2: {output / '001.mp4'}: No space left on device"
    assert re.findall("error: .*", "".join(errors)) == [message]
    assert not (output / "002.safetensors").exists()

    for name in ("000.mp4", "000.safetensors"):  # the first process may have been too late to write them
        (output / name).unlink(missing_ok=True)
    two = launch(2, ["-c", IN_PROCESSES, str(tmp_path), "", *config, *mesh])
    (out, err), (out_of_other, err_of_other) = (process.communicate(timeout=PATIENCE) for process in two)
    assert [process.returncode for process in two] == [0, 0], err + err_of_other
    assert sorted(file.name for file in tmp_path.glob("*.npy")) == ["0_000.npy", "0_002.npy", "1_001.npy"]
    assert out.endswith(f"{output}: 3 videos and contact_sheet.png\n")
    assert "devices: 8 x cpu in 2 processes" in err
    assert "videos" not in out_of_other + err_of_other
    assert_equal(output, tmp_path, finished, frames_of_one)


@pytest.mark.slow
def test_two_processes_share_the_weights_and_one_video(finished, frames_of_one, launch, tmp_path):
    mesh = ["--mesh.sequence=4", "--mesh.tensor=2", f"--sampling.output={tmp_path / 'two'}"]
    config = ["--config", str(finished / "config.yaml")]
    two = launch(2, ["-c", IN_PROCESSES, str(tmp_path), "", *config, *mesh])
    errors = [process.communicate(timeout=PATIENCE)[1] for process in two]
    assert [process.returncode for process in two] == [0, 0], errors
    assert sorted(file.name for file in tmp_path.glob("*.npy")) == ["0_000.npy", "0_001.npy", "0_002.npy"]
    assert_equal(tmp_path / "two", tmp_path, finished, frames_of_one)


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
