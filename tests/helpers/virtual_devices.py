"""Several devices on one CPU, for programs that run in a process of their own."""


def environment(devices: int) -> dict[str, str]:
    """Of a process in which JAX has so many CPU devices.

    XLA's own pool has no more threads than cores or devices, and an all-reduce blocks one for each device: on two cores
    the last participants may find none, and the program is killed after 40 seconds. NPROC is the size of the pool.
    """
    return {
        "PATH": "",
        "JAX_PLATFORMS": "cpu",
        "NPROC": str(4 * devices),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
