"""ONNX files as other tools write them, from tiny transformers models, and what their bytes mean."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
import transformers
from onnx import numpy_helper

from edgepeft.exporters.sources.loading import load_source

from . import models

LLAMA_TYPES = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}


class Logits(torch.nn.Module):
    """A model that takes tokens and a mask by position and returns the logits alone."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        super().__init__()
        # The names of the modules in the file begin as the model's own.
        for name, child in model.named_children():
            self.add_module(name, child)
        self.__dict__["whole"] = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        given = {} if position_ids is None else {"position_ids": position_ids}
        result = self.__dict__["whole"](input_ids=input_ids, attention_mask=attention_mask, **given)
        logits: torch.Tensor = result.logits
        return logits


def export_dynamo(model: transformers.PreTrainedModel, path: Path) -> Path:
    """`torch.onnx.export` as it is called today; the weights keep their names or become `val_67`."""
    model.config.use_cache = False
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=64)
    axes = {0: batch, 1: sequence}
    ids = torch.randint(0, models.SIZES["vocab_size"], (2, 7))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (),
            str(path),
            kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes={"input_ids": axes, "attention_mask": axes},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    return path


def export_torchscript(
    model: transformers.PreTrainedModel, path: Path, *, with_positions: bool = False
) -> Path:
    """As optimum exports: opset 14, paths in the nodes' names, weights `onnx::MatMul_123`."""
    model.config.use_cache = False
    ids = torch.randint(0, models.SIZES["vocab_size"], (2, 7))
    names = ["input_ids", "attention_mask", *(["position_ids"] if with_positions else [])]
    positions = torch.arange(7)[None].expand(2, 7)
    axes = {0: "batch", 1: "sequence"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Logits(model).eval(),
            (ids, torch.ones_like(ids), positions)[: len(names)],
            str(path),
            input_names=names,
            output_names=["logits"],
            dynamic_axes=dict.fromkeys([*names, "logits"], axes),
            dynamo=False,
            opset_version=14,
        )
    return path


class Hidden(torch.nn.Module):
    """An encoder that returns its last hidden state alone."""

    def __init__(self, encoder: transformers.PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        result = self.encoder(input_ids=input_ids, attention_mask=mask, token_type_ids=types)
        hidden: torch.Tensor = result.last_hidden_state
        return hidden


def export_encoder(model: transformers.PreTrainedModel, path: Path) -> Path:
    """A sentence encoder as it comes out of torch: hidden states, no pooling."""
    ids = torch.randint(0, models.SIZES["vocab_size"], (2, 7))
    names = ["input_ids", "attention_mask", "token_type_ids"]
    axes = {0: "rows", 1: "tokens"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Hidden(model).eval(),
            (ids, torch.ones_like(ids), torch.zeros_like(ids)),
            str(path),
            input_names=names,
            output_names=["last_hidden_state"],
            dynamic_axes=dict.fromkeys([*names, "last_hidden_state"], axes),
            dynamo=False,
            opset_version=17,
        )
    return path


def quantize_nbits(path: Path, output: Path, *, symmetric: bool) -> Path:
    """onnxruntime's 4-bit quantizer over a file."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(path), block_size=32, is_symmetric=symmetric)
    quantizer.process()
    quantizer.model.save_model_to_file(str(output))
    return output


def build_genai(kind: str, precision: str, folder: Path, *options: str) -> Path:
    """A file of onnxruntime-genai's builder, from a random model saved with a tokenizer stub."""
    import tokenizers
    from onnxruntime_genai.models import builder

    model = decoder(kind)
    model.save_pretrained(folder / "hub")
    vocabulary = {f"w{index}": index for index in range(models.SIZES["vocab_size"])}
    stub = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=stub, unk_token="w0", bos_token="w1", eos_token="w2", pad_token="w0"
    ).save_pretrained(folder / "hub")
    arguments = ("", str(folder / "hub"), str(folder / "onnx"), precision, "cpu", str(folder / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        builder.create_model(*arguments, **builder.parse_extra_options(*arguments, list(options)))
    return folder / "onnx" / "model.onnx"


def bert() -> transformers.PreTrainedModel:
    """A random classifier of three classes."""
    return with_biases(models.bert_classifier())


def decoder(kind: str) -> transformers.PreTrainedModel:
    """A random Llama or Qwen2 with grouped heads; a Qwen2's biases are not zero."""
    torch.manual_seed(0)
    config = LLAMA_TYPES[kind](
        **models.SIZES,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=kind == "qwen2",
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return with_biases(transformers.AutoModelForCausalLM.from_config(config).eval())


def with_biases(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Exporters drop biases that are zero and merge those that are equal."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.1)
    return model


def dequantized(path: Path) -> dict[str, np.ndarray]:
    """By node name, the weight `[N, K]` of every `MatMulNBits`, by the operator's definition.

    Blocks of codes, low half first; w = (code - zero point) * scale, the zero point 8 where none is stored.
    """
    model = onnx.load(path)
    arrays = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        attributes: dict[str, Any] = {item.name: item.i for item in node.attribute}
        rows, columns, block = attributes["N"], attributes["K"], attributes["block_size"]
        blocks = columns // block
        codes = halves(arrays[node.input[1]]).reshape(rows, blocks, block).astype(np.float32)
        points = np.full((rows, blocks), 8, np.float32)
        if len(node.input) > 3 and node.input[3]:
            stored = arrays[node.input[3]].reshape(rows, -1)
            points = halves(stored).reshape(rows, -1)[:, :blocks].astype(np.float32)
        scales = arrays[node.input[2]].reshape(rows, blocks)
        found[node.name] = ((codes - points[..., None]) * scales[..., None]).reshape(rows, columns)
    return found


def halves(packed: np.ndarray) -> np.ndarray:
    """Each byte's low half and then its high half."""
    return np.stack([packed & 15, packed >> 4], axis=-1)


def quantize_qdq(path: Path, output: Path) -> Path:
    """onnxruntime's 4-bit quantizer, with `DequantizeLinear` before each `MatMul`."""
    from onnxruntime.quantization import QuantFormat
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    settings = DefaultWeightOnlyQuantConfig(32, is_symmetric=True, quant_format=QuantFormat.QDQ)
    model = onnx.version_converter.convert_version(onnx.load(path), 21)
    quantizer = MatMulNBitsQuantizer(model, algo_config=settings)
    quantizer.process()
    quantizer.model.save_model_to_file(str(output))
    return output


def quantize_whole(path: Path, output: Path) -> Path:
    """8 bits with one scale for a whole matrix, a number of which every layer has another."""
    model = onnx.load(path)
    arrays = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        weight = arrays.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is not None:
            scale = np.float32(np.abs(weight).max() / 127)
            name = f"{node.input[1]}_quantized"
            codes = np.round(weight / scale).astype(np.int8)
            model.graph.initializer.append(numpy_helper.from_array(codes, name))
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(scale), f"{name}_scale"))
            inputs = [name, f"{name}_scale"]
            nodes.append(onnx.helper.make_node("DequantizeLinear", inputs, [f"{name}_decoded"]))
            node.input[1] = f"{name}_decoded"
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, output)
    return output


def quantize_bnb4(path: Path, output: Path) -> Path:
    """bitsandbytes' NF4."""
    from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer

    quantizer = MatMulBnb4Quantizer(onnx.load(path), 1, 64)
    quantizer.process()
    quantizer.model.save_model_to_file(str(output))
    return output


def fuse_bert(path: Path, output: Path) -> Path:
    """onnxruntime's optimizer for BERT: normalizations with skips, biased activations."""
    from onnxruntime.transformers import optimizer

    options = {"model_type": "bert", "num_heads": 4, "hidden_size": 64, "opt_level": 0}
    optimizer.optimize_model(str(path), **options).save_model_to_file(str(output))
    return output


def with_cache(model: transformers.PreTrainedModel, output: Path) -> Path:
    """A decoder whose cache is joined by plain operators, its inputs named as optimum names them."""
    traced = load_source(model).trace(training=False)
    graph = traced.model.graph
    for value in list(graph.inputs):
        if value.name in traced.weights:
            graph.inputs.remove(value)
            value.const_value = ir.tensor(traced.weights[value.name].numpy(), name=value.name)
            graph.register_initializer(value)
    ir.save(traced.model, output)
    return output
