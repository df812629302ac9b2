"""Distributed runs: tfm-train itself in two processes of four CPU devices each, which communicate over gloo."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import virtual_devices
from helpers.configured import configured
from helpers.launching import (
    BATCH,
    CONFIG,
    LOADING,
    PATIENCE,
    Launcher,
    damage,
    lines_of,
    saved,
    training,
    wait_for,
    write_run,
)
from helpers.paths import ROOT
from helpers.training_runs import computed, validated
from safetensors.numpy import load_file

from tfm_jax import interrupts, jax_distributed, processes
from tfm_jax.checkpoint import Checkpoints
from tfm_jax.data.batches import Batches
from tfm_jax.data.records import open_records
from tfm_jax.errors import InputError, NonFiniteLoss, StoppedEarly
from tfm_jax.sharding import one_device_mesh
from tfm_jax.train import loop
from tfm_jax.train.metrics import read_metrics
from tfm_jax.train.run import TrainRun
from tfm_jax.train.watching import Reports


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes")
    write_run(path)
    return path


@pytest.fixture
def launch(folder):
    launcher = Launcher()
    yield launcher
    launcher.kill()


# --- Two processes ---------------------------------------------------------------------------------------------------


def test_two_processes_are_stopped_resumed_and_equal_one(folder, launch):
    """A run of 2 x 4 devices that SIGTERM to one process stops and that is then resumed equals a run of 1 x 8.

    So does its validation, of the base before the first step and of the LoRA after the last one.
    """
    output, held_out = folder / "two", ("--data.held_out=0.2", "--train.eval_every=1000")
    two = launch(2, training(folder, f"--train.output={output}", *held_out))
    wait_for(lambda: lines_of(output) >= 2, two)
    two[1].send_signal(signal.SIGTERM)
    (out, err), (out_of_other, err_of_other) = (process.communicate(timeout=PATIENCE) for process in two)
    assert [process.returncode for process in two] == [75, 75], err + err_of_other
    (stopped,) = saved(output)[0]
    assert "devices: 8 x cpu in 2 processes; mesh: data=1, fsdp=8, sequence=1, tensor=1" in out
    line = f"stopped by SIGTERM after step {stopped} of 1000; to continue, run the same command with --resume\n"
    assert (err + err_of_other).count(line) == 1
    assert not any(word in out_of_other + err_of_other for word in ("processes", "error", "step 1/"))
    assert [line["step"] for line in read_metrics(output / "metrics.jsonl")] == list(range(1, stopped + 1))

    steps = (f"--train.steps={stopped + 2}", *held_out)
    two = launch(2, training(folder, f"--train.output={output}", *steps, "--resume"))
    (out, err), _ = (process.communicate(timeout=PATIENCE) for process in two)
    assert [process.returncode for process in two] == [0, 0], err
    assert f"resumed {output} after step {stopped}" in out

    (one,) = launch(1, training(folder, f"--train.output={folder / 'one'}", *steps, "--mesh.data=2", "--mesh.fsdp=4"))
    _, err = one.communicate(timeout=PATIENCE)
    assert one.returncode == 0, err
    ours, theirs = (computed(folder / name) for name in ("two", "one"))
    assert len(ours) == len(theirs) == stopped + 2
    for a, b in zip(ours, theirs, strict=True):
        levels = [[math.nan if x is None else x for x in line.pop("loss_by_level")] for line in (a, b)]
        assert levels[0] == pytest.approx(levels[1], rel=1e-5, nan_ok=True)
        assert a == pytest.approx(b, rel=1e-5)
    ours, theirs = (validated(folder / name) for name in ("two", "one"))
    assert [(line["model"], line["step"]) for line in ours] == [("base", 0), ("lora", stopped + 2)]
    for a, b in zip(ours, theirs, strict=True):
        for loss in ("fm", "tfm"):
            assert a["by_level"][loss] == pytest.approx(b["by_level"][loss], rel=1e-4)
    (_, ours), (_, theirs) = saved(folder / "two"), saved(folder / "one")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert np.abs(ours[name] - value).max() <= 1e-5 * np.abs(value).max(), name


def test_a_process_of_eight_reads_an_eighth(folder, launch, tmp_path):
    """Each process reads different whole rows of every kernel, and all of the tensors that are not split."""
    eight = launch(8, ["-c", LOADING, str(folder / "model"), str(tmp_path)])
    errors = [process.communicate(timeout=PATIENCE)[1] for process in eight]
    assert [process.returncode for process in eight] == [0] * 8, errors
    tensors = load_file(folder / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    reads = [json.loads((tmp_path / f"reads{index}.json").read_text()) for index in range(8)]
    kernels = {name for name in tensors if re.fullmatch(r"blocks\.\d+\..*\.weight", name) and tensors[name].ndim == 2}
    assert len(kernels) == 10 * CONFIG.layers
    for name in kernels:
        parts = [part for process in reads for part in process[name]]
        assert [part["bytes"] for part in parts] == [tensors[name].nbytes // 8] * 8, name
        assert sorted(part["first"] for part in parts) == [len(tensors[name]) // 8 * place for place in range(8)]
        assert all(part["rows_are_whole"] for part in parts), name
    split = sum(tensors[name].nbytes for name in kernels)
    rest = sum(tensor.nbytes for tensor in tensors.values()) - split
    for process in reads:
        assert process.keys() == tensors.keys()
        total = sum(part["bytes"] for parts in process.values() for part in parts)
        assert total <= split / 8 + rest


def test_an_error_of_one_process_ends_all(folder, launch):
    """One process reads a damaged clip at the third step while the other waits for the gradients of that step."""
    clip = Batches(open_records(folder / "latents"), BATCH, 0, one_device_mesh(), 64).read(2)[1][BATCH - 1]
    damage(folder / "latents", folder / "damaged", clip)
    two = launch(2, training(folder, f"--train.output={folder / 'failed'}", f"--data.path={folder / 'damaged'}"))
    error = two[1].stderr.readline()
    while error and not error.startswith("error"):
        error = two[1].stderr.readline()
    noticed = time.monotonic()
    (_, err), (_, rest) = (process.communicate(timeout=PATIENCE) for process in two)
    assert time.monotonic() - noticed < 30
    assert [process.returncode for process in two] == [2, 2], err + rest
    assert error.startswith(f"error: process 1 of 2: {folder / 'damaged'}: clip {clip} is damaged"), error + rest
    assert not any(word in err + rest for word in ("error", "Traceback"))
    assert lines_of(folder / "failed") >= 1


def test_a_killed_process_ends_the_other_and_ctrl_c_stops_both(folder, launch):
    """The same command continues the run after each."""
    output = folder / "killed"
    command = training(folder, f"--train.output={output}", "--train.checkpoint_every=1", "--resume")
    two = launch(2, command)
    wait_for(lambda: Checkpoints(output / "checkpoints").steps, two)
    two[1].kill()
    killed = time.monotonic()
    _, err = two[0].communicate(timeout=PATIENCE)
    assert time.monotonic() - killed < 30
    assert two[1].wait() == -signal.SIGKILL
    # Either a computation fails first, or JAX notices first and aborts.
    assert two[0].returncode in (1, -signal.SIGABRT), err

    before = saved(output)[0][-1]
    two = launch(2, command)
    wait_for(lambda: lines_of(output) > before, two)
    two[0].send_signal(signal.SIGINT)
    (out, err), (_, err_of_other) = (process.communicate(timeout=PATIENCE) for process in two)
    assert [process.returncode for process in two] == [75, 75], err + err_of_other
    assert f"resumed {output} after step {before}" in out
    stopped = saved(output)[0][-1]
    assert stopped > before
    message = (
        rf"stopped by SIG(INT|TERM) after step {stopped} of 1000; to continue, run the same command with --resume\n"
    )
    assert len(re.findall(message, err + err_of_other)) == 1
    assert "SIGINT: saving a checkpoint after this step; send it again to end the program at once\n" in err
    assert [line["step"] for line in read_metrics(output / "metrics.jsonl")] == list(range(1, stopped + 1))


# --- One process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_process_alone_saves_and_stops(folder, tmp_path, monkeypatch, number):
    add = Reports.add

    def watched(self, step, *rest):
        if step == 2:
            os.kill(os.getpid(), number)
            while not interrupts.requested():
                time.sleep(0.01)
        add(self, step, *rest)

    monkeypatch.setattr(Reports, "add", watched)
    options = ["--config", str(folder / "config.yaml"), "--mesh.fsdp=1", "--train.batch_size=1"]
    run = configured(TrainRun, [*options, f"--train.output={tmp_path / 'run'}"])
    with pytest.raises(StoppedEarly) as stopped, interrupts.handled(), processes.distributed():
        loop.train(run)
    (step,) = saved(tmp_path / "run")[0]
    assert step in (2, 3)  # the signal arrived after step 2 had asked for signals
    assert str(stopped.value) == (
        f"stopped by {number.name} after step {step} of 1000; to continue, run the same command with --resume"
    )


def test_several_processes_agree_on_a_stop_and_then_end_at_once(monkeypatch):
    """JAX handles SIGTERM until all processes agree on a step; Ctrl-C is passed on to it as SIGTERM."""
    agreed = iter([False, True])
    monkeypatch.setattr(processes, "is_distributed", lambda: True)
    monkeypatch.setattr(processes.multihost_utils, "reached_preemption_sync_point", lambda step: next(agreed))
    monkeypatch.setattr(interrupts, "requested", lambda: "SIGINT")
    passed_on = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: passed_on.append(number))
    try:
        assert processes.stop_requested(1) is None
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert processes.stop_requested(2) == "SIGINT"
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert passed_on == [signal.SIGTERM] * 2


@pytest.mark.parametrize(
    ("ending", "first", "code", "line"),
    [
        (NonFiniteLoss("step 3"), None, 1, "error: process 0 of 1: step 3\n"),
        (NonFiniteLoss("step 3"), "2", 2, ""),
        (StoppedEarly("stopped"), None, 75, "stopped\n"),
        (StoppedEarly("stopped"), "75", 75, ""),
    ],
)
def test_the_first_ending_is_printed_and_gives_the_code_of_all(monkeypatch, capsys, ending, first, code, line):
    def key_value_set(key, value):
        if first:
            raise RuntimeError("ALREADY_EXISTS")

    client = SimpleNamespace(
        key_value_set=key_value_set,
        key_value_try_get=lambda key: first,
        wait_at_barrier=lambda name, milliseconds: None,
    )
    monkeypatch.setattr(jax_distributed.global_state, "client", client)
    monkeypatch.setattr(processes, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        processes._fail(ending)
    assert ended.value.code == code
    assert capsys.readouterr().err == line


# --- Environment variables -------------------------------------------------------------------------------------------

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "node1:4321", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


def test_settings_of_the_environment():
    assert processes.initialize_arguments({}) is None
    wanted = {"coordinator_address": "node1:4321", "num_processes": 4, "process_id": 3}
    assert processes.initialize_arguments(SLURM | EXPLICIT) == wanted | {"cluster_detection_method": "deactivate"}
    slurm = {"cluster_detection_method": "slurm"}
    assert processes.initialize_arguments(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}) == slurm
    one_a_machine = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    assert processes.initialize_arguments(one_a_machine) == slurm | {"local_device_ids": []}
    assert processes.initialize_arguments(one_a_machine | {"JAX_LOCAL_DEVICE_IDS": "0,1"}) == slurm
    assert processes.initialize_arguments(SLURM | {"SLURM_NTASKS": "1"}) is None
    assert processes.initialize_arguments(SLURM | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize(
    ("environment", "arguments"),
    [({}, {}), ({"JAX_PLATFORMS": "tpu,cpu"}, {}), ({"JAX_PLATFORMS": "cpu"}, None), ({"JAX_PLATFORMS": "cuda"}, None)],
)
def test_a_tpu_machine_is_recognised(environment, arguments):
    """JAX_FORCE_TPU_INIT makes JAX believe that it runs on a TPU machine."""
    program = "from tfm_jax import processes\nprint(processes.initialize_arguments({}))"
    environment = {"PATH": "", "PYTHONPATH": str(ROOT), "JAX_FORCE_TPU_INIT": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout == f"{arguments}\n", done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID is not set, but JAX_COORDINATOR_ADDRESS=node1:4321, JAX_NUM_PROC"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two: expected the number of processes, at least 1"),
        ({"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES=0: expected"),
        ({"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4: expected the number of this process, from 0 to 3"),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID=-1: expected"),
        ({"JAX_COORDINATOR_ADDRESS": "node1"}, "JAX_COORDINATOR_ADDRESS=node1: expected the host and a free port"),
        ({"JAX_COORDINATOR_ADDRESS": "node1:99999"}, "JAX_COORDINATOR_ADDRESS=node1:99999: expected"),
        ({"JAX_COORDINATOR_ADDRESS": ":80"}, "JAX_COORDINATOR_ADDRESS=:80: expected"),
    ],
)
def test_invalid_settings_are_reported_in_one_line(change, message):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        processes.initialize_arguments(EXPLICIT | change)
    assert "\n" not in str(caught.value)


def test_a_port_in_use_is_reported():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(InputError, match=f"JAX_COORDINATOR_ADDRESS={address}: port .*in use"):
            processes.initialize_arguments(EXPLICIT | {"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": "0"})


def test_a_process_that_waits_in_vain_ends():
    program = (
        "from tfm_jax import processes\nprocesses.BARRIER_TIMEOUT = 2\n"
        "with processes.distributed():\n    print('connected')"
    )
    with socket.socket() as free:
        free.bind(("", 0))
        settings = EXPLICIT | {"JAX_COORDINATOR_ADDRESS": f"localhost:{free.getsockname()[1]}"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=virtual_devices.environment(1) | settings | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: process 3 of 4: not all 4 processes connected to localhost:\d+ within 2 s; .*\n", done.stderr
    )
    assert not done.stdout
