"""Several virtual devices on one CPU, for programs that run in a separate process."""

from helpers import compiling


def environment(devices: int) -> dict[str, str]:
    """The environment variables of a process in which JAX has this many CPU devices.

    An all-reduce blocks one thread of XLA's pool for each device. By default the pool has no more threads than cores or
    devices, so that on two cores the last participants may find none and the program is killed after 40 seconds. NPROC
    sets the size of the pool.
    """
    return {
        **compiling.settings(),
        "PATH": "",
        "JAX_PLATFORMS": "cpu",
        "NPROC": str(4 * devices),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
