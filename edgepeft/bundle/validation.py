"""What a manifest must satisfy before any of its sizes, offsets, names or paths is used."""

import math
import re
from collections.abc import Collection
from pathlib import PurePosixPath

from ..errors import BundleError
from ..slots import EMPTY, SIZE, WHOLE, SlotTensor
from ..techniques import MODULES, of_slot
from .decoder_validation import check_decoder
from .manifest import (
    FEATURES,
    GenerationSettings,
    GraphSpec,
    ImagePreprocessing,
    LinearHead,
    Manifest,
    TensorSpec,
    WeightTensor,
)
from .memory_formula import MemoryFormula
from .partition_validation import check_partition, check_streamed_inference
from .sizes_on_disk import DTYPE_BITS, tensor_bytes

#: The tasks a bundle can have; each has a loss below `exporters/losses` and a task below `runtime/tasks`.
TASKS = (
    "text-classification",
    "token-classification",
    "feature-extraction",
    "fill-mask",
    "text-generation",
    "text2text-generation",
    "image-classification",
    "audio-classification",
)
TOKENLESS = ("image-classification", "audio-classification")
"""Tasks of models that read no tokens."""
#: Ways to resize an image.
RESAMPLE = ("nearest", "bilinear", "bicubic", "lanczos")
#: transformers' problem types.
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
ALIGNMENT_BYTES = 64
#: What `is_adapter_name` wants, for messages.
ADAPTER_NAMES = "letters, digits, '.', '_' and '-' only, at most 64, and nothing that Windows reserves"

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Windows opens a device by such a name, in any folder and whatever follows a dot, and drops a dot or a blank
# at the end.
_WINDOWS_NAME = re.compile(
    r"(con|conin\$|conout\$|prn|aux|nul|(com|lpt)[\d¹²³])(\..*)?|.*[. ]", re.IGNORECASE
)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_AXES = 8
# Of a graph's input or output, 8 GiB of float32: arrays are made before onnxruntime sees whether it is so.
_MAX_VALUES = 2**31
_MAX_POWER = 4
_MAX_EDGE = 4096
_MAX_RATE = 384_000


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise BundleError(message)


def check_relative_path(path: str, what: str) -> None:
    """Accept only what is a plain path below the bundle on every system: no root, drive, `..`, `.`,
    backslash, control character or name of a device.

    Raises:
        BundleError: the path could leave the bundle.
    """
    parts = path.split("/")
    plain = (
        bool(path)
        and len(path) <= 255
        and path.isprintable()
        and not any(character in path for character in '\\:*?"<>|')
        and not any(part == "" or _WINDOWS_NAME.fullmatch(part) for part in parts)
        and not PurePosixPath(path).is_absolute()
    )
    _require(plain, f"{what} {path!r} is not a plain path inside the bundle")


def _differ(names: Collection[str]) -> bool:
    """Whether no two are the same to a file system that does not tell cases apart (Windows, macOS)."""
    return len({name.casefold() for name in names}) == len(names)


def is_adapter_name(name: str) -> bool:
    """Whether a name is one safe path component on every system: letters, digits, `.`, `_`, `-`, at most 64
    of them, and no name that Windows has for a device or would shorten."""
    return _ADAPTER_NAME.fullmatch(name) is not None and _WINDOWS_NAME.fullmatch(name) is None


def validate_manifest(manifest: Manifest) -> None:
    """Check a manifest against itself.

    Raises:
        BundleError: names the field, what it holds and what was expected.
    """
    _require(
        manifest.task in TASKS,
        f"task is {manifest.task!r}, this edgepeft knows {', '.join(TASKS)}: pip install --upgrade edgepeft",
    )
    _require(
        manifest.base is None or _SHA256.fullmatch(manifest.base) is not None, f"base is {manifest.base!r}"
    )
    _check_files(manifest)
    _check_weights(manifest)
    _check_model(manifest)
    for role, graph in manifest.graphs.items():
        _check_graph(role, graph, manifest)
    _check_adapters(manifest)
    _check_training(manifest)
    _check_formula("inference_memory", manifest.inference_memory)
    if manifest.image_preprocessing is not None:
        _check_images(manifest, manifest.image_preprocessing)
    if manifest.audio_preprocessing is not None:
        rate = manifest.audio_preprocessing.sampling_rate
        _require(1 <= rate <= _MAX_RATE, f"audio_preprocessing.sampling_rate is {rate}")
    if manifest.linear_head is not None:
        _check_linear_head(manifest, manifest.linear_head)
    if manifest.streamed_inference is not None:
        check_streamed_inference(manifest, manifest.streamed_inference)
        _check_formula("streamed_inference", manifest.streamed_inference.memory)
    if manifest.decoder is not None:
        check_decoder(manifest, manifest.decoder)
        for formula in (manifest.decoder.memory, manifest.decoder.int8_memory):
            if formula is not None:
                _check_formula("decoder", formula)


def _check_files(manifest: Manifest) -> None:
    _require(_differ(manifest.files), "files lists a path twice but for the case of its letters")
    for path, entry in manifest.files.items():
        check_relative_path(path, "file")
        _require(path != "manifest.json", "files lists manifest.json, which cannot hold its own hash")
        _require(entry.nbytes >= 0, f"file {path!r} has {entry.nbytes} B")
        _require(_SHA256.fullmatch(entry.sha256) is not None, f"file {path!r} has sha256 {entry.sha256!r}")
    _require(
        manifest.weights_file in manifest.files, f"weights_file {manifest.weights_file!r} is not in files"
    )


def _check_weights(manifest: Manifest) -> None:
    file_bytes = manifest.files[manifest.weights_file].nbytes
    for name, weight in manifest.weights.items():
        _check_weight(name, weight, file_bytes)


def _check_weight(name: str, weight: WeightTensor, file_bytes: int) -> None:
    _require(weight.dtype in DTYPE_BITS, f"weight {name!r} has dtype {weight.dtype!r}")
    _require(
        len(weight.shape) <= _MAX_AXES and all(size >= 0 for size in weight.shape),
        f"weight {name!r} has shape {list(weight.shape)}",
    )
    expected_bytes = tensor_bytes(weight.dtype, weight.shape)
    _require(
        weight.nbytes == expected_bytes,
        f"weight {name!r} {list(weight.shape)} of {weight.dtype} needs {expected_bytes:,} B, its entry says "
        f"{weight.nbytes:,} B",
    )
    _require(
        weight.offset >= 0 and weight.offset % ALIGNMENT_BYTES == 0,
        f"weight {name!r} begins at byte {weight.offset}, expected a multiple of {ALIGNMENT_BYTES}",
    )
    _require(
        weight.offset + weight.nbytes <= file_bytes,
        f"weight {name!r} ends at byte {weight.offset + weight.nbytes:,}, the file has {file_bytes:,} B",
    )


def _check_model(manifest: Manifest) -> None:
    model = manifest.model
    _require(model.max_length >= 1, f"model.max_length is {model.max_length}, expected at least 1")
    _require(
        1 <= model.min_length <= model.max_length,
        f"model.min_length is {model.min_length}, expected 1 to {model.max_length}",
    )
    least = 0 if manifest.task in TOKENLESS else 1
    _require(model.vocab_size >= least, f"model.vocab_size is {model.vocab_size}, expected at least {least}")
    whole = model.whole_vocab_size
    _require(
        whole is None or whole >= model.vocab_size,
        f"model.whole_vocab_size is {whole}, expected {model.vocab_size} (model.vocab_size) or more",
    )
    for name in ("pad_token_id", "bos_token_id", "decoder_start_token_id", "mask_token_id"):
        token = getattr(model, name)
        _require(
            token is None or 0 <= token < model.vocab_size,
            f"model.{name} is {token}, the vocabulary has {model.vocab_size} tokens",
        )
    _require(all(token >= 0 for token in model.eos_token_ids), "model.eos_token_ids has a negative token")
    _require(len(set(model.labels)) == len(model.labels), "model.labels has a label twice")
    if manifest.task.endswith("-classification"):
        _require(len(model.labels) >= 1, f"a {manifest.task} bundle has no labels")
    if manifest.task in ("text-classification", "image-classification"):
        _require(
            model.problem_type in (None, *PROBLEM_TYPES),
            f"model.problem_type is {model.problem_type!r}, expected one of {', '.join(PROBLEM_TYPES)}",
        )
    if manifest.task == "text2text-generation":
        _require(model.decoder_start_token_id is not None, "model.decoder_start_token_id is missing")
    if manifest.task == "feature-extraction":
        _require((model.embedding_size or 0) >= 1, f"model.embedding_size is {model.embedding_size}")
    _require(
        model.default_prompt is None or model.default_prompt in model.prompts,
        f"model.default_prompt is {model.default_prompt!r}, which is not among the prompts",
    )
    sides = ("left", "right")
    _require(
        model.text.truncation_side in sides, f"model.text.truncation_side is {model.text.truncation_side!r}"
    )
    _check_generation(model.generation, model.vocab_size)
    bits = manifest.quantization.bits
    _require(bits in (2, 4, 8, 16, 32), f"quantization.bits is {bits}, expected 2, 4, 8, 16 or 32")


def _check_generation(settings: GenerationSettings, vocab_size: int) -> None:
    """Sizes that mean something, and tokens of the vocabulary."""
    where = "model.generation"
    finite = (settings.temperature, settings.repetition_penalty)
    _require(all(map(math.isfinite, finite)) and min(finite) >= 0, f"{where} has factors {finite}")
    _require(settings.repetition_penalty > 0, f"{where}.repetition_penalty is 0")
    _require(settings.top_k is None or settings.top_k >= 1, f"{where}.top_k is {settings.top_k}")
    for name in ("top_p", "min_p"):
        value = getattr(settings, name)
        _require(value is None or 0 <= value <= 1, f"{where}.{name} is {value}, expected 0 to 1")
    for name in ("min_length", "min_new_tokens", "no_repeat_ngram_size"):
        _require(getattr(settings, name) >= 0, f"{where}.{name} is {getattr(settings, name)}")
    first = settings.forced_bos_token_id
    named = (
        *settings.suppress_tokens,
        *settings.begin_suppress_tokens,
        *settings.forced_eos_token_ids,
        *(() if first is None else (first,)),
        *(token for word in settings.bad_words_ids for token in word),
    )
    wrong = [token for token in named if not 0 <= token < vocab_size]
    _require(not wrong, f"{where} names token {wrong[:1]}, the vocabulary has {vocab_size} tokens")
    _require(all(settings.bad_words_ids), f"{where}.bad_words_ids has an empty word")
    _require(all(settings.stop_strings), f"{where}.stop_strings has an empty text")


def _check_images(manifest: Manifest, settings: ImagePreprocessing) -> None:
    """Sizes that can be allocated, and pixels of the graph's own size at the end."""
    where = "image_preprocessing"
    for name in ("height", "width", "shortest_edge", "crop_height", "crop_width"):
        size = getattr(settings, name)
        _require(
            size is None or 1 <= size <= _MAX_EDGE, f"{where}.{name} is {size}, expected 1 to {_MAX_EDGE}"
        )
    _require(settings.resample in RESAMPLE, f"{where}.resample is {settings.resample!r}")
    numbers = (settings.rescale_factor, *settings.mean, *settings.std)
    _require(all(map(math.isfinite, numbers)) and 0 not in settings.std, f"{where} has unusable factors")
    specs = {spec.name: spec for spec in manifest.graphs["inference"].inputs}
    pixels = specs["pixel_values"].shape[1:] if "pixel_values" in specs else ()
    channels = len(settings.mean)
    size = settings.output_size
    _require(
        channels in (1, 3) and len(settings.std) == channels and pixels == (channels, *size),
        f"{where} makes {[channels, *size]}, the inference graph takes {list(pixels)}",
    )


def _check_graph(role: str, graph: GraphSpec, manifest: Manifest) -> None:
    _require(graph.file in manifest.files, f"graph {role!r} is in {graph.file!r}, which is not in files")
    for kind, specs in (("input", graph.inputs), ("output", graph.outputs)):
        names = [spec.name for spec in specs]
        _require(len(set(names)) == len(names), f"graph {role!r} has an {kind} twice")
        for spec in specs:
            _check_spec(f"graph {role!r}: {kind} {spec.name!r}", spec)


def _check_spec(where: str, spec: TensorSpec) -> None:
    _require(bool(spec.name), f"{where} has no name")
    _require(spec.dtype in DTYPE_BITS, f"{where} has dtype {spec.dtype!r}")
    sizes = [size for size in spec.shape if not isinstance(size, str)]
    fits = (
        len(spec.shape) <= _MAX_AXES and all(size >= 0 for size in sizes) and math.prod(sizes) <= _MAX_VALUES
    )
    _require(fits, f"{where} has shape {list(spec.shape)}")


def _check_adapters(manifest: Manifest) -> None:
    _require("inference" in manifest.graphs, "there is no inference graph")
    inputs = {spec.name for spec in manifest.graphs["inference"].inputs}
    seen: set[str] = set()
    for slot in manifest.slots:
        where = f"slot {slot.module!r}"
        _require(
            slot.technique in MODULES,
            f"{where} is of the technique {slot.technique!r}, this edgepeft knows {', '.join(MODULES)}: pip "
            "install --upgrade edgepeft",
        )
        _require(
            slot.activation_axes == 0 or 2 <= slot.activation_axes <= _MAX_AXES,
            f"{where}: activation_axes is {slot.activation_axes}",
        )
        for tensor in slot.tensors:
            _require(tensor.input in inputs, f"{where}: the inference graph has no input {tensor.input!r}")
            _require(tensor.input not in seen, f"{where}: input {tensor.input!r} belongs to two slots")
            seen.add(tensor.input)
            _check_slot_tensor(manifest, tensor, f"{where}, {tensor.name!r}")
        problem = of_slot(slot).problem(slot)
        _require(problem is None, f"{where}, {slot.technique}: {problem}")
    _require(
        _differ(manifest.adapters), "an adapter is listed twice, at least but for the case of its letters"
    )
    for name in manifest.adapters:
        _require(
            is_adapter_name(name),
            f"adapter name {name!r} is not usable: {ADAPTER_NAMES}",
        )
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            path = f"adapters/{name}/{file}"
            _require(path in manifest.files, f"adapter {name!r}: {path!r} is not in files")


def _check_slot_tensor(manifest: Manifest, tensor: SlotTensor, where: str) -> None:
    """Sizes that can be allocated, and a neutral value of the tensor's shape."""
    sizes = [dim for dim in tensor.shape if isinstance(dim, int)]
    _require(
        len(tensor.shape) <= _MAX_AXES
        and all(dim == SIZE if isinstance(dim, str) else dim >= 0 for dim in tensor.shape),
        f"{where} has shape {list(tensor.shape)}",
    )
    _require(not tensor.transposed or len(tensor.shape) == 2, f"{where} is transposed and has no 2 axes")
    if tensor.default is None:
        fits = (SIZE in tensor.shape) == (tensor.neutral == EMPTY)
        _require(fits, f"{where} is {list(tensor.shape)} and {tensor.neutral!r} where no adapter is")
        return
    weight = manifest.weights.get(tensor.default)
    _require(weight is not None, f"{where}: its default {tensor.default!r} is not among the weights")
    assert weight is not None
    _require(
        list(weight.shape) == sizes == list(tensor.shape) and weight.dtype in ("float32", "float16"),
        f"{where}: its default is {list(weight.shape)} of {weight.dtype}, expected {list(tensor.shape)} of "
        "float32 or float16",
    )


def _check_linear_head(manifest: Manifest, head: LinearHead) -> None:
    """Both inputs are of parameters that are replaced whole, of the sizes of the labels and features."""
    outputs = {spec.name: spec for spec in manifest.graphs["inference"].outputs}
    _require(FEATURES in outputs, f"linear_head: the inference graph has no output {FEATURES!r}")
    width, count = outputs[FEATURES].shape[-1:], (len(manifest.model.labels),)
    shapes = {tensor.input: tensor.shape for slot in manifest.slots_of(WHOLE) for tensor in slot.tensors}
    for name, expected in ((head.weight, (*count, *width)), (head.bias, count)):
        _require(
            name is None or shapes.get(name) == expected,
            f"linear_head: {name!r} has shape {shapes.get(name or '')}, expected {expected}",
        )


def _check_training(manifest: Manifest) -> None:
    trainable = {name for name, tensor in manifest.adapter_inputs.items() if tensor.trains}
    for name in manifest.policy.trainable:
        _require(name in trainable, f"policy.trainable: {name!r} is no input of a slot that trains")
    max_steps, change = manifest.policy.max_steps, manifest.policy.max_relative_change
    _require(max_steps is None or max_steps >= 1, f"policy.max_steps is {max_steps}, expected at least 1")
    _require(change is None or change > 0, f"policy.max_relative_change is {change}, expected above 0")
    names = [strategy.name for strategy in manifest.strategies]
    _require(len(set(names)) == len(names), "a strategy is listed twice")
    for strategy in manifest.strategies:
        for role in (strategy.graph, "loss", "adamw", "grad_norm"):
            _require(
                role is None or role in manifest.graphs,
                f"strategy {strategy.name!r} needs the graph {role!r}",
            )
        _check_formula(f"strategy {strategy.name!r}", strategy.memory)
        if strategy.graph is None:
            _require(
                manifest.partition is not None or not strategy.exact,
                f"strategy {strategy.name!r} needs a partition",
            )
            continue
        outputs = {spec.name for spec in manifest.graphs[strategy.graph].outputs}
        missing = [name for name in manifest.policy.trainable if f"grad.{name}" not in outputs]
        _require(not missing, f"strategy {strategy.name!r} has no gradient of {missing[:1]}")
    if manifest.partition is not None:
        check_partition(manifest, manifest.partition)


def _check_formula(where: str, formula: MemoryFormula) -> None:
    _require(formula.session_bytes >= 0, f"{where}: session_bytes is {formula.session_bytes}")
    _require(0 <= formula.arena_gaps <= 1, f"{where}: arena_gaps is {formula.arena_gaps}")
    for terms in formula.peaks:
        for term in terms:
            powers = (term.batch_power, term.seq_power, term.rank_power, term.past_power)
            _require(
                math.isfinite(term.bytes)
                and term.bytes >= 0
                and all(0 <= power <= _MAX_POWER for power in powers),
                f"{where}: a memory term has {term.bytes} B and powers {powers}",
            )
