"""Checkpoints: what the fingerprints see, and that no damage of any file gives wrong values or stops a run."""

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from helpers import virtual_devices
from helpers.paths import ROOT

from tfm_jax import checkpoint
from tfm_jax.checkpoint import Checkpoints, fingerprints
from tfm_jax.errors import InputError, NonFiniteLoss
from tfm_jax.lora.files import read_lora
from tfm_jax.train.export import export

FACTORS = "lora/blocks/self_attn/q"
METADATA = {
    "config": {
        "model": {"path": "model"},
        "lora": {"rank": 4, "alpha": 4.0},
        "objective": {"kind": "tfm", "rho": 10.0, "beta": 0.1},
    },
    "numbers": [0.1, 1e-300, 2**60, None, "Ω"],
}


def state(step: int) -> dict[str, jax.Array]:
    """What a run has after `step` steps, of different values for every step."""
    key = jax.random.key(step)
    return {
        f"{FACTORS}/lora_a/value": jax.random.normal(key, (2, 160, 4)),
        f"{FACTORS}/lora_b/value": jax.random.normal(key, (2, 4, 160)),
        "moment": jnp.full(5, step, jnp.bfloat16),
        "step": jnp.int32(step),
    }


def wanted(metadata: dict) -> dict[str, jax.ShapeDtypeStruct]:
    assert metadata == METADATA
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for name, x in state(0).items()}


def assert_is_of_step(restored: checkpoint.Restored | None, step: int) -> None:
    assert restored is not None
    assert restored.step == step
    assert restored.metadata == METADATA
    expected = state(step)
    assert restored.arrays.keys() == expected.keys()
    for name, array in expected.items():
        assert restored.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(restored.arrays[name], array)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """A run with checkpoints of steps 1 and 2. The name of its folder is one that a URL would have to encode."""
    run = tmp_path_factory.mktemp("run") / "Ω 100% #1?"
    with Checkpoints(run / "checkpoints", keep=3) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), METADATA)
    return run


@pytest.fixture
def folder(two, tmp_path) -> Path:
    """A copy of its checkpoints."""
    return shutil.copytree(two, tmp_path / two.name) / "checkpoints"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def edit(file: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def damage(folder: Path, step: int = 2) -> None:
    """Turn a bit of the array data of a checkpoint."""
    flip(max((folder / str(step)).rglob("d/*"), key=lambda file: file.stat().st_size), 0.5)


def flip(file: Path, place: float, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1 << bit
    file.write_bytes(content)


# --- Fingerprints ----------------------------------------------------------------------------------------------------


def fingerprint(array: np.ndarray) -> int:
    return fingerprints({"x": jnp.asarray(array)})["x"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_fingerprints_see_every_change(dtype):
    rng = np.random.default_rng(0)
    x = np.asarray(1000 * rng.standard_normal((8, 8, 8))).astype(dtype)
    unsigned = {2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    seen = {fingerprint(x)}

    def changed(value: np.ndarray) -> None:
        """Each change has a fingerprint of its own."""
        before = len(seen)
        seen.add(fingerprint(value))
        assert len(seen) == before + 1

    def bits_turned(mask: int, *places: tuple[int, ...]) -> np.ndarray:
        copy = x.copy()
        for place in places:
            copy.view(unsigned)[place] ^= unsigned(mask)
        return copy

    sign = 1 << (8 * x.dtype.itemsize - 1)
    for bit in range(8 * x.dtype.itemsize):
        changed(bits_turned(1 << bit, (1, 2, 3)))
    changed(bits_turned(1, (0, 0, 0)))
    for other in range(1, 8):
        changed(bits_turned(sign, (0, 0, 0), (0, 0, other)))
        changed(bits_turned(sign, (0, 0, 0), (other, 0, 0)))
    changed((x.view(unsigned) ^ unsigned(sign)).view(x.dtype))  # the whole array negated
    for axes in ((0, 1), (1, 2), (0, 2)):
        changed(np.swapaxes(x, *axes))
    for axis in range(3):
        changed(np.flip(x, axis))
        changed(np.roll(x, 1, axis))
    swapped = x.copy()
    swapped[0, 0, 0], swapped[7, 7, 7] = x[7, 7, 7], x[0, 0, 0]
    changed(swapped)
    zeroed = x.copy()
    zeroed[2:4, :, 1:5] = 0
    changed(zeroed)
    changed(np.zeros_like(x))
    changed(np.zeros((8, 8, 7), dtype))


def test_fingerprints_are_the_same_on_every_mesh():
    program = """
import json, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from tfm_jax.checkpoint import fingerprints
mesh = jax.make_mesh((2, 4), ("a", "b"))
specs = (None, "a"), ("b", None, "a"), (("a", "b"),), (None, None, "b"), ()
for dtype in ("float32", "bfloat16"):
    x = jax.random.normal(jax.random.key(0), (8, 6, 16)).astype(dtype)
    split = [jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec))) for spec in specs]
    assert split[1].addressable_shards[0].data.shape == (2, 6, 8)
    print(json.dumps(list(fingerprints(dict(enumerate(split))).values())))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=virtual_devices.environment(8) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    x = jax.random.normal(jax.random.key(0), (8, 6, 16))
    ours = [[fingerprint(x.astype(dtype))] * 5 for dtype in ("float32", "bfloat16")]
    assert [json.loads(line) for line in done.stdout.splitlines()] == ours


# --- Damage of files -------------------------------------------------------------------------------------------------


def damages(target: Path, places: list[float], bits: list[int]) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Ways to damage a file or folder, by name."""
    if target.is_dir():
        yield "deleted", shutil.rmtree
        yield "emptied", lambda path: (shutil.rmtree(path), path.mkdir())
        yield "replaced by a file", lambda path: (shutil.rmtree(path), path.write_text("x"))
        return
    size = target.stat().st_size
    yield "deleted", Path.unlink
    yield "emptied", lambda path: path.write_bytes(b"")
    yield "cut", lambda path: path.write_bytes(path.read_bytes()[: size // 2])
    yield "overwritten", lambda path: path.write_bytes(bytes(range(256)) * (size // 256 + 1))
    for place in places:
        for bit in bits:
            yield f"bit {bit} at {place}", lambda path, place=place, bit=bit: flip(path, place, bit)


def check_every_damage(two: Path, scratch: Path, capfd, places: list[float], bits: list[int]) -> None:
    """Restoring gives the damaged step exactly (the file has no part in it), or the one before, never anything else."""
    step = two / "checkpoints" / "2"
    outcomes = {}
    for target in sorted(step.rglob("*")):
        for number, (name, apply) in enumerate(damages(target, places, bits)):
            part = str(target.relative_to(step))
            run = shutil.copytree(two, scratch / f"{part.replace('/', '-')}-{number}")
            apply(run / "checkpoints" / "2" / part)
            with Checkpoints(run / "checkpoints", keep=3) as checkpoints:
                restored = checkpoints.restore(wanted)
            assert restored is not None, (part, name)
            assert_is_of_step(restored, restored.step)
            printed = capfd.readouterr()
            assert printed.err == "", (part, name)
            if restored.step == 2:
                assert printed.out == ""
            else:
                assert printed.out.startswith(f"note: {run}/checkpoints/2 is damaged and now named 2.damaged: ")
                assert printed.out.count("\n") == 1
                assert names(run / "checkpoints") == ["1", "2.damaged"]
            outcomes[part, name] = restored.step
            shutil.rmtree(run)
    parts = {part.split("/d/")[0] for part, _ in outcomes}
    assert {"_CHECKPOINT_METADATA", "state/manifest.ocdbt", "state", "state/d", "state/ocdbt.process_0"} <= parts
    for (part, name), result in outcomes.items():  # no array of the two checkpoints is the same
        needed = part in ("_CHECKPOINT_METADATA", "state/manifest.ocdbt") or "/d/" in part
        if needed and name in ("deleted", "emptied", "cut", "overwritten"):
            assert result == 1, (part, name)


def test_damaged_files(two, tmp_path, capfd):
    check_every_damage(two, tmp_path, capfd, places=[0.5], bits=[0])


@pytest.mark.slow
def test_every_damage_of_every_file(two, tmp_path, capfd):
    check_every_damage(two, tmp_path, capfd, places=[n / 40 for n in range(41)], bits=[0, 4, 7])


def test_a_checkpoint_is_restored_exactly(folder, capfd):
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps == [1, 2]
        assert_is_of_step(checkpoints.restore(wanted), 2)
        assert_is_of_step(checkpoints.restore(), 2)
        assert_is_of_step(checkpoints.restore(wanted, step=1), 1)
    assert capfd.readouterr() == ("", "")


def test_changed_metadata_is_noticed(folder, capsys):
    def change(content: dict) -> None:
        kept = content["custom_metadata"]
        assert '"alpha": 4.0' in kept["record"]
        kept["record"] = kept["record"].replace('"alpha": 4.0', '"alpha": 6.0')

    edit(folder / "2" / "_CHECKPOINT_METADATA", change)
    with Checkpoints(folder, keep=3) as checkpoints:
        assert_is_of_step(checkpoints.restore(), 1)
    assert "checkpoints/2 is damaged" in capsys.readouterr().out


def test_a_checkpoint_under_the_number_of_another_step(folder, capsys):
    (folder / "2").rename(folder / "3")
    with Checkpoints(folder, keep=3) as checkpoints:
        assert_is_of_step(checkpoints.restore(), 1)
    assert capsys.readouterr().out.endswith("now named 3.damaged: it is the checkpoint of step 2\n")


def test_what_is_set_aside_stays_and_the_run_goes_on(folder, capsys):
    """Several times, with an empty folder and a file among the checkpoints."""
    (folder / "2.damaged").mkdir()
    (folder / "2.damaged" / "mine").write_text("")
    damage(folder)
    (folder / "7").mkdir()
    (folder / "8").write_text("")
    (folder / "0").mkdir()  # is not looked at, and must not disturb Orbax
    with Checkpoints(folder, keep=2) as checkpoints:
        assert_is_of_step(checkpoints.restore(wanted), 1)
        assert checkpoints.steps == [0, 1]
        checkpoints.save(2, state(2), METADATA)
        checkpoints.save(3, state(3), METADATA)
    assert capsys.readouterr().out.count("is damaged and now named") == 3
    assert names(folder) == ["2", "2.damaged", "2.damaged-2", "3", "7.damaged", "8.damaged"]
    assert names(folder / "2.damaged") == ["mine"]
    damage(folder, 3)
    with Checkpoints(folder, keep=2) as checkpoints:
        assert_is_of_step(checkpoints.restore(wanted), 2)


def test_no_checkpoint_is_left(folder):
    damage(folder, 1)
    damage(folder, 2)
    with Checkpoints(folder, keep=3) as checkpoints:
        assert checkpoints.restore() is None
    assert names(folder) == ["1.damaged", "2.damaged"]
    with Checkpoints(folder / "none") as checkpoints:
        assert checkpoints.steps == []
        assert checkpoints.restore() is None
    assert not (folder / "none").exists()


def test_a_reader_renames_nothing(folder, capsys):
    damage(folder)
    before = sorted(folder.rglob("*"))
    with Checkpoints(folder) as checkpoints:
        assert_is_of_step(checkpoints.restore(), 1)
        line = capsys.readouterr().out
        assert line.startswith(f"note: {folder / '2'} is damaged and not used: ")
        assert line.count("\n") == 1
        with pytest.raises(InputError, match=r"checkpoints/2: damaged: .*; undamaged steps: 1$"):
            checkpoints.restore(step=2)
        with pytest.raises(InputError, match="no checkpoint of step 5; expected one of 1, 2"):
            checkpoints.restore(step=5)
        damage(folder, 1)
        with pytest.raises(InputError, match="undamaged steps: none"):
            checkpoints.restore(step=2)
    assert sorted(folder.rglob("*")) == before


def test_another_run_is_refused_and_not_set_aside(folder):
    def other(metadata: dict) -> dict:
        raise InputError("of another run")

    def wider(metadata: dict) -> dict:
        return wanted(metadata) | {"moment": jax.ShapeDtypeStruct((6,), jnp.bfloat16)}

    def fewer(metadata: dict) -> dict:
        return {name: array for name, array in wanted(metadata).items() if name != "moment"}

    with Checkpoints(folder, keep=3) as checkpoints:
        with pytest.raises(InputError, match="of another run"):
            checkpoints.restore(other)
        with pytest.raises(InputError, match=r"2: moment is bfloat16\[5\]; this configuration needs bfloat16\[6\]"):
            checkpoints.restore(wider)
        with pytest.raises(InputError, match="2: moment is not of this run"):
            checkpoints.restore(fewer)
    assert names(folder) == ["1", "2"]


def test_a_checkpoint_of_the_first_version_is_refused(folder):
    edit(
        folder / "2" / "_CHECKPOINT_METADATA",
        lambda content: content.update(custom_metadata={"arrays": {}, "facts": {}}),
    )
    with Checkpoints(folder, keep=3) as checkpoints, pytest.raises(InputError, match=r"2: written by version 0\.1\.0"):
        checkpoints.restore()
    assert names(folder) == ["1", "2"]


@pytest.mark.parametrize(
    "error", [MemoryError(), PermissionError(13, "Permission denied"), ValueError("RESOURCE_EXHAUSTED")]
)
def test_a_failure_of_the_machine_is_no_damage(folder, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(tensorstore, "open", fail)
    with Checkpoints(folder, keep=3) as checkpoints, pytest.raises(type(error)):
        checkpoints.restore()
    assert names(folder) == ["1", "2"]


# --- Several processes -----------------------------------------------------------------------------------------------

TOGETHER = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tfm_jax import checkpoint, hosts
from tfm_jax.checkpoint import Checkpoints

def value(step):
    return jax.device_put(np.arange(16.0, dtype=np.float32) * step, where)

def fail(place, abstract, read=checkpoint._read_arrays):
    if jax.process_index() == 1 and place.name == "3":
        raise ValueError("only process 1 fails")
    return read(place, abstract)

checkpoint._read_arrays = fail
with hosts.distributed():
    where = NamedSharding(jax.make_mesh((8,), "x"), PartitionSpec("x"))
    folder = Path(sys.argv[1])
    with Checkpoints(folder, keep=9) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, {"x": value(step)}, {})
    if hosts.is_first():
        record = folder / "4" / "_CHECKPOINT_METADATA"
        record.write_text(record.read_text()[:-20])
        data = max((folder / "2").rglob("d/*"), key=lambda file: file.stat().st_size)
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    hosts.barrier("damaged")
    with Checkpoints(folder, keep=9) as checkpoints:
        restored = checkpoints.restore(lambda _: {"x": jax.ShapeDtypeStruct((16,), np.float32, sharding=where)})
        parts = restored.arrays["x"].addressable_shards
        same = all((part.data == 1.0 * np.arange(16)[part.index]).all() for part in parts)
        checkpoints.save(2, {"x": value(2)}, {})
    print("restored", restored.step, same, checkpoints.steps)
"""


def test_two_processes_agree_on_what_is_damaged(tmp_path):
    """Damaged metadata, an error of one process alone, and damaged data."""
    with socket.socket() as free:
        free.bind(("", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = []
    for index in range(2):
        environment = virtual_devices.environment(4) | {
            "PYTHONPATH": str(ROOT),
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
        }
        command = [sys.executable, "-c", TOGETHER, str(tmp_path / "checkpoints")]
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    try:
        (first, first_errors), (second, second_errors) = (process.communicate(timeout=120) for process in started)
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], first_errors + second_errors
    assert first.splitlines()[-1] == second.splitlines()[-1] == "restored 1 True [1, 2]"
    assert "note" not in second
    notes = [line for line in first.splitlines() if "Gloo" not in line][:-1]
    assert [note.split(" is damaged and now named ")[0] for note in notes] == [
        f"note: {tmp_path}/checkpoints/{step}" for step in (4, 3, 2)
    ]
    assert "only process 1 fails" in notes[1]
    assert names(tmp_path / "checkpoints") == ["1", "2", "2.damaged", "3.damaged", "4.damaged"]


# --- Saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, value):
    arrays = state(1)
    arrays["moment"] = arrays["moment"].at[3].set(value)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        with pytest.raises(NonFiniteLoss, match="step 1: moment has values that are not finite"):
            checkpoints.save(1, arrays, METADATA)
        assert names(tmp_path) == []


LIMITED = """
import resource, sys
from pathlib import Path
import jax
from tfm_jax.cli import command
from tfm_jax.errors import InputError
from tfm_jax.checkpoint import Checkpoints

def main(argv):
    arrays = {"x": jax.random.normal(jax.random.key(0), (200, 100))}
    folders = [Path(argv[0], name) for name in ("error", "again", "end")]
    for folder in folders:
        with Checkpoints(folder, keep=1) as checkpoints:
            checkpoints.save(1, arrays, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    for folder in folders[:-1]:
        try:
            with Checkpoints(folder, keep=1) as checkpoints:
                checkpoints.save(2, arrays, {})
                if folder.name == "error":
                    raise InputError("something else")
                checkpoints.save(3, arrays, {})
        except InputError as error:
            print(error)
    with Checkpoints(folders[-1], keep=1) as checkpoints:
        checkpoints.save(2, arrays, {})

command.run(main)
"""
"""Save with a limit on the size of files, which fails in Orbax's threads as a full disk does."""


def test_a_failed_write_is_one_line_and_costs_nothing(tmp_path):
    """It is noticed at the end, by the next save, or while another error ends the program."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        env=virtual_devices.environment(1) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    failed = "writing failed: File too large; last complete checkpoint: step 1\n"
    assert done.stderr == f"error: {tmp_path / 'end'}: {failed}"
    note, other, again = done.stdout.splitlines(keepends=True)
    assert note.startswith(f"note: {tmp_path / 'error'}: the last save failed: ")
    assert other == "something else\n"
    assert again == f"{tmp_path / 'again'}: {failed}"
    for folder in tmp_path.iterdir():
        with Checkpoints(folder, keep=1) as checkpoints:
            assert checkpoints.steps == [1]
            arrays = checkpoints.restore().arrays
            checkpoints.save(2, arrays, {})
        assert names(folder) == ["2"]
        with Checkpoints(folder) as checkpoints:
            np.testing.assert_array_equal(checkpoints.restore().arrays["x"], arrays["x"])


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with Checkpoints(tmp_path / "file" / "checkpoints", keep=1) as checkpoints, pytest.raises(OSError, match="file"):
        checkpoints.save(1, state(1), METADATA)


def test_a_folder_that_is_lost_leaves_no_thread(folder):
    """As if the disk had become read-only: the program must end instead of waiting for threads."""
    threads = set(threading.enumerate())
    with Checkpoints(folder, keep=9) as checkpoints:
        checkpoints.save(3, state(3), METADATA)
        while 3 not in checkpoints.steps:
            time.sleep(0.01)
        folder.rename(folder.with_name("elsewhere"))
        folder.write_text("")
        with pytest.raises(OSError, match="directory"):
            checkpoints.save(4, state(4), METADATA)
    # The workers of asyncio are idle and end with the program.
    assert all(thread.daemon or "asyncio" in thread.name for thread in set(threading.enumerate()) - threads)


def test_a_step_before_the_newest_is_refused(folder):
    """Orbax would not save it, and not say so."""
    with Checkpoints(folder, keep=3) as checkpoints:
        for step in (0, 1, 2):
            with pytest.raises(InputError, match=f"has step 2 already; expected only steps before {step}"):
                checkpoints.save(step, state(step), METADATA)


def test_what_orbax_logs():
    def logged(module: str, message: str, error: Exception | None) -> logging.LogRecord | None:
        path = os.path.join("site-packages", "orbax", "checkpoint", f"{module}.py")
        exc_info = (type(error), error, None) if error else None
        record = logging.LogRecord("absl", logging.ERROR, path, 1, message, ("there",), exc_info)
        return record if logging.getLogger("absl").filter(record) else None

    assert logged("future", "failed: %s", OSError("full")) is None
    kept = logged("storage_backend", "Failed to remove checkpoint (%s)", OSError("busy"))
    assert kept.getMessage() == "Failed to remove checkpoint (there): busy"
    assert kept.exc_info is None


# --- Export ----------------------------------------------------------------------------------------------------------


def test_exported_from_the_newest_that_is_undamaged(folder, tmp_path, capsys):
    files = [tmp_path / f"{name}.safetensors" for name in ("newest", "chosen", "left")]
    assert export(folder.parent, files[0], "comfy", np.dtype(np.float32)) == (2, 2)
    assert export(folder.parent, files[1], "comfy", np.dtype(np.float32), step=1) == (1, 2)
    damage(folder)
    assert export(folder.parent, files[2], "comfy", np.dtype(np.float32)) == (1, 2)
    assert capsys.readouterr().out.startswith(f"note: {folder / '2'} is damaged and not used: ")
    loras = [read_lora(file) for file in files]
    for lora, step in zip(loras, (2, 1, 1), strict=True):
        for name, (a, b) in lora.adapters.items():
            layer = int(name.split(".")[1])
            ours = [state(step)[f"{FACTORS}/lora_{factor}/value"][layer] for factor in "ab"]
            np.testing.assert_allclose(lora.alpha / lora.rank * b @ a, np.asarray(ours[0] @ ours[1]).T, atol=1e-5)
    with pytest.raises(InputError, match=r"checkpoints/2: damaged: .*; undamaged steps: 1"):
        export(folder.parent, tmp_path / "none.safetensors", "comfy", np.dtype(np.float32), step=2)
    damage(folder, 1)
    with pytest.raises(InputError, match="no usable checkpoint in it"):
        export(folder.parent, tmp_path / "none.safetensors", "comfy", np.dtype(np.float32))
    assert names(folder) == ["1", "2"]
    assert not (tmp_path / "none.safetensors").exists()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("", "a directory; expected the name of a new file"),
        (".", "a directory; expected the name of a new file"),
        ("mine", "mine: already there; expected a new file"),
        ("mine/lora.safetensors", "/mine is a file; expected a directory"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(two, tmp_path, monkeypatch, file, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Checkpoints, "restore", lambda *_, **__: pytest.fail("read before the check"))
    (tmp_path / "mine").write_text("")
    with pytest.raises(InputError, match=message):
        export(two, Path(file), "comfy", np.dtype(np.float32))


def test_export_without_a_device(two, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "export_lora.py"), str(two), str(tmp_path / "lora.safetensors")],
        env=virtual_devices.environment(1) | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: JAX finds no device")
    assert done.stderr.count("\n") == 1
