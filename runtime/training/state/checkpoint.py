"""The state of an interrupted update, in one file that is always whole.

It holds the trained tensors, what they began with, the optimizer's moments and where the run stands. Batches
are a function of the seed and the step, so nothing else is needed to continue bit for bit.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgepeft.errors import AdapterError, UsageError
from edgepeft.tensor_files import check_sums, read_metadata, read_state, write_in_pieces

from .buffers import TrainingState

_KEY = "edgepeft_training_state"
_REMEDIES = {
    "data": "give the same records in the same order, cut to the same --seq-len (from standard input: once "
    "more all of those that it was given before)",
}


@dataclass
class Progress:
    """How far an update has come.

    Attributes:
        step: steps done.
        losses, learning_rates, grad_norms: one entry a step.
        held_out_before: loss, accuracy and what `Judged` compares of the starting adapter, so that they are
            computed once.
        held_out_head: the same of a head in closed form, where training starts from one.
        head_says_something: whether a head in closed form beats those to shuffled labels; None where that was
            not tried.
        limited_steps: steps after which the policy's bound scaled the update back.
        of_technique: what the adapter's technique remembers beside the state's buffers.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    held_out_before: tuple[float, float | None, float] | None = None
    held_out_head: tuple[float, float | None, float] | None = None
    head_says_something: bool | None = None
    limited_steps: int = 0
    of_technique: dict[str, Any] = field(default_factory=dict)


def checkpoint_path(output: Path) -> Path:
    """Where the checkpoint of an update to `output` stands."""
    return output.parent / f"{output.name}.checkpoint"


def save_checkpoint(
    path: Path, fingerprint: dict[str, Any], state: TrainingState, progress: Progress
) -> None:
    """Replace the checkpoint, once the new one has been read back.

    Raises:
        EdgePeftError: it cannot be written; the last one is kept.
    """
    write_in_pieces(
        path,
        {name: state.buffers[name] for name in ("param", "start", *state.moments)},
        {_KEY: json.dumps({"fingerprint": fingerprint, "progress": vars(progress)})},
    )


def is_finished(path: Path, report: Path) -> bool:
    """Whether the update of a checkpoint is the one that a report in its output's folder tells of: it was
    killed after the adapter had taken its place. The same losses, bit for bit, are of the same update."""
    try:
        progress = json.loads(read_metadata(path)[_KEY])["progress"]
        told = json.loads(report.read_bytes())
        return bool(progress["step"]) and all(
            progress[name] == told[name] for name in ("losses", "learning_rates", "grad_norms")
        )
    except (AdapterError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def load_checkpoint(path: Path, fingerprint: dict[str, Any], state: TrainingState) -> Progress | None:
    """Put the checkpoint's tensors into the state; None if there is no checkpoint.

    Raises:
        UsageError: it belongs to another update, or is damaged.
    """
    if not path.exists():
        return None
    try:
        saved = json.loads(read_metadata(path).get(_KEY, "null"))
    except (AdapterError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is no checkpoint ({error}): remove it to start over") from error
    theirs = saved.get("fingerprint") if isinstance(saved, dict) else None
    if not isinstance(theirs, dict):
        raise UsageError(f"{path}: is no checkpoint: remove it to start over")
    for name, value in fingerprint.items():
        if theirs.get(name) != value:
            raise UsageError(
                f"{path}: was made with {name} {_short(theirs.get(name))}, this update has {_short(value)}: "
                f"{_REMEDIES.get(name, 'give what it was made with')}, or start over without --resume"
            )
    try:
        check_sums(path)
    except AdapterError as error:
        raise UsageError(f"{error}: remove it to start over") from error
    for name in ("param", "start", *state.moments):
        buffer = state.buffers[name]
        try:
            saved_buffer = read_state(path, name)
        except AdapterError as error:
            raise UsageError(f"{path}: is damaged ({error}): remove it to start over") from error
        if saved_buffer is None or (saved_buffer.shape, saved_buffer.dtype) != ((len(buffer),), buffer.dtype):
            raise UsageError(f"{path}: its {name} is not of this update: start over without --resume")
        buffer.write(0, saved_buffer)
    try:
        progress = Progress(**saved["progress"])
        for name in ("held_out_before", "held_out_head"):
            found = getattr(progress, name)
            setattr(progress, name, None if found is None else (found[0], found[1], found[2]))
        if (
            not len(progress.losses)
            == len(progress.learning_rates)
            == len(progress.grad_norms)
            == progress.step
        ):
            raise ValueError("its lists have different lengths")
        if not isinstance(progress.of_technique, dict):
            raise TypeError("what its technique remembers is no object")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UsageError(f"{path}: is damaged ({error}): remove it to start over") from error
    return progress


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
