"""A loaded bundle: generation, prediction, gradients and adaptation beside forward passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import UsageError
from edgepeft.sizes import parse_size

from . import prediction
from .adapters.graph_inputs import AdapterSpec
from .adapters.loaded import AdapterSpecs, check_rows
from .one_call_at_a_time import one_at_a_time
from .opened_bundle import FloatArray, LoadedBundle
from .records import RecordSource, count_records, records
from .tasks import Example
from .training.options import TrainingOptions

# A device process generates, predicts or trains; what the others need, modules and all, it does not hold.
if TYPE_CHECKING:
    from .generation.generate import CacheSpec, Messages, TextStream
    from .generation.prompt_cache import PromptCache
    from .training.adapt import OnStep
    from .training.report import AdaptReport


class Model(LoadedBundle):
    """A bundle, ready to run. Sessions are opened when they are first needed; close it or use it in a `with`
    block.

    Any number of threads may call it: calls run one after the other, each with the adapter that it names. A
    stream takes its turn for every token; `adapt`, and a call whose memory budget needs sessions closed, are
    refused while one is open.

    Args:
        bundle: an opened bundle.
        memory_budget_bytes: limit on the whole process's resident memory; None for no limit.
        threads: threads of a session; 0 lets onnxruntime choose.
        int8_activations: see `load`.
    """

    @one_at_a_time
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
        from .batch_gradients import loss_and_gradients

        return loss_and_gradients(self._bundle, self._sessions, self._budget_bytes, batch, adapter)

    @overload
    def generate(self, prompt: str | None = None, adapter: AdapterSpec = None, **options: Any) -> str: ...

    @overload
    def generate(self, prompt: Sequence[str], adapter: AdapterSpecs = None, **options: Any) -> list[str]: ...

    @one_at_a_time
    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        adapter: AdapterSpecs = None,
        *,
        messages: Messages | None = None,
        prompt_cache: CacheSpec = None,
        **options: Any,
    ) -> str | list[str]:
        """Continue a text or several, or answer a conversation.

        Args:
            prompt: the text to continue, or several, each of which gets what it gets alone.
            adapter: as for `forward`; a list has one for each prompt.
            messages: instead of a prompt, a conversation for the base model's chat template, `{"role",
                "content"}` each.
            prompt_cache: of `read_prompt` or a stream with `keep`, or its file; what prompts have in common
                with it is not read again.
            **options: see `GenerationOptions`: `max_new_tokens`, `temperature`, `seed`, `stop`, …; what is
                not given is the model's own setting. With messages also `tools` and `documents`, for the
                template.

        Returns:
            The continuation without the prompt; of an encoder-decoder, what it answers. A list for several.

        Raises:
            UsageError: the bundle is no language model, or an option or the prompt cache cannot be used.
            ContextError: prompt and answer do not fit the model's context.
            DataError: the chat template refuses the messages.
            MissingExtraError: `tokenizers`, or `jinja2` for messages, is not installed.
            BudgetError: the memory budget cannot hold it.
        """
        return self._generator.texts(prompt, messages, adapter, prompt_cache, options)

    @one_at_a_time
    def stream(
        self,
        prompt: str | None = None,
        adapter: AdapterSpec = None,
        *,
        messages: Messages | None = None,
        prompt_cache: CacheSpec = None,
        keep: bool = False,
        **options: Any,
    ) -> TextStream:
        """Continue a text, or answer a conversation, piece by piece as the model writes it.

        Args:
            prompt: the text to continue.
            adapter: as for `generate`.
            messages: as for `generate`.
            prompt_cache: as for `generate`.
            keep: have a `prompt_cache` of prompt and answer at the end, for what continues them.
            **options: as for `generate`.

        Returns:
            An iterator over pieces of text, with the `result` at its end; `close` ends it before.

        Raises:
            EdgePeftError: as `generate`, before the first piece.
        """
        return self._generator.stream(prompt, messages, adapter, prompt_cache, keep, options)

    @overload
    def generate_ids(
        self, prompt: Sequence[int], adapter: AdapterSpec = None, **options: Any
    ) -> list[int]: ...

    @overload
    def generate_ids(
        self, prompt: Sequence[Sequence[int]], adapter: AdapterSpecs = None, **options: Any
    ) -> list[list[int]]: ...

    @one_at_a_time
    def generate_ids(
        self,
        prompt: Sequence[int] | Sequence[Sequence[int]],
        adapter: AdapterSpecs = None,
        *,
        prompt_cache: CacheSpec = None,
        **options: Any,
    ) -> list[int] | list[list[int]]:
        """Continue token ids, or several lists of them; see `generate`. The end-of-sequence token is included
        if it was reached; no tokenizer is needed, except for `stop`."""
        return self._generator.ids(prompt, adapter, prompt_cache, options)

    @one_at_a_time
    def read_prompt(
        self, prompt: str | None = None, adapter: AdapterSpec = None, *, messages: Messages | None = None
    ) -> PromptCache:
        """Read a prompt, or a conversation, that others begin with: once for all of them.

        Args:
            prompt: as for `generate`.
            adapter: as for `generate`.
            messages: as for `generate`.

        Returns:
            What `prompt_cache` takes; `save` writes it to a file.

        Raises:
            UsageError: the model has no key/value cache; and see `generate`.
        """
        return self._generator.read_prompt(prompt, messages, adapter)

    @one_at_a_time
    def predict(
        self,
        source: RecordSource,
        adapter: AdapterSpecs = None,
        batch_size: int = 8,
        seq_len: int | None = None,
        *,
        on_progress: prediction.OnProgress | None = None,
    ) -> list[dict[str, Any]]:
        """Classify or embed records.

        Args:
            source: a JSONL file's path, `-` for standard input, or mappings such as `{"text": …}`. Files that
                its records name are found from its folder; those of mappings, and of standard input, from
                the working directory.
            adapter: as for `forward`; a list has one for each record.
            batch_size: records a run; fewer where the memory budget holds no more.
            seq_len: tokens a text is cut to, or samples a recording; None for the model's maximum.
            on_progress: is told, after every run, how many records of how many are done.

        Returns:
            For each record `{"label", "score", "scores"}`; `{"labels", "scores"}` where several labels apply
            or every token has one; `{"entities"}` of a text whose tokens are labelled; `{"values"}` of a
            regression; `{"masks"}` of a text with masks to fill; each with `"expected"` if the record is
            labelled; or `{"embedding"}`.

        Raises:
            DataError: a record cannot be used.
            UsageError: the task predicts nothing a record.
        """
        return list(self.predictions(source, adapter, batch_size, seq_len, on_progress=on_progress))

    def predictions(
        self,
        source: RecordSource,
        adapter: AdapterSpecs = None,
        batch_size: int = 8,
        seq_len: int | None = None,
        *,
        on_progress: prediction.OnProgress | None = None,
    ) -> Iterator[dict[str, Any]]:
        """As `predict`, one result after the other: for more records than memory has room for.

        Args:
            source: as for `predict`.
            adapter: as for `predict`; with a list, the records are all read first.
            batch_size: as for `predict`.
            seq_len: as for `predict`.
            on_progress: as for `predict`.

        Raises:
            EdgePeftError: as `predict`, when the first result is asked for; of a record that cannot be used,
                after the results of many that stand before it.
        """
        windows = self._predicted(source, adapter, batch_size, seq_len, on_progress)
        while True:
            with self._lock, self._reading():
                window = next(windows, None)
            if window is None:
                return
            yield from window

    def _predicted(
        self,
        source: RecordSource,
        adapter: AdapterSpecs,
        batch_size: int,
        seq_len: int | None,
        on_progress: prediction.OnProgress | None,
    ) -> Iterator[list[dict[str, Any]]]:
        """The results of as many records at a time as are read at once."""
        if self.manifest.task.endswith("-generation"):
            raise UsageError(f"a {self.manifest.task} bundle predicts nothing a record: use generate")
        labels = self._sessions.registry.labels(adapter)
        self._task.know(labels)
        windows: Iterable[list[Example]]
        if isinstance(adapter, list | tuple):
            windows = [self._examples(source, adapter, batch_size, seq_len)]
        else:
            length = self._length(batch_size, seq_len)
            windows = prediction.windows(self._task, records(source), length, batch_size)
        total = count_records(source) if on_progress is not None else None
        done = 0
        for examples in windows:
            read = max(total or 0, done + len(examples))
            tell = None if on_progress is None else partial(_tell, on_progress, done, read)
            yield prediction.results(self._task, self.forward, examples, adapter, batch_size, tell)
            done += len(examples)
            self._task.know(labels)  # a call in between may have had others

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

    @one_at_a_time
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
        from .tasks.embedding import Embedding

        task = self._task
        if not isinstance(task, Embedding):
            raise UsageError(f"a {self.manifest.task} bundle embeds nothing: it takes feature-extraction")
        source = task.prompted(prediction.as_records(task, texts), prompt)
        examples = self._examples(source, adapter, batch_size, seq_len)
        return prediction.embeddings(task, self.forward, examples, adapter, batch_size)

    def _examples(
        self, source: RecordSource, adapter: AdapterSpecs, batch_size: int, seq_len: int | None
    ) -> list[Example]:
        length = self._length(batch_size, seq_len)
        examples = self._task.encode_all(records(source), length, training=False)
        check_rows(adapter, len(examples), "records")
        return examples

    def _length(self, batch_size: int, seq_len: int | None) -> int:
        """Tokens a text is cut to, or samples a recording; both are checked."""
        TrainingOptions(seq_len=seq_len, batch_size=batch_size).check(self.manifest)
        return self.manifest.model.max_length if seq_len is None else seq_len

    @one_at_a_time
    def adapt(
        self, source: RecordSource, output: str | Path, *, on_step: OnStep | None = None, **options: Any
    ) -> AdaptReport:
        """Train an adapter on records, within the memory budget, and keep it if it is better on held-out
        ones.

        Args:
            source: as for `predict`, with labels.
            output: folder for the new adapter, in PEFT's format; it is left alone unless the update is kept.
            on_step: called after every step; what it raises ends the update there, with the work so far in a
                checkpoint that `resume` goes on from.
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
        from .training.adapt import Update

        self._sessions.check_unused("training needs its memory")
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


def _tell(on_progress: prediction.OnProgress, before: int, total: int, done: int) -> None:
    on_progress(before + done, total)


def load(
    path: str | Path,
    memory_budget: str | int | None = None,
    threads: int = 0,
    *,
    int8_activations: bool = False,
    force: bool = False,
) -> Model:
    """Open a bundle and check every file of it.

    Args:
        path: the bundle's folder.
        memory_budget: limit on the whole process's resident memory, such as `"128MiB"`; None for no limit.
        threads: threads of a session; 0 lets onnxruntime choose.
        int8_activations: generate with activations rounded to 8 bits in products with quantized weights:
            a token takes about half the time, and logits move by some hundredths of their spread.
            `forward`, `predict` and training stay exact.
        force: take adapters that say they were trained on another base.

    Raises:
        BundleError: the bundle is missing, damaged, of a newer format or reaches outside its folder.
        UsageError: the budget is no size, or the bundle cannot generate with rounded activations.
    """
    budget_bytes = None if memory_budget is None else parse_size(memory_budget)
    bundle = open_bundle(path, force=force)
    return Model(bundle, budget_bytes, threads, int8_activations=int8_activations)
