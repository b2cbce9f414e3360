"""Ways to damage a file: of any kind, of JSON, of safetensors and of ONNX."""

import json
from collections.abc import Callable
from random import Random
from typing import Any

import onnx

Mutation = Callable[[bytes, Random], bytes]

_DEEP = 5000
_WRONG: list[Any] = [
    None,
    True,
    0,
    -1,
    2**31,
    2**53,
    2**64,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    0.5,
    "",
    "a",
    "\0",
    "\ud800",
    "../x",
    "é" * 500,
    "a" * 100_000,
    [],
    {},
    [[]],
    [None],
    {"": None},
    list(range(1000)),
]


def damage(data: bytes, random: Random) -> bytes:
    """Bits, bytes, fields and blocks; one to three times."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        data = random.choice(_BYTES)(data, random)
    return data


def _flip(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8)) if data else 0):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _truncate(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def _duplicate(data: bytes, random: Random) -> bytes:
    start = random.randrange(len(data) + 1)
    end = min(len(data), start + random.choice((1, 4, 64, 4096)))
    return data[:end] + data[start:end] * random.choice((1, 2, 100)) + data[end:]


def _cut_out(data: bytes, random: Random) -> bytes:
    start = random.randrange(len(data) + 1)
    return data[:start] + data[start + random.choice((1, 4, 64, 4096)) :]


def _field(data: bytes, random: Random) -> bytes:
    """A number somewhere, most often near the beginning, where headers are, set to an extreme."""
    size = random.choice((1, 2, 4, 8))
    if len(data) < size:
        return data
    start = random.randrange(min(len(data) - size + 1, random.choice((16, 256, len(data)))))
    value = random.choice((0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), 2 ** (8 * size - 1) - 1))
    return data[:start] + value.to_bytes(size, random.choice(("little", "big"))) + data[start + size :]


def _noise(data: bytes, random: Random) -> bytes:
    start = random.randrange(len(data) + 1)
    return data[:start] + random.randbytes(random.choice((1, 16, 300))) + data[start:]


_BYTES = (_flip, _flip, _truncate, _duplicate, _cut_out, _field, _field, _noise)


def damage_json(data: bytes, random: Random) -> bytes:
    """A value of another type or size, a key that is missing or another, lists that are too long or deep; or
    the text's bytes."""
    if random.random() < 0.3:
        return damage(data, random)
    try:
        value = json.loads(data)
    except ValueError:
        return damage(data, random)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        value = _changed(value, random)
    text = json.dumps(value)
    if random.random() < 0.05:
        place = random.randrange(len(text) + 1)
        text = text[:place] + "[" * _DEEP + "]" * random.choice((0, _DEEP)) + text[place:]
    return text.encode("utf-8", "surrogatepass")


def _changed(value: Any, random: Random) -> Any:
    """A copy of a JSON value with one place in it changed, the deeper places as likely as the others."""
    places = list(_places(value, ()))
    place = random.choice(places)
    if not place:
        return random.choice(_WRONG)
    value = json.loads(json.dumps(value))
    inside = value
    for key in place[:-1]:
        inside = inside[key]
    kind, last = random.random(), place[-1]
    if kind < 0.6:
        inside[last] = random.choice(_WRONG)
    elif kind < 0.7:
        del inside[last]
    elif kind < 0.8 and isinstance(inside, dict):
        inside[random.choice(("", "x", str(last) * 2, "__class__"))] = inside.pop(last)
    elif kind < 0.9 and isinstance(inside, list):
        inside[last:last] = [inside[last]] * random.choice((1, 100))
    else:
        other = value
        for key in random.choice(places):
            other = other[key]
        inside[last] = json.loads(json.dumps(other))
    return value


def _places(value: Any, here: tuple[Any, ...]) -> Any:
    yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*here, key))


def damage_lines(data: bytes, random: Random) -> bytes:
    """One of the lines of JSON, or the whole file."""
    lines = data.split(b"\n")
    if random.random() < 0.3:
        return damage(data, random)
    place = random.randrange(len(lines))
    lines[place] = damage_json(lines[place], random)
    return b"\n".join(lines)


def damage_safetensors(data: bytes, random: Random) -> bytes:
    """The header as JSON, with its length made right; or the file's bytes."""
    if random.random() < 0.4:
        return damage(data, random)
    size = int.from_bytes(data[:8], "little")
    header = damage_json(data[8 : 8 + size], random)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def damage_onnx(data: bytes, random: Random) -> bytes:
    """The graph, so that it still parses; or the file's bytes."""
    if random.random() < 0.3:
        return damage(data, random)
    model = onnx.ModelProto.FromString(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        random.choice(_ONNX)(model, random)
    try:
        return model.SerializeToString()
    except ValueError:  # a name that is no text any more
        return damage(data, random)


def _rewire(model: Any, random: Random) -> None:
    node, other = (random.choice(model.graph.node) for _ in range(2))
    if node.input:
        names = [*other.input, *other.output, "", "nowhere"]
        node.input[random.randrange(len(node.input))] = random.choice(names)


def _rename_operator(model: Any, random: Random) -> None:
    random.choice(model.graph.node).op_type = random.choice(
        [*(node.op_type for node in model.graph.node), "Nothing", "", "Loop", "If"]
    )


def _attribute(model: Any, random: Random) -> None:
    nodes = [node for node in model.graph.node if node.attribute]
    if nodes:
        attribute = random.choice(random.choice(nodes).attribute)
        attribute.i = random.choice((0, -1, 2**31, 2**62))
        attribute.ints[:] = [random.choice((0, -1, 2**31, 2**62)) for _ in attribute.ints]


def _dimensions(model: Any, random: Random) -> None:
    tensors = [*model.graph.initializer]
    if tensors and random.random() < 0.5:
        tensor = random.choice(tensors)
        tensor.dims.append(random.choice((0, -1, 2, 2**31, 2**62)))
        tensor.data_type = random.choice((tensor.data_type, 0, 1, 7, 8, 16, 22, 99))
    values = [*model.graph.input, *model.graph.output]
    value = random.choice(values).type.tensor_type
    value.elem_type = random.choice((value.elem_type, value.elem_type, 0, 7, 8, 99))
    if value.shape.dim:
        random.choice(value.shape.dim).dim_value = random.choice((0, -1, 2, 2**31, 2**62))


def _remove(model: Any, random: Random) -> None:
    graph = model.graph
    part = random.choice([graph.node, graph.input, graph.output, graph.initializer, model.opset_import])
    if part:
        del part[random.randrange(len(part))]


def _repeat(model: Any, random: Random) -> None:
    graph = model.graph
    part = random.choice([graph.node, graph.input, graph.output, graph.initializer, model.opset_import])
    if part:
        part.append(random.choice(part))


_ONNX = (_rewire, _rename_operator, _attribute, _dimensions, _remove, _repeat)
