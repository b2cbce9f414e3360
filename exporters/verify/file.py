"""Run a bundle as a device would and compare it with the ONNX file that it was made from.

There is no PyTorch model to ask. Compared are the outputs with no adapter with the file's own, run in
onnxruntime; the outputs of the training graph with the file's, its activations not rounded; and the gradients
of every adapter with central differences of the loss. A starting adapter, which has no effect yet, is
compared with noise in what holds it back; where there is no adapter, a random one is made.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgepeft.adapters import Adapter
from edgepeft.bundle.reader import Bundle, open_bundle
from edgepeft.errors import AdapterError, ExportError, VerificationError
from edgepeft.runtime.adapters.graph_inputs import graph_inputs
from edgepeft.runtime.session import GraphSession
from edgepeft.runtime.training.starting import fresh_adapter
from edgepeft.techniques import peft_slots

from ..options import STARTING_ADAPTER
from ..quantize.exact_products import use_exact_products
from ..sources.base import Pooling
from ..sources.onnx_file import OnnxFile
from . import finite_differences
from .batch import Arrays, model_feeds, relative_difference, sample_batch, stirred
from .decoder import verify_decoder
from .pytorch import EFFECT, OUTPUT_TOLERANCE
from .stages import verify_stages
from .streamed import verify_streamed

#: Largest difference of an output that is computed from the same weights by the same or equal operators,
#: relative to the outputs' largest magnitude where that is above 1.
SAME_WEIGHTS = 1e-4
#: The same of a file that computes in 16 bits.
HALF = 2e-2
#: Rank of the random adapter that is compared where the bundle has none.
RANK = 2


def verify_against_file(
    folder: Path,
    source: OnnxFile,
    reference: Mapping[str, torch.Tensor],
    adapters: Mapping[str, Adapter],
) -> dict[str, Any]:
    """Compare the bundle in `folder` with the file of `source`.

    Args:
        reference: the values that the bundle holds of the file's float weights.

    Returns:
        What was measured, for the manifest.

    Raises:
        VerificationError: an output or a gradient differs by more than the tolerance.
        AdapterError: an adapter does not change the output.
    """
    bundle = open_bundle(folder)
    check = _Check(bundle, source, reference)
    check.outputs()
    if bundle.manifest.streamed_inference is not None:
        check.streamed_outputs()
    if bundle.manifest.decoder is not None:
        check.decoder_outputs()
    if bundle.manifest.strategies:
        check.training_outputs()
    compared = dict(adapters) or _random_adapters(bundle)
    for name, adapter in compared.items():
        filled = stirred(adapter) if name == STARTING_ADAPTER else adapter
        check.effect(name, filled)
        if bundle.manifest.strategies:
            check.gradients(name, filled)
    return check.figures


class _Check:
    """The bundle, the file, and what was measured."""

    def __init__(self, bundle: Bundle, source: OnnxFile, reference: Mapping[str, torch.Tensor]) -> None:
        self.bundle = bundle
        self.source = source
        self.reference = {name: reference.get(name, value) for name, value in source.weights.items()}
        self.batch = sample_batch(bundle, source)
        self.output_name = bundle.manifest.graphs["inference"].outputs[0].name
        requantized = source.quantization is None and bundle.manifest.quantization.bits < 32
        self.tolerance = OUTPUT_TOLERANCE[bundle.manifest.quantization.bits] if requantized else SAME_WEIGHTS
        self.requantized = requantized
        self.figures: dict[str, Any] = {
            "against": "the file and central differences",
            "output_tolerance": self.tolerance,
            "outputs": {},
            "gradients": {},
        }
        self._session = GraphSession(bundle, "inference")
        self._plain = self._run(None)

    def outputs(self) -> None:
        """The file's outputs, and the bundle's with no adapter."""
        expected = self._pooled(_run_file(self.source.path, self.batch, self.bundle))
        if self.requantized or self.source.widened:
            original = self._graph_output(self.source.weights, exact=False)
            tolerance = HALF if self.source.widened else SAME_WEIGHTS
            self._close("the file, read", original, expected, tolerance)
            expected = self._graph_output(self.reference, exact=False)
        self._close("no adapter", self._plain, expected, self.tolerance)

    def streamed_outputs(self) -> None:
        """The outputs of streamed inference, which rounds no activations, as those of the training graph."""
        expected = self._graph_output(self.reference, exact=True)
        inputs = graph_inputs(self.bundle, [])
        difference = verify_streamed(self.bundle, self.batch, inputs, expected, self.tolerance)
        self.figures["streamed_outputs"] = {"no adapter": difference}

    def decoder_outputs(self) -> None:
        """The decoder graph's logits, as those of the training graph."""
        expected = self._graph_output(self.reference, exact=True)
        inputs = graph_inputs(self.bundle, [])
        difference = verify_decoder(self.bundle, self.batch, inputs, expected, self.tolerance)
        self.figures["decoder_outputs"] = {"no adapter": difference}

    def training_outputs(self) -> None:
        """The training graph's outputs and those of the file's own operators, without rounded activations."""
        expected = self._graph_output(self.reference, exact=True)
        session = _forward_session(self.bundle, [self.output_name])
        feeds = {**self._feeds("train"), **graph_inputs(self.bundle, [])}
        (got,) = session.run(None, _taken(session, feeds))
        self._close("training graph", got, expected, self.tolerance)

    def effect(self, name: str, adapter: Adapter) -> None:
        """Whether the adapter changes the output."""
        changed = float(np.abs(self._counted(self._run(adapter)) - self._counted(self._plain)).max())
        if changed < EFFECT:
            raise AdapterError(
                f"adapter {name!r} does not change the output: it is untrained, or made for another base; "
                "nothing was written"
            )

    def gradients(self, name: str, adapter: Adapter) -> None:
        """Every gradient against central differences of the loss."""
        fed = {**self._feeds("train"), **graph_inputs(self.bundle, [(adapter, 1.0)])}
        session = GraphSession(self.bundle, "train")
        session.bind(fed)
        outputs = {key: value.numpy() for key, value in session.run_for(list(session.outputs)).items()}
        session.close()
        trainable = [key for key in self.bundle.manifest.policy.trainable if fed[key].size]
        forward = _forward_session(self.bundle, ["loss"])

        def loss(changed: Mapping[str, np.ndarray]) -> float:
            return float(forward.run(None, _taken(forward, {**fed, **changed}))[0])

        found = finite_differences.compare(
            loss,
            {key: fed[key] for key in trainable},
            {key: outputs[f"grad.{key}"] for key in trainable},
        )
        worst = max(found, key=lambda difference: difference.relative)
        if not worst.relative <= finite_differences.TOLERANCE:
            raise VerificationError(
                f"the gradient of {', '.join(worst.names)} with adapter {name!r} gives a directional "
                f"derivative of {worst.derivative:.6g}, central differences of the loss give "
                f"{worst.central:.6g} ± {worst.error:.1g} (tolerance {finite_differences.TOLERANCE:.0e}): "
                "nothing was written"
            )
        resolved = [difference for difference in found if difference.resolved]
        if 2 * len(resolved) < len(found):
            raise VerificationError(
                f"only {len(resolved)} of {len(found)} derivatives with adapter {name!r} stand out from the "
                "rounding of the loss, so the gradients cannot be verified: nothing was written; export with "
                "--no-verify"
            )
        self.figures["gradients"][name] = {
            "tensors": len(trainable),
            "directions": len(found),
            "resolved_directions": len(resolved),
            "tolerance": finite_differences.TOLERANCE,
            "largest_relative_difference": max(
                abs(item.derivative - item.central) / abs(item.derivative) for item in resolved
            ),
        }
        if self.bundle.manifest.partition is not None:
            adapters = graph_inputs(self.bundle, [(adapter, 1.0)])
            difference = verify_stages(self.bundle, self._feeds("train"), adapters, outputs)
            self.figures["gradients"][name]["stage_difference"] = difference

    def _run(self, adapter: Adapter | None) -> np.ndarray:
        adapters = graph_inputs(self.bundle, [] if adapter is None else [(adapter, 1.0)])
        self._session.bind({**self._feeds("inference"), **adapters})
        return np.asarray(self._session.run_for([self.output_name])[self.output_name].numpy())

    def _feeds(self, role: str) -> Arrays:
        return model_feeds(self.bundle, role, self.batch)

    def _graph_output(self, weights: Mapping[str, torch.Tensor], *, exact: bool) -> np.ndarray:
        """The file's graph as it was read, on `weights`."""
        model = self.source.model.clone()
        if exact:
            use_exact_products(model.graph)
        with tempfile.TemporaryDirectory(prefix="edgepeft-reference-") as scratch:
            path = Path(scratch) / "reference.onnx"
            ir.save(model, path, external_data="reference.data")
            feeds = {**_file_feeds(self.batch, self.bundle)}
            feeds |= {name: value.float().numpy() for name, value in weights.items()}
            return self._pooled(_run_session(path, feeds, exact=exact))

    def _pooled(self, output: np.ndarray) -> np.ndarray:
        return output if self.source.pooling is None else _pool(output, self.batch, self.source.pooling)

    def _counted(self, output: np.ndarray) -> np.ndarray:
        """The positions that are not padding."""
        return output[self.batch["attention_mask"].astype(bool)] if output.ndim == 3 else output

    def _close(self, what: str, got: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
        got, expected = self._counted(got), self._counted(expected)
        if got.shape != expected.shape:
            raise VerificationError(
                f"{self.output_name} ({what}) has shape {got.shape}, the file's has {expected.shape}: "
                "nothing was written"
            )
        differs = self.figures["outputs"][what] = relative_difference(got, expected)
        if not differs <= tolerance:
            raise VerificationError(
                f"{self.output_name} ({what}) differs from the file's by {differs:.2e} of their largest "
                f"magnitude, tolerance {tolerance:.0e}: nothing was written"
            )


def _run_file(path: Path, batch: Arrays, bundle: Bundle) -> np.ndarray:
    """The first output of the file as it is."""
    return _run_session(path, _file_feeds(batch, bundle))


def _run_session(path: Path, feeds: Arrays, *, exact: bool = False) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise ExportError(f"{path}: onnxruntime {ort.__version__} refuses it: {error}") from error
    try:
        outputs = session.run(None, _taken(session, feeds))
    except Exception as error:
        raise ExportError(
            f"{path}: onnxruntime {ort.__version__} does not run it on {len(feeds['input_ids'])} rows "
            f"({' '.join(str(error).split())[:300]}): write the file with another opset or exporter; "
            "--no-verify exports it without the comparison"
        ) from error
    names = [item.name for item in session.get_outputs()]
    wanted = [name for name in ("logits", "sentence_embedding", "last_hidden_state") if name in names]
    return np.asarray(outputs[names.index(wanted[0])])


def _taken(session: ort.InferenceSession, feeds: Arrays) -> Arrays:
    halves = {item.name for item in session.get_inputs() if item.type == "tensor(float16)"}
    taken = {item.name: feeds[item.name] for item in session.get_inputs()}
    return {name: value.astype(np.float16) if name in halves else value for name, value in taken.items()}


def _file_feeds(batch: Arrays, bundle: Bundle) -> Arrays:
    """The batch as the file takes it: with positions, and with an empty cache."""
    positions = np.maximum(np.cumsum(batch["attention_mask"], axis=1) - 1, 0)
    return {**model_feeds(bundle, "inference", batch), **batch, "position_ids": positions}


def _forward_session(bundle: Bundle, outputs: list[str]) -> ort.InferenceSession:
    """The training graph without its backward pass."""
    path = bundle.path / bundle.manifest.graphs["train"].file
    model = ir.load(path)
    values = {output.name: output for node in model.graph for output in node.outputs}
    model.graph.outputs[:] = [values[name] for name in outputs]
    RemoveUnusedNodesPass()(model)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(bundle.path.absolute())
    )
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    data = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(
        data, options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
    )


def _pool(hidden: np.ndarray, batch: Arrays, pooling: Pooling) -> np.ndarray:
    mask = batch["attention_mask"][..., None].astype(np.float32)
    pooled = {
        "mean": (hidden * mask).sum(1) / mask.sum(1),
        "max": np.where(mask == 1, hidden, -1e9).max(1),
        "cls": hidden[:, 0],
    }[pooling.mode]
    norms = np.linalg.norm(pooled, axis=-1, keepdims=True) if pooling.normalize else 1.0
    return np.asarray(pooled / norms, np.float32)


def _random_adapters(bundle: Bundle) -> dict[str, Adapter]:
    """One of rank `RANK` on every slot, if there are any."""
    return {"random": stirred(fresh_adapter(bundle, RANK, 2))} if peft_slots(bundle.manifest.slots) else {}
