"""An ONNX file that somebody else exported, as a source: torch.onnx, optimum, onnxruntime-genai, Olive."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import TopologicalSortPass

from edgepeft.bundle.manifest import Quantization, TextSettings
from edgepeft.errors import EdgePeftError, ExportError, UsageError

from ..graph import INT64, MICROSOFT, rename_axes
from ..passes.attention.group_query import lower_group_query_attention
from ..passes.attention.multi_head import lower_multi_head_attention, lower_packed_attention
from ..passes.drop_cache import PAST, drop_cache, is_cache
from ..passes.shapes.position_ids import derive_position_ids
from ..passes.weights.lift import Weights, find_weights, lift, lift_weights, to_torch
from ..passes.weights.linears import Linear, find_embeddings, find_linears, find_marked_linears, unpack
from ..quantize.exact_products import use_exact_products
from ..quantize.table_weight import StoredWeight
from .base import Pooling, Traced
from .file_config import FileConfig, genai_type, looked_up_rows, read_config
from .loading import read_max_length
from .model_files import read_pooling
from .naming import SELF_ATTENTION, added_bias, module_names
from .onnx_graph import read_graph, standardize
from .tasks import resolve_task
from .tokenizer import read_tokenizer

#: Inputs that a bundle's runtime, or the graph itself, can fill.
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_OUTPUTS = ("logits", "sentence_embedding", "last_hidden_state")


@dataclass
class OnnxFile:
    """A graph with its weights as inputs, and what the files beside it say.

    Attributes:
        path: the file.
        model: the standardized graph; its float matrices are inputs named by their modules.
        weights: the values of those inputs.
        aliases: module names by the names that nodes and initializers had in the file.
        packed: linears that compute several modules at once, with the width of each.
        widened: whether the file computes in 16 bits what the graph computes in float32.
    """

    path: Path
    task: str
    name: str
    config: FileConfig
    model: ir.Model
    weights: dict[str, torch.Tensor]
    aliases: dict[str, str]
    packed: dict[str, dict[str, int]]
    architecture: str
    quantization: Quantization | None
    pooling: Pooling | None = None
    tokenizer_files: dict[str, bytes] = field(default_factory=dict)
    text_settings: TextSettings = field(default_factory=TextSettings)
    tokenizer: Any = None
    max_length: int = 0
    widened: bool = False
    #: Its own quantized products stay in the graph.
    quantized: Mapping[str, StoredWeight] = field(default_factory=dict)

    @property
    def image_preprocessing(self) -> None:
        """A file takes tokens."""
        return None

    @property
    def audio_preprocessing(self) -> None:
        """A file takes tokens."""
        return None

    @property
    def problem_type(self) -> str | None:
        """What the configuration beside the file says of a classifier; classes where it says nothing."""
        if self.task not in ("text-classification", "image-classification"):
            return None
        declared: str | None = getattr(self.config, "problem_type", None)
        return declared or "single_label_classification"

    @property
    def length_unit(self) -> int:
        """Tokens."""
        return 1

    @property
    def min_length(self) -> int:
        """One token."""
        return 1

    @property
    def own_training_graph(self) -> bool:
        """The graph to infer with keeps what the file fuses and rounds."""
        return True

    def module_names(self) -> list[str]:
        """Names of the linears and look-ups."""
        linears = [*self.linears(), *(name.removesuffix(".weight") for name in self.weights)]
        return [name for name in dict.fromkeys(linears) if not name.endswith(".bias")]

    def parameter_names(self) -> set[str]:
        """Names of the float matrices, and of a head's bias."""
        return set(self.weights)

    def parameters(self, prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Those of the float matrices, and of a head's bias, that begin so."""
        return {name: value for name, value in self.weights.items() if name.startswith(prefixes)}

    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """As the graph has them."""
        return {name: (linear.out_features, linear.in_features) for name, linear in self.linears().items()}

    def check_patterns(self, folder: Path) -> None:
        """PEFT is not asked: slots are found by name."""

    def is_tied(self, weight: str) -> bool:
        """Whether a weight is multiplied by and looked up."""
        values = [value for value in self.model.graph.inputs if value.name == weight]
        return bool(find_linears(values)) and bool(find_embeddings(values))

    def linear_names(self) -> list[str]:
        """Names of the linears but the one whose output is a language model's logits, and tied tables."""
        head = self._head() if self.task == "text-generation" else None
        return [name for name in self.linears() if name != head]

    def called_linears(self) -> set[str]:
        """All: a slot is put where a product is."""
        return set(self.linears())

    def has_matrix(self, module: str) -> bool:
        """Whether there is a linear of that name."""
        return module in self.linears()

    def resolve_targets(self, targets: Sequence[str]) -> list[str]:
        """Names of nodes and initializers of the file as module names; suffixes of those as they are."""
        modules = [self.aliases.get(target, target) for target in targets]
        return [part for module in modules for part in self.packed.get(module, {module: 0})]

    def trace(self, *, training: bool) -> Traced:
        """A copy of the graph; for training without a cache, and with nothing that has no gradient rule."""
        model = self.model.clone()
        graph = model.graph
        if training:
            drop_cache(graph)
            lower_group_query_attention(graph)
            lower_multi_head_attention(graph)
            use_exact_products(graph)
        _name_axes(graph)
        return Traced(model, dict(self.weights), self.packed)

    def linears(self) -> dict[str, Linear]:
        """Every linear of the graph, by module name."""
        graph = self.model.graph
        inputs = [value for value in graph.inputs if value.name in self.weights]
        return unpack(find_linears(inputs) | find_marked_linears(graph), self.packed)

    def _head(self) -> str | None:
        for name, linear in self.linears().items():
            for node in linear.nodes:
                uses = node.outputs[0].uses()
                after = [use.node for use in uses if use.node.op_type == "Add"]
                if any(output.is_graph_output() for item in (node, *after) for output in item.outputs):
                    return name
        return None


def is_onnx_file(model: object) -> bool:
    """Whether `model` is the path of an ONNX file."""
    return isinstance(model, str | Path) and str(model).lower().endswith(".onnx")


@contextlib.contextmanager
def converting(path: Path) -> Iterator[None]:
    """Have whatever fails in the block be a fault of the file, which nobody has checked: a graph may be wrong
    in more ways than the passes look for.

    Raises:
        ExportError: names the file, and what went wrong; the cause is kept.
    """
    try:
        yield
    except (EdgePeftError, OSError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ExportError(
            f"{path}: cannot be converted ({type(error).__name__}: {reason[:200]}): check it with "
            "onnx.checker.check_model, or export it again"
        ) from error


def load_onnx_file(path: Path, *, task: str | None = None, labels: Sequence[str] | None = None) -> OnnxFile:
    """Load an ONNX file.

    Args:
        path: the `.onnx` file; external data, `config.json`, `genai_config.json` and tokenizer files are
            looked for in its folder.
        task: one of `TASKS` or a synonym; inferred from the outputs where None.
        labels: names of the classes, which a file without a `config.json` does not carry.

    Raises:
        UsageError: unknown task, or labels that do not fit it.
        ExportError: the file cannot be read or converted, or has inputs or outputs that no task has.
    """
    if not path.is_file():
        raise ExportError(f"{path}: no such file")
    with converting(path):
        return _loaded(path, task, labels)


def _loaded(path: Path, task: str | None, labels: Sequence[str] | None) -> OnnxFile:
    model = read_graph(path)
    producer = model.producer_name or "unknown"
    model, widened = standardize(model, path)
    graph = model.graph
    _check_inputs(path, graph)
    resolved, output = _infer_task(path, graph, resolve_task(task) if task else None)
    if labels is not None and resolved != "text-classification":
        raise UsageError(f"--labels goes with text-classification, not with {resolved}")
    config = read_config(path.parent, graph, output, None if labels is None else list(labels))
    graph.outputs[:] = [output, *(value for value in graph.outputs if is_cache(value))]
    derive_position_ids(graph)
    lower_packed_attention(graph)
    quantization = _quantization(graph)
    weights = find_weights(graph)
    names = module_names(weights.named, genai_type=genai_type(path.parent))
    aliases: dict[str, str] = {}
    for weight, nodes in weights.named:
        for alias in (weight.name, *(node.name for node in nodes)):
            if alias:
                aliases[alias] = names[weight]
    packed = _packed(graph, weights, names, genai_type(path.parent))
    heads = _head_biases(weights.products) if resolved == "text-classification" else {}
    lifted = lift_weights(graph, weights, names)
    for weight, bias in heads.items():
        name = f"{names[weight]}.bias"
        if f"{names[weight]}.weight" in lifted and bias.name in graph.initializers:
            lifted[name] = to_torch(bias)
            lift(graph, bias, name)
    _name_cache(graph)
    TopologicalSortPass()(model)
    text = read_tokenizer(
        str(path.parent), embeds=resolved == "feature-extraction", writes=resolved == "text-generation"
    )
    return OnnxFile(
        path=path,
        task=resolved,
        name=path.stem if path.stem != "model" else path.resolve().parent.name,
        config=config,
        model=model,
        weights=lifted,
        aliases=aliases,
        packed=packed,
        architecture=producer,
        quantization=quantization,
        pooling=read_pooling(str(path.parent)) if output.name == "last_hidden_state" else None,
        tokenizer_files=text.files,
        text_settings=text.settings,
        tokenizer=text.tokenizer,
        max_length=read_max_length(resolved, config, str(path.parent)),
        widened=widened,
    )


def _check_inputs(path: Path, graph: ir.Graph) -> None:
    names = [value.name or "" for value in graph.inputs]
    unknown = [name for name in names if name not in _INPUTS and not name.startswith(PAST)]
    if unknown or "input_ids" not in names:
        raise ExportError(
            f"{path}: takes {', '.join(names)}; a bundle's runtime feeds {', '.join(_INPUTS[:3])} and "
            f"{PAST}N.key/value: "
            + (f"export the model without {unknown[0]!r}" if unknown else "it needs input_ids")
        )
    for value in graph.inputs:
        expected = ir.DataType.FLOAT if is_cache(value) else INT64
        if value.dtype != expected:
            raise ExportError(f"{path}: input {value.name!r} is {value.dtype}, expected {expected}")


def _infer_task(path: Path, graph: ir.Graph, task: str | None) -> tuple[str, ir.Value]:
    outputs = {value.name or "": value for value in graph.outputs}
    found = next((outputs[name] for name in _OUTPUTS if name in outputs), None)
    if found is None or found.shape is None:
        raise ExportError(
            f"{path}: returns {', '.join(outputs)}, expected one of {', '.join(_OUTPUTS)}: name the output so"
        )
    if found.dtype != ir.DataType.FLOAT:
        raise ExportError(f"{path}: {found.name} is {found.dtype}, expected FLOAT: export it in float32")
    rank, last = len(found.shape), found.shape[-1]
    if found.name != "logits":
        inferred = "feature-extraction"
    elif rank == 2:
        inferred = "text-classification"
    elif rank == 3 and (last == looked_up_rows(graph) or not isinstance(last, int)):
        inferred = "text-generation"
    elif rank == 3 and task == "text-generation":
        inferred = task
    else:
        raise ExportError(
            f"{path}: logits of shape {found.shape} are neither [batch, classes] nor [batch, sequence, "
            "vocabulary]: pass --task text-generation if they are the latter"
        )
    if task is not None and task != inferred:
        raise UsageError(f"--task {task}: the output {found.name} {found.shape} of {path} is {inferred}'s")
    return inferred, found


def _quantization(graph: ir.Graph) -> Quantization | None:
    """How most of the quantized products are stored."""
    kinds: Counter[tuple[int, int]] = Counter()
    for node in graph:
        if node.op_type in ("MatMulNBits", "MatMulBnb4") and node.domain == MICROSOFT:
            kinds[node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 0)] += 1
        elif node.op_type == "DequantizeLinear" and (codes := node.inputs[0]) is not None and codes.dtype:
            kinds[round(8 * codes.dtype.itemsize), node.attributes.get_int("block_size", 0)] += 1
    if not kinds:
        return None
    bits, block_size = kinds.most_common(1)[0][0]
    return Quantization(bits, block_size)


def _packed(
    graph: ir.Graph, weights: Weights, names: dict[ir.Value, str], model_type: str | None
) -> dict[str, dict[str, int]]:
    """The products of genai that hold query, key and value, which transformers keeps apart."""
    if model_type not in SELF_ATTENTION:
        return {}
    modules = {node: names[weight] for weight, nodes in weights.products.items() for node in nodes}
    packed: dict[str, dict[str, int]] = {}
    for node in graph:
        if node.op_type != "GroupQueryAttention" or node.inputs[1] is not None or node.inputs[0] is None:
            continue
        product = node.inputs[0].producer()
        if product is not None and product.op_type == "Add":
            product = next((item for item in product.predecessors() if item in modules), None)
        module = modules.get(product, "") if product is not None else ""
        width = node.inputs[0].shape[-1] if node.inputs[0].shape is not None else None
        if module.endswith(".qkv_proj") and isinstance(width, int):
            heads, kv_heads = node.attributes["num_heads"].as_int(), node.attributes["kv_num_heads"].as_int()
            size = width // (heads + 2 * kv_heads)
            widths = {"q_proj": heads * size, "k_proj": kv_heads * size, "v_proj": kv_heads * size}
            packed[module] = {f"{module.removesuffix('qkv_proj')}{part}": n for part, n in widths.items()}
    return packed


def _head_biases(products: dict[ir.Value, list[ir.Node]]) -> dict[ir.Value, ir.Value]:
    """By weight, the bias that is added to its product and to nothing else."""
    found = {}
    for weight, nodes in products.items():
        bias = added_bias(nodes[0])
        if bias is not None and len(bias.uses()) == 1 and len(nodes) == 1:
            found[weight] = bias
    return found


def _name_cache(graph: ir.Graph) -> None:
    """Give cache inputs the static head size that their consumers imply."""
    for value in graph.inputs:
        if not is_cache(value) or value.shape is None or isinstance(value.shape[3], int):
            continue
        for node, _ in value.uses():
            if node.op_type != "GroupQueryAttention":
                continue
            query, key = node.inputs[0], node.inputs[1]
            heads, kv_heads = node.attributes["num_heads"].as_int(), node.attributes["kv_num_heads"].as_int()
            total = query.shape[-1] if query is not None and query.shape is not None else None
            if isinstance(total, int):
                size = total // (heads if key is not None else heads + 2 * kv_heads)
                value.shape = ir.Shape([*list(value.shape)[:3], size])


def _name_axes(graph: ir.Graph) -> None:
    """Call the symbolic axes what the runtime calls them."""
    renamed: dict[str, str] = {}
    cached = any(is_cache(value) for value in graph.inputs)
    axes: dict[str, tuple[str | None, ...]] = {"input_ids": ("batch", "sequence")}
    for value in graph.inputs:
        name = value.name or ""
        if is_cache(value):
            axes[name] = ("batch", None, "past_sequence", None)
        elif name == "attention_mask":
            axes[name] = ("batch", "total_sequence" if cached else "sequence")
        elif name in _INPUTS:
            axes[name] = ("batch", "sequence")
        else:
            continue
        assert value.shape is not None
        for dim, axis in zip(value.shape, axes[name], strict=True):
            if isinstance(dim, int) and axis is not None:
                raise ExportError(
                    f"input {name!r}: has shape {value.shape}, its axis {axis} is fixed to {dim}: export the "
                    "model with dynamic axes"
                )
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None and axis is not None:
                for part in re.findall(r"[A-Za-z_]\w*", dim.value) if dim.value.isidentifier() else ():
                    renamed[part] = axis
    rename_axes(graph, renamed)
    for value in graph.inputs:
        if (value.name or "") in axes:
            dims = zip(axes[value.name or ""], value.shape or (), strict=True)
            value.shape = ir.Shape([axis if axis is not None else dim for axis, dim in dims])
    output = graph.outputs[0]
    assert output.shape is not None
    rank = len(output.shape)
    lead = ["batch", "sequence"][: rank - 1]
    output.shape = ir.Shape([*lead, *list(output.shape)[len(lead) :]])
