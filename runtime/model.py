"""A loaded bundle: forward passes, gradients, generation, prediction and adaptation."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.manifest import Manifest
from edgepeft.bundle.reader import Bundle, open_bundle
from edgepeft.errors import UsageError
from edgepeft.runtime import generation, prediction
from edgepeft.runtime.activation import AdapterSpec, to_peft_layout
from edgepeft.runtime.data import RecordSource, records
from edgepeft.runtime.inputs import batch_shape, check_batch, model_inputs
from edgepeft.runtime.memory.inference import RunPlan, plan_forward, plan_generation, plan_graph
from edgepeft.runtime.registry import AdapterSpecs, check_rows
from edgepeft.runtime.session import GraphSession
from edgepeft.runtime.sessions import Sessions
from edgepeft.runtime.streamed import StreamedModel
from edgepeft.runtime.tasks import Example, Task, task_for
from edgepeft.runtime.tasks.embedding import Embedding
from edgepeft.runtime.training.adapt import OnStep, Update
from edgepeft.runtime.training.options import TrainingOptions
from edgepeft.runtime.training.report import AdaptReport
from edgepeft.sizes import parse_size

FloatArray = npt.NDArray[np.float32]


class Model:
    """A bundle, ready to run. Sessions are opened when they are first needed; close it or use it in a `with`
    block.

    Args:
        bundle: an opened bundle.
        memory_budget_bytes: limit on the whole process's resident memory; None for no limit.
        threads: threads of a session; 0 lets onnxruntime choose.

    Attributes:
        predicted_peak_bytes: the plan's peak for the last run; None before the first.
    """

    def __init__(self, bundle: Bundle, memory_budget_bytes: int | None = None, threads: int = 0) -> None:
        self._bundle = bundle
        self._budget_bytes = memory_budget_bytes
        self._threads = threads
        self._task: Task = task_for(bundle)
        self._sessions = Sessions(bundle, threads, one_at_a_time=memory_budget_bytes is not None)
        self.predicted_peak_bytes: int | None = None

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self._bundle.manifest

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the bundle's adapters and of those that were loaded."""
        own = self._bundle.adapter_names()
        return own + tuple(name for name in self._sessions.registry.names if name not in own)

    def load_adapter(self, name: str, path: str | Path | None = None) -> None:
        """Keep an adapter in memory, so that activating it only binds what is there.

        It takes its own bytes (float32) and no more. Adapters that are not loaded are read whenever a call
        activates them.

        Args:
            name: what calls name it by; without `path` an adapter of the bundle.
            path: a PEFT folder.

        Raises:
            AdapterError: the adapter is missing, damaged, does not fit or has no effect.
            UsageError: the name cannot be used, or is taken.
        """
        self._sessions.registry.load(name, path)

    def unload_adapter(self, name: str) -> None:
        """Free what `load_adapter` loaded.

        Raises:
            AdapterError: no adapter of that name is loaded.
        """
        self._sessions.unload(name)

    def forward(self, batch: Mapping[str, object], adapter: AdapterSpecs = None) -> dict[str, FloatArray]:
        """Run the model on a batch.

        Args:
            batch: the transformers model's keyword arguments as arrays, such as `input_ids` int64
                `[batch, sequence]`; rows of language models are padded on the right.
            adapter: an adapter's name, a PEFT folder's path, a mixture `{name: weight}`, or None for the base
                alone; or a list of these, one for each row of the batch.

        Returns:
            `logits` float32 `[batch, num_labels]` or `[batch, sequence, vocab]`, or `sentence_embedding`
            `[batch, width]`.

        Raises:
            UsageError: an input cannot be used.
            AdapterError: the adapter is missing, damaged, does not fit or has no effect.
            BudgetError: the memory budget cannot hold this batch.
        """
        specs = model_inputs(self.manifest, self.manifest.graphs["inference"].inputs)
        arrays = check_batch(self.manifest, specs, batch)
        shape = batch_shape(specs, arrays)
        check_rows(adapter, shape[0], "rows")

        def plan(process_bytes: int, rank: int) -> RunPlan:
            return plan_forward(self.manifest, self._budget_bytes, process_bytes, shape=shape, rank=rank)

        session, chosen = self._sessions.activated(adapter, plan)
        self.predicted_peak_bytes = chosen.peak_bytes
        if isinstance(session, StreamedModel):
            return {self._task.output: session.forward(arrays)}
        session.bind(arrays)
        session.bind(generation.empty_cache(session, shape[0]))
        outputs = session.run_for([self._task.output])
        return {name: value.numpy() for name, value in outputs.items()}

    def loss_and_gradients(
        self, batch: Mapping[str, object], adapter: str | Path | None = None
    ) -> tuple[float, dict[str, FloatArray]]:
        """The loss of a batch and its gradients with respect to the adapter's tensors.

        Args:
            batch: as for `forward`, with `labels` where the task has them (unshifted, -100 ignored); for
                sentence embeddings the rows are all anchors and then all positives.
            adapter: the adapter's name or path; None is the base alone, whose LoRA gradients have rank 0.

        Returns:
            The loss, and float32 gradients by PEFT's state-dict key in PEFT's layout.

        Raises:
            UsageError: an input cannot be used, or the bundle was exported without training graphs.
            AdapterError: the adapter is missing, damaged or does not fit.
        """
        if not self.manifest.strategies:
            raise UsageError(
                "the bundle was exported with --no-train, so it has no gradients: export it again without"
            )
        if isinstance(adapter, Mapping):
            raise UsageError("gradients are of one adapter, not of a mixture: name one")
        strategy = self.manifest.strategies[0]
        role = strategy.graph or "train"
        specs = model_inputs(self.manifest, self.manifest.graphs[role].inputs)
        arrays = check_batch(self.manifest, specs, batch)
        shape = batch_shape(specs, arrays)

        def plan(process_bytes: int, rank: int) -> RunPlan:
            return plan_graph(
                role, strategy.memory, self._budget_bytes, process_bytes, shape=shape, rank=rank
            )

        session, chosen = self._sessions.activated(adapter, plan, check_effect=False)
        self.predicted_peak_bytes = chosen.peak_bytes
        assert isinstance(session, GraphSession)
        session.bind(arrays)
        names = {f"grad.{name}": name for name in self.manifest.policy.trainable}
        outputs = session.run_for(["loss", *names])
        loss = float(outputs.pop("loss").numpy())
        gradients = {names[output]: value.numpy() for output, value in outputs.items()}
        return loss, to_peft_layout(self._bundle, gradients)

    def generate(self, prompt: str, adapter: AdapterSpec = None, max_new_tokens: int = 64) -> str:
        """Continue a text greedily.

        Args:
            prompt: the text to continue.
            adapter: as for `forward`.
            max_new_tokens: tokens to write at most; an end-of-sequence token ends earlier.

        Returns:
            The continuation without the prompt; of an encoder-decoder, what it answers.

        Raises:
            UsageError: the bundle is no language model, or prompt and answer do not fit its context.
            MissingExtraError: `tokenizers` is not installed.
        """
        self._require_language_model()
        ids, _ = self._task.text.encode(prompt)
        return self._task.text.decode(self.generate_ids(ids, adapter, max_new_tokens))

    def generate_ids(
        self, prompt: list[int], adapter: AdapterSpec = None, max_new_tokens: int = 64
    ) -> list[int]:
        """Continue token ids greedily; see `generate`. The end-of-sequence token is included if it was
        reached.

        Raises:
            UsageError: the bundle is no language model, or prompt and answer do not fit its context.
        """
        self._require_language_model()
        generation.check_length(self.manifest, len(prompt), max_new_tokens)
        specs = model_inputs(self.manifest, self.manifest.graphs["inference"].inputs)
        decodes = self.manifest.task == "text2text-generation"
        start = {"decoder_input_ids": [[self.manifest.model.decoder_start_token_id]]} if decodes else {}
        check_batch(self.manifest, specs, {"input_ids": [prompt], **start})

        def plan(process_bytes: int, rank: int) -> RunPlan:
            if decodes:
                shape = 1, max(len(prompt), max_new_tokens)
                return plan_forward(self.manifest, self._budget_bytes, process_bytes, shape=shape, rank=rank)
            return plan_generation(
                self.manifest,
                self._budget_bytes,
                process_bytes,
                prompt_tokens=len(prompt),
                max_new_tokens=max_new_tokens,
                rank=rank,
            )

        session, chosen = self._sessions.activated(adapter, plan)
        self.predicted_peak_bytes = chosen.peak_bytes
        if isinstance(session, StreamedModel):
            return generation.greedy_streamed(session, self.manifest, prompt, max_new_tokens, chosen.chunk)
        run = generation.greedy_decoder if decodes else generation.greedy
        return run(session, self.manifest, prompt, max_new_tokens)

    def predict(
        self,
        source: RecordSource,
        adapter: AdapterSpecs = None,
        batch_size: int = 8,
        seq_len: int | None = None,
    ) -> list[dict[str, Any]]:
        """Classify or embed records.

        Args:
            source: a JSONL file's path, or mappings such as `{"text": …}`.
            adapter: as for `forward`; a list has one for each record.
            batch_size: records a run; fewer where the memory budget holds no more.
            seq_len: tokens a text is cut to, or samples a recording; None for the model's maximum.

        Returns:
            For each record `{"label", "score", "scores"}`; `{"labels", "scores"}` where several labels apply
            or every token has one; `{"entities"}` of a text whose tokens are labelled; `{"values"}` of a
            regression; `{"masks"}` of a text with masks to fill; each with `"expected"` if the record is
            labelled; or `{"embedding"}`.

        Raises:
            DataError: a record cannot be used.
            UsageError: the task predicts nothing a record.
        """
        if self.manifest.task.endswith("-generation"):
            raise UsageError(f"a {self.manifest.task} bundle predicts nothing a record: use generate")
        examples = self._examples(source, adapter, batch_size, seq_len)
        return prediction.results(self._task, self.forward, examples, adapter, batch_size)

    def classify(
        self,
        inputs: Sequence[object],
        adapter: AdapterSpecs = None,
        batch_size: int = 8,
        seq_len: int | None = None,
    ) -> list[dict[str, Any]]:
        """Classify texts, images or recordings.

        Args:
            inputs: texts; images or recordings as paths or arrays; or records, as for `predict`.
            adapter: as for `forward`; a list has one for each input.
            batch_size: inputs a run.
            seq_len: as for `predict`.

        Returns:
            As `predict`, of which this is the part for classifiers.

        Raises:
            DataError: an input cannot be used.
            UsageError: the bundle's task is not one of classification.
        """
        if not self.manifest.task.endswith("-classification"):
            raise UsageError(f"a {self.manifest.task} bundle classifies nothing")
        return self.predict(prediction.as_records(self._task, inputs), adapter, batch_size, seq_len)

    def embed(
        self,
        texts: Sequence[object],
        adapter: AdapterSpecs = None,
        batch_size: int = 32,
        seq_len: int | None = None,
        prompt: str | None = None,
    ) -> FloatArray:
        """Embed texts.

        Args:
            texts: texts, or records such as `{"input_ids": …}`.
            adapter: as for `forward`; a list has one for each text.
            batch_size: texts a run; fewer where the memory budget holds no more.
            seq_len: as for `predict`.
            prompt: name of the prompt to put before every text; the model's default one where None.

        Returns:
            Embeddings float32 `[texts, width]`, pooled and normalized as the model was exported.

        Raises:
            DataError: a text cannot be used.
            UsageError: the bundle's task is not feature-extraction, or it has no such prompt.
        """
        task = self._task
        if not isinstance(task, Embedding):
            raise UsageError(f"a {self.manifest.task} bundle embeds nothing: it takes feature-extraction")
        source = task.prompted(prediction.as_records(task, texts), prompt)
        examples = self._examples(source, adapter, batch_size, seq_len)
        return prediction.embeddings(task, self.forward, examples, adapter, batch_size)

    def _examples(
        self, source: RecordSource, adapter: AdapterSpecs, batch_size: int, seq_len: int | None
    ) -> list[Example]:
        TrainingOptions(seq_len=seq_len, batch_size=batch_size).check(self.manifest)
        length = self.manifest.model.max_length if seq_len is None else seq_len
        examples = self._task.encode_all(records(source), length, training=False)
        check_rows(adapter, len(examples), "records")
        return examples

    def adapt(
        self, source: RecordSource, output: str | Path, *, on_step: OnStep | None = None, **options: Any
    ) -> AdaptReport:
        """Train an adapter on records, within the memory budget, and keep it if it is better on held-out
        ones.

        Args:
            source: a JSONL file's path, or mappings such as `{"text": …, "label": …}`.
            output: folder for the new adapter, in PEFT's format; it is left alone unless the update is kept.
            on_step: called after every step.
            **options: see `TrainingOptions`: `steps`, `seq_len`, `batch_size`, `learning_rate`, ….

        Returns:
            What was done, what it cost and how it was judged.

        Raises:
            BudgetError: the memory budget cannot be met.
            UpdateRejectedError: the new adapter is worse, so nothing was written.
            DataError: a record cannot be used.
            UsageError: an option cannot be used.
        """
        known = {item.name for item in dataclasses.fields(TrainingOptions)}
        unknown = sorted(options.keys() - known)
        if unknown:
            raise UsageError(f"adapt takes no option {unknown[0]!r}: it takes {', '.join(sorted(known))}")
        self.close()
        return Update(
            self._bundle,
            self._task,
            source,
            Path(output),
            TrainingOptions(**options),
            self._budget_bytes,
            self._threads,
            on_step,
        ).run()

    def close(self) -> None:
        """Free the sessions; the next call opens them again."""
        self._sessions.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_language_model(self) -> None:
        if not self.manifest.task.endswith("-generation"):
            raise UsageError(f"a {self.manifest.task} bundle generates no text: use predict")


def load(path: str | Path, memory_budget: str | int | None = None, threads: int = 0) -> Model:
    """Open a bundle and check every file of it.

    Args:
        path: the bundle's folder.
        memory_budget: limit on the whole process's resident memory, such as `"128MiB"`; None for no limit.
        threads: threads of a session; 0 lets onnxruntime choose.

    Raises:
        BundleError: the bundle is missing, damaged, of a newer format or reaches outside its folder.
        UsageError: the budget is no size.
    """
    return Model(open_bundle(path), None if memory_budget is None else parse_size(memory_budget), threads)
