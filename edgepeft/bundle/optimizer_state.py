"""What the optimizer's graphs keep of every trained value: the layouts that exporter and driver agree on."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Buffer:
    """One flat buffer: numpy's name of its dtype, and how many trained values share one of its entries."""

    dtype: str
    values: int = 1


@dataclass(frozen=True)
class OptimizerState:
    """The graph that makes a step and the buffers that it reads and, as `NAME_out`, writes.

    All of them are zeros before the first step.
    """

    role: str
    buffers: dict[str, Buffer]

    @property
    def block(self) -> int:
        """Tensors begin at multiples of so many values, so that none shares an entry with another."""
        return max((buffer.values for buffer in self.buffers.values()), default=1)

    @property
    def bytes_per_value(self) -> float:
        """Bytes of all buffers, divided by the trained values."""
        return sum(np.dtype(item.dtype).itemsize / item.values for item in self.buffers.values())


OPTIMIZER_STATES = {
    "32bit": OptimizerState("adamw", {"exp_avg": Buffer("float32"), "exp_avg_sq": Buffer("float32")}),
    "8bit": OptimizerState(
        "adamw8",
        {
            "exp_avg": Buffer("uint8"),
            "exp_avg_sq": Buffer("uint8"),
            "exp_avg_absmax": Buffer("float32", 256),
            "exp_avg_sq_absmax": Buffer("float32", 256),
        },
    ),
}
