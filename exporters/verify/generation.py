"""Generate as a device would, with the folder's own settings, and compare each token with transformers'.

Each row follows transformers' `generate`: at every step it says what it would choose itself, and goes on with
what transformers chose. Behind a few tokens each token that ends a text is made the likeliest once, on both
sides.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import transformers

from edgepeft.bundle.reader import Bundle
from edgepeft.errors import VerificationError
from edgepeft.runtime.adapters.graph_inputs import graph_inputs, inputs_taken
from edgepeft.runtime.generation.decoders.base import Decoder, FloatArray
from edgepeft.runtime.generation.decoders.choose import decoder_for
from edgepeft.runtime.generation.loop import Generation
from edgepeft.runtime.generation.options import GenerationOptions
from edgepeft.runtime.generation.sampling import Sampler, candidates, penalized
from edgepeft.runtime.memory.inference import RESIDENT, RunPlan
from edgepeft.runtime.session import GraphSession
from edgepeft.runtime.text.tokenizer import TOKENIZER_FILE, Text

from ..sources.quiet import quiet
from ..sources.transformers_model import Source

#: Tokens that are generated, and those before which a token that ends a text is pushed.
COUNT, PUSHED_AT = 16, 2
#: What is added to the logit of a token that is pushed, and how many of them are.
PUSH, MOST_ENDS = 1e4, 3
#: Largest sum of differences of probabilities that are drawn from; at a border of top-p a token is in or out.
SHARES = 0.1

Array = np.ndarray


def verify_generation(
    bundle: Bundle, source: Source, prompt: Sequence[int], tolerance: float
) -> dict[str, Any]:
    """What was compared.

    Args:
        bundle: a language model's, without an adapter.
        source: the model on the weights that the bundle holds.
        prompt: tokens.
        tolerance: of a logit, of the largest magnitude.

    Raises:
        VerificationError: a token, or the end, is not transformers'.
    """
    model, manifest = source.model, bundle.manifest
    decodes = manifest.task == "text2text-generation"
    count = min(COUNT, manifest.model.max_length - (1 if decodes else len(prompt)))
    if count <= PUSHED_AT:
        return {"tokens": 0}
    declared = model.generation_config.eos_token_id
    listed = declared if isinstance(declared, list | tuple) else [declared]
    ends = [token for token in listed if token is not None and token < manifest.model.vocab_size]
    pushed = [None, *ends[:MOST_ENDS]]
    stops = bool(model.generation_config.stop_strings)
    if stops and source.tokenizer is None:
        return {"tokens": 0}
    ids = torch.tensor([list(prompt)] * len(pushed))
    options = {"tokenizer": source.tokenizer} if stops else {}
    torch.manual_seed(0)
    try:
        with quiet(), torch.no_grad():
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                logits_processor=transformers.LogitsProcessorList([_Push(pushed)]),
                return_dict_in_generate=True,
                output_scores=True,
                pad_token_id=0,
                max_time=None,
                num_return_sequences=1,
                **options,
            )
    except Exception as error:  # whatever a family's own generation raises
        return {"tokens": 0, "transformers": next(iter(str(error).splitlines()), type(error).__name__)}
    written = made.sequences[:, 1 if decodes else len(prompt) :].tolist()
    scores = [step.numpy() for step in made.scores]
    chosen = GenerationOptions.of({"max_new_tokens": count, "seed": 0}, manifest.model.generation)
    if bool(model.generation_config.do_sample) != (chosen.temperature > 0):
        raise VerificationError(
            f"tokens are {'drawn' if chosen.temperature else 'not drawn'} where transformers does otherwise: "
            "nothing was written"
        )
    rows = [
        _Follower(chosen, _until(answer, ends), [step[row] for step in scores], pushed[row], tolerance)
        for row, answer in enumerate(written)
    ]
    text = Text(bundle) if stops and TOKENIZER_FILE in manifest.files else None
    decoder = _decoder(bundle, len(rows), len(prompt) + count)
    generation = Generation(
        decoder,
        manifest,
        [list(prompt)] * len(rows),
        chosen,
        None if text is None else text.decode,
        samplers=rows,
    )
    for row, completion in zip(rows, generation.run(), strict=True):
        row.ended(completion.ids)
    return {"tokens": sum(row.step for row in rows), "ends": len(rows) - 1}


class _Push(transformers.LogitsProcessor):
    def __init__(self, tokens: Sequence[int | None]) -> None:
        self._tokens, self._step = tokens, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        del input_ids
        if self._step == PUSHED_AT:
            for row, token in enumerate(self._tokens):
                if token is not None:
                    scores[row, token] += PUSH
        self._step += 1
        return scores


class _Follower(Sampler):
    """Chooses what transformers chose, after a look at what it would choose itself."""

    def __init__(
        self,
        options: GenerationOptions,
        expected: Sequence[int],
        scores: Sequence[Array],
        pushed: int | None,
        tolerance: float,
    ) -> None:
        super().__init__(options)
        self._given, self._expected, self._scores = options, expected, scores
        self._pushed, self._tolerance = pushed, tolerance
        self.step = 0

    def choose(self, logits: FloatArray, seen: Iterable[int]) -> int:
        """See `Sampler.choose`.

        Raises:
            VerificationError: the choice is not transformers', or it has ended.
        """
        if self.step == len(self._expected):
            raise VerificationError(
                f"an answer goes on behind its token {self.step}, {self._expected[-1]}, where transformers "
                "ends it: nothing was written"
            )
        wanted, theirs = self._expected[self.step], self._scores[self.step]
        logits = penalized(logits, seen, self._given.repetition_penalty)
        if self._pushed is not None and self.step == PUSHED_AT:
            logits = logits.copy()
            logits[self._pushed] += PUSH
        if self._given.temperature == 0:
            own = int(logits.argmax())
            scale = max(1.0, float(np.abs(theirs[np.isfinite(theirs)]).max()))
            agrees = bool(own == wanted or abs(theirs[wanted] - theirs[own]) <= self._tolerance * scale)
        else:
            tokens, shares = candidates(logits, self._given)
            found = np.zeros(len(logits), np.float64)
            found[tokens] = shares
            powers = np.exp(theirs.astype(np.float64) - theirs.max())
            own = int(tokens[shares.argmax()])
            agrees = bool(np.abs(found - powers / powers.sum()).sum() <= SHARES)
        self.step += 1
        if not agrees:
            raise VerificationError(
                f"token {self.step} of an answer is {own}, transformers' with the same generation_config "
                f"is {wanted}: nothing was written"
            )
        return wanted

    def ended(self, ids: Sequence[int]) -> None:
        """Whether all of it was said.

        Raises:
            VerificationError: it was not.
        """
        if len(ids) < len(self._expected):
            raise VerificationError(
                f"an answer ends with its token {len(ids)}, {ids[-1]}, where transformers goes on: nothing "
                "was written"
            )


def _until(answer: list[int], ends: Sequence[int]) -> list[int]:
    """An answer up to its end; what follows is padding."""
    last = next((index for index, token in enumerate(answer) if token in ends), len(answer) - 1)
    return answer[: last + 1]


def _decoder(bundle: Bundle, rows: int, capacity: int) -> Decoder:
    """The decoder that a device without a budget would choose for no adapter."""
    manifest = bundle.manifest
    role = RESIDENT if manifest.decoder is None else manifest.decoder.plain_graph
    session = GraphSession(bundle, role)
    session.bind(inputs_taken(manifest, role, graph_inputs(bundle, [])))
    return decoder_for(session, manifest, RunPlan(role, 0, 0, 0, chunk=capacity), [capacity] * rows)
