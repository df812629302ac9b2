"""The coordination service of `jax.distributed`: a key-value store and barriers that need no devices.

JAX has no public interface to it. The public `jax.experimental.multihost_utils` computes on the devices, so it hangs
if another process hangs or has failed, and `jax.process_index` starts the backend. This is the only module that uses
the private state of `jax.distributed`, and tests/test_private_apis.py checks it against the installed JAX.

Call these functions after `jax.distributed.initialize`; a process can already describe itself and its coordinator while
`initialize` waits for the others.
"""

from typing import Any

from jax._src.distributed import global_state


def put(key: str, value: str) -> bool:
    """Store a value; return False if the key has a value already or the service is unreachable."""
    try:
        _client().key_value_set(key, value)
    except RuntimeError:
        return False
    return True


def get(key: str) -> str | None:
    """Return the value of a key; None if it has none or the service is unreachable."""
    try:
        return _client().key_value_try_get(key)
    except RuntimeError:
        return None


def wait_at_barrier(name: str, seconds: int) -> None:
    """Wait until all processes have called this with the same name.

    Raises:
        RuntimeError: a process did not arrive in time, or the service is unreachable.
    """
    _client().wait_at_barrier(name, 1000 * seconds)


def runs_service() -> bool:
    """Whether the coordination service runs inside this process."""
    return global_state.service is not None


def describe_process() -> str:
    """Name this process, such as "process 1 of 8"."""
    return f"process {global_state.process_id} of {global_state.num_processes}"


def coordinator() -> tuple[str | None, int]:
    """Return the address of the coordination service, and the number of processes that it expects."""
    return global_state.coordinator_address, global_state.num_processes


def _client() -> Any:
    return global_state.client
