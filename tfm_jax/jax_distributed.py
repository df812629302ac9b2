"""The coordination service of `jax.distributed`: a key-value store and barriers that need no devices.

JAX has no public interface to this service. The public `jax.experimental.multihost_utils` computes on the devices, so
that it hangs if another process hangs or has failed, and `jax.process_index` starts the backend. Only this module uses
the private state of `jax.distributed`, and tests/test_private_apis.py checks that the installed JAX still has it.

Call these functions after `jax.distributed.initialize`. Only `describe_process` and `coordinator` already work while
`initialize` waits for the other processes.
"""

from typing import Any

from jax._src.distributed import global_state


def put(key: str, value: str) -> bool:
    """Store a value. Return False if the key already has a value or if the service is unreachable."""
    try:
        _client().key_value_set(key, value)
    except RuntimeError:
        return False
    return True


def get(key: str) -> str | None:
    """Return the value of a key; None if the key has no value or if the service is unreachable."""
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
    """Return a name for this process, such as "process 1 of 8"; the first is process 0."""
    return f"process {global_state.process_id} of {global_state.num_processes}"


def coordinator() -> tuple[str | None, int]:
    """Return the address of the coordination service, and the number of processes that the service expects."""
    return global_state.coordinator_address, global_state.num_processes


def _client() -> Any:
    return global_state.client
