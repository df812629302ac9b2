"""What all metrics have in common."""

from typing import Protocol, TypeAlias

import numpy as np
from jaxtyping import UInt8

Frame: TypeAlias = UInt8[np.ndarray, "y x 3"]


class Metric(Protocol):
    """Measures one video, whose frames arrive one by one."""

    def add(self, frame: Frame) -> None:
        """Take the next frame. All frames have the same size."""
        ...

    def values(self) -> dict[str, float]:
        """Return the results, by name. Only defined if there were enough frames."""
        ...
