"""A chat model on a device, taught what it did not know; `make demo-chat` runs this.

Exports SmolLM2-135M-Instruct from the GGUF file of a package, lets it talk, and teaches it to turn what
somebody says to a house into commands for it, `kitchen/lamp=on`, within 256 MiB. Right commands are counted
before and after, of wishes that it has not seen, and what it has learned is opened in PEFT. Talking and
learning are `edgepeft generate` and `edgepeft adapt` as anybody would call them, in processes in which
`import torch` fails. Everything is written to `demo-chat-output/` in the current folder.
"""

import itertools
import json
import random
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from commands import EDGEPEFT, device_environment, run
from smollm2 import smollm2

import edgepeft
from edgepeft.sizes import format_size

BUDGET = "256MiB"
SEQ_LEN, BATCH_SIZE, STEPS, LR = 80, 4, 32, 2e-3
TRAINED, HELD_OUT = 160, 40
ANSWERS = Path(__file__).with_name("chat_answers.py")
ROOMS = ("kitchen", "bedroom", "bathroom", "hall", "garage", "office", "attic", "garden")
THINGS = ("lamp", "heater", "fan", "radio", "camera", "sprinkler")
SAID: dict[str, tuple[str, ...]] = {
    "on": (
        "Turn on the {thing} in the {room}.",
        "Could you switch the {room} {thing} on?",
        "I want the {thing} in the {room} running.",
        "It's time to start the {room} {thing}, please.",
    ),
    "off": (
        "Turn off the {thing} in the {room}.",
        "Nobody is in the {room}, so stop the {thing}.",
        "The {room} {thing} should not be running.",
        "Could you switch the {thing} in the {room} off?",
    ),
    "30": ("Set the {room} {thing} to thirty percent.", "Put the {thing} in the {room} at 30 %."),
    "70": ("Set the {room} {thing} to seventy percent.", "Put the {thing} in the {room} at 70 %."),
}


def conversations(seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records to train on and others; no room, thing and setting of these is together in one of those."""
    drawn = random.Random(seed)
    wishes = list(itertools.product(ROOMS, THINGS, SAID))
    drawn.shuffle(wishes)
    records = []
    for room, thing, setting in wishes:
        said = drawn.choice(SAID[setting]).format(room=room, thing=thing)
        turns = [("user", said), ("assistant", f"{room}/{thing}={setting}")]
        records.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    return records[:TRAINED], records[TRAINED : TRAINED + HELD_OUT]


class Demo:
    """The steps of the demo, in order; every figure lands in `results`."""

    def __init__(self, out: Path) -> None:
        self.bundle, self.adapter = out / "chat.edge", out / "house"
        self.file = smollm2()
        train, held_out = conversations()
        self.test = [(record["messages"][0], record["messages"][1]["content"]) for record in held_out]
        self.data, self.exam = out / "commands.jsonl", out / "exam.jsonl"
        for file, records in ((self.data, train), (self.exam, held_out)):
            file.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
        self.results: dict[str, Any] = {}
        self._device = device_environment(out / "device")

    def run(self) -> None:
        """Do it all."""
        self.export()
        self.talk("What is the capital of France?")
        self.results["before"] = self.count(None)
        self.adapt()
        self.results["after"] = self.count(self.adapter)
        self.talk(self.test[0][0]["content"], "--adapter", self.adapter)
        self.open_in_peft()

    def export(self) -> None:
        """Workstation: the file in, bundle out."""
        began_s = time.perf_counter()
        options = ("-o", self.bundle, "--rank", "8", "--max-length", "2048", "--json")
        summary = json.loads(run(EDGEPEFT, "export", self.file, *options))
        self.results["export"] = {
            "seconds": time.perf_counter() - began_s,
            "file_bytes": self.file.stat().st_size,
            "bundle_bytes": summary["bundle_bytes"],
        }

    def talk(self, prompt: str, *options: str | Path) -> None:
        """Device: an answer, word by word."""
        arguments = (self.bundle, "--chat", "--prompt", prompt, "--max-new-tokens", "32")
        run(
            *(EDGEPEFT, "generate", *arguments, "--budget", BUDGET, *options),
            environment=self._device,
            shows=True,
        )

    def count(self, adapter: Path | None) -> int:
        """Device: how many of the held-out wishes become the right command, to the letter."""
        given = [sys.executable, ANSWERS, self.bundle, self.exam, BUDGET]
        if adapter is not None:
            given.append(adapter)
        answers = json.loads(run(*given, environment=self._device))
        return sum(answer.strip() == right for answer, (_, right) in zip(answers, self.test, strict=True))

    def adapt(self) -> None:
        """Device: learn from the other commands within the budget."""
        report = json.loads(
            run(
                *(EDGEPEFT, "adapt", self.bundle, "--data", self.data, "--budget", BUDGET),
                *("-o", self.adapter, "--seq-len", str(SEQ_LEN), "--batch-size", str(BATCH_SIZE)),
                *("--steps", str(STEPS), "--lr", str(LR), "--json"),
                environment=self._device,
            )
        )
        self.results["adapt"] = {
            "seconds": report["seconds"]["total"],
            "strategy": report["strategy"],
            "trained_values": report["trained_values"],
            "peak_bytes": report["memory"]["measured_peak_bytes"],
            "predicted_peak_bytes": report["memory"]["predicted_peak_bytes"],
            "budget_bytes": report["memory"]["budget_bytes"],
        }

    def open_in_peft(self) -> None:
        """Workstation: the adapter in PEFT, on the file's weights as transformers reads them, which are the
        bundle's."""
        transformers.logging.set_verbosity_error()
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        base = transformers.AutoModelForCausalLM.from_pretrained(
            str(self.file.parent), gguf_file=self.file.name, dtype=torch.float32
        )
        model = peft.PeftModel.from_pretrained(base, str(self.adapter)).eval()
        ids = np.arange(100, 148)[None]
        with torch.no_grad():
            expected = model(torch.from_numpy(ids)).logits.numpy()
        with edgepeft.load(self.bundle) as device:
            got = device.forward({"input_ids": ids, "attention_mask": np.ones_like(ids)}, str(self.adapter))
        self.results["peft"] = {"largest_logit_difference": float(np.abs(got["logits"] - expected).max())}


def table(results: dict[str, Any]) -> str:
    """The demo's figures as text."""
    export, adapt = results["export"], results["adapt"]
    sizes = [format_size(adapt[key]) for key in ("predicted_peak_bytes", "peak_bytes", "budget_bytes")]
    return "\n".join(
        [
            f"file {format_size(export['file_bytes'])}, bundle to talk and to learn "
            f"{format_size(export['bundle_bytes'])}, exported and verified in {export['seconds']:.0f} s",
            f"right commands, of {HELD_OUT} not seen before: {results['before']} before, "
            f"{results['after']} after",
            f"learned {adapt['trained_values']:,} values in {adapt['seconds']:.0f} s ({adapt['strategy']}): "
            f"predicted {sizes[0]}, measured {sizes[1]}, budget {sizes[2]}",
            "the adapter in PEFT: logits differ by at most "
            f"{results['peft']['largest_logit_difference']:.1e}",
        ]
    )


def main() -> None:
    """Run the demo into an empty folder, print the figures, write `results.json`."""
    out = Path("demo-chat-output").absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    began_s = time.perf_counter()
    demo = Demo(out)
    demo.run()
    demo.results["seconds"] = time.perf_counter() - began_s
    (out / "results.json").write_text(json.dumps(demo.results, indent=1) + "\n", "utf-8")
    print("\n" + table(demo.results))
    print(f"\nall of it in {demo.results['seconds']:.0f} s; figures are in {out}")


if __name__ == "__main__":
    main()
