"""Virtual tokens in a graph: ids behind the vocabulary's, of which a slot says what they stand for."""

import numpy as np
import onnx_ir as ir
import torch

from edgepeft.bundle.validation import TOKENLESS
from edgepeft.errors import UsageError
from edgepeft.slots import Slot
from edgepeft.virtual_tokens import FIRST_ID, RANGE, VirtualTokens

from .graph import FLOAT, INT64, append, initializer, put_behind, share
from .options import ExportOptions
from .passes.weights.embedding import TokenEmbedding
from .sources.base import ModelSource

BOOL = ir.DataType.BOOL
# Rows of an embedding that its standard deviation is taken of.
_ROWS = 4096


def check_virtual(source: ModelSource, options: ExportOptions, technique: VirtualTokens) -> None:
    """
    Raises:
        UsageError: the model reads no tokens, or in two places, or its loss compares with the base's logits.
    """
    if source.task in TOKENLESS:
        raise UsageError(
            f"{technique.title} is for texts, {source.name} is for {source.task}: train a LoRA instead"
        )
    if source.task == "text2text-generation":
        raise UsageError(
            f"{technique.title} of an encoder-decoder is not supported: train a LoRA on {source.name} instead"
        )
    if options.drift_penalty:
        raise UsageError(
            "--drift-penalty compares with what the base says of the same tokens, and it knows no virtual "
            f"ones: leave it out for {technique.title}"
        )


def first_id(site: TokenEmbedding, technique: VirtualTokens) -> int:
    """The id of the technique's first virtual token."""
    return _rows(site) + technique.place * RANGE


def standard_deviation(table: torch.Tensor) -> float:
    """Of an embedding's values, to six digits."""
    return float(f"{table[:_ROWS].float().std().item():.6g}")


def only_real_tokens(graph: ir.Graph, site: TokenEmbedding) -> None:
    """Have the embedding look up its first row where the id is that of no real token."""
    ids = site.lookup.inputs[1]
    assert ids is not None
    if not ids.is_graph_input():
        return
    count = initializer(graph, "vocabulary", np.array(_rows(site), np.int64))
    zero = initializer(graph, "zero_int64", np.array(0, np.int64))
    is_no_token = append(graph, "GreaterOrEqual", [ids, count], shape=ids.shape, dtype=BOOL)
    real = append(graph, "Where", [is_no_token, zero, ids], shape=ids.shape, dtype=INT64)
    site.lookup.replace_input_with(1, real)


def look_up(graph: ir.Graph, slot: Slot, rows: ir.Value) -> tuple[ir.Value, ir.Value]:
    """What a token's own value is multiplied by, 0 where it is one of the slot's, `[batch, sequence, 1]`, and
    the row that is added, zeros where it is none, `[batch, sequence, width]`; `rows` are `[size, width]`."""
    ids = next(value for value in graph.inputs if value.name == "input_ids")
    assert ids.shape is not None
    assert rows.shape is not None
    begin, width, shape = int(slot.settings[FIRST_ID]), rows.shape[-1], list(ids.shape)
    assert isinstance(width, int)
    first, end, before = (
        initializer(graph, f"token_{token}", np.array(token, np.int64))
        for token in (begin, begin + RANGE, begin - 1)
    )
    zero = initializer(graph, "zero_int64", np.array(0, np.int64))
    last = initializer(graph, "axis_last", np.array([-1], np.int64))
    above = append(graph, "GreaterOrEqual", [ids, first], shape=shape, dtype=BOOL)
    below = append(graph, "Less", [ids, end], shape=shape, dtype=BOOL)
    virtual = append(graph, "And", [above, below], shape=shape, dtype=BOOL)
    # The first row is that of all others, so that there is one where nobody has a virtual token.
    place = append(graph, "Sub", [ids, before], shape=shape, dtype=INT64)
    place = share(append(graph, "Where", [virtual, place, zero], shape=shape, dtype=INT64))
    nothing = initializer(graph, f"zeros_{width}", np.zeros((1, width), np.float32))
    table = append(graph, "Concat", [nothing, rows], {"axis": 0}, shape=[None, width])
    added = append(graph, "Gather", [table, place], {"axis": 0}, shape=[*shape, width])
    others = append(graph, "Not", [virtual], shape=shape, dtype=BOOL)
    keeps = append(graph, "Cast", [others], {"to": FLOAT.value}, shape=shape)
    return share(append(graph, "Unsqueeze", [keeps, last], shape=[*shape, 1])), added


def replace_virtual(graph: ir.Graph, site: TokenEmbedding, slot: Slot, rows: ir.Value) -> None:
    """Have the embedding make of a virtual token of the slot's its row."""
    only_real_tokens(graph, site)
    keeps, added = look_up(graph, slot, rows)
    put_behind(graph, site.output, "Add", added)
    put_behind(graph, site.output, "Mul", keeps)


def _rows(site: TokenEmbedding) -> int:
    rows = None if site.table.shape is None else site.table.shape[0]
    assert isinstance(rows, int)  # a weight's
    return rows
