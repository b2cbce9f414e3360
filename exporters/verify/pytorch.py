"""Run a bundle as a device would and compare it with PyTorch + PEFT on the weights that the bundle holds.

Compared are the outputs with no adapter and with each, the loss, and the gradient of every trainable tensor;
each adapter must also change the output. A starting adapter, which has no effect yet, is compared with noise
in what holds it back.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

from edgepeft.adapters import Adapter, load_adapter
from edgepeft.bundle.reader import Bundle, open_bundle
from edgepeft.errors import AdapterError, VerificationError
from edgepeft.runtime.adapters.graph_inputs import graph_inputs
from edgepeft.runtime.adapters.virtual_tokens import in_front, of_adapter
from edgepeft.runtime.inputs import BASE_LOGITS, DRIFT_WEIGHT, IGNORED_LABEL, has_drift_penalty
from edgepeft.runtime.key_value_cache import cache_specs
from edgepeft.runtime.memory.process import release_freed_memory
from edgepeft.runtime.session import GraphSession
from edgepeft.token_rows import token_indices

from ..options import STARTING_ADAPTER
from ..sources.last_token import lacks_pad
from ..sources.transformers_model import Source
from .batch import (
    PADDED,
    Arrays,
    affordable,
    model_feeds,
    relative_difference,
    sample_batch,
    stirred,
    unpadded,
    with_tokens,
)
from .decoder import GROWN, verify_decoder, verify_growth
from .generation import verify_generation
from .reference import (
    BundleWeights,
    long_output,
    parameters_by_key,
    torch_drift,
    torch_gradients,
    torch_output,
    with_adapter,
    without_adapter,
)
from .stages import SMALLEST_NORM, STAGE_TOLERANCE, is_rounding, verify_stages
from .streamed import verify_streamed
from .text import TEXTS

#: Largest difference of an output, relative to the outputs' largest magnitude where that is above 1.
OUTPUT_TOLERANCE = {4: 1e-3, 8: 1e-3, 16: 1e-3, 32: 1e-4}
LOSS_TOLERANCE = 1e-3
GRADIENT_COSINE = 0.9999
GRADIENT_NORM_TOLERANCE = 1e-3
#: A change of the output below this is no change.
EFFECT = 1e-6
#: Of the drift penalty, where there is one.
DRIFT = 0.7


def verify_against_pytorch(
    folder: Path,
    source: Source,
    reference: Mapping[str, torch.Tensor],
    adapters: Mapping[str, Path],
) -> dict[str, Any]:
    """Compare the bundle in `folder` with `source`, whose weights are replaced by `reference`.

    Returns:
        What was measured, for the manifest.

    Raises:
        VerificationError: an output, a loss or a gradient differs by more than the tolerance.
        AdapterError: an adapter does not change the output.
    """
    bundle = open_bundle(folder)
    source.traced = None  # it would keep the model's own weights
    weights = BundleWeights(source.model, bundle, reference)
    weights.freeze()
    weights.reset()  # PEFT writes into them, and they may be in the memory of somebody's model
    release_freed_memory()  # of the model's own weights, which malloc keeps
    source.model.config.use_cache = False
    configs = (load_adapter(folder / "adapters" / name).config for name in adapters)
    replaced = {token for config in configs for token in token_indices(config) or ()}
    batch = with_tokens(sample_batch(bundle, source), sorted(replaced))
    check = _Check(bundle, source, batch)
    check.outputs("no adapter", None, source.model)
    check.full_length()
    if bundle.manifest.task.endswith("-generation"):
        check.figures["generation"] = verify_generation(bundle, source, check.prompt(), check.tolerance)
    for name, path in adapters.items():
        adapter = load_adapter(folder / "adapters" / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = with_adapter(source.model, path)
        for config in model.peft_config.values():
            if isinstance(config, peft.AdaLoraConfig):
                config.orth_reg_weight = 0.0  # a term of the loss that no graph computes
        weights.freeze()  # of which the adapter may hold copies that are not rounded
        if name == STARTING_ADAPTER:
            adapter = stirred(adapter)
            with torch.no_grad():
                for key, parameter in parameters_by_key(model).items():
                    if key in adapter.tensors:
                        parameter.copy_(torch.from_numpy(adapter.tensors[key]))
        check.outputs(f"adapter {name!r}", adapter, model)
        check.effect(name)
        if bundle.manifest.strategies:
            check.gradients(name, adapter, model)
        source.model = without_adapter(model).requires_grad_(False)
        weights.reset()
    return check.figures


class _Check:
    """Both sides of the comparison and what it measured."""

    def __init__(self, bundle: Bundle, source: Source, batch: Arrays) -> None:
        self.bundle = bundle
        self.source = source
        self.batch = batch
        self.output_name = bundle.manifest.graphs["inference"].outputs[0].name
        self.tolerance = OUTPUT_TOLERANCE[bundle.manifest.quantization.bits]
        self.figures: dict[str, Any] = {
            "against": "PyTorch",
            "output_tolerance": self.tolerance,
            "outputs": {},
            "gradients": {},
        }
        self._session = GraphSession(bundle, "inference")
        self._plain: np.ndarray | None = None
        self._latest: np.ndarray | None = None

    def outputs(self, what: str, adapter: Adapter | None, model: Any) -> None:
        with torch.no_grad():
            expected, _ = self._torch_output(model)
        batch = self._read(adapter)
        got = self._said(batch, adapter)
        counted = got, expected.numpy()
        if got.ndim == 3:  # positions that are padding hold nothing
            decoder = "decoder_input_ids" in self.batch
            filled = self.batch["labels"] != IGNORED_LABEL if decoder else self.batch["attention_mask"] == 1
            own = filled.shape[1]  # what virtual tokens stand in front of
            counted = got[:, -own:][filled], expected.numpy()[:, -own:][filled]
        differs = self.figures["outputs"][what] = relative_difference(*counted)
        if not differs <= self.tolerance:
            raise VerificationError(
                f"{self.output_name} with {what} differs from PyTorch's by {differs:.2e} of their largest "
                f"magnitude, tolerance {self.tolerance:.0e}: nothing was written"
            )
        if self.bundle.manifest.streamed_inference is not None:
            inputs = self._adapter_feeds(adapter)
            streamed = verify_streamed(self.bundle, batch, inputs, got, self.tolerance)
            self.figures.setdefault("streamed_outputs", {})[what] = streamed
        if self.bundle.manifest.decoder is not None:
            inputs = self._adapter_feeds(adapter)
            decoded = verify_decoder(self.bundle, batch, inputs, got, self.tolerance)
            self.figures.setdefault("decoder_outputs", {})[what] = decoded
        if adapter is None:
            self._padding(got)
            self._plain = counted[0]
            if has_drift_penalty(self.bundle.manifest):
                self.batch |= {BASE_LOGITS: got, DRIFT_WEIGHT: np.array(DRIFT, np.float32)}
        self._latest = counted[0]

    def _said(self, batch: Arrays, adapter: Adapter | None = None) -> np.ndarray:
        """The bundle's output for a batch."""
        feeds = model_feeds(self.bundle, "inference", batch)
        self._session.bind({**feeds, **self._adapter_feeds(adapter)})
        output: np.ndarray = self._session.run_for([self.output_name])[self.output_name].numpy()
        return output

    def _padding(self, got: np.ndarray) -> None:
        """A classifier that knows no padding by its token says of a padded row what it says of it alone.

        PyTorch's own model, made to read what the mask counts, is no judge of that.
        """
        task = self.bundle.manifest.task
        if task != "text-classification" or not lacks_pad(self.source.model.config):
            return
        differs = relative_difference(got[[PADDED]], self._said(unpadded(self.batch, PADDED)))
        if not differs <= self.tolerance:
            raise VerificationError(
                f"{self.output_name} of a row differs by {differs:.2e} of their largest magnitude with "
                f"padding behind it, tolerance {self.tolerance:.0e}: nothing was written"
            )

    def prompt(self) -> list[int]:
        """Tokens of a text of the tokenizer's own, or, without one, those of the batch's first row."""
        own = [] if self.source.tokenizer is None else self.source.tokenizer(TEXTS[0])["input_ids"]
        usable = [token for token in own if token < self.bundle.manifest.model.vocab_size]
        prompt = usable or self.batch["input_ids"][0].tolist()
        return prompt[: max(1, self.bundle.manifest.model.max_length // 2)]

    def full_length(self) -> None:
        """One row as long as the model takes, or as is affordable, and how a cache grows up to there."""
        if "input_ids" not in self.batch:
            return
        manifest = self.bundle.manifest
        tokens = affordable(self.source.model, manifest.model.max_length)
        ids = np.random.default_rng(2).integers(0, manifest.model.vocab_size, (1, tokens))
        own = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        own |= {name: np.zeros_like(ids) for name in ("token_type_ids",) if name in self.batch}
        if "decoder_input_ids" in self.batch:
            own["decoder_input_ids"] = ids
        try:
            with torch.no_grad():
                expected = long_output(self.source, own).numpy()
        except Exception as error:  # whatever the model's own code raises
            raise VerificationError(
                f"{self.source.name} does not read {tokens} tokens in PyTorch, of "
                f"{manifest.model.max_length} that it is said to take "
                f"({next(iter(str(error).splitlines()), type(error).__name__)}): nothing was written"
            ) from error
        got = self._said(own)
        differs = relative_difference(got, expected)
        self.figures["longest"] = {"tokens": tokens, "of": manifest.model.max_length, "output": differs}
        if not differs <= self.tolerance:
            raise VerificationError(
                f"{self.output_name} of {tokens} tokens differs from PyTorch's by {differs:.2e} of their "
                f"largest magnitude, tolerance {self.tolerance:.0e}: nothing was written"
            )
        if manifest.task == "text-generation" and cache_specs(manifest) and tokens > GROWN:
            grown = verify_growth(
                self.bundle, self._adapter_feeds(None), ids[0].tolist(), got[0], self.tolerance
            )
            self.figures["longest"]["cache"] = grown

    def effect(self, name: str) -> None:
        assert self._plain is not None
        assert self._latest is not None
        if float(np.abs(self._latest - self._plain).max()) < EFFECT:
            raise AdapterError(
                f"adapter {name!r} does not change the output: it is untrained, or made for another base; "
                "nothing was written"
            )

    def gradients(self, name: str, adapter: Adapter, model: Any) -> None:
        trainable = self.bundle.manifest.policy.trainable
        session = GraphSession(self.bundle, "train")
        feeds = model_feeds(self.bundle, "train", self._read(adapter))
        session.bind({**feeds, **self._adapter_feeds(adapter)})
        outputs = {key: value.numpy() for key, value in session.run_for(list(session.outputs)).items()}
        session.close()
        model.zero_grad()
        output, loss = self._torch_output(model)
        if BASE_LOGITS in self.batch:
            loss = loss + DRIFT * torch_drift(output, self.batch)
        loss.backward()
        differs = abs(float(outputs["loss"]) - loss.item()) / max(1.0, abs(loss.item()))
        if not differs <= LOSS_TOLERANCE:
            raise VerificationError(
                f"the loss with adapter {name!r} is {float(outputs['loss']):.6f}, PyTorch's is "
                f"{loss.item():.6f}: nothing was written"
            )
        worst_cosine, worst_norm, tolerance = 1.0, 0.0, STAGE_TOLERANCE
        inputs = self.bundle.manifest.adapter_inputs
        gradients = {key: value for key, value in torch_gradients(model, adapter).items() if key in trainable}
        # What PEFT stores unasked, such as a resized embedding, it does not train.
        asked = tuple(adapter.config.get("modules_to_save") or ())
        own = {
            key
            for key in adapter.tensors
            if adapter.technique.owns(key) or key.rpartition(".")[0].endswith(asked)
        }
        if unseen := sorted(own.intersection(trainable) - gradients.keys()):
            raise VerificationError(
                f"PyTorch has no gradient of {unseen[0]} with adapter {name!r} to compare with: nothing was "
                "written"
            )
        largest = max((float(np.linalg.norm(value)) for value in gradients.values()), default=1.0)
        for key, expected in gradients.items():
            got = outputs[f"grad.{key}"]
            got = got.T if inputs[key].transposed else got
            cosine, norm = (
                (1.0, 0.0) if is_rounding(key, (got, expected), largest) else _compare(got, expected)
            )
            worst_cosine, worst_norm = min(worst_cosine, cosine), max(worst_norm, norm)
            tolerance = max(tolerance, 2 * _relative_distance(got, expected))
            if not (cosine >= GRADIENT_COSINE and norm <= GRADIENT_NORM_TOLERANCE):
                raise VerificationError(
                    f"the gradient of {key} with adapter {name!r} has cosine {cosine:.6f} with PyTorch's "
                    f"(at least {GRADIENT_COSINE}) and a norm off by {norm:.2e} (at most "
                    f"{GRADIENT_NORM_TOLERANCE:.0e}): nothing was written"
                )
        self.figures["gradients"][name] = {
            "loss_difference": differs,
            "smallest_cosine": worst_cosine,
            "largest_norm_difference": worst_norm,
        }
        if self.bundle.manifest.partition is not None:
            # Where the graph and PyTorch differ by e, float32 allows that much: in real language models, of
            # which a few activations are a thousand times the others, more than in models of random weights.
            # Stages that err as much as the graph does are at most 2 e from it.
            self.figures["gradients"][name]["stage_difference"] = verify_stages(
                self.bundle, feeds, self._adapter_feeds(adapter), outputs, tolerance
            )

    def _torch_output(self, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch_output(self.source, model, self.batch, self.bundle.manifest.model.loss)

    def _read(self, adapter: Adapter | None) -> Arrays:
        """The batch as it is read with an adapter."""
        virtual = None if adapter is None else of_adapter(self.bundle.manifest, adapter)
        if virtual is None:
            return self.batch
        return in_front(self.bundle.manifest, self.batch, [virtual] * len(self.batch["input_ids"]))

    def _adapter_feeds(self, adapter: Adapter | None) -> Arrays:
        return dict(graph_inputs(self.bundle, [] if adapter is None else [(adapter, 1.0)]))


def _relative_distance(got: np.ndarray, expected: np.ndarray) -> float:
    """How far a gradient is from PyTorch's, by its L2 norm; 0 for one that vanishes."""
    norm = float(np.linalg.norm(expected))
    return float(np.linalg.norm(got - expected)) / norm if norm >= SMALLEST_NORM else 0.0


def _compare(got: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Cosine, and the relative difference of the norms; gradients that vanish on both sides agree."""
    norms = float(np.linalg.norm(got)), float(np.linalg.norm(expected))
    if max(norms) < 1e-8:
        return 1.0, 0.0
    if min(norms) == 0.0:
        return 0.0, 1.0
    cosine = float((got.astype(np.float64) * expected).sum()) / (norms[0] * norms[1])
    return min(cosine, 1.0), abs(norms[0] / norms[1] - 1.0)
