"""Measures the speed of training steps without making the devices wait."""

import time
from collections.abc import Sequence
from typing import Any

import jax

from tfm_jax.flops import peak_flops


class Speed:
    """Measures steps by the times at which the host learns that they are done.

    Args:
        clips_per_step: over all devices.
        devices: the devices of the run, of all processes.
    """

    def __init__(self, clips_per_step: int, devices: Sequence[Any]):
        self._clips_per_step = clips_per_step
        self._num_devices = len(devices)
        self._peak = peak_flops(devices[0].device_kind)
        self._local_device = next(device for device in devices if device.process_index == jax.process_index())
        self._since = time.perf_counter()

    def restart(self) -> None:
        """Start the clock of the next step, when nothing is left to compute of the previous one."""
        self._since = time.perf_counter()

    def measure(self, flops: int, data_wait: float) -> dict[str, float]:
        """Return the fields of metrics.jsonl about a step that has just ended: seconds, clips_per_second, data_wait,
        tflops (per device) and, if they are known, mfu and memory_bytes.

        Args:
            flops: number of operations of the step, over all devices, without those that are repeated.
            data_wait: seconds that the step waited for its clips.
        """
        now = time.perf_counter()
        seconds, self._since = max(now - self._since, 1e-9), now
        rate = flops / self._num_devices / seconds
        values = {
            "seconds": seconds,
            "clips_per_second": self._clips_per_step / seconds,
            "data_wait": data_wait,
            "tflops": rate / 1e12,
        }
        if self._peak:
            values["mfu"] = rate / self._peak
        memory = (self._local_device.memory_stats() or {}).get("peak_bytes_in_use")
        if memory is not None:
            values["memory_bytes"] = float(memory)
        return values
