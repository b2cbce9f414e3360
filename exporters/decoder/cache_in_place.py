"""Let attention write its keys and values where they stay: `GroupQueryAttention` over a cache of fixed size.

Before, for every layer: `Attention` (ai.onnx, version 23) over `Concat(past, new)` of keys and of values,
with a mask that is computed; queries and keys turned by `RotaryEmbedding`. After: one `GroupQueryAttention`,
whose past and present have the same shape, `[batch, kv_heads, capacity, head_dim]`, and may be the same
memory; it turns queries and keys itself, and keeps to `seqlens_k` int32 `[batch]`, a row's tokens but one,
this run's included. Source: `GroupQueryAttention` of com.microsoft, version 1.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepeft.bundle.wiring import SEQLENS, TOTAL

from ..graph import FLOAT, MICROSOFT, append, graph_input, initializer, tidy
from ..passes.attention.capped import gather_capped_attention
from ..passes.drop_cache import PAST
from ..passes.shapes.evaluate import evaluate

CAPACITY = "capacity"
INT32 = ir.DataType.INT32
#: Tokens of a run and of the cache before it, at which masks and angles are compared.
_SEQUENCE, _PAST = 3, 5
_TOKENS_MAJOR = [0, 2, 1, 3]


@dataclass
class _Layer:
    """An `Attention` and what it reads; `cos` and `sin` are None where nothing is turned."""

    node: ir.Node
    mask: ir.Value
    pasts: tuple[ir.Value, ir.Value]
    new: tuple[ir.Value, ir.Value, ir.Value]
    cos: ir.Value | None = None
    sin: ir.Value | None = None
    interleaved: int = 0


def keep_cache_in_place(model: ir.Model, max_length: int) -> bool:
    """Rewrite every `Attention` of a language model's graph; the caller sorts and tidies.

    Args:
        model: the graph, optimized, its weights inputs.
        max_length: positions that the model knows.

    Returns:
        Whether all of it is now as above. If not, the graph is of no use any more: a mask is not causal, the
        angles depend on the length of the text, positions are used otherwise, or onnxruntime's operator does
        not take heads of this size.
    """
    graph = model.graph
    if gather_capped_attention(graph):
        tidy(model)
    layers = [_match(node) for node in graph if node.op_type == "Attention" and not node.domain]
    pasts = [value for value in graph.inputs if (value.name or "").startswith(PAST)]
    if not layers or len(pasts) != 2 * len(layers):
        return False
    matched = [layer for layer in layers if layer is not None]
    if len(matched) < len(layers) or not all(_takes_size(layer) for layer in matched):
        return False
    windows = _windows(model, matched, max_length)
    tables = _tables(model, matched, max_length)
    if windows is None or tables is None:
        return False
    seqlens = graph_input(graph, SEQLENS, ["batch"], INT32)
    total = graph_input(graph, TOTAL, [1], INT32)
    for layer in matched:
        _rewrite(graph, layer, seqlens, total, windows[layer.mask], tables)
    for past in pasts:
        assert past.shape is not None
        past.shape = ir.Shape([past.shape[0], past.shape[1], CAPACITY, past.shape[3]])
    return True


def _match(node: ir.Node) -> _Layer | None:
    """An `Attention` over a growing cache with a mask, or None."""
    inputs = list(node.inputs)
    if (
        len(inputs) < 4
        or any(value is not None for value in inputs[4:])
        or node.attributes.get_int("is_causal", 0) != 0
    ):
        return None
    query, key, value, mask = inputs[:4]
    grown = [_grown(operand) for operand in (key, value)]
    if query is None or mask is None or mask.producer() is None or grown[0] is None or grown[1] is None:
        return None
    (past_key, new_key), (past_value, new_value) = grown[0], grown[1]
    turned = [_turned(operand) for operand in (query, new_key)]
    layer = _Layer(node, mask, (past_key, past_value), (query, new_key, new_value))
    if all(turn is None for turn in turned):
        return layer
    if turned[0] is None or turned[1] is None or turned[0].inputs[1:3] != turned[1].inputs[1:3]:
        return None
    first, second = turned[0], turned[1]
    interleaved = [turn.attributes.get_int("interleaved", 0) for turn in (first, second)]
    before = first.inputs[0], second.inputs[0]
    if interleaved[0] != interleaved[1] or before[0] is None or before[1] is None:
        return None
    layer.cos, layer.sin = first.inputs[1], first.inputs[2]
    layer.new = before[0], before[1], new_value
    layer.interleaved = interleaved[0]
    return layer


def _takes_size(layer: _Layer) -> bool:
    """Whether the kernel takes heads of this size, keys' and values': multiples of 8, or, turned, of 16."""
    key, value = (_fixed(past, 3) for past in layer.pasts)
    return key == value and key % (8 if layer.cos is None else 16) == 0


def _grown(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """Past and new part of keys or values, where they are `Concat(past, new)` and nothing else reads them."""
    node = value.producer() if value is not None else None
    if value is None or node is None or node.op_type != "Concat" or len(node.inputs) != 2:
        return None
    past, new = node.inputs
    if past is None or new is None or not (past.name or "").startswith(PAST):
        return None
    if (
        node.attributes.get_int("axis", 0) not in (-2, 2)
        or not value.is_graph_output()
        or len(value.uses()) != 1
    ):
        return None
    return past, new


def _turned(value: ir.Value) -> ir.Node | None:
    node = value.producer()
    cached = (
        node is not None and node.op_type == "RotaryEmbedding" and not node.domain and len(node.inputs) == 3
    )
    return node if cached else None


def _windows(model: ir.Model, layers: list[_Layer], max_length: int) -> dict[ir.Value, int] | None:
    """How many keys each mask lets a query see, itself included; 0 for all up to it. None: another mask."""
    masks = list(dict.fromkeys(layer.mask for layer in layers))
    long = evaluate(model, masks, sequence=1, past=max_length - 1)
    short = evaluate(model, masks, sequence=_SEQUENCE, past=_PAST)
    if long is None or short is None:
        return None
    windows: dict[ir.Value, int] = {}
    for index, mask in enumerate(masks):
        seen = _allowed(long[index], 1, max_length)
        if seen is None:
            return None
        count = int(seen.sum())
        windows[mask] = 0 if count == max_length else count
        for sequence, past, values in (
            (1, max_length - 1, long),
            (_SEQUENCE, _PAST, short),
            (_SEQUENCE, count - 2, evaluate(model, masks, sequence=_SEQUENCE, past=count - 2))
            if 2 < count <= max_length - _SEQUENCE
            else (_SEQUENCE, _PAST, short),
        ):
            assert values is not None
            seen = _allowed(values[index], sequence, past + sequence)
            if seen is None or not np.array_equal(seen, _causal(sequence, past, windows[mask])):
                return None
    return windows


def _allowed(mask: np.ndarray, sequence: int, total: int) -> np.ndarray | None:
    """Which keys a mask `[1, 1, sequence, total]` lets be seen; None where it also weighs them."""
    if mask.shape != (1, 1, sequence, total):
        return None
    if mask.dtype == np.bool_:
        return np.asarray(mask[0, 0])
    seen = mask[0, 0] == 0
    return seen if bool((mask[0, 0][~seen] <= -1e9).all()) else None


def _causal(sequence: int, past: int, window: int) -> np.ndarray:
    query = past + np.arange(sequence)[:, None]
    key = np.arange(past + sequence)[None, :]
    seen = key <= query
    return np.asarray(seen & (key > query - window) if window else seen)


def _tables(model: ir.Model, layers: list[_Layer], max_length: int) -> dict[ir.Value, np.ndarray] | None:
    """Cosines and sines of all positions, float32 `[max_length, head_dim / 2]`, by the value that has those
    of a run. None where a position's angles are not its own."""
    angles = list(
        dict.fromkeys(value for layer in layers for value in (layer.cos, layer.sin) if value is not None)
    )
    if not angles:
        return {}
    whole = evaluate(model, angles, sequence=max_length, past=0)
    part = evaluate(model, angles, sequence=_SEQUENCE, past=_PAST)
    if whole is None or part is None:
        return None
    tables: dict[ir.Value, np.ndarray] = {}
    for value, table, few in zip(angles, whole, part, strict=True):
        if table.ndim != 3 or table.shape[:2] != (1, max_length):
            return None
        if not np.array_equal(few[0], table[0, _PAST : _PAST + _SEQUENCE]):
            return None
        tables[value] = table[0]
    return tables


def _rewrite(
    graph: ir.Graph,
    layer: _Layer,
    seqlens: ir.Value,
    total: ir.Value,
    window: int,
    tables: dict[ir.Value, np.ndarray],
) -> None:
    node = layer.node
    old = node.outputs[0]
    presents = [value for value in node.inputs[1:3] if value is not None]
    heads = [_fixed(old, 1), _fixed(presents[0], 1)]
    size = _fixed(old, 3)
    query, key, value = (
        _tokens_major(graph, part, count * size)
        for part, count in zip(layer.new, (heads[0], heads[1], heads[1]), strict=True)
    )
    operands: list[ir.Value | None] = [query, key, value, *layer.pasts, seqlens, total]
    attributes: dict[str, int | float] = {"num_heads": heads[0], "kv_num_heads": heads[1]}
    for name in ("scale", "softcap"):
        given = node.attributes.get_float(name, 0.0)
        if given:
            attributes[name] = given
    if window:
        attributes["local_window_size"] = window
    if layer.cos is not None and layer.sin is not None:
        operands += [_table(graph, "cos", tables[layer.cos]), _table(graph, "sin", tables[layer.sin])]
        attributes |= {"do_rotary": 1, "rotary_interleaved": layer.interleaved}
    batch, tokens = (query.shape or ir.Shape([]))[0], (query.shape or ir.Shape([]))[1]
    outputs = [ir.Value(type=ir.TensorType(FLOAT)) for _ in range(3)]
    outputs[0].shape = ir.Shape([batch, tokens, heads[0] * size])
    graph.append(ir.node("GroupQueryAttention", operands, attributes, domain=MICROSOFT, outputs=outputs))
    for present, past, output in zip(presents, layer.pasts, outputs[1:], strict=True):
        assert past.shape is not None
        graph.outputs[list(graph.outputs).index(present)] = output
        output.name, present.name = present.name, None
        output.shape = ir.Shape([past.shape[0], past.shape[1], CAPACITY, past.shape[3]])
    _read_tokens_major(graph, old, outputs[0])
    node.replace_input_with(1, None)
    node.replace_input_with(2, None)


def _fixed(value: ir.Value, axis: int) -> int:
    assert value.shape is not None
    size = value.shape[axis]
    assert isinstance(size, int)
    return size


def _table(graph: ir.Graph, kind: str, table: np.ndarray) -> ir.Value:
    """The initializer of a table; layers that have the same share it."""
    for name, value in graph.initializers.items():
        known = value.const_value if name.startswith(f"rotary.{kind}.") else None
        if known is not None and np.array_equal(known.numpy(), table):
            return value
    number = sum(name.startswith(f"rotary.{kind}.") for name in graph.initializers)
    return initializer(graph, f"rotary.{kind}.{number}", np.ascontiguousarray(table, np.float32))


def _tokens_major(graph: ir.Graph, value: ir.Value, width: int) -> ir.Value:
    """`[batch, heads, sequence, size]` as `[batch, sequence, heads * size]`: what it was made of, or new."""
    assert value.shape is not None
    batch, heads, tokens, size = value.shape
    node = value.producer()
    if (
        node is not None
        and node.op_type == "Transpose"
        and list(node.attributes["perm"].as_ints()) == _TOKENS_MAJOR
    ):
        apart = node.inputs[0]
        assert apart is not None
    else:
        apart = append(
            graph, "Transpose", [value], {"perm": _TOKENS_MAJOR}, shape=[batch, tokens, heads, size]
        )
    node = apart.producer()
    source = node.inputs[0] if node is not None and node.op_type == "Reshape" else None
    if (
        source is not None
        and source.shape is not None
        and len(source.shape) == 3
        and source.shape[2] == width
    ):
        return source
    target = initializer(graph, f"shape_0_0_{width}", np.array([0, 0, width], np.int64))
    return append(graph, "Reshape", [apart, target], shape=[batch, tokens, width])


def _read_tokens_major(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let what reads `old` `[batch, heads, sequence, size]` read `new` `[batch, sequence, heads * size]`."""
    assert old.shape is not None
    assert new.shape is not None
    batch, heads, tokens, size = old.shape
    for reader, _ in list(old.uses()):
        if reader.op_type != "Transpose" or list(reader.attributes["perm"].as_ints()) != _TOKENS_MAJOR:
            continue
        for merge, _ in list(reader.outputs[0].uses()):
            merged = merge.outputs[0]
            if merge.op_type == "Reshape" and merged.shape is not None and merged.shape[-1] == new.shape[-1]:
                merged.replace_all_uses_with(new)
    if all(not merge.outputs[0].uses() for reader, _ in old.uses() for merge, _ in reader.outputs[0].uses()):
        return
    target = initializer(graph, f"shape_heads_{heads}_{size}", np.array([0, 0, heads, size], np.int64))
    apart = append(graph, "Reshape", [new, target], shape=[batch, tokens, heads, size])
    back = append(graph, "Transpose", [apart], {"perm": _TOKENS_MAJOR}, shape=old.shape)
    old.replace_all_uses_with(back)
