"""One loop for all ways to generate: any decoder, one row or several, greedy or drawn."""

import time
from collections.abc import Callable, Sequence

from edgepeft.bundle.manifest import Manifest

from ..key_value_cache import cache_specs
from .decoders.base import Array, Decoder, FloatArray
from .detokenizer import Detokenizer, StopTexts
from .options import Completion, FinishReason, GenerationOptions
from .prompt_cache import PromptCache
from .rules import Rules
from .sampling import Sampler

Decode = Callable[[list[int]], str]

# Tokens of a prompt that are read before somebody else has a turn, or the stream may be closed.
_PIECE = 512


class _Row:
    """One prompt and its answer so far."""

    def __init__(
        self,
        manifest: Manifest,
        prompt: Sequence[int],
        options: GenerationOptions,
        sampler: Sampler,
        decode: Decode | None,
    ) -> None:
        self.prompt = list(prompt)
        self.read = 0  # tokens of the prompt
        self.ids: list[int] = []
        self.text = ""
        self.reason: FinishReason | None = None
        self.cached = 0
        self._options, self._ends = options, manifest.model.eos_token_ids
        self._sampler = sampler
        self._text = None if decode is None else Detokenizer(decode)
        self._stops = StopTexts(options.stop)
        # An encoder-decoder's penalty counts what the decoder has said, its start token included; nobody's
        # counts what is no token of the vocabulary.
        start = manifest.model.decoder_start_token_id
        known = manifest.model.vocab_size
        read = [token for token in prompt if token < known] if start is None else [start]
        self._seen = set(read)
        self._rules = Rules(manifest.model, read, options.max_new_tokens)

    def take(self, logits: FloatArray) -> str:
        """Choose the next token; the text that it adds to the answer."""
        token = self._sampler.choose(self._rules.applied(logits, self.ids), self._seen)
        self.ids.append(token)
        self._seen.add(token)
        piece = ""
        if token in self._ends:
            self.reason = "eos"
        elif self._text is not None:
            piece = self._stops.add(self._text.add(token))
        if self.reason is None and len(self.ids) == self._options.max_new_tokens:
            self.reason = "length"
        if self.reason is not None and self._text is not None:
            piece += self._stops.add(self._text.finish())
        if self._stops.found:
            self.reason = "stop"
        if self.reason is not None:
            piece += self._stops.finish()
        self.text += piece
        return piece


class Generation:
    """Answers to one or several prompts, a token at a time.

    Args:
        decoder: with as many rows as there are prompts, all of them empty; it is closed at the end.
        manifest: the bundle's manifest.
        prompts: token ids.
        options: how.
        decode: the text of token ids; None where only the ids are asked for.
        caches: keys and values of what each prompt begins with; none where None.
        keep: whether to keep the first row's at the end.
        samplers: what chooses each row's tokens; by `options` where None.

    Attributes:
        kept: these, with the tokens that they stand for; None before the end, or where nothing was read.
    """

    def __init__(
        self,
        decoder: Decoder,
        manifest: Manifest,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
        decode: Decode | None,
        caches: Sequence[PromptCache | None] | None = None,
        *,
        keep: bool = False,
        samplers: Sequence[Sampler] | None = None,
    ) -> None:
        self._decoder, self._caches = decoder, list(caches or [None] * len(prompts))
        self._keep, self._is_closed = keep, False
        self.kept: tuple[list[int], dict[str, Array]] | None = None
        own = samplers or [Sampler(options, row) for row in range(len(prompts))]
        self._rows = [
            _Row(manifest, prompt, options, sampler, decode)
            for prompt, sampler in zip(prompts, own, strict=True)
        ]
        # Without a cache, a prompt is read with every token, and an encoder reads it whole.
        self._piece = _PIECE if cache_specs(manifest) else max(map(len, prompts))
        self._prefill_s = self._decode_s = 0.0

    @property
    def ended(self) -> bool:
        """Whether every row has its answer."""
        return all(row.reason is not None for row in self._rows)

    @property
    def completions(self) -> list[Completion]:
        """What every row has so far, in the order of the prompts; one that has not ended is cancelled."""
        return [
            Completion(
                text=row.text,
                ids=row.ids,
                finish_reason=row.reason or "cancelled",
                prompt_tokens=len(row.prompt),
                cached_tokens=row.cached,
                prefill_s=self._prefill_s,
                decode_s=self._decode_s,
            )
            for row in self._rows
        ]

    def advance(self) -> list[str]:
        """Read on in a prompt, or one more token for every row that has not ended; the text that each row
        gets."""
        began_s = time.perf_counter()
        unread = next((index for index, row in enumerate(self._rows) if not row.ids), None)
        pieces = self._step() if unread is None else self._read(unread)
        if self.ended:
            self.close()
        else:
            for index, row in enumerate(self._rows):
                if row.reason is not None:
                    self._decoder.truncate(index, 0)
        if unread is None:
            self._decode_s += time.perf_counter() - began_s
        else:
            self._prefill_s += time.perf_counter() - began_s
        return pieces

    def run(self) -> list[Completion]:
        """All answers."""
        try:
            while not self.ended:
                self.advance()
        finally:
            self.close()
        return self.completions

    def close(self) -> None:
        """Free what generating holds; rows that have not ended are cancelled."""
        if self._is_closed:
            return
        self._is_closed = True
        first = self._rows[0]
        if self._keep and self._decoder.lengths[0]:
            read = [*first.prompt, *first.ids][: self._decoder.lengths[0]]
            self.kept = read, self._decoder.snapshot(0)
        for row in self._rows:
            row.reason = row.reason or "cancelled"
        self._caches.clear()
        self._decoder.close()
        del self._decoder  # and with it the session, once the model has closed it too

    def _read(self, index: int) -> list[str]:
        """Some more of a row's prompt; after the last of it, the first token."""
        row = self._rows[index]
        cache = self._caches[index]
        if row.read == 0 and cache is not None:
            row.read = row.cached = cache.common_prefix(row.prompt)
            if row.cached:
                self._decoder.restore(index, cache.state(row.cached))
        piece = row.prompt[row.read : row.read + self._piece]
        logits = self._decoder.read(index, piece)
        row.read += len(piece)
        pieces = [""] * len(self._rows)
        if row.read == len(row.prompt):
            pieces[index] = row.take(logits)
            self._caches[index] = None
        return pieces

    def _step(self) -> list[str]:
        logits = self._decoder.step([row.ids[-1] for row in self._rows])
        return [
            row.take(values) if row.reason is None else ""
            for row, values in zip(self._rows, logits, strict=True)
        ]
