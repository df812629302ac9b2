"""Several processes as one run: the program itself, on two processes of four CPU devices each that talk over gloo."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import virtual_devices
from helpers.configured import configured
from helpers.paths import ROOT
from helpers.wan_reference import SIZES, reference_transformer
from safetensors.numpy import load_file

from tfm_jax import hosts, interrupts
from tfm_jax.checkpoint import Checkpoints
from tfm_jax.data.batches import Batches
from tfm_jax.data.records import Record, RecordWriter, open_records
from tfm_jax.errors import InputError, NonFiniteLoss, StoppedEarly
from tfm_jax.train import loop
from tfm_jax.train.metrics import Metrics, read_metrics

CONFIG = SIZES["small"]
SCRIPT = ROOT / "scripts" / "train.py"
CLIP = {"frames": 5, "height": 32, "width": 32, "fps": 16.0}
BATCH = 8
CLIPS = 24
PATIENCE = 900
"""Seconds; many times what a run takes, for machines that have other work."""

FAST_COMPILATION = " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

LOADING = """
import json, sys
from pathlib import Path
import jax
from tfm_jax import hosts
from tfm_jax.config import MeshConfig
from tfm_jax.sharding import make_mesh
from tfm_jax.wan import layouts, load_transformer
reads, open_tensors = {}, layouts.open_tensors

def counted(files):
    def entry(name, tensor):
        def read(index):
            values = tensor.read(index)
            rows = [piece.indices(length) for piece, length in zip(index, tensor.shape)]
            whole = all(piece == (0, length, 1) for piece, length in zip(rows[1:], tensor.shape[1:]))
            reads.setdefault(name, []).append({"bytes": values.nbytes, "first": rows[0][0], "rows_are_whole": whole})
            return values
        return tensor._replace(read=read)
    return {name: entry(name, tensor) for name, tensor in open_tensors(files).items()}

layouts.open_tensors = counted
with hosts.distributed():
    load_transformer(sys.argv[1], "float32", make_mesh(MeshConfig(data=1, fsdp=8)))
    Path(f"{sys.argv[2]}/reads{jax.process_index()}.json").write_text(json.dumps(reads))
"""
"""Load a transformer, and leave a file of what this process read of its weights."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A transformer, prepared clips and a configuration of a run on eight devices that share the weights."""
    path = tmp_path_factory.mktemp("hosts")
    reference_transformer(CONFIG).save_pretrained(path / "model" / "transformer")
    rng = np.random.default_rng(0)
    with RecordWriter(path / "latents", CLIP) as writer:
        for number in range(CLIPS):
            clip = rng.standard_normal((2, 4, 4, CONFIG.channels), np.float32)
            writer.write(Record(clip, rng.standard_normal((3, CONFIG.text_dim), np.float32), "", f"{number}.mp4"))
    values = {
        "model": {"path": str(path / "model"), "dim": CONFIG.dim, "ffn_dim": CONFIG.ffn_dim, "heads": CONFIG.heads,
                  "layers": CONFIG.layers, "dtype": "float32"},
        "clip": CLIP,
        "data": {"path": str(path / "latents")},
        "lora": {"rank": 2, "targets": ["self_attn.q", "ffn.2"]},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"output": str(path / "run"), "steps": 1000, "batch_size": BATCH, "checkpoint_every": 1000},
        "mesh": {"data": 1, "fsdp": 8},
    }  # fmt: skip
    (path / "config.yaml").write_text(json.dumps(values))  # JSON is YAML
    return path


@pytest.fixture
def launch(folder):
    """Start processes: `launch(2, training(folder, "--train.steps=2"))`; what is left of them at the end is killed."""
    started: list[subprocess.Popen] = []

    def start(count: int, command: list[str]) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("", 0))
            address = f"localhost:{free.getsockname()[1]}"
        environment = virtual_devices.environment(8 // count)
        environment["XLA_FLAGS"] += FAST_COMPILATION
        environment |= {
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        for index in range(count):
            several = {
                "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            }
            process = subprocess.Popen(
                [sys.executable, *command],
                env=environment | (several if count > 1 else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            started.append(process)
        return started[-count:]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def training(folder: Path, *options: str) -> list[str]:
    return [str(SCRIPT), "--config", str(folder / "config.yaml"), *options]


def wait_for(condition, processes) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.1)


def lines_of(output: Path) -> int:
    file = output / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def saved(output: Path) -> tuple[list[int], dict[str, np.ndarray]]:
    """The steps of the checkpoints, and the arrays of the last."""
    checkpoints = Checkpoints(output / "checkpoints")
    return checkpoints.steps, {name: np.asarray(array) for name, array in checkpoints.restore().arrays.items()}


# --- Two processes ---------------------------------------------------------------------------------------------------


def test_two_processes_are_stopped_resumed_and_equal_one(folder, launch):
    """Started on 2 x 4 devices, stopped by SIGTERM to one process, resumed on 2 x 4; compared with 1 x 8 throughout."""
    output = folder / "two"
    two = launch(2, training(folder, f"--train.output={output}"))
    wait_for(lambda: lines_of(output) >= 2, two)
    two[1].send_signal(signal.SIGTERM)
    (out, err), (out_of_other, err_of_other) = (process.communicate(timeout=PATIENCE) for process in two)
    assert [process.returncode for process in two] == [75, 75], err + err_of_other
    (stopped,) = saved(output)[0]
    assert "devices: 8 x cpu in 2 processes; mesh: data=1, fsdp=8, sequence=1, tensor=1" in out
    line = f"stopped by SIGTERM after step {stopped} of 1000; the same command with --resume continues\n"
    assert (err + err_of_other).count(line) == 1
    assert not any(word in out_of_other + err_of_other for word in ("processes", "error", "step 1/"))
    assert [line["step"] for line in read_metrics(output / "metrics.jsonl")] == list(range(1, stopped + 1))

    steps = f"--train.steps={stopped + 2}"
    two = launch(2, training(folder, f"--train.output={output}", steps, "--resume"))
    (out, err), _ = (process.communicate(timeout=PATIENCE) for process in two)
    assert [process.returncode for process in two] == [0, 0], err
    assert f"resumed {output} after step {stopped}" in out

    (one,) = launch(1, training(folder, f"--train.output={folder / 'one'}", steps, "--mesh.data=2", "--mesh.fsdp=4"))
    _, err = one.communicate(timeout=PATIENCE)
    assert one.returncode == 0, err
    ours, theirs = (read_metrics(folder / name / "metrics.jsonl") for name in ("two", "one"))
    assert len(ours) == len(theirs) == stopped + 2
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    (_, ours), (_, theirs) = saved(folder / "two"), saved(folder / "one")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert np.abs(ours[name] - value).max() <= 1e-5 * np.abs(value).max(), name


def test_a_process_of_eight_reads_an_eighth(folder, launch, tmp_path):
    """Of every kernel one piece of whole rows that no other process reads; of what is not split, the whole."""
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
    """A clip is damaged that one process reads at the third step, while the other waits for that step's gradients."""
    clip = Batches(open_records(folder / "latents"), BATCH, seed=0).at(2)[1][BATCH - 1]
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
    """The same command continues after either."""
    output = folder / "killed"
    command = training(folder, f"--train.output={output}", "--train.checkpoint_every=1", "--resume")
    two = launch(2, command)
    wait_for(lambda: Checkpoints(output / "checkpoints").steps, two)
    two[1].kill()
    killed = time.monotonic()
    _, err = two[0].communicate(timeout=PATIENCE)
    assert time.monotonic() - killed < 30
    assert two[1].wait() == -signal.SIGKILL
    # What comes first: a computation that fails without the other, or JAX, which aborts.
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
    message = rf"stopped by SIG(INT|TERM) after step {stopped} of 1000; the same command with --resume continues\n"
    assert len(re.findall(message, err + err_of_other)) == 1
    assert "SIGINT: saving a checkpoint after this step; send it again to end the program at once\n" in err
    assert [line["step"] for line in read_metrics(output / "metrics.jsonl")] == list(range(1, stopped + 1))


def damage(dataset: Path, copy: Path, clip: int) -> None:
    """`dataset` with one bit of one clip turned."""
    shutil.copytree(dataset, copy)
    (shard,) = copy.glob("*.array_record*")
    content = shard.read_bytes()
    for place in range(0, len(content), 400):
        bad = bytearray(content)
        bad[place] ^= 4
        shard.write_bytes(bad)
        try:
            records = open_records(copy)
        except InputError:
            continue
        if damaged(records) == [clip]:
            return
    pytest.fail("no such place")


def damaged(records) -> list[int]:
    found = []
    for clip in range(len(records)):
        try:
            records[clip]
        except InputError:
            found.append(clip)
    return found


# --- One process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_process_alone_saves_and_stops(folder, tmp_path, monkeypatch, number):
    add = Metrics.add

    def watched(self, step, *rest):
        if step == 2:
            os.kill(os.getpid(), number)
            while not interrupts.requested():
                time.sleep(0.01)
        add(self, step, *rest)

    monkeypatch.setattr(Metrics, "add", watched)
    options = ["--config", str(folder / "config.yaml"), "--mesh.fsdp=1", "--train.batch_size=1"]
    run = configured(loop.TrainRun, [*options, f"--train.output={tmp_path / 'run'}"])
    with pytest.raises(StoppedEarly) as stopped, interrupts.handled(), hosts.distributed():
        loop.train(run)
    (step,) = saved(tmp_path / "run")[0]
    assert step in (2, 3)  # the signal came after the question of step 2
    assert str(stopped.value) == (
        f"stopped by {number.name} after step {step} of 1000; the same command with --resume continues"
    )


def test_several_processes_agree_on_a_stop_and_then_end_at_once(monkeypatch):
    """JAX has SIGTERM until all agree on a step; Ctrl-C is passed on to it."""
    agreed = iter([False, True])
    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(hosts.multihost_utils, "reached_preemption_sync_point", lambda step: next(agreed))
    monkeypatch.setattr(interrupts, "requested", lambda: "SIGINT")
    passed_on = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: passed_on.append(number))
    try:
        assert hosts.stop_requested(1) is None
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert hosts.stop_requested(2) == "SIGINT"
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
    def key_value_set(name, value):
        if first:
            raise RuntimeError("ALREADY_EXISTS")

    client = SimpleNamespace(
        key_value_set=key_value_set,
        key_value_try_get=lambda name: first,
        wait_at_barrier=lambda name, milliseconds: None,
    )
    monkeypatch.setattr(hosts, "_client", lambda: client)
    monkeypatch.setattr(hosts, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        hosts._fail(ending)
    assert ended.value.code == code
    assert capsys.readouterr().err == line


# --- What the environment says ---------------------------------------------------------------------------------------

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "node1:4321", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


def test_settings_of_the_environment():
    assert hosts.arguments({}) is None
    wanted = {"coordinator_address": "node1:4321", "num_processes": 4, "process_id": 3}
    assert hosts.arguments(SLURM | EXPLICIT) == wanted | {"cluster_detection_method": "deactivate"}
    slurm = {"cluster_detection_method": "slurm"}
    assert hosts.arguments(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}) == slurm
    one_a_machine = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    assert hosts.arguments(one_a_machine) == slurm | {"local_device_ids": []}
    assert hosts.arguments(one_a_machine | {"JAX_LOCAL_DEVICE_IDS": "0,1"}) == slurm
    assert hosts.arguments(SLURM | {"SLURM_NTASKS": "1"}) is None
    assert hosts.arguments(SLURM | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_a_tpu_machine_is_recognised(monkeypatch):
    monkeypatch.setattr(hosts.cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    assert hosts.arguments({}) == hosts.arguments({"JAX_PLATFORMS": "tpu,cpu"}) == {}
    assert hosts.arguments({"JAX_PLATFORMS": "cpu"}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID is not set, but JAX_COORDINATOR_ADDRESS=node1:4321, JAX_NUM_PROC"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two: expected how many processes there are, at least 1"),
        ({"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES=0: expected"),
        ({"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4: expected the number of this process, from 0 to 3"),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID=-1: expected"),
        ({"JAX_COORDINATOR_ADDRESS": "node1"}, "JAX_COORDINATOR_ADDRESS=node1: expected the host and a free port"),
        ({"JAX_COORDINATOR_ADDRESS": "node1:99999"}, "JAX_COORDINATOR_ADDRESS=node1:99999: expected"),
        ({"JAX_COORDINATOR_ADDRESS": ":80"}, "JAX_COORDINATOR_ADDRESS=:80: expected"),
    ],
)
def test_wrong_settings_are_told_in_one_line(change, message):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        hosts.arguments(EXPLICIT | change)
    assert "\n" not in str(caught.value)


def test_a_port_that_is_taken_is_told():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(InputError, match=f"JAX_COORDINATOR_ADDRESS={address}: port .*in use"):
            hosts.arguments(EXPLICIT | {"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": "0"})


def test_a_process_that_nobody_meets_ends():
    program = "from tfm_jax import hosts\nhosts.MEET_SECONDS = 2\nwith hosts.distributed():\n    print('met')"
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
        r"error: process 3 of 4: not all of 4 processes came to localhost:\d+ within 2 s; .*\n", done.stderr
    )
    assert not done.stdout
