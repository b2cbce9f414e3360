"""One side of the comparison of generation, in a process of its own: reads and writes as it is told to.

    python -m benchmarks.generation_side genai FOLDER --tokens 64
    python -m benchmarks.generation_side edgepeft BUNDLE --tokens 64 [--adapter FOLDER] [--int8]
    python -m benchmarks.generation_side llama.cpp LIBRARY FILE --tokens 64

Every line read is a command: `round` answers `{"prefill_s", "token_s"}` (the time of the prompt up to the
first token, and the median time of a token after it), `swap` the time to activate the other adapter, `end`
the process's memory, beside what the plan predicted. What comes before the first line is loading.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from edgepeft.runtime.memory.process import MemoryRecorder


def prompt_of(tokens: int) -> list[int]:
    """The prompt that all sides read."""
    ids: list[int] = np.random.default_rng(0).integers(10, 8000, tokens).tolist()
    return ids


def _say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def _serve(
    recorder: MemoryRecorder,
    commands: dict[str, Callable[[], dict[str, float]]],
    predicted_bytes: Callable[[], int | None] = lambda: None,
) -> None:
    for line in sys.stdin:
        if line.strip() == "end":
            break
        _say(**commands[line.strip()]())
    _say(
        peak_bytes=recorder.peak_bytes,
        resident_bytes=recorder.samples[-1].resident_bytes,
        predicted_bytes=predicted_bytes(),
    )


def _timed(first: Callable[[], object], tokens: Iterator[object]) -> dict[str, float]:
    began_s = time.perf_counter()
    first()
    prefill_s = time.perf_counter() - began_s
    token_s = []
    while True:
        began_s = time.perf_counter()
        if next(tokens, None) is None:
            return {"prefill_s": prefill_s, "token_s": statistics.median(token_s)}
        token_s.append(time.perf_counter() - began_s)


@click.group()
@click.pass_context
def main(context: click.Context) -> None:
    """One side of a comparison, whose memory is watched from the beginning."""
    context.obj = context.with_resource(MemoryRecorder())


@main.command("genai")
@click.argument("folder")
@click.option("--prompt", default=128)
@click.option("--tokens", default=64)
@click.option("--threads", default=2)
@click.pass_obj
def genai_side(recorder: MemoryRecorder, folder: str, prompt: int, tokens: int, threads: int) -> None:
    """onnxruntime-genai on the model of its own builder."""
    import onnxruntime_genai as genai

    began_s = time.perf_counter()
    config = genai.Config(folder)
    options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
    config.overlay(json.dumps(options))
    model = genai.Model(config)
    ids = np.array(prompt_of(prompt), np.int32)
    _say(load_s=time.perf_counter() - began_s)

    def once() -> dict[str, float]:
        params = genai.GeneratorParams(model)
        length = prompt + tokens + 1
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(model, params)

        def first() -> None:
            generator.append_tokens(ids)
            generator.generate_next_token()

        def rest() -> Iterator[int]:
            for _ in range(tokens):
                generator.generate_next_token()
                yield 1

        return _timed(first, rest())

    _serve(recorder, {"round": once})


@main.command("llama.cpp")
@click.argument("library", type=click.Path(exists=True, path_type=Path))
@click.argument("file", type=click.Path(exists=True, path_type=Path))
@click.option("--prompt", default=128)
@click.option("--tokens", default=64)
@click.option("--threads", default=2)
@click.pass_obj
def llama_cpp_side(
    recorder: MemoryRecorder, library: Path, file: Path, prompt: int, tokens: int, threads: int
) -> None:
    """llama.cpp on a GGUF file."""
    from benchmarks.llama_cpp_run import LlamaCpp

    began_s = time.perf_counter()
    model = LlamaCpp(library, file, threads)
    ids = prompt_of(prompt)
    _say(load_s=time.perf_counter() - began_s)

    def once() -> dict[str, float]:
        model.forget()
        token = 0

        def first() -> None:
            nonlocal token
            token = int(model.read(ids).argmax())

        def rest() -> Iterator[int]:
            nonlocal token
            for _ in range(tokens):
                token = int(model.read([token]).argmax())
                yield 1

        return _timed(first, rest())

    _serve(recorder, {"round": once})


@main.command("edgepeft")
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--prompt", default=128)
@click.option("--tokens", default=64)
@click.option("--threads", default=2)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    help="Folder of an adapter; of two, `swap` activates each in turn.",
)
@click.option("--int8", is_flag=True, help="Round activations to 8 bits.")
@click.pass_obj
def edgepeft_side(
    recorder: MemoryRecorder,
    bundle: Path,
    prompt: int,
    tokens: int,
    threads: int,
    adapters: tuple[str, ...],
    int8: bool,
) -> None:
    """edgepeft on its bundle, through the decoder that `generate` uses."""
    import edgepeft
    from edgepeft.runtime.generation.decoders.choose import decoder_for
    from edgepeft.runtime.memory.inference import RunPlan, plan_generation

    began_s = time.perf_counter()
    model = edgepeft.load(bundle, threads=threads, int8_activations=int8)
    ids = prompt_of(prompt)
    for folder in adapters:
        model.load_adapter(Path(folder).name, folder)
    names = [Path(folder).name for folder in adapters] or [None]

    def plan(process_bytes: int, rank: int) -> RunPlan:
        return plan_generation(
            model.manifest,
            None,
            process_bytes,
            prompt_tokens=prompt,
            max_new_tokens=tokens + 1,
            rank=rank,
            int8=int8,
        )

    def activate() -> Any:
        return model._sessions.borrowed(names[:1], plan)

    activate()
    _say(load_s=time.perf_counter() - began_s)

    def once() -> dict[str, float]:
        (own,), chosen = activate()
        decoder = decoder_for(own.session, model.manifest, chosen, [prompt + tokens])
        token = 0

        def first() -> None:
            nonlocal token
            token = int(decoder.read(0, ids).argmax())

        def rest() -> Iterator[int]:
            nonlocal token
            for _ in range(tokens):
                token = int(decoder.step([token])[0].argmax())
                yield 1

        figures = _timed(first, rest())
        decoder.close()
        return figures

    def swap() -> dict[str, float]:
        names.append(names.pop(0))
        began_s = time.perf_counter()
        activate()
        return {"swap_s": time.perf_counter() - began_s}

    def predicted_bytes() -> int:
        return int(activate()[1].peak_bytes)

    _serve(recorder, {"round": once, "swap": swap}, predicted_bytes)


if __name__ == "__main__":
    main()
