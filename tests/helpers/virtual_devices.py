"""Provides several virtual devices on one CPU to programs in separate processes."""

from helpers import compiling


def environment(devices: int) -> dict[str, str]:
    """Return the environment variables of a process in which JAX has this many CPU devices.

    An all-reduce blocks one thread of XLA's pool for each device. By default, the pool may have too few threads for all
    devices if there are only two cores; then the program is killed after 40 seconds. NPROC sets the size of the pool.
    """
    return {
        **compiling.settings(),
        "PATH": "",
        "JAX_PLATFORMS": "cpu",
        "NPROC": str(4 * devices),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
