"""The model that `benchmarks.quality` judges: its weights, its texts and what it makes of them in float32.

Weights of a published file of 4 bits lie on the grid that is to be judged: rounding them to another one, or
to the same one again, says nothing of weights as they were trained. So they are moved off it by changes that
leave the function as it is: channels of the residual stream, of the feed-forward layers and of the value
heads change places, so that every block has weights of many others, and channels of a value are scaled by up
to 15 %, which `o_proj` undoes. Rounding errors are then those of weights that no one has rounded, and logits
differ by what float32 rounds.

The model is a decoder of Llama's form: `self_attn` with `q_proj`, `k_proj`, `v_proj`, `o_proj`, `mlp` with
`gate_proj`, `up_proj`, `down_proj`, and norms of the residual stream that multiply channel by channel
(Gemma's `1 + w` too). Norms of heads and the rows of queries and keys, which the rotary embedding orders,
stay as they are, and an output layer that is tied stays tied.
"""

import ast
import json
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import transformers

from benchmarks.llama_cpp_files import write_float16
from edgepeft.exporters.sources.gguf import load_gguf

TOKENS, WINDOWS, READMES, RECORDS = 512, 12, 4, 64
#: Modules whose docstrings are text A; records are of those after them.
MODULES = 40
#: Characters of a docstring that is a record, at least.
RECORD_LENGTH = 400
#: Largest difference of a logit that moving the weights may make.
TOLERANCE = 1e-3
#: Largest logarithm of what a channel of a value is multiplied by.
SCALING = 0.15
Logits = Callable[[list[int]], torch.Tensor]


@dataclass(frozen=True)
class Workplace:
    """A folder with the moved model and all that is made of it.

    Attributes:
        folder: the folder.
        source: the GGUF file of the published weights.
    """

    folder: Path
    source: Path

    @property
    def model(self) -> Path:
        """The moved model, as transformers writes it."""
        return self.folder / "model"

    @property
    def records(self) -> Path:
        """What may be calibrated on."""
        return self.folder / "records.jsonl"

    @property
    def windows(self) -> dict[str, list[list[int]]]:
        """Token ids of every text's windows."""
        found: dict[str, list[list[int]]] = json.loads((self.folder / "windows.json").read_text("utf-8"))
        return found

    @property
    def reference(self) -> np.ndarray:
        """The float model's log-probabilities, float32 `[windows, tokens - 1, vocabulary]`, mapped."""
        found: np.ndarray = np.load(self.folder / "reference.npy", mmap_mode="r")
        return found

    def float16(self) -> Path:
        """The moved model as a GGUF file, written where it is not there yet."""
        path = self.folder / "float16.gguf"
        if not path.exists():
            write_float16(self.load(), self.source, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
        return path

    def load(self) -> Any:
        """The moved model, float32."""
        return transformers.AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()

    def parameters(self) -> int:
        """How many weights the model has."""
        return int(json.loads((self.folder / "model.json").read_text("utf-8"))["parameters"])


def docstrings(modules: Iterable[Path]) -> list[str]:
    """All docstrings of some modules, which are parsed and not imported."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = (
        ast.get_docstring(node)
        for path in modules
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, kinds)
    )
    return [text for text in found if text]


def texts(tokenizer: Any) -> tuple[dict[str, list[list[int]]], list[str]]:
    """Windows of both texts as token ids, and the records."""
    start: list[int] = tokenizer("").input_ids  # what every text of the model begins with

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return found

    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    length = TOKENS - len(start)
    read = ids("\n\n".join(docstrings(modules[:MODULES])))
    a = [start + read[at : at + length] for at in range(0, 2 * WINDOWS * length, 2 * length)]
    readmes = [
        ids(path.read_text("utf-8", "ignore"))
        for path in sorted(Path("/usr/share/doc").glob("*/README*"))
        if path.suffix != ".gz"
    ]
    long = [start + found[40 : 40 + length] for found in readmes if len(found) >= 40 + length]
    b = long[:: max(1, len(long) // READMES)][:READMES]
    others = [text for text in docstrings(modules[MODULES:]) if len(text) >= RECORD_LENGTH]
    return {"A": a, "B": b}, others[:: len(others) // RECORDS][:RECORDS]


@torch.no_grad()
def prepare(work: Workplace) -> None:
    """Move the weights, choose the texts and note what the float model makes of them, where that is not done.

    Raises:
        click.ClickException: the moved model computes something else.
    """
    if (work.folder / "reference.npy").exists():
        return
    work.folder.mkdir(parents=True, exist_ok=True)
    model, text, _ = load_gguf(work.source)
    windows, records = texts(text.tokenizer)
    first = torch.tensor([next(iter(windows.values()))[0]])
    before = model.eval()(input_ids=first).logits
    move(model)
    difference = float((model(input_ids=first).logits - before).abs().max())
    click.echo(
        f"moved weights change logits by up to {difference:.1e} of {float(before.abs().max()):.0f}", err=True
    )
    if difference > TOLERANCE:
        raise click.ClickException(f"the moved model's logits differ by {difference:.1e}")
    model.save_pretrained(work.model)
    text.tokenizer.save_pretrained(work.model)
    lines = "".join(json.dumps({"text": record}) + "\n" for record in records)
    work.records.write_text(lines, "utf-8")
    (work.folder / "windows.json").write_text(json.dumps(windows), "utf-8")
    about = {"parameters": sum(tensor.numel() for tensor in model.parameters()), "moved_by": difference}
    (work.folder / "model.json").write_text(json.dumps(about), "utf-8")
    everything = [ids for found in windows.values() for ids in found]
    part = work.folder / "reference.part.npy"
    shape = (len(everything), TOKENS - 1, model.config.vocab_size)
    reference = np.lib.format.open_memmap(part, "w+", np.float32, shape)
    logits = of_transformers(model)
    for row, ids in zip(reference, everything, strict=True):
        row[:] = logits(ids)[:-1].log_softmax(-1).numpy()
    reference.flush()
    part.rename(work.folder / "reference.npy")


def of_transformers(model: Any) -> Logits:
    """Logits `[tokens, vocabulary]` of a model in PyTorch."""

    @torch.no_grad()
    def logits(ids: list[int]) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        return found

    return logits


@torch.no_grad()
def move(model: Any, seed: int = 0) -> None:
    """Move the weights of a transformers model in place.

    Args:
        model: a causal language model of Llama's form.
        seed: draws the permutations and scalings.
    """
    generator = torch.Generator().manual_seed(seed)
    config, body = model.config, model.model
    residual = _permutation(config.hidden_size, generator)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    _select(embedding.weight, residual, 1)
    if head.weight is not embedding.weight:
        _select(head.weight, residual, 1)
    _select(body.norm.weight, residual, 0)
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm in layer.children():
            if isinstance(weight := getattr(norm, "weight", None), torch.Tensor):
                _select(weight, residual, 0)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            _select(linear.weight, residual, 1)
        for linear in (attention.o_proj, mlp.down_proj):
            _select_rows(linear, residual)
        hidden = _permutation(mlp.down_proj.in_features, generator)
        _select_rows(mlp.gate_proj, hidden)
        _select_rows(mlp.up_proj, hidden)
        _select(mlp.down_proj.weight, hidden, 1)
        _move_values(attention.v_proj, attention.o_proj, config.num_key_value_heads, generator)


def _move_values(v_proj: Any, o_proj: Any, heads: int, generator: torch.Generator) -> None:
    """Permute and scale the channels of every value head; the query heads that share it undo it."""
    channels = v_proj.out_features // heads
    queries = o_proj.in_features // v_proj.out_features
    orders = torch.stack([_permutation(channels, generator) for _ in range(heads)])
    scales = torch.empty(heads, channels).uniform_(-SCALING, SCALING, generator=generator).exp()
    _select_rows(v_proj, (orders + channels * torch.arange(heads)[:, None]).flatten())
    for tensor in v_proj.parameters():
        tensor.mul_(scales.reshape(-1, *[1] * (tensor.ndim - 1)))
    # Query heads that share a value head lie beside each other.
    shared = orders.repeat_interleave(queries, 0) + channels * torch.arange(heads * queries)[:, None]
    _select(o_proj.weight, shared.flatten(), 1)
    o_proj.weight.div_(scales.repeat_interleave(queries, 0).flatten())


def _permutation(length: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(length, generator=generator)


def _select(tensor: torch.Tensor, order: torch.Tensor, axis: int) -> None:
    tensor.copy_(tensor.index_select(axis, order))


def _select_rows(linear: Any, order: torch.Tensor) -> None:
    """Rows of a linear and, where it has one, of its bias."""
    for tensor in linear.parameters():
        _select(tensor, order, 0)
