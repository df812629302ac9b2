"""The processes of a distributed run: how they find each other, which one prints, and how they stop together.

The environment determines the processes of a run. The first of these settings that applies is used:

- JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID;
- a SLURM job step of several tasks, started by srun; JAX gives each task the GPU with its local task number, or all
  GPUs of a machine that runs only one task;
- one or several TPU slices, with one process per host.

Otherwise the run is a single process.
"""

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
from jax.experimental import multihost_utils

from tfm_jax import errors, interrupts, jax_distributed
from tfm_jax.errors import InputError

T = TypeVar("T")

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

BARRIER_TIMEOUT = 300
"""Longest time, in seconds, that processes wait for each other at the start and at the end of a run."""

ERROR_TIMEOUT = 5
"""Longest time, in seconds, that a failed process waits for the others to see its error."""

_ERROR = "tfm_jax/error"
"""The key under which the exit code of the first error is stored, and the name of the barrier after that error."""

_MEETING = "tfm_jax/meeting"
"""The start of the keys that say where each process is."""

_DECISION = "tfm_jax/decision"
"""The start of the keys that store what the first process decided."""


@contextlib.contextmanager
def distributed() -> Iterator[None]:
    """Run the block as one process of the run that the environment describes.

    Enter the block before JAX initialises the devices.

    An exception in one process ends all processes within seconds: the error is printed once, with the number of the
    process, and all processes exit with the code of the error. `StoppedEarly` also ends all processes, but is not
    printed as an error. If the run is not distributed, exceptions pass through.

    A killed process reports nothing. The other processes end within 30 s: with exit code 1 if a computation that
    involves the killed process fails, or with 134 if JAX notices after 15 s that the process is gone and aborts them.

    Raises:
        InputError: the environment variables are incomplete or invalid, or the port is in use.
    """
    if not _initialize():
        yield
        return
    watchdog = _Watchdog()
    try:
        yield
        # At shutdown JAX waits for only 10 s, but the other processes may need longer to finish.
        jax_distributed.wait_at_barrier("tfm_jax/done", BARRIER_TIMEOUT)
    except BaseException as error:
        watchdog.stop()
        _fail(error)
    watchdog.stop()
    jax.distributed.shutdown()


def is_distributed() -> bool:
    """Whether this is a distributed run; such a run may consist of a single process."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process is the one that prints and writes logs."""
    return not is_distributed() or jax.process_index() == 0


def print_once(line: str) -> None:
    """Print a line in the first process only."""
    if is_first():
        print(line, flush=True)


def barrier(name: str) -> None:
    """Wait until all processes have reached the barrier."""
    if is_distributed():
        multihost_utils.sync_global_devices(name)


def meet(name: str) -> None:
    """Wait until all processes have called this with the same name, however long that takes.

    Unlike `barrier`, this needs no devices. A name can be used once in a run.
    """
    if is_distributed():
        jax_distributed.put(f"{_MEETING}/{name}/{jax.process_index()}", "here")
        for process in range(jax.process_count()):
            while jax_distributed.get(f"{_MEETING}/{name}/{process}") is None:
                time.sleep(0.2)


def decided_by_first(name: str, decide: Callable[[], T]) -> T:
    """Return what `decide` returns in the first process, which alone calls it.

    This is for decisions that depend on the state of files, because processes may see different states. It needs no
    devices. A name can be used once in a run.

    Args:
        decide: returns a value that JSON can represent.
    """
    if not is_distributed():
        return decide()
    key = f"{_DECISION}/{name}"
    if is_first():
        decision = decide()
        jax_distributed.put(key, json.dumps(decision))
        return decision
    while (text := jax_distributed.get(key)) is None:
        time.sleep(0.2)
    return json.loads(text)


def stop_requested(step: int) -> str | None:
    """Return the name of the signal that requires the run to save and stop at `step`, or None to continue.

    Any process may receive the signal. All processes agree on the step to stop at, so each of them must call this after
    every step, inside `interrupts.postponed`. Once a name has been returned, a second signal ends the process at once.
    """
    name = interrupts.requested()
    if not is_distributed():
        return name
    # JAX handles SIGTERM itself, so that all processes agree on a step. Pass Ctrl-C on to JAX as SIGTERM.
    if name:
        os.kill(os.getpid(), signal.SIGTERM)
    if not multihost_utils.reached_preemption_sync_point(step):
        return None
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return name or "SIGTERM"


# --- Start -----------------------------------------------------------------------------------------------------------


def _initialize() -> bool:
    """Connect to the other processes; return False if the run is not distributed."""
    arguments = initialize_arguments(os.environ)
    if arguments is None:
        return False
    timer = threading.Timer(BARRIER_TIMEOUT, _abort_startup)
    timer.start()
    try:
        jax.distributed.initialize(
            **arguments,
            # Our timer must fire first: at its own timeout, JAX aborts with a stack trace.
            initialization_timeout=BARRIER_TIMEOUT + 60,
            heartbeat_timeout_seconds=15,  # how soon JAX ends the others if one is killed
            shutdown_timeout_seconds=10,
        )
    except ValueError as error:
        raise InputError(f"cannot find the other processes of this run ({error}); set {', '.join(VARIABLES)}") from None
    finally:
        timer.cancel()
    return True


def initialize_arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the arguments of `jax.distributed.initialize`, or None if the run is not distributed.

    Raises:
        InputError: one of the three JAX variables is missing or invalid, or the port is in use.
    """
    if any(environment.get(name) for name in VARIABLES):
        return _explicit_arguments(environment)
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environment for name in slurm):
        # In an interactive shell, SLURM_NTASKS is the number of tasks of the job, but the shell is a step of one task.
        tasks = environment.get("SLURM_STEP_NUM_TASKS", environment["SLURM_NTASKS"])
        if tasks == "1":
            return None
        one_per_node = re.fullmatch(r"1(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
        all_devices = {"local_device_ids": []} if one_per_node and "JAX_LOCAL_DEVICE_IDS" not in environment else {}
        return {"cluster_detection_method": "slurm", **all_devices}
    # When JAX is imported on a TPU machine, the platforms become "tpu,cpu", unless JAX_PLATFORMS is set.
    if (jax.config.values["jax_platforms"] or "").startswith("tpu"):
        return {}
    return None


def _explicit_arguments(environment: Mapping[str, str]) -> dict[str, Any]:
    given = {name: environment.get(name, "") for name in VARIABLES}
    for name, value in given.items():
        if not value:
            others = ", ".join(f"{other}={given[other]}" for other in VARIABLES if given[other])
            raise InputError(f"{name} is not set, but {others}; expected all of {', '.join(VARIABLES)}, or none")
    address, count, index = given.values()
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(
            f"{VARIABLES[0]}={address}: expected the host and a free port of process 0, such as node1:4321"
        )
    if not count.isdecimal() or int(count) < 1:
        raise InputError(f"{VARIABLES[1]}={count}: expected the number of processes, at least 1")
    if not index.isdecimal() or int(index) >= int(count):
        raise InputError(f"{VARIABLES[2]}={index}: expected the number of this process, from 0 to {int(count) - 1}")
    if int(index) == 0:
        _check_port(address, int(port))
    return {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(index),
        "cluster_detection_method": "deactivate",
    }


def _check_port(address: str, port: int) -> None:
    """Raise InputError if the port is in use, because JAX would crash."""
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except OSError as error:
            raise InputError(f"{VARIABLES[0]}={address}: port {port} of process 0: {error.strerror}") from None


def _abort_startup() -> NoReturn:
    address, count = jax_distributed.coordinator()
    _print_error(
        f"not all {count} processes connected to {address} within {BARRIER_TIMEOUT} s; "
        "expected all of them to run with the same address and number of processes",
        2,
    )
    _exit(2)


# --- End -------------------------------------------------------------------------------------------------------------


class _Watchdog:
    """A thread that ends this process if another one fails, because the main thread may wait for that one forever."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(1):
            code = _first_error_code()
            if code is not None:
                _wait_for_others()
                _exit(code)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


def _fail(error: BaseException) -> NoReturn:
    """End all processes. Only the first error is printed, because it causes all the others."""
    message, code = errors.describe(error) or ("".join(traceback.format_exception(error)), 1)
    # `put` fails if another process failed first, or if the service in process 0 is gone. The latter leaves no code.
    first_code = None if jax_distributed.put(_ERROR, str(code)) else _first_error_code()
    if first_code is None:
        _print_error(message, code)
    else:
        code = first_code
    _wait_for_others()
    _exit(code)


def _first_error_code() -> int | None:
    """Return the exit code of the first process that failed; None if no process has failed."""
    code = jax_distributed.get(_ERROR)
    return None if code is None else int(code)


def _wait_for_others() -> None:
    """Wait until all processes have seen the error, or until the timeout."""
    with contextlib.suppress(RuntimeError):
        jax_distributed.wait_at_barrier(_ERROR, ERROR_TIMEOUT)
    if jax_distributed.runs_service():
        time.sleep(1)  # JAX aborts the other processes with a stack trace if the service ends before they do


def _print_error(message: str, code: int) -> None:
    stopped_early = code == 75
    line = message if stopped_early else f"error: {jax_distributed.describe_process()}: {message}"
    print(line, file=sys.stderr, flush=True)


def _exit(code: int) -> NoReturn:
    """Exit without the cleanup of Python, JAX and Orbax, because it would wait for the other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
