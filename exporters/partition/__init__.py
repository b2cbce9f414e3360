"""Cut a forward graph into a chain of stages that train one at a time."""

from .build import build_partition

__all__ = ["build_partition"]
