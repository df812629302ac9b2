"""Several processes as one run: how they meet, what one of them says for all, and how they stop together.

Which processes belong to a run is read from the environment, in this order:

- JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID, which always win;
- a job step of SLURM with several tasks, started by srun; JAX gives each task the GPU of its number on the machine, or
  all GPUs where there is one task a machine;
- the hosts of a TPU slice, or of several.

Without any of these the run is this process alone.
"""

import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
from jax._src import cloud_tpu_init
from jax._src.distributed import global_state  # its client is not public; it alone reaches a process that is stuck
from jax.experimental import multihost_utils

from tfm_jax import errors, interrupts
from tfm_jax.errors import InputError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

MEET_SECONDS = 300
"""How long processes wait for each other at the start."""

PART_SECONDS = 5
"""How long a process that failed stays for the others to hear of it."""

_ERROR = "tfm_jax/error"


@contextlib.contextmanager
def distributed() -> Iterator[None]:
    """Run the block as one of the processes that the environment names; enter it before JAX has looked for devices.

    An exception in one process ends all of them within seconds: it is printed once, with the number of the process, and
    all exit with its code. `StoppedEarly` does the same, and is printed as what it is: no error. In a run of one
    process, exceptions pass through.

    A process that is killed says nothing. The others end within 30 s: with exit code 1 if a computation between the
    processes fails, or with 134 when JAX notices after 15 s and aborts them.

    Raises:
        InputError: the environment is half given or wrong.
    """
    if not _start():
        yield
        return
    watch = _Watch()
    try:
        yield
        # The others may be slower than the time that JAX gives them to shut down.
        _client().wait_at_barrier("tfm_jax/done", 1000 * MEET_SECONDS)
    except BaseException as error:
        watch.stop()
        _fail(error)
    watch.stop()
    jax.distributed.shutdown()


def is_distributed() -> bool:
    """Whether the run has several processes (or one that the environment numbers)."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process is the one that writes logs and talks."""
    return not is_distributed() or jax.process_index() == 0


def print_once(line: str) -> None:
    """Print a line, once for all processes."""
    if is_first():
        print(line, flush=True)


def barrier(name: str) -> None:
    """Wait until all processes are here."""
    if is_distributed():
        multihost_utils.sync_global_devices(name)


def stop_requested(step: int) -> str | None:
    """The name of the signal that asks to save and stop after step `step`, whichever process got it.

    All processes stop at the same step; each must ask after every step, inside `interrupts.postponed`.
    Afterwards a second signal ends a process at once.
    """
    name = interrupts.requested()
    if not is_distributed():
        return name
    # JAX has taken SIGTERM over, to agree with the other processes on a step. Ctrl-C joins it.
    if name:
        os.kill(os.getpid(), signal.SIGTERM)
    if not multihost_utils.reached_preemption_sync_point(step):
        return None
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return name or "SIGTERM"


# --- Meeting ---------------------------------------------------------------------------------------------------------


def _start() -> bool:
    """Connect to the other processes, if there are any."""
    settings = arguments(os.environ)
    if settings is None:
        return False
    timer = threading.Timer(MEET_SECONDS, _give_up)
    timer.start()
    try:
        jax.distributed.initialize(
            **settings,
            initialization_timeout=MEET_SECONDS + 60,  # ours is up before: JAX would abort with a stack trace
            heartbeat_timeout_seconds=15,  # for a process that is killed: JAX then ends the others
            shutdown_timeout_seconds=10,
        )
    except ValueError as error:
        raise InputError(f"the hosts of this run are not named ({error}); set {', '.join(VARIABLES)}") from None
    finally:
        timer.cancel()
    return True


def arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What to start `jax.distributed` with; None for a process alone.

    Raises:
        InputError: one of the three variables is missing or wrong, or the port is taken.
    """
    if any(environment.get(name) for name in VARIABLES):
        return _explicit(environment)
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environment for name in slurm):
        # An interactive shell has the tasks of its job in SLURM_NTASKS, but is a step of one task.
        tasks = environment.get("SLURM_STEP_NUM_TASKS", environment["SLURM_NTASKS"])
        if tasks == "1":
            return None
        alone = re.fullmatch(r"1(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
        everything = {"local_device_ids": []} if alone and "JAX_LOCAL_DEVICE_IDS" not in environment else {}
        return {"cluster_detection_method": "slurm", **everything}
    if cloud_tpu_init.running_in_cloud_tpu_vm and environment.get("JAX_PLATFORMS", "tpu").startswith("tpu"):
        return {}
    return None


def _explicit(environment: Mapping[str, str]) -> dict[str, Any]:
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
        raise InputError(f"{VARIABLES[1]}={count}: expected how many processes there are, at least 1")
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
    """Raise InputError where JAX would crash."""
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except OSError as error:
            raise InputError(f"{VARIABLES[0]}={address}: port {port} of process 0: {error.strerror}") from None


def _give_up() -> NoReturn:
    _tell(
        f"not all of {global_state.num_processes} processes came to {global_state.coordinator_address} within "
        f"{MEET_SECONDS} s; expected each to be running and to be given the same address and number of processes",
        2,
    )
    _exit(2)


# --- Ending ----------------------------------------------------------------------------------------------------------


class _Watch:
    """A thread that ends this process when another one has failed: the main thread may wait for that one for ever."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(1):
            code = _code_of_the_first_error()
            if code is not None:
                _part()
                _exit(code)

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


def _fail(error: BaseException) -> NoReturn:
    """End this process and with it the others, and print why: the first error is the cause of all that follow."""
    message, code = errors.describe(error) or ("".join(traceback.format_exception(error)), 1)
    try:
        _client().key_value_set(_ERROR, str(code))
    except RuntimeError:  # another process was first, or process 0 is gone and none can be asked
        code_of_the_cause = _code_of_the_first_error()
    else:
        code_of_the_cause = None
    if code_of_the_cause is None:
        _tell(message, code)
    else:
        code = code_of_the_cause
    _part()
    _exit(code)


def _code_of_the_first_error() -> int | None:
    try:
        return int(_client().key_value_try_get(_ERROR))
    except RuntimeError:
        return None


def _part() -> None:
    """Stay until all processes have heard of the error."""
    with contextlib.suppress(RuntimeError):
        _client().wait_at_barrier(_ERROR, 1000 * PART_SECONDS)
    if global_state.service is not None:
        time.sleep(1)  # those that lose the service before they have left are aborted with a stack trace


def _client() -> Any:
    """What asks and tells process 0; set by `jax.distributed.initialize`."""
    return global_state.client


def _tell(message: str, code: int) -> None:
    place = f"process {global_state.process_id} of {global_state.num_processes}"
    print(message if code == 75 else f"error: {place}: {message}", file=sys.stderr, flush=True)


def _exit(code: int) -> NoReturn:
    """Without the clean-up of Python, JAX and Orbax, which waits for the other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
