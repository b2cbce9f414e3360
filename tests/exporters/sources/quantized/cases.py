"""A small Llama of every layout of quantized weights, through the export and against PyTorch.

The weights that PyTorch computes with are made of the drawn codes by each format's formula, and of GGUF files
by the package gguf; the export's own verification compares with the model that it has read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import torch
import transformers

import edgepeft

from ... import models
from .. import gguf_llama
from . import writers
from .test_bitsandbytes import INT8_SETTINGS, NF4_SETTINGS, drawn_int8, drawn_table
from .test_checkpoint import AWQ, EMBEDDING, GPTQ, HEAD, MLX
from .test_compressed_tensors import drawn as draw_compressed
from .test_compressed_tensors import settings
from .test_gguf_layouts import HALVES, random_blocks
from .test_torchao import drawn as draw_torchao
from .test_torchao import noted

#: What CI demands of `Figures`.
OUTPUT, COSINE = 1e-5, 0.9999

#: Writes a checkpoint into a folder: what is to be exported, and the model that it stands for.
Write = Callable[[Path], tuple[Path, transformers.PreTrainedModel]]


@dataclass(frozen=True)
class Case:
    """A layout. `bits` is how most weights of the bundle are stored; `source`, what the weights of the
    reference come from."""

    write: Write
    bits: int
    source: str = "formula"


@dataclass(frozen=True)
class Figures:
    """How far a bundle is from PyTorch: the largest difference of a logit, relative to the largest logit; the
    least cosine of a gradient, among so many."""

    output: float
    cosine: float
    gradients: int


def folder(draw: writers.Draw, described: dict[str, Any], **options: Any) -> Write:
    """A folder with `described` as its quantization_config."""

    def write(path: Path) -> tuple[Path, transformers.PreTrainedModel]:
        model = models.llama(tied=HEAD not in options.get("also", ()))
        for name, value in writers.quantized_llama(path, draw, described, model, **options).items():
            model.get_parameter(name).data = value
        return path, model

    return write


def gguf_file(kind: str) -> Write:
    """A GGUF file with all matrices of one type: any codes, and scales that make weights of usual sizes."""

    def write(path: Path) -> tuple[Path, transformers.PreTrainedModel]:
        type_ = gguf.GGMLQuantizationType[kind]
        path.mkdir(parents=True, exist_ok=True)
        model = models.llama(tied=True, hidden_size=256, intermediate_size=256)
        usual = 0.02 * 0.05 / float(gguf.quants.dequantize(random_blocks(kind, 64, 256), type_).std())

        def stored(name: str, array: np.ndarray) -> gguf_llama.Stored:
            blocks = random_blocks(kind, *array.shape, usual)
            values = np.asarray(gguf.quants.dequantize(blocks, type_), np.float32)
            values = gguf_llama.interleaved(model, name, values, back=True)
            model.get_parameter(name).data = torch.from_numpy(values)
            return blocks, type_

        gguf_llama.write(path / "tiny.gguf", model, stored)
        return path / "tiny.gguf", model

    return write


def draw_table(kind: str, *, nested: bool) -> writers.Draw:
    """bitsandbytes of 4 bits."""

    def draw(rows: int, columns: int, _: np.random.Generator) -> writers.Drawn:
        tensors, weight = drawn_table(kind, nested=nested, rows=rows, columns=columns)
        own = {name: tensor.clone() for name, tensor in tensors.items()}  # not the table that all have
        return writers.Drawn(own, torch.from_numpy(weight))

    return draw


def draw_int8(rows: int, columns: int, rng: np.random.Generator) -> writers.Drawn:
    """bitsandbytes of 8 bits."""
    tensors, weight = drawn_int8(rng, rows=rows, columns=columns, largest=0.2)
    return writers.Drawn(tensors, torch.from_numpy(weight.astype(np.float32)))


def drawn_at(drawn: Callable[..., writers.Drawn], *given: Any, **options: Any) -> writers.Draw:
    """What a layout's own tests draw, of any shape."""
    return lambda rows, columns, _: drawn(*given, **options, rows=rows, columns=columns)


INT4 = noted(
    "IntxUnpackedToInt8Tensor", block_size=[1, 32], target_dtype={"_type": "torch.dtype", "_data": "int4"}
)
NF4, FP4 = (NF4_SETTINGS | {"bnb_4bit_quant_type": kind} for kind in ("nf4", "fp4"))
PACKED_ASYMMETRIC = settings(symmetric=False)
#: GGUF types that are stored as codes of 4 bits; the others have 8.
OF_4_BITS = ("Q4_0", "Q4_1", "Q2_K", "Q3_K", "Q4_K")
CASES = {
    **{f"GGUF {kind}": Case(gguf_file(kind), 4 if kind in OF_4_BITS else 8, "gguf") for kind in HALVES},
    "GPTQ": Case(folder(writers.draw_gptq(version=2), GPTQ | {"checkpoint_format": "gptq_v2"}), 4),
    "GPTQ, act-order": Case(
        folder(writers.draw_gptq(sym=False, act_order=True), GPTQ | {"desc_act": True}), 4
    ),
    "GPTQ, output layer too": Case(folder(writers.draw_gptq(), GPTQ, also=(HEAD,)), 4),
    "GPTQ of 8 bits": Case(folder(writers.draw_gptq(8), GPTQ | {"bits": 8}), 8),
    "AWQ": Case(folder(writers.draw_awq(), AWQ), 4),
    "bitsandbytes NF4": Case(folder(draw_table("nf4", nested=True), NF4), 4),
    "bitsandbytes FP4": Case(folder(draw_table("fp4", nested=False), FP4), 4),
    "bitsandbytes LLM.int8": Case(folder(draw_int8, INT8_SETTINGS), 8),
    "compressed-tensors, 4 bits": Case(folder(drawn_at(draw_compressed, 4, sym=False), PACKED_ASYMMETRIC), 4),
    "compressed-tensors, 8 bits": Case(
        folder(drawn_at(draw_compressed, 8, plain=True), settings("int-quantized", num_bits=8)), 8
    ),
    "torchao, 4 bits": Case(folder(drawn_at(draw_torchao, 4, 32), {"quant_method": "torchao"}, note=INT4), 4),
    "MLX": Case(folder(writers.draw_mlx(), MLX, key="quantization", also=(EMBEDDING,)), 4),
}


def measured(case: Case, path: Path) -> Figures:
    """Export a case into `path` with a fresh LoRA on every linear, and compare.

    The gradients are those of each B: A's is 0 while B is.
    """
    source, model = case.write(path / "model")
    manifest = edgepeft.export(source, path / "bundle", rank=4, verify=False)  # which is what this does
    assert manifest.quantization.bits == case.bits
    batch = models.batch(labels="tokens")
    inputs = {key: value for key, value in batch.arrays.items() if key != "labels"}
    with edgepeft.load(path / "bundle") as device:
        (got,) = device.forward(inputs).values()
        _, gradients = device.loss_and_gradients(batch.arrays, adapter="default")
    with torch.no_grad():
        logits = model(**{key: torch.from_numpy(value) for key, value in inputs.items()}).logits.numpy()
    counted = batch.arrays["attention_mask"].astype(bool)
    output = np.abs(got[counted] - logits[counted]).max() / np.abs(logits[counted]).max()
    wrapped = peft.PeftModel.from_pretrained(model, path / "bundle/adapters/default", is_trainable=True)
    wrapped(**batch.tensors).loss.backward()
    cosines = []
    for key, parameter in wrapped.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            gradient, ours = parameter.grad.numpy(), gradients[key.replace(".default.", ".")]
            cosines.append((ours * gradient).sum() / (np.linalg.norm(ours) * np.linalg.norm(gradient)))
    return Figures(float(output), float(min(cosines)), len(cosines))
