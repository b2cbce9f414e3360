"""One side of a comparison, in a process of its own: trains, one step at a time, as it is told to.

    python -m benchmarks.side torch SHAPE --seq-len 128
    python -m benchmarks.side edgepeft BUNDLE --seq-len 128 [--budget SIZE]

Every line read is a command: `step` answers `{"step_s": …, "loss": …}`, `end` the process's memory. The
process sleeps between two steps, so that the sides do not disturb each other.
"""

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from edgepeft.errors import BudgetError
from edgepeft.runtime.memory.process import MemoryRecorder

LEARNING_RATE = 1e-4
#: More steps than any comparison asks for.
MANY = 1_000_000


def tokens(seq_len: int, vocab_size: int) -> np.ndarray:
    """The sequence that both sides train on, int64 `[1, seq_len]`."""
    return np.random.default_rng(0).integers(10, min(vocab_size, 8000), (1, seq_len))


def _say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def _commands(recorder: MemoryRecorder) -> Iterator[str]:
    """What the comparison asks for; when it asks for nothing more, the memory is told and that is all."""
    for line in sys.stdin:
        if line.strip() == "end":
            break
        yield line.strip()
    _say(
        peak_bytes=recorder.peak_bytes,
        anonymous_bytes=max(sample.anonymous_bytes or 0 for sample in recorder.samples),
        file_bytes=max(sample.file_bytes or 0 for sample in recorder.samples),
    )


@click.group()
@click.pass_context
def main(context: click.Context) -> None:
    """One side of a comparison, whose memory is watched from the beginning."""
    context.obj = context.with_resource(MemoryRecorder())


@main.command("torch")
@click.argument("shape")
@click.option("--seq-len", default=128)
@click.option("--threads", default=2)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.option("--checkpoint", is_flag=True, help="Recompute activations layer by layer.")
@click.pass_obj
def torch_side(
    recorder: MemoryRecorder, shape: str, seq_len: int, threads: int, dtype: str, checkpoint: bool
) -> None:
    """PyTorch + PEFT: LoRA on the shape's targets, AdamW."""
    import peft
    import torch

    from benchmarks.shapes import RANK, SHAPES

    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT asks for it
    chosen = SHAPES[shape]
    base = chosen.build().to(getattr(torch, dtype))
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(chosen.targets))
    model: Any = peft.get_peft_model(base, config)
    model.config.use_cache = False
    if checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE)
    ids = torch.from_numpy(tokens(seq_len, model.config.vocab_size))
    _say(ready=True)
    for _ in _commands(recorder):
        began_s = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)  # as the other side does
        optimizer.step()
        optimizer.zero_grad()
        _say(step_s=time.perf_counter() - began_s, loss=loss.item())


@main.command("edgepeft")
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--seq-len", default=128)
@click.option("--threads", default=2)
@click.option("--budget", help="Memory budget of the whole process.")
@click.option("--method", help="Of a fresh adapter of size 8; without, the bundle's own.")
@click.pass_obj
def edgepeft_side(
    recorder: MemoryRecorder, bundle: Path, seq_len: int, threads: int, budget: str | None, method: str | None
) -> None:
    """edgepeft's own `adapt`, held up after every step."""
    import edgepeft
    from edgepeft.runtime.training.trainer import Step

    model = edgepeft.load(bundle, memory_budget=budget, threads=threads)
    record = {"input_ids": tokens(seq_len, model.manifest.model.vocab_size)[0].tolist()}
    commands = _commands(recorder)
    began_s = 0.0

    def wait(step: Step | None) -> None:
        nonlocal began_s
        if step is not None:
            _say(step_s=time.perf_counter() - began_s, loss=step.loss)
        if next(commands, None) is None:
            raise SystemExit(0)
        began_s = time.perf_counter()

    def first(step: Step) -> None:
        # The first step opened the session and found its memory: it is nobody's time.
        _say(ready=True) if step.number == 1 else None
        wait(None if step.number == 1 else step)

    with tempfile.TemporaryDirectory(dir=bundle.parent) as scratch:
        model.adapt(
            [record] * 20,
            Path(scratch) / "adapter",
            on_step=first,
            steps=MANY,
            seq_len=seq_len,
            batch_size=1,
            learning_rate=LEARNING_RATE,
            schedule="constant",
            method=method,
            rank=None if method is None else 8,
        )


if __name__ == "__main__":
    try:
        main()
    except BudgetError as refused:
        click.echo(f"error: {refused}", err=True)
        sys.exit(refused.exit_code)
