"""How texts are generated, and what came of one."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from edgepeft.bundle.manifest import GenerationSettings, Manifest
from edgepeft.errors import ContextError, UsageError

FinishReason = Literal["eos", "stop", "length", "cancelled"]


@dataclass(frozen=True)
class GenerationOptions:
    """How texts are generated. What changes logits has the definitions and the order of transformers.

    The defaults are those of a model whose folder says nothing; `of` knows a model's own.

    Attributes:
        max_new_tokens: tokens to write at most.
        temperature: logits are divided by it before a token is drawn; 0 takes the most likely token.
        top_k: draw among so many of the likeliest tokens.
        top_p: draw among the likeliest tokens that together have this probability.
        min_p: draw among tokens that have at least this share of the likeliest one's probability.
        repetition_penalty: what logits of tokens that the text holds are divided by where they are positive,
            and multiplied with where they are negative; 1 changes nothing.
        seed: of the draws; row `i` of several has the seed `seed + i`. None: a new one every time.
        stop: texts that end the answer; they are not part of it.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            UsageError: names the option, what it is and what is expected.
        """
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("max_new_tokens", "top_k", "seed"):
            value = getattr(self, name)
            _check(name, value, "a whole number", value is None or type(value) is int)
        _check("max_new_tokens", self.max_new_tokens, "at least 1", self.max_new_tokens >= 1)
        temperature, penalty = self.temperature, self.repetition_penalty
        # By less, a logit of float32 becomes infinite.
        _check(
            "temperature", temperature, "0, or 0.001 to 1,000", temperature == 0 or 1e-3 <= temperature <= 1e3
        )
        _check("repetition_penalty", penalty, "0.001 to 1,000", 1e-3 <= penalty <= 1e3)
        if self.top_k is not None:
            _check("top_k", self.top_k, "at least 1", self.top_k >= 1)
        if self.top_p is not None:
            _check("top_p", self.top_p, "more than 0, at most 1", 0 < self.top_p <= 1)
        if self.min_p is not None:
            _check("min_p", self.min_p, "0 to 1", 0 <= self.min_p <= 1)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UsageError(f"stop is {self.stop!r}, expected texts that are not empty")
        for name in ("top_k", "top_p", "min_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                raise UsageError(
                    f"{name} chooses among draws, and at temperature 0 nothing is drawn: give a temperature, "
                    "such as 1"
                )

    @classmethod
    def of(
        cls, options: Mapping[str, object], settings: GenerationSettings | None = None
    ) -> "GenerationOptions":
        """Options by name; those that are missing or None are the model's own, of `settings`.

        Raises:
            UsageError: there is no such option, or it has a value that cannot be used.
        """
        known = [item.name for item in dataclasses.fields(cls)]
        unknown = sorted(options.keys() - set(known))
        if unknown:
            raise UsageError(f"generation takes no option {unknown[0]!r}: it takes {', '.join(known)}")
        given = {name: value for name, value in options.items() if value is not None and value != ()}
        own = {} if settings is None else _own(settings, given)
        try:
            return cls(**{**own, **given})  # type: ignore[arg-type]
        except TypeError as error:  # a comparison with something that is no number
            raise UsageError(f"a generation option has a value of the wrong type ({error})") from error


def _own(settings: GenerationSettings, given: Mapping[str, object]) -> dict[str, object]:
    """A model's own options; those of draws only where something is drawn."""
    own: dict[str, object] = {
        "temperature": settings.temperature,
        "repetition_penalty": settings.repetition_penalty,
        "stop": settings.stop_strings,
    }
    if given.get("temperature", settings.temperature) != 0:
        own |= {name: getattr(settings, name) for name in ("top_k", "top_p", "min_p")}
    return {name: value for name, value in own.items() if value is not None}


@dataclass(frozen=True)
class Completion:
    """What was generated for one prompt.

    Attributes:
        text: the answer; empty where no tokenizer was needed.
        ids: its tokens, the end-of-sequence token or those of a stop text included.
        finish_reason: `eos` (an end-of-sequence token), `stop` (a stop text), `length` (`max_new_tokens`) or
            `cancelled`.
        prompt_tokens: tokens of the prompt.
        cached_tokens: of these, tokens that came from a prompt cache.
        prefill_s: seconds until the first token, of all rows together.
        decode_s: seconds of all further tokens.
    """

    text: str
    ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    prefill_s: float
    decode_s: float


def check_lengths(manifest: Manifest, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuse what the model's context cannot hold, before any work is done.

    Raises:
        UsageError: a prompt is empty.
        ContextError: a prompt and its answer do not fit the context.
    """
    if not prompts:
        raise UsageError("there are no prompts: give the model something to continue")
    for index, prompt in enumerate(prompts):
        the_prompt = "the prompt" if len(prompts) == 1 else f"prompt {index + 1} of {len(prompts)}"
        _check_length(manifest, the_prompt, len(prompt), max_new_tokens)


def _check_length(manifest: Manifest, the_prompt: str, prompt_tokens: int, max_new_tokens: int) -> None:
    if prompt_tokens < 1:
        raise UsageError(f"{the_prompt} has no tokens: give the model something to continue")
    limit = manifest.model.max_length
    if manifest.task == "text2text-generation":
        if max(prompt_tokens, max_new_tokens) > limit:
            raise ContextError(
                f"{the_prompt} has {prompt_tokens} tokens and {max_new_tokens} are asked for, the model "
                f"takes and writes at most {limit} each: shorten the prompt or lower --max-new-tokens"
            )
        return
    if prompt_tokens + max_new_tokens > limit:
        raise ContextError(
            f"{the_prompt} has {prompt_tokens} tokens and {max_new_tokens} more are asked for, the model's "
            f"context holds {limit}: shorten the prompt or lower --max-new-tokens to "
            f"{max(limit - prompt_tokens, 0)}"
        )


def _check(name: str, value: object, expected: str, holds: bool) -> None:
    if not holds:
        raise UsageError(f"{name} is {value!r}, expected {expected}")
