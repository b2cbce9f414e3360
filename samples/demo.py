"""The whole path on a real model and real text; `make demo` runs this.

Exports all-MiniLM-L6-v2 at 4 bits with a LoRA and a new classification head, teaches it on the device side
which area of the standard library a docstring comes from (the head in closed form, then everything by
gradients), and does the latter in PyTorch + PEFT beside it. The device side is `edgepeft predict` and
`edgepeft adapt` as anybody would call them, in processes in which `import torch` fails. Everything is written
to `demo-output/` in the current folder.
"""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import docstrings
import numpy as np
import plot
import torch_side
from commands import EDGEPEFT, device_environment, run

import edgepeft
from edgepeft.bundle.reader import open_bundle
from edgepeft.runtime.records import records
from edgepeft.runtime.tasks import task_for
from edgepeft.sizes import format_size

BUDGET = "384MiB"
STEPS, BATCH_SIZE, SEQ_LEN = 80, 16, 48
LORA_LR = 1e-3


class Demo:
    """The steps of the demo, in order; every figure lands in `results`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.bundle = out / "topics.edge"
        self.train, self.test = docstrings.write(out / "data")
        self.labels = sorted(
            {json.loads(line)["label"] for line in self.train.read_text("utf-8").splitlines()}
        )
        self.results: dict[str, Any] = {}
        self._device = device_environment(out / "device")

    def run(self) -> None:
        """Do it all."""
        self.export()
        self.results["before"] = {"accuracy": self.accuracy("default", "before")}
        self.results["head"] = self.adapt("head", "--trainable", "head")
        self.results["lora"] = self.adapt(
            *("lora", "--steps", str(STEPS)),
            *("--batch-size", str(BATCH_SIZE), "--lr", str(LORA_LR), "--warmup-steps", "10"),
        )
        self.compare_with_torch()
        self.open_in_peft()

    def export(self) -> None:
        """Workstation: model in, bundle out."""
        began_s = time.perf_counter()
        model = self.out / "all-MiniLM-L6-v2"  # the package calls its folder `model`
        model.symlink_to(torch_side.MODEL)
        summary = self._edgepeft(
            *("export", str(model), "-o", str(self.bundle), "--task", "text-classification"),
            *("--labels", ",".join(self.labels), "--bits", "4", "--rank", "8"),
            *("--targets", "query,key,value,dense", "--json"),
        )
        model_bytes = (torch_side.MODEL / "model.safetensors").stat().st_size
        self.results["export"] = {
            "seconds": time.perf_counter() - began_s,
            "bundle_bytes": summary["bundle_bytes"],
            "model_bytes": model_bytes,
        }

    def accuracy(self, adapter: str, name: str) -> float:
        """Device: share of the test records that an adapter gets right."""
        predicted = self._edgepeft(
            *("predict", str(self.bundle), "--data", str(self.test), "--adapter", adapter),
            *("--seq-len", str(SEQ_LEN), "--batch-size", "16", "--budget", BUDGET, "--json"),
            environment=self._device,
        )
        (self.out / f"{name}.json").write_text(json.dumps(predicted), "utf-8")
        return float(predicted["accuracy"])

    def adapt(self, name: str, *options: str) -> dict[str, Any]:
        """Device: learn from the training records within the budget, then classify the test records."""
        output = self.out / f"{name}-adapter"
        report = self._edgepeft(
            *("adapt", str(self.bundle), "--data", str(self.train), "--budget", BUDGET, "-o", str(output)),
            *("--seq-len", str(SEQ_LEN), *options, "--json"),
            environment=self._device,
        )
        return {
            "accuracy": self.accuracy(str(output), name),
            "trained_values": report["trained_values"],
            "seconds": report["seconds"]["total"],
            "peak_bytes": report["memory"]["measured_peak_bytes"],
            "predicted_peak_bytes": report["memory"]["predicted_peak_bytes"],
            "budget_bytes": report["memory"]["budget_bytes"],
            "adapter_bytes": sum(file.stat().st_size for file in output.glob("adapter_*")),
        }

    def compare_with_torch(self) -> None:
        """Workstation: PyTorch + PEFT in float32, from a head in closed form through the same batches."""
        figures = self.out / "torch.json"
        report = self.out / "lora-adapter" / "adapt_report.json"
        script = Path(__file__).with_name("torch_side.py")
        start = self.out / "head-adapter"
        run(sys.executable, script, self.bundle, self.train, self.test, report, start, figures)
        baseline = json.loads(figures.read_text("utf-8"))
        self.results["torch"] = {name: baseline[name] for name in ("accuracy", "seconds", "peak_bytes")}

    def open_in_peft(self) -> None:
        """Workstation: the adapted adapter in PEFT, on the bundle's weights and on the original ones."""
        bundle = open_bundle(self.bundle)
        task = task_for(bundle)
        adapter = self.out / "lora-adapter"
        examples = task.encode_all(records(self.test), SEQ_LEN, training=True)
        with edgepeft.load(self.bundle) as device:
            runtime = np.concatenate(
                [
                    device.forward(task.batch(examples[start : start + 32], training=False), adapter)[
                        "logits"
                    ]
                    for start in range(0, len(examples), 32)
                ]
            )
        stored = torch_side.open_adapted(bundle, adapter, stored_weights=True)
        original = torch_side.open_adapted(bundle, adapter, stored_weights=False)
        right = torch_side.logits(original, task, examples).argmax(1) == [item.label for item in examples]
        self.results["peft"] = {
            "largest_logit_difference": float(
                np.abs(torch_side.logits(stored, task, examples) - runtime).max()
            ),
            "accuracy_on_float32_base": float(right.mean()),
        }

    def _edgepeft(self, *arguments: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
        """Run a command that prints JSON; its progress is shown."""
        return dict(json.loads(run(EDGEPEFT, *arguments, environment=environment)))


def table(results: dict[str, Any]) -> str:
    """The demo's figures as text."""
    head, lora, torch = results["head"], results["lora"], results["torch"]
    columns = "{:34} {:>8} {:>12} {:>10} {:>11} {:>10} {:>8}"
    lines = [columns.format("", "accuracy", "parameters", "predicted", "peak memory", "budget", "seconds")]
    lines.append(columns.format("before: new head", f"{results['before']['accuracy']:.1%}", *[""] * 5))
    for label, row in (("device, int4: head, closed form", head), ("device, int4: then LoRA and head", lora)):
        sizes = [format_size(row[key]) for key in ("predicted_peak_bytes", "peak_bytes", "budget_bytes")]
        values = f"{row['trained_values']:,}"
        lines.append(columns.format(label, f"{row['accuracy']:.1%}", values, *sizes, f"{row['seconds']:.0f}"))
    same = [
        f"{torch['accuracy']:.1%}",
        f"{lora['trained_values']:,}",
        "",
        format_size(torch["peak_bytes"]),
        "",
    ]
    lines.append(columns.format("PyTorch + PEFT, fp32: the same", *same, f"{torch['seconds']:.0f}"))
    export, peft = results["export"], results["peft"]
    lines += [
        "",
        f"bundle {format_size(export['bundle_bytes'])} (the model's float32 weights: "
        f"{format_size(export['model_bytes'])}), adapter {format_size(lora['adapter_bytes'])}, exported and "
        f"verified in {export['seconds']:.0f} s",
        f"the adapted adapter in PEFT: logits on the bundle's weights differ from the device's by at most "
        f"{peft['largest_logit_difference']:.1e};",
        f"on the original float32 weights its accuracy is {peft['accuracy_on_float32_base']:.1%}",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the demo into an empty folder, print the table, write `results.json` and `memory.png`."""
    out = Path("demo-output").absolute()
    shutil.rmtree(out, ignore_errors=True)
    began_s = time.perf_counter()
    demo = Demo(out)
    demo.run()
    demo.results["seconds"] = time.perf_counter() - began_s
    (out / "results.json").write_text(json.dumps(demo.results, indent=1) + "\n", "utf-8")
    plot.memory(
        json.loads((out / "lora-adapter" / "adapt_report.json").read_text("utf-8")),
        json.loads((out / "torch.json").read_text("utf-8")),
        out / "memory.png",
    )
    print(table(demo.results))
    print(f"\nall of it in {demo.results['seconds']:.0f} s; figures and memory.png are in {out}")


if __name__ == "__main__":
    main()
