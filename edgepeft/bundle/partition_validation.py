"""What a manifest must satisfy before its chain of stages is run."""

from collections.abc import Collection, Mapping

from ..errors import BundleError
from .manifest import GraphSpec, Manifest, TensorSpec
from .sizes_on_disk import tensor_bytes
from .wiring import Partition, Stage, StreamedInference, VocabularyHead


def check_partition(manifest: Manifest, partition: Partition) -> None:
    """Check that every stage's graphs exist and that each of their inputs is bound to something.

    Raises:
        BundleError: names the stage, the input and what is missing.
    """
    _require(len(partition.stages) >= 1, "the partition has no stage")
    heads = [head for head in (partition.head, partition.vocabulary_head) if head is not None]
    _require(len(heads) == 1, f"the partition has {len(heads)} heads, expected one")
    shared = {spec.name for role in ("inference", "train") for spec in manifest.graphs[role].inputs}
    if partition.context is not None:
        context = _graph(manifest, partition.context, "the partition's context")
        shared |= {spec.name for spec in context.outputs}
        _check_weights(manifest, partition.context_weights, context, "the partition's context")
    adapters = manifest.adapter_inputs
    stages = {f"stage {index}": stage for index, stage in enumerate(partition.stages)}
    if partition.head is not None:
        stages["the head"] = partition.head
    for where, stage in stages.items():
        for key in stage.adapter.values():
            _require(key in adapters, f"{where}: {key!r} is no input of a slot")
        for name in stage.context.values():
            _require(name in shared, f"{where}: {name!r} is neither a model input nor shared")
        _check_lookups(manifest, stage, where)
        for role in (stage.forward, stage.output, stage.backward):
            if role is not None:
                _check_inputs(manifest, stage, role, f"{where}, graph {role!r}")
    if partition.vocabulary_head is not None:
        _check_vocabulary_head(manifest, partition.vocabulary_head)


def check_streamed_inference(manifest: Manifest, streamed: StreamedInference) -> None:
    """Check that every stage's graph exists, that each of its inputs is bound to something and that the cache
    is made once.

    Raises:
        BundleError: names the stage, the input or output and what is missing.
    """
    what = "streamed inference"
    _require(len(streamed.stages) >= 1, f"{what} has no stage")
    inference = manifest.graphs["inference"]
    adapters = manifest.adapter_inputs
    shared = {spec.name for spec in inference.inputs} - adapters.keys()
    if streamed.context is not None:
        context = _graph(manifest, streamed.context, f"{what}, context")
        known = {*streamed.context_weights, *shared}
        unbound = [spec.name for spec in context.inputs if spec.name not in known]
        _require(not unbound, f"{what}, context: nothing is bound to the input {unbound[:1]}")
        _check_weights(manifest, streamed.context_weights, context, f"{what}, context")
        shared |= {spec.name for spec in context.outputs}
    made: list[str] = []
    for index, stage in enumerate(streamed.stages):
        where = f"{what}, stage {index}"
        graph = _graph(manifest, stage.forward, where)
        _check_bound(stage.adapter, adapters, where, "an adapter input")
        _check_bound(stage.context, shared, where, "a model input or shared")
        known = {*stage.weights, *stage.adapter, *stage.context, *(("hidden",) if index else ())}
        unbound = [spec.name for spec in graph.inputs if spec.name not in known]
        _require(not unbound, f"{where}: nothing is bound to the input {unbound[:1]}")
        outputs = {spec.name for spec in graph.outputs}
        missing = sorted({"hidden.out", *stage.cache} - outputs)
        _require(not missing, f"{where}: the graph {stage.forward!r} has no output {missing[:1]}")
        _check_weights(manifest, stage.weights, graph, where)
        _check_lookups(manifest, stage, where)
        made += stage.cache.values()
    presents = [spec.name for spec in inference.outputs if spec.name.startswith("present.")]
    _require(
        sorted(made) == sorted(presents),
        f"{what}: its stages make {len(made)} parts of the cache, the inference graph {len(presents)}",
    )
    layer = streamed.output_layer
    if layer is not None:
        graph = _graph(manifest, layer.graph, f"{what}, output layer")
        width = inference.outputs[0].shape[-1]
        _require(layer.rows == width, f"{what}: the output layer has {layer.rows} rows, expected {width}")
        unbound = [spec.name for spec in graph.inputs if spec.name not in {*layer.weights, "hidden"}]
        _require(not unbound, f"{what}, output layer: nothing is bound to the input {unbound[:1]}")
        names = [spec.name for spec in graph.outputs]
        _require(names == ["logits"], f"{what}, output layer: has the outputs {names[:3]}, expected 'logits'")
        _check_rows(manifest, layer.weights, layer.rows, layer.graph, f"{what}, output layer")


def _check_bound(bound: Mapping[str, str], known: Collection[str], where: str, expected: str) -> None:
    for key in bound.values():
        _require(key in known, f"{where}: {key!r} is not {expected}")


def _check_vocabulary_head(manifest: Manifest, head: VocabularyHead) -> None:
    """Rows `[0, rows)` of every weight lie inside its tensor."""
    where = "the vocabulary head"
    for role in (head.scan, head.spread, head.loss, head.cotangent):
        _graph(manifest, role, where)
    for role in (head.scan, head.spread):
        _check_rows(manifest, head.weights, head.rows, role, where)


def _check_rows(manifest: Manifest, weights: Mapping[str, str], rows: int, role: str, where: str) -> None:
    """`rows` rows of each weight input are exactly the bytes that its weight has."""
    _require(rows >= 1, f"{where} has {rows} rows")
    specs: dict[str, TensorSpec] = {spec.name: spec for spec in _graph(manifest, role, where).inputs}
    for name, key in weights.items():
        weight, spec = manifest.weights.get(key), specs.get(name)
        _require(weight is not None, f"{where}: {key!r} is not among the weights")
        _require(spec is not None, f"{where}: the graph {role!r} has no input {name!r}")
        assert weight is not None
        assert spec is not None
        columns = [dim for dim in spec.shape[1:] if isinstance(dim, int)]
        _require(len(columns) == len(spec.shape) - 1, f"{where}: {name!r} has rows of no fixed size")
        expected_bytes = tensor_bytes(spec.dtype, [rows, *columns])
        _require(
            weight.nbytes == expected_bytes,
            f"{where}: {name!r} reads {expected_bytes:,} B, {key!r} has {weight.nbytes:,} B",
        )


def _check_inputs(manifest: Manifest, stage: Stage, role: str, where: str) -> None:
    graph = _graph(manifest, role, where)
    of_batch = {spec.name for spec in manifest.graphs["train"].inputs}
    kept = {spec.name for spec in _graph(manifest, stage.forward, where).outputs} if stage.output else set()
    known = {*stage.weights, *stage.adapter, *stage.context, "hidden", "cotangent", *kept, *of_batch}
    unbound = [spec.name for spec in graph.inputs if spec.name not in known]
    _require(not unbound, f"{where}: nothing is bound to the input {unbound[:1]}")
    _check_weights(manifest, stage.weights, graph, where)


def _check_weights(manifest: Manifest, weights: dict[str, str], graph: GraphSpec, where: str) -> None:
    """Each weight input reads exactly the bytes that its weight has."""
    specs = {spec.name: spec for spec in graph.inputs}
    for name, key in weights.items():
        weight, spec = manifest.weights.get(key), specs.get(name)
        _require(weight is not None, f"{where}: {key!r} is not among the weights")
        if spec is None:
            continue
        _require(all(isinstance(dim, int) for dim in spec.shape), f"{where}: {name!r} has no fixed shape")
        expected_bytes = tensor_bytes(spec.dtype, [int(dim) for dim in spec.shape])
        assert weight is not None
        _require(
            weight.nbytes == expected_bytes,
            f"{where}: {name!r} reads {expected_bytes:,} B, {key!r} has {weight.nbytes:,} B",
        )


def _check_lookups(manifest: Manifest, stage: Stage, where: str) -> None:
    """Rows are looked up in weights of the stage, by integers that the model is given."""
    inputs = {spec.name: spec for spec in manifest.graphs["inference"].inputs}
    for name, source in stage.lookups.items():
        _require(name in stage.weights, f"{where}: looks rows up in {name!r}, which is bound to no weight")
        spec = inputs.get(source)
        _require(
            spec is not None and spec.dtype in ("int32", "int64"),
            f"{where}: looks rows of {name!r} up by {source!r}, which is no input of whole numbers",
        )


def _graph(manifest: Manifest, role: str, where: str) -> GraphSpec:
    graph = manifest.graphs.get(role)
    _require(graph is not None, f"{where}: there is no graph {role!r}")
    assert graph is not None
    return graph


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise BundleError(message)
