"""Weights that somebody else has quantized, in every layout: bundles against PyTorch with their values.

The export's own verification compares outputs, logits of every graph that generates and gradients.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import pytest
import torch
import transformers

import edgepeft
from edgepeft.exporters import pipeline
from edgepeft.exporters.quantize.layouts import BlockValues, QuantizedWeight, concatenate, pack, unpack
from edgepeft.exporters.sources.loading import load_source
from edgepeft.exporters.sources.tied_weights import canonical_names

from .. import models
from ..partition.test_partition import both_ways

Layout = Callable[[np.random.Generator, int, int], QuantizedWeight]
SCALE = 0.01


def scales(rng: np.random.Generator, rows: int, blocks: int) -> np.ndarray:
    return (SCALE * rng.uniform(0.5, 1.5, (rows, blocks))).astype(np.float16)


def codes(
    rng: np.random.Generator, rows: int, columns: int, bits: int, spread: int | None = None
) -> np.ndarray:
    low, high = (0, 2**bits) if spread is None else (2 ** (bits - 1) - spread, 2 ** (bits - 1) + spread)
    return rng.integers(low, high, (rows, columns), np.uint8)


def symmetric(rng: np.random.Generator, rows: int, columns: int) -> QuantizedWeight:
    """GGML's Q4_0."""
    return QuantizedWeight.of_codes(
        codes(rng, rows, columns, 4), BlockValues(scales(rng, rows, columns // 32)), 4, 32
    )


def zero_points(rng: np.random.Generator, rows: int, columns: int) -> QuantizedWeight:
    """AWQ's."""
    blocks = columns // 64
    return QuantizedWeight.of_codes(
        codes(rng, rows, columns, 4),
        BlockValues(scales(rng, rows, blocks)),
        4,
        64,
        zero_points=rng.integers(4, 12, (rows, blocks), np.uint8),
    )


def ordered(rng: np.random.Generator, rows: int, columns: int) -> QuantizedWeight:
    """GPTQ's with activation order; linears that read the same values may have orders of their own."""
    weight = zero_points(rng, rows, columns)
    return QuantizedWeight(
        weight.packed,
        weight.scales,
        4,
        64,
        weight.zero_points,
        order=rng.permutation(columns).astype(np.int64),
    )


def minimums(rng: np.random.Generator, rows: int, columns: int) -> QuantizedWeight:
    """GGML's Q4_1."""
    blocks = columns // 32
    found = scales(rng, rows, blocks)
    return QuantizedWeight.of_codes(
        codes(rng, rows, columns, 4),
        BlockValues(found),
        4,
        32,
        zero_points=np.zeros((rows, blocks), np.uint8),
        minimums=BlockValues(
            (-8 * found.astype(np.float32) + SCALE * rng.normal(size=found.shape)).astype(np.float16)
        ),
    )


def two_levels(rng: np.random.Generator, rows: int, columns: int) -> QuantizedWeight:
    """GGML's Q4_K."""
    blocks, groups = columns // 32, columns // 256
    factors = (scales(rng, rows, groups) / 48).astype(np.float16)
    return QuantizedWeight.of_codes(
        codes(rng, rows, columns, 4),
        BlockValues(rng.integers(32, 64, (rows, blocks), np.uint8), factors),
        4,
        32,
        zero_points=np.zeros((rows, blocks), np.uint8),
        minimums=BlockValues(
            rng.integers(32, 64, (rows, blocks), np.uint8), (-8 * factors).astype(np.float16)
        ),
    )


def small_blocks(rng: np.random.Generator, rows: int, columns: int) -> QuantizedWeight:
    """GGML's Q6_K."""
    return QuantizedWeight.of_codes(
        codes(rng, rows, columns, 8, spread=32),
        BlockValues(
            rng.integers(-64, 64, (rows, columns // 16), np.int8),
            (scales(rng, rows, columns // 256) / 128).astype(np.float16),
        ),
        8,
        16,
    )


LAYOUTS: dict[str, Layout] = {
    layout.__name__: layout
    for layout in (symmetric, zero_points, ordered, minimums, two_levels, small_blocks)
}


def by_hand(weight: QuantizedWeight) -> np.ndarray:
    """The definition, a value at a time."""
    rows, columns = weight.shape
    found = np.zeros((rows, columns))

    def number(numbers: BlockValues, row: int, block: int) -> float:
        value = float(numbers.values[row, block])
        if numbers.factors is None:
            return value
        each = numbers.values.shape[1] // numbers.factors.shape[1]
        return value * float(numbers.factors[row, block // each])

    for row in range(rows):
        for column in range(columns):
            byte = int(weight.packed[row, column * weight.bits // 8])
            code = byte if weight.bits == 8 else (byte >> 4 if column % 2 else byte & 15)
            block = column // weight.block_size
            zero = (
                2 ** (weight.bits - 1) if weight.zero_points is None else int(weight.zero_points[row, block])
            )
            value = (code - zero) * number(weight.scales, row, block)
            if weight.minimums is not None:
                value += number(weight.minimums, row, block)
            found[row, column if weight.order is None else weight.order[column]] = value
    return found


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_values_are_the_definitions(layout: Layout) -> None:
    rng = np.random.default_rng(0)
    weight = layout(rng, 6, 256)
    np.testing.assert_allclose(weight.dequantize().numpy(), by_hand(weight), rtol=1e-5, atol=1e-7)
    other = layout(rng, 3, 256)
    if weight.order is not None:
        assert weight.kind != other.kind
        return
    assert weight.kind == other.kind
    both = concatenate([weight, other])
    np.testing.assert_array_equal(both.dequantize()[6:], other.dequantize())


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_are_picked(layout: Layout) -> None:
    """With all that belongs to them, in any order, and more than once."""
    weight = layout(np.random.default_rng(0), 8, 256)
    rows = np.array([6, 0, 3, 6])
    assert torch.equal(weight.with_rows(rows).dequantize(), weight.dequantize()[rows])


@pytest.mark.parametrize("columns", [6, 7])
def test_codes_come_back(columns: int) -> None:
    given = codes(np.random.default_rng(0), 3, columns, 4)
    np.testing.assert_array_equal(unpack(pack(given, 4), 4)[:, :columns], given)


def quantized_llama(
    layouts: list[Layout], *, tied: bool = True
) -> tuple[transformers.PreTrainedModel, dict[str, QuantizedWeight]]:
    """A tiny Llama whose matrices are of these layouts, one after the other."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        vocab_size=384,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    rng = np.random.default_rng(0)
    found: dict[str, QuantizedWeight] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            found[name] = layouts[len(found) % len(layouts)](rng, *parameter.shape)
            parameter.data = found[name].dequantize()
    return model, found


@contextmanager
def given(quantized: dict[str, QuantizedWeight]) -> Iterator[None]:
    """Have an export's source say that these weights are quantized already."""

    @contextmanager
    def opened(model: Any, **options: Any) -> Iterator[Any]:
        source = load_source(model, **options)
        names = canonical_names(source.model)
        source.quantized = {name: quantized[key] for key in quantized for name in (key, names[key])}
        yield source

    with patch.object(pipeline, "opened_source", opened):
        yield


MIXED = [symmetric, small_blocks, minimums, two_levels, zero_points]
#: The mixture has all but the order.
FAST = ("ordered", "mixed")


@pytest.mark.parametrize(
    "layouts",
    [
        pytest.param(layouts, id=name, marks=[] if name in FAST else pytest.mark.slow)
        for name, layouts in {**{name: [one] for name, one in LAYOUTS.items()}, "mixed": MIXED}.items()
    ],
)
def test_bundles_compute_with_the_codes_that_they_were_given(layouts: list[Layout], tmp_path: Path) -> None:
    model, quantized = quantized_llama(layouts)
    with given(quantized):
        manifest = edgepeft.export(model, tmp_path / "bundle", rank=4)
    assert manifest.missing == {}
    assert max(manifest.verification["outputs"].values()) <= 1e-5
    weights = set(manifest.weights)
    first = "lm_head.weight"  # which is the embedding
    assert f"{first}.scales" in weights
    assert manifest.weights[f"{first}.scales"].dtype in ("float16", "uint8", "int8")
    for graph in manifest.graphs.values():
        for node in onnx.load(tmp_path / "bundle" / graph.file, load_external_data=False).graph.node:
            assert node.op_type != "MatMulNBits" or len(node.input) <= 6


def test_mixed_layouts_train_in_stages_as_they_do_whole(tmp_path: Path) -> None:
    model, quantized = quantized_llama(MIXED, tied=False)
    with given(quantized):
        manifest = edgepeft.export(model, tmp_path / "bundle", rank=4, verify=False)
    loss, staged_loss, resident, staged = both_ways(tmp_path / "bundle", models.batch(labels="tokens"))
    assert staged_loss == pytest.approx(loss, rel=1e-5)
    for name, expected in resident.gradients.items():
        got = staged.gradients[name]
        assert np.linalg.norm(got - expected) <= 1e-4 * max(np.linalg.norm(expected), 1e-3), name
    # However its weights are stored, a layer is a stage; the embedding is read by rows in all its parts.
    assert manifest.partition is not None
    assert len([stage for stage in manifest.partition.stages if stage.adapter]) == 3
    assert manifest.partition.vocabulary_head is not None
    first = manifest.partition.stages[0]
    assert first.lookups.keys() == first.weights.keys()
