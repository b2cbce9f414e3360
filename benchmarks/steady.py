"""Resident memory over thousands of tokens and swaps of adapters: does anything stay that should go?

    python -m benchmarks.steady MODEL.edge ADAPTER ADAPTER [--tokens 10000] [--length 1000] [--swaps 1000]

writes texts with every kind of adapter in turn, then swaps adapters at every call: loaded ones and ones that
are read anew, mixtures, none, and one for each prompt of a batch. The kernel's account of the process is read
after every text and every swap. Reported of each phase, as JSON and in bytes, are the largest figures of its
first and of its second half, once everything has been done before: what stays of texts or of swaps would make
the second larger.
"""

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import edgepeft
from edgepeft.runtime.memory.process import read_memory

PROMPT_TOKENS = (4, 40)


def texts(model: Any, specs: list[Any], tokens: int, length: int, rng: random.Random) -> Iterator[int]:
    """Write texts until there are so many tokens, every fourth time two at once; yields the tokens so far."""
    written = 0
    for number in itertools.count():
        spec, other = specs[number % len(specs)], specs[(number + 1) % len(specs)]
        prompts = [prompt(model, rng) for _ in range(1 if number % 4 else 2)]
        answers = model.generate_ids(prompts, [spec, other][: len(prompts)], max_new_tokens=length)
        written += sum(map(len, answers))
        yield written
        if written >= tokens:
            return


def swaps(
    model: Any, specs: list[Any], count: int, loaded: Mapping[str, str], rng: random.Random
) -> Iterator[int]:
    """Call with another adapter every time; yields the calls so far."""
    for number in range(1, count + 1):
        spec = specs[number % len(specs)]
        if number % 3:
            model.generate_ids(prompt(model, rng)[:8], spec, max_new_tokens=1)
        else:
            others = [spec, specs[(number + 1) % len(specs)]]
            model.generate_ids([prompt(model, rng)[:8] for _ in others], others, max_new_tokens=2)
        if number % 10 == 0:
            name = rng.choice(list(loaded))
            model.unload_adapter(name)
            model.load_adapter(name, loaded[name])
        yield number


def prompt(model: Any, rng: random.Random) -> list[int]:
    """A random prompt, and so a length of keys and values that was not there before."""
    return [rng.randrange(3, model.manifest.model.vocab_size) for _ in range(rng.randint(*PROMPT_TOKENS))]


def watched(phase: Iterator[int]) -> dict[str, Any]:
    """Run a phase and read the kernel's account after every step of it."""
    began_s = time.perf_counter()
    steps: list[tuple[int, int, int]] = []
    for done in phase:
        memory = read_memory()
        assert memory.anonymous_bytes is not None, "only Linux tells them apart"
        steps.append((done, memory.resident_bytes, memory.anonymous_bytes))
    seconds = time.perf_counter() - began_s
    middle = len(steps) // 2
    summary: dict[str, Any] = {"done": steps[-1][0], "steps": len(steps), "seconds": seconds}
    for name, column in (("resident_bytes", 1), ("anonymous_bytes", 2)):
        before, after = (max(step[column] for step in some) for some in (steps[:middle], steps[middle:]))
        summary[name] = {"first_half": before, "second_half": after, "grown": after - before}
    return summary


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("adapters", nargs=2, help="PEFT folders")
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--length", type=int, default=1000, help="tokens of a text")
    parser.add_argument("--swaps", type=int, default=1000)
    options = parser.parse_args()
    rng = random.Random(0)
    one, two = options.adapters
    with edgepeft.load(options.bundle, threads=1) as model:
        loaded = {"one": one, "two": two}
        for name, folder in loaded.items():
            model.load_adapter(name, folder)
        specs: list[Any] = [None, "one", two, {"one": 0.7, "two": 0.3}, "two", one]
        # The arena and malloc keep what the largest of all that follows needs.
        watched(texts(model, specs, len(specs) * options.length, options.length, rng))
        watched(swaps(model, specs, 10 * len(specs), loaded, rng))
        report = {"tokens": watched(texts(model, specs, options.tokens, options.length, rng))}
        report["swaps"] = watched(swaps(model, specs, options.swaps, loaded, rng))
    report["peak_bytes"] = read_memory().peak_bytes
    json.dump(report, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
