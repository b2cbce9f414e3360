"""Generation as a loaded model offers it: prompts are checked, planned for and given a decoder."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from edgepeft.bundle.reader import Bundle
from edgepeft.errors import UsageError
from edgepeft.sizes import format_size

from ..adapters.graph_inputs import AdapterSpec
from ..adapters.loaded import AdapterSpecs, check_rows, grouped
from ..inputs import check_batch, model_inputs
from ..key_value_cache import cache_specs, growing_cache_bytes
from ..memory.inference import STREAMED, RunPlan, plan_forward, plan_generation
from ..memory.room import check_room, within
from ..open_sessions import Sessions
from ..tasks import Task
from ..text.chat import BESIDE, NOTHING
from .decoders.by_adapter import ByAdapter
from .decoders.choose import decoder_for
from .loop import Generation
from .options import Completion, GenerationOptions, check_lengths
from .prefix import begin_row, prefix_cache
from .prompt_cache import PromptCache, open_prompt_cache, origin

# Bytes that encoding takes for each of a text: 86 to 284, measured with two tokenizers.
_ENCODED = 300

Messages = Sequence[Mapping[str, Any]]
CacheSpec = PromptCache | str | Path | None
"""A prompt cache, or its file."""


@dataclass(frozen=True)
class _Begun:
    """A generation, what its keys and values depend on, and the bytes that they take at most."""

    generation: Generation
    made_by: Mapping[str, str]
    held_bytes: int


class TextStream(Iterator[str]):
    """The answer to one prompt, as pieces of text that come as the model writes them.

    It has keys and values of its own: other calls may come between two pieces, of the same or of other
    threads. At its end, or once it is closed, or when nothing refers to it any more, its memory is free.
    """

    def __init__(self, begun: _Begun, sessions: Sessions, lock: threading.RLock) -> None:
        self._generation, self._made_by = begun.generation, begun.made_by
        self._sessions, self._lock = sessions, lock
        self.held_bytes = begun.held_bytes
        sessions.lend(self)

    @property
    def result(self) -> Completion:
        """What was generated, once the stream has ended.

        Raises:
            UsageError: it has not.
        """
        with self._lock:
            if not self._generation.ended:
                raise UsageError("the stream has not ended: read it to its end or close it first")
            return self._generation.completions[0]

    @property
    def prompt_cache(self) -> PromptCache | None:
        """What a stream with `keep` has read, once it has ended, for the next `prompt_cache`; None where
        nothing was read."""
        with self._lock:
            kept = self._generation.kept
            return None if kept is None else PromptCache.of(kept[0], self._made_by, kept[1])

    def __next__(self) -> str:
        """The next piece, never empty, of whole characters."""
        piece = ""
        while not piece:
            # Other threads may have the model between two tokens, or pieces of the prompt.
            with self._lock:
                if self._generation.ended:
                    raise StopIteration
                try:
                    (piece,) = self._generation.advance()
                except BaseException:
                    self.close()
                    raise
                if self._generation.ended:
                    self._sessions.give_back(self)
        return piece

    def close(self) -> None:
        """End the stream here and free its memory; any thread may. An answer that had not ended is
        `cancelled`."""
        with self._lock:
            self._generation.close()
            self._sessions.give_back(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Generator:
    """Begins generations; the caller holds the model's lock.

    Args:
        bundle: the bundle.
        task: its task, which has the tokenizer.
        sessions: where sessions come from.
        lock: the model's.
        budget_bytes: limit on the process's resident memory; None for no limit.
        int8_activations: round activations to 8 bits; the bundle has a graph for it.
    """

    def __init__(
        self,
        bundle: Bundle,
        task: Task,
        sessions: Sessions,
        lock: threading.RLock,
        budget_bytes: int | None,
        *,
        int8_activations: bool = False,
    ) -> None:
        self._manifest = bundle.manifest
        self._int8 = int8_activations
        self._task, self._sessions, self._lock, self._budget_bytes = task, sessions, lock, budget_bytes
        self._decodes = self._manifest.task == "text2text-generation"

    def texts(
        self,
        prompt: str | Sequence[str] | None,
        messages: Messages | None,
        adapter: AdapterSpecs,
        prompt_cache: CacheSpec,
        options: Mapping[str, object],
    ) -> str | list[str]:
        """See `edgepeft.runtime.model.Model.generate`."""
        beside, chosen = self._chosen(options)
        if prompt is None or isinstance(prompt, str):
            begun = self._begin([self._encode(prompt, messages, beside)], adapter, chosen, prompt_cache)
            return begun.generation.run()[0].text
        prompts = [self._encode(text, messages, beside) for text in prompt]
        begun = self._begin(prompts, adapter, chosen, prompt_cache)
        return [completion.text for completion in begun.generation.run()]

    def stream(
        self,
        prompt: str | None,
        messages: Messages | None,
        adapter: AdapterSpec,
        prompt_cache: CacheSpec,
        keep: bool,
        options: Mapping[str, object],
    ) -> TextStream:
        """See `edgepeft.runtime.model.Model.stream`."""
        beside, chosen = self._chosen(options)
        ids = self._encode(prompt, messages, beside)
        begun = self._begin([ids], adapter, chosen, prompt_cache, keep=keep)
        return TextStream(begun, self._sessions, self._lock)

    def ids(
        self,
        prompt: Sequence[int] | Sequence[Sequence[int]],
        adapter: AdapterSpecs,
        prompt_cache: CacheSpec,
        options: Mapping[str, object],
    ) -> list[int] | list[list[int]]:
        """See `edgepeft.runtime.model.Model.generate_ids`."""
        chosen = GenerationOptions.of(options, self._manifest.model.generation)
        several = len(prompt) > 0 and isinstance(prompt[0], Sequence)
        prompts = cast(Sequence[Sequence[int]], prompt if several else [prompt])
        begun = self._begin(prompts, adapter, chosen, prompt_cache, as_text=bool(chosen.stop))
        answers = [completion.ids for completion in begun.generation.run()]
        return answers if several else answers[0]

    def read_prompt(self, prompt: str | None, messages: Messages | None, adapter: AdapterSpec) -> PromptCache:
        """See `edgepeft.runtime.model.Model.read_prompt`."""
        ids = self._encode(prompt, messages)
        self._check([ids])
        (ids,) = self._with_virtual([ids], adapter)
        check_lengths(self._manifest, [ids], 0)
        self._require_cache()
        # The snapshot is as large as another row's cache.
        (own,), plan = self._sessions.borrowed([adapter], self._planned([ids], 0, rows=2))
        decoder = decoder_for(own.session, self._manifest, plan, [len(ids)])
        made_by = origin(self._manifest, plan.role, own.inputs)
        try:
            begin_row(decoder, 0, ids, prefix_cache(self._manifest, own.inputs, made_by))
            return PromptCache.of(ids, made_by, decoder.snapshot(0))
        finally:
            decoder.close()

    def _begin(
        self,
        prompts: Sequence[Sequence[int]],
        adapter: AdapterSpecs,
        options: GenerationOptions,
        prompt_cache: CacheSpec,
        *,
        as_text: bool = True,
        keep: bool = False,
    ) -> _Begun:
        """A generation that has read nothing yet."""
        self._check(prompts)
        check_rows(adapter, len(prompts), "prompts")
        prompts = self._with_virtual(prompts, adapter)
        check_lengths(self._manifest, prompts, options.max_new_tokens)
        if keep or prompt_cache is not None:
            self._require_cache()
        cache = (
            open_prompt_cache(Path(prompt_cache), self._manifest)
            if isinstance(prompt_cache, str | Path)
            else prompt_cache
        )
        rows, cached_bytes = len(prompts) + keep, 0 if cache is None else cache.held_bytes
        planned = self._planned(prompts, options.max_new_tokens, rows, cached_bytes)
        groups = grouped(adapter, len(prompts))
        borrowed, plan = self._sessions.borrowed([spec for spec, _ in groups], planned)
        made_by: dict[str, str] = {}
        caches: list[PromptCache | None] = [None] * len(prompts)
        for own, (_, rows_of) in zip(borrowed, groups, strict=True):
            if keep or cache is not None:
                made_by = origin(self._manifest, plan.role, own.inputs)
            if cache is not None:
                cache.check_origin(made_by)
            prefix = prefix_cache(self._manifest, own.inputs, made_by)
            for row in rows_of:
                caches[row] = _longer(cache, prefix, prompts[row])
        # The last token that is written is not read.
        capacities = [len(prompt) + options.max_new_tokens - 1 for prompt in prompts]
        decoders = [
            (decoder_for(own.session, self._manifest, plan, [capacities[row] for row in rows_of]), rows_of)
            for own, (_, rows_of) in zip(borrowed, groups, strict=True)
        ]
        generation = Generation(
            decoders[0][0] if len(decoders) == 1 else ByAdapter(decoders),
            self._manifest,
            prompts,
            options,
            self._task.text.decode if as_text else None,
            caches,
            keep=keep,
        )
        growing_bytes = growing_cache_bytes(self._manifest, rows, max(capacities))
        return _Begun(generation, made_by, plan.cache_bytes if plan.role == STREAMED else growing_bytes)

    def _planned(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, rows: int, cached_bytes: int = 0
    ) -> Callable[[int, int], RunPlan]:
        """Plans for `Sessions.borrowed`: rows of the longest prompt, beside a cache that is in memory."""
        longest = max(map(len, prompts))

        def plan(process_bytes: int, rank: int) -> RunPlan:
            process_bytes += cached_bytes
            if self._decodes:
                shape = 1, max(longest, max_new_tokens)
                return plan_forward(self._manifest, self._budget_bytes, process_bytes, shape=shape, rank=rank)
            return plan_generation(
                self._manifest,
                self._budget_bytes,
                process_bytes,
                prompt_tokens=longest,
                max_new_tokens=max_new_tokens,
                rank=rank,
                rows=rows,
                int8=self._int8,
            )

        return plan

    def _chosen(self, options: Mapping[str, object]) -> tuple[dict[str, object], GenerationOptions]:
        """What of a caller's options the chat template takes, and how a text is generated."""
        beside = {name: value for name, value in options.items() if name in BESIDE}
        others = {name: value for name, value in options.items() if name not in BESIDE}
        return beside, GenerationOptions.of(others, self._manifest.model.generation)

    def _encode(
        self, prompt: str | None, messages: Messages | None, beside: Mapping[str, object] = NOTHING
    ) -> list[int]:
        """Token ids of a text, or of a conversation up to where the answer begins."""
        self._require_language_model()
        if (prompt is None) == (messages is None):
            raise UsageError("give either a prompt or messages")
        # The template writes the special tokens itself.
        if messages is None and beside:
            raise UsageError(f"{next(iter(beside))} goes with messages: the chat template reads it")
        text = prompt or "" if messages is None else self._task.chat.prompt(messages, "generate", beside)
        count = len(text.encode("utf-8", "surrogatepass"))
        with within(self._budget_bytes, self._sessions.make_room):
            check_room(_ENCODED * count, f"a prompt of {format_size(count)}")
        return self._task.text.encode(text, special_tokens=messages is None)[0]

    def _with_virtual(self, prompts: Sequence[Sequence[int]], adapter: AdapterSpecs) -> list[list[int]]:
        """The prompts with the virtual tokens of their adapters in front."""
        found = [list(prompt) for prompt in prompts]
        for spec, rows in grouped(adapter, len(prompts)):  # which have bindings of their own
            for virtual in self._sessions.registry.virtual_tokens(spec, 1) or ():
                for row in rows:
                    found[row][:0] = virtual.ids.tolist()
        return found

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        """Refuse what cannot be generated, before any work is done."""
        self._require_language_model()
        check_lengths(self._manifest, prompts, 0)
        specs = model_inputs(self._manifest, self._manifest.graphs["inference"].inputs)
        start = self._manifest.model.decoder_start_token_id
        answer = {"decoder_input_ids": [[start]]} if self._decodes else {}
        for prompt in prompts:
            check_batch(self._manifest, specs, {"input_ids": [prompt], **answer})

    def _require_cache(self) -> None:
        if self._decodes or not cache_specs(self._manifest):
            raise UsageError("the model has no key/value cache, so nothing of a prompt can be kept")

    def _require_language_model(self) -> None:
        if not self._manifest.task.endswith("-generation"):
            raise UsageError(f"a {self._manifest.task} bundle generates no text: use predict")


def _longer(
    cache: PromptCache | None, prefix: PromptCache | None, prompt: Sequence[int]
) -> PromptCache | None:
    """The one that more of a prompt begins with."""
    found = [item for item in (cache, prefix) if item is not None]
    return max(found, key=lambda item: item.common_prefix(prompt), default=None)
