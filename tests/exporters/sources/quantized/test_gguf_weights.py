"""Which weight of a model a tensor of a GGUF file is."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers.pytorch_utils import Conv1D

from edgepeft.exporters.sources.quantized.gguf_file import read_tensors
from edgepeft.exporters.sources.quantized.gguf_weights import GgufWeights

from .test_gguf_layouts import random_blocks

pytestmark = pytest.mark.versions

ROWS, COLUMNS = 40, 512


class Model(torch.nn.Module):
    """Two linears of one shape, one of the transposed kind, and a table that is the head, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(ROWS, COLUMNS)
        self.first = torch.nn.Linear(COLUMNS, ROWS)
        self.second = torch.nn.Linear(COLUMNS, ROWS)
        self.turned = Conv1D(ROWS + 1, COLUMNS)
        self.head = torch.nn.Linear(COLUMNS, ROWS)
        self.head.weight = self.table.weight
        self.experts = torch.nn.Parameter(torch.zeros(2, ROWS, COLUMNS))

    def hold(self, name: str, values: np.ndarray) -> None:
        """Put values into a parameter."""
        with torch.no_grad():
            self.get_parameter(name).copy_(torch.from_numpy(values))


def write(path: Path, **tensors: tuple[str, np.ndarray]) -> None:
    """A file of blocks, each with its type."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for name, (kind, blocks) in tensors.items():
        writer.add_tensor(name, blocks, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def found(path: Path, model: Model) -> GgufWeights:
    return GgufWeights(path, read_tensors(path), model)


def values(kind: str, blocks: np.ndarray) -> np.ndarray:
    return gguf.quants.dequantize(blocks, GGMLQuantizationType[kind])


def test_rows_may_be_in_another_order_and_weights_transposed(tmp_path: Path) -> None:
    """What a tensor is called says nothing; a tied weight has the linear's name, as in the trace."""
    blocks = {
        name: (kind, random_blocks(kind, rows, COLUMNS))
        for name, kind, rows in (
            ("a", "Q4_K", ROWS),
            ("b", "Q6_K", ROWS),
            ("c", "Q5_0", ROWS),
            ("d", "Q8_0", ROWS + 1),
        )
    }
    blocks["a"][1][[0, -1]] = 0  # as rows are of tokens that are none
    write(tmp_path / "model.gguf", **blocks)
    model = Model()
    model.hold("second.weight", values(*blocks["a"])[::-1].copy())
    model.hold("table.weight", values(*blocks["b"]))
    model.hold("first.weight", np.roll(values(*blocks["c"]), 7, axis=0))
    model.hold("turned.weight", values(*blocks["d"]).T)
    weights = found(tmp_path / "model.gguf", model)
    assert list(weights) == ["second.weight", "head.weight", "first.weight", "turned.weight"]
    assert weights.left_out == ()
    for name, weight in weights.items():
        expected = model.get_parameter(name).detach()
        assert torch.equal(weight.dequantize(), expected.T if name == "turned.weight" else expected)


def test_what_the_model_has_in_another_form_is_left_out(tmp_path: Path) -> None:
    """A value that differs, experts, a type without a layout; and no weight is two tensors."""
    blocks = random_blocks("Q4_K", ROWS, COLUMNS)
    other = random_blocks("Q4_K", ROWS, COLUMNS + 256)[:, : blocks.shape[1]]
    grid = np.zeros((ROWS, COLUMNS // 256 * 66), np.uint8)
    experts = np.stack([blocks, blocks])
    write(
        tmp_path / "model.gguf",
        same=("Q4_K", blocks),
        again=("Q4_K", blocks),
        differs=("Q4_K", other),
        experts=("Q4_K", experts),
        grid=("IQ2_XXS", grid),
    )
    model = Model()
    model.hold("first.weight", values("Q4_K", blocks))
    changed = values("Q4_K", other)
    changed[3, 5] += 1
    model.hold("second.weight", changed)
    model.hold("experts", values("Q4_K", experts))
    weights = found(tmp_path / "model.gguf", model)
    assert list(weights) == ["first.weight"]
    assert weights.left_out == ("again", "differs", "experts", "grid")
