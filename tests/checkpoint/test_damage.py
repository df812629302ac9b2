"""Whatever file is damaged, restoring never returns wrong values, and the run can go on."""

import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tensorstore
from helpers import virtual_devices
from helpers.checkpoints import METADATA, assert_is_of_step, damage, edit, flip, make_target, names, state
from helpers.paths import ROOT

from tfm_jax.checkpoint import Checkpoints
from tfm_jax.errors import InputError


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


def check_every_damage(two_steps: Path, scratch: Path, capfd, places: list[float], bits: list[int]) -> None:
    """Restoring returns either exactly what was saved, if the damage is in an unused part, or the step before."""
    step = two_steps / "checkpoints" / "2"
    outcomes = {}
    for target in sorted(step.rglob("*")):
        for number, (name, apply) in enumerate(damages(target, places, bits)):
            part = str(target.relative_to(step))
            run = shutil.copytree(two_steps, scratch / f"{part.replace('/', '-')}-{number}")
            apply(run / "checkpoints" / "2" / part)
            with Checkpoints(run / "checkpoints", max_to_keep=3) as checkpoints:
                restored = checkpoints.restore(make_target)
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
    for (part, name), result in outcomes.items():  # the two checkpoints have no array in common
        needed = part in ("_CHECKPOINT_METADATA", "state/manifest.ocdbt") or "/d/" in part
        if needed and name in ("deleted", "emptied", "cut", "overwritten"):
            assert result == 1, (part, name)


def test_damaged_files(two_steps, tmp_path, capfd):
    check_every_damage(two_steps, tmp_path, capfd, places=[0.5], bits=[0])


@pytest.mark.slow
def test_every_damage_of_every_file(two_steps, tmp_path, capfd):
    check_every_damage(two_steps, tmp_path, capfd, places=[n / 40 for n in range(41)], bits=[0, 4, 7])


def test_a_checkpoint_is_restored_exactly(folder, capfd):
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps == [1, 2]
        assert_is_of_step(checkpoints.restore(make_target), 2)
        assert_is_of_step(checkpoints.restore(), 2)
        assert_is_of_step(checkpoints.restore(make_target, step=1), 1)
    assert capfd.readouterr() == ("", "")


def test_changed_metadata_is_detected(folder, capsys):
    def change(content: dict) -> None:
        kept = content["custom_metadata"]
        assert '"alpha": 4.0' in kept["record"]
        kept["record"] = kept["record"].replace('"alpha": 4.0', '"alpha": 6.0')

    edit(folder / "2" / "_CHECKPOINT_METADATA", change)
    with Checkpoints(folder, max_to_keep=3) as checkpoints:
        assert_is_of_step(checkpoints.restore(), 1)
    assert "checkpoints/2 is damaged" in capsys.readouterr().out


def test_a_checkpoint_under_the_number_of_another_step(folder, capsys):
    (folder / "2").rename(folder / "3")
    with Checkpoints(folder, max_to_keep=3) as checkpoints:
        assert_is_of_step(checkpoints.restore(), 1)
    assert capsys.readouterr().out.endswith("now named 3.damaged: the metadata belongs to step 2\n")


def test_damaged_checkpoints_are_kept_and_the_run_goes_on(folder, capsys):
    """Even several times, and with an empty folder and a file among the checkpoints."""
    (folder / "2.damaged").mkdir()
    (folder / "2.damaged" / "mine").write_text("")
    damage(folder)
    (folder / "7").mkdir()
    (folder / "8").write_text("")
    (folder / "0").mkdir()  # is not read, and must not confuse Orbax
    with Checkpoints(folder, max_to_keep=2) as checkpoints:
        assert_is_of_step(checkpoints.restore(make_target), 1)
        assert checkpoints.steps == [0, 1]
        checkpoints.save(2, state(2), METADATA)
        checkpoints.save(3, state(3), METADATA)
    assert capsys.readouterr().out.count("is damaged and now named") == 3
    assert names(folder) == ["2", "2.damaged", "2.damaged-2", "3", "7.damaged", "8.damaged"]
    assert names(folder / "2.damaged") == ["mine"]
    damage(folder, 3)
    with Checkpoints(folder, max_to_keep=2) as checkpoints:
        assert_is_of_step(checkpoints.restore(make_target), 2)


def test_all_checkpoints_are_damaged(folder):
    damage(folder, 1)
    damage(folder, 2)
    with Checkpoints(folder, max_to_keep=3) as checkpoints:
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


def test_a_checkpoint_of_another_run_is_refused_and_not_renamed(folder):
    def other(metadata: dict) -> dict:
        raise InputError("of another run")

    def wider(metadata: dict) -> dict:
        return make_target(metadata) | {"moment": jax.ShapeDtypeStruct((6,), jnp.bfloat16)}

    def fewer(metadata: dict) -> dict:
        return {name: array for name, array in make_target(metadata).items() if name != "moment"}

    with Checkpoints(folder, max_to_keep=3) as checkpoints:
        with pytest.raises(InputError, match="of another run"):
            checkpoints.restore(other)
        with pytest.raises(InputError, match=r"2: moment is bfloat16\[5\]; this configuration needs bfloat16\[6\]"):
            checkpoints.restore(wider)
        with pytest.raises(InputError, match="2: moment does not belong to this run"):
            checkpoints.restore(fewer)
    assert names(folder) == ["1", "2"]


def test_a_checkpoint_of_the_first_version_is_refused(folder):
    edit(
        folder / "2" / "_CHECKPOINT_METADATA",
        lambda content: content.update(custom_metadata={"arrays": {}, "facts": {}}),
    )
    with (
        Checkpoints(folder, max_to_keep=3) as checkpoints,
        pytest.raises(InputError, match=r"2: was written by version 0\.1\.0"),
    ):
        checkpoints.restore()
    assert names(folder) == ["1", "2"]


@pytest.mark.parametrize(
    "error", [MemoryError(), PermissionError(13, "Permission denied"), ValueError("RESOURCE_EXHAUSTED")]
)
def test_a_failure_of_the_machine_is_not_damage(folder, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(tensorstore, "open", fail)
    with Checkpoints(folder, max_to_keep=3) as checkpoints, pytest.raises(type(error)):
        checkpoints.restore()
    assert names(folder) == ["1", "2"]


# --- Several processes -----------------------------------------------------------------------------------------------

TOGETHER = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tfm_jax import processes
from tfm_jax.checkpoint import Checkpoints, reading

def value(step):
    return jax.device_put(np.arange(16.0, dtype=np.float32) * step, sharding)

def fail(checkpoint, target, read=reading.read_arrays):
    if jax.process_index() == 1 and checkpoint.name == "3":
        raise ValueError("only process 1 fails")
    return read(checkpoint, target)

reading.read_arrays = fail
with processes.distributed():
    sharding = NamedSharding(jax.make_mesh((8,), "x"), PartitionSpec("x"))
    folder = Path(sys.argv[1])
    with Checkpoints(folder, max_to_keep=9) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, {"x": value(step)}, {})
    if processes.is_first():
        record = folder / "4" / "_CHECKPOINT_METADATA"
        record.write_text(record.read_text()[:-20])
        data = max((folder / "2").rglob("d/*"), key=lambda file: file.stat().st_size)
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    processes.barrier("damaged")
    with Checkpoints(folder, max_to_keep=9) as checkpoints:
        restored = checkpoints.restore(lambda _: {"x": jax.ShapeDtypeStruct((16,), np.float32, sharding=sharding)})
        parts = restored.arrays["x"].addressable_shards
        same = all((part.data == 1.0 * np.arange(16)[part.index]).all() for part in parts)
        checkpoints.save(2, {"x": value(2)}, {})
    print("restored", restored.step, same, checkpoints.steps)
"""


def test_two_processes_agree_on_what_is_damaged(tmp_path):
    """Damaged metadata, an error in one process only, and damaged data."""
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
