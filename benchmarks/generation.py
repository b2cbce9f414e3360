"""Generation beside onnxruntime-genai, on its own builder's model of the same weights.

    python -m benchmarks.generation [--shape smollm2-135m] [--work DIR] [--rounds 7]

Both sides: 4 bits in blocks of 32, 2 threads, a prompt of 128 tokens and 64 greedy tokens after it. Every
side is a process of its own and they take rounds in turn; ratios are medians over the rounds. Writes
benchmarks/results/generation.json.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.compare import REST_S, Command, Side, machine
from benchmarks.shapes import ALL_LINEARS, DECODERS, SHAPES, bundle_of

RESULTS = Path(__file__).parent / "results" / "generation.json"
PROMPT, TOKENS, THREADS, SWAPS = 128, 64, 2, 10
PEER = "onnxruntime-genai"
#: Bytes that a read has to bring from memory, beyond any cache.
BANDWIDTH_BYTES = 2**28


class GenerationSide(Side):
    """A process of `benchmarks.generation_side`."""

    def __init__(self, name: str, command: Command) -> None:
        super().__init__(name, command)
        self.load_s = float(self._read()["load_s"])
        self.rounds: list[dict[str, float]] = []
        self.swap_s: list[float] = []

    def round(self) -> None:
        """A prompt and its tokens."""
        self.rounds.append(self._ask("round"))

    def swap(self) -> None:
        """Activate the other adapter."""
        self.swap_s.append(float(self._ask("swap")["swap_s"]))


def prepare(shape: str, work: Path) -> tuple[Path, Path]:
    """The bundle with two adapters, and genai's folder, below `work`; made where they are not there yet."""
    folder, source = (work / f"{shape}.{kind}" for kind in ("genai", "hf"))
    bundle = bundle_of(shape, work, lambda text: click.echo(f"{text} …", err=True), ALL_LINEARS, train=False)
    for name in ("a", "b"):
        _random_adapter(bundle, work / f"{shape}.{name}")
    if not folder.exists():
        SHAPES[shape].build().save_pretrained(source)
        shutil.copy(_tokenizer(work), source / "tokenizer.json")
        command = ["-m", "onnxruntime_genai.models.builder", "-i", source, "-o", folder, "-c", work / "cache"]
        options = ["-p", "int4", "-e", "cpu", "--extra_options", "int4_block_size=32"]
        subprocess.run([sys.executable, *map(str, command), *options], check=True, capture_output=True)
    return bundle, folder


def _tokenizer(work: Path) -> Path:
    """A tokenizer of no use, without which the builder ends."""
    from tokenizers import Tokenizer, models

    path = work / "tokenizer.json"
    Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")).save(str(path))
    return path


def _random_adapter(bundle: Path, folder: Path) -> None:
    """The bundle's starting adapter, its `B` factors no longer zero."""
    from edgepeft.adapters import load_adapter, write_adapter

    adapter = load_adapter(bundle / "adapters" / "default")
    rng = np.random.default_rng(len(folder.name))
    for name, value in adapter.tensors.items():
        adapter.tensors[name] = rng.normal(0, 0.01, value.shape).astype(np.float32)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_adapter(adapter, folder)


def take_turns(sides: Sequence[GenerationSide], rounds: int, name: str) -> None:
    """Rounds of all sides, in turn; one more comes first and does not count."""
    for number in range(rounds + 1):
        click.echo(f"{name}: round {number} of {rounds}", err=True)
        for side in sides:
            side.round()
            time.sleep(REST_S)
    for side in sides:
        del side.rounds[0]


def compare(shape: str, work: Path, rounds: int) -> list[dict[str, Any]]:
    """A row a side, the peer's first."""
    bundle, folder = prepare(shape, work)
    adapters = [f"--adapter={work / f'{shape}.{name}'}" for name in ("a", "b")]

    def command(kind: str, target: Path, *options: str) -> Command:
        sizes = ["--prompt", str(PROMPT), "--tokens", str(TOKENS), "--threads", str(THREADS)]
        return Command(
            [sys.executable, "-m", "benchmarks.generation_side", kind, str(target), *sizes, *options]
        )

    sides = {
        PEER: command("genai", folder),
        "edgepeft": command("edgepeft", bundle),
        "edgepeft, LoRA": command("edgepeft", bundle, *adapters),
        "edgepeft, int8 activations": command("edgepeft", bundle, "--int8"),
        "edgepeft, int8 activations, LoRA": command("edgepeft", bundle, "--int8", *adapters),
    }
    with ExitStack() as stack:
        running = [stack.enter_context(GenerationSide(name, side)) for name, side in sides.items()]
        take_turns(running, rounds, shape)
        for side in running:
            if "LoRA" in side.name:
                for _ in range(SWAPS):
                    side.swap()
            side.end()
    return [_row(shape, side, running) for side in running]


def _row(shape: str, side: GenerationSide, sides: list[GenerationSide]) -> dict[str, Any]:
    peer = sides[0]
    base = next((other for other in sides if other.name == side.name.removesuffix(", LoRA")), side)

    def speed(other: GenerationSide, what: str) -> float:
        """The other's time by this side's, round by round."""
        return statistics.median(a[what] / b[what] for a, b in zip(other.rounds, side.rounds, strict=True))

    return {
        "shape": shape,
        "side": side.name,
        "rounds": len(side.rounds),
        "load_s": side.load_s,
        "prefill_tokens_per_s": PROMPT / statistics.median(row["prefill_s"] for row in side.rounds),
        "prefill_speed": speed(peer, "prefill_s"),
        "decode_tokens_per_s": 1 / statistics.median(row["token_s"] for row in side.rounds),
        "decode_speed": speed(peer, "token_s"),
        "decode_speed_to_no_adapter": speed(base, "token_s"),
        "peak_bytes": side.memory["peak_bytes"],
        "peak_ratio": side.memory["peak_bytes"] / peer.memory["peak_bytes"],
        "predicted_bytes": side.memory["predicted_bytes"],
        "swap_s": statistics.median(side.swap_s) if side.swap_s else None,
    }


def bandwidth() -> float:
    """Bytes that one core reads from memory a second, the best of a few."""
    data = np.ones(BANDWIDTH_BYTES // 4, np.float32)
    best_s = float("inf")
    for _ in range(5):
        began_s = time.perf_counter()
        data.sum()
        best_s = min(best_s, time.perf_counter() - began_s)
    return BANDWIDTH_BYTES / best_s


@click.command(help=__doc__.split("\n", 1)[0])
@click.option("--shape", "shapes", type=click.Choice(DECODERS), multiple=True, help="Only these.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Keep what is exported here.")
@click.option("--rounds", default=7, show_default=True, help="Rounds that count.")
def main(shapes: tuple[str, ...], work: Path, rounds: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    rows = [row for shape in shapes or DECODERS for row in compare(shape, work, rounds)]
    weights = {shape: (work / f"{shape}.edge" / "weights.bin").stat().st_size for shape in shapes or DECODERS}
    results = {
        "machine": machine(),
        "bytes_read_per_s_one_core": bandwidth(),
        "weights_bytes": weights,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    for row in rows:
        swap = "" if row["swap_s"] is None else f"{1000 * row['swap_s']:.1f}"
        cells = [
            row["shape"],
            row["side"],
            f"{row['prefill_tokens_per_s']:.0f}",
            f"{row['prefill_speed']:.2f}",
            f"{row['decode_tokens_per_s']:.0f}",
            f"{row['decode_speed']:.2f}",
            f"{row['decode_speed_to_no_adapter']:.2f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
            f"{row['peak_ratio']:.2f}",
            swap,
        ]
        click.echo(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
