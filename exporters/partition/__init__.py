"""Cut a forward graph into a chain of stages that run, or train, one at a time."""

from .build import Partitioned, build_partition
from .inference import StreamedGraphs, build_streamed_inference
from .pieces import Uncut

__all__ = ["Partitioned", "StreamedGraphs", "Uncut", "build_partition", "build_streamed_inference"]
