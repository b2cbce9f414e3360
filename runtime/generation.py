"""Greedy generation with a key/value cache that stays in onnxruntime's own memory between tokens."""

import numpy as np

from edgepeft.bundle.manifest import Manifest
from edgepeft.errors import UsageError
from edgepeft.runtime.cache import PAST, PRESENT
from edgepeft.runtime.session import GraphSession
from edgepeft.runtime.streamed import StreamedModel


def check_length(manifest: Manifest, prompt_tokens: int, max_new_tokens: int) -> None:
    """Refuse what the model's context cannot hold, before any work is done.

    Raises:
        UsageError: the prompt is empty, nothing is asked for, or the two do not fit the context.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    if prompt_tokens < 1:
        raise UsageError("the prompt has no tokens: give the model something to continue")
    limit = manifest.model.max_length
    if manifest.task == "text2text-generation":
        if max(prompt_tokens, max_new_tokens) > limit:
            raise UsageError(
                f"the prompt has {prompt_tokens} tokens and {max_new_tokens} are asked for, the model takes "
                f"and writes at most {limit} each: shorten the prompt or lower --max-new-tokens"
            )
        return
    if prompt_tokens + max_new_tokens > limit:
        raise UsageError(
            f"the prompt has {prompt_tokens} tokens and {max_new_tokens} more are asked for, the model's "
            f"context holds {limit}: shorten the prompt or lower --max-new-tokens to "
            f"{max(limit - prompt_tokens, 0)}"
        )


def empty_cache(session: GraphSession, batch: int) -> dict[str, np.ndarray]:
    """Cache inputs of length 0, `[batch, kv_heads, 0, head_dim]` float32 each; none for a model without a
    cache."""
    return {
        name: np.zeros((batch, int(spec.shape[1]), 0, int(spec.shape[3])), np.dtype(spec.dtype))
        for name, spec in session.inputs.items()
        if name.startswith(PAST)
    }


def greedy(session: GraphSession, manifest: Manifest, prompt: list[int], max_new_tokens: int) -> list[int]:
    """The most likely continuation token by token, until an end-of-sequence token or `max_new_tokens`.

    Args:
        session: the inference graph, with an adapter's inputs bound.
        manifest: the bundle's manifest.
        prompt: token ids.
        max_new_tokens: tokens to generate at most.

    Returns:
        The new token ids, the end-of-sequence token included if it was reached.

    Raises:
        UsageError: see `check_length`.
    """
    check_length(manifest, len(prompt), max_new_tokens)
    presents = [name for name in session.outputs if name.startswith(PRESENT)]
    session.bind(empty_cache(session, 1))
    ids = np.array([prompt], np.int64)
    generated: list[int] = []
    while True:
        length = len(prompt) + len(generated)
        feeds = {"input_ids": ids, "attention_mask": np.ones((1, length), np.int64)}
        session.bind({name: value for name, value in feeds.items() if name in session.inputs})
        outputs = session.run_for(["logits", *presents])
        token = int(outputs.pop("logits").numpy()[0, -1].argmax())
        generated.append(token)
        if token in manifest.model.eos_token_ids or len(generated) == max_new_tokens:
            # The session would keep the last cache alive for as long as it lives.
            session.bind(empty_cache(session, 1))
            return generated
        session.bind_values({PAST + name.removeprefix(PRESENT): value for name, value in outputs.items()})
        # A graph without a cache, of an ONNX file that has none, reads the whole text again.
        ids = np.array([[token]] if presents else [[*prompt, *generated]], np.int64)


def greedy_streamed(
    model: StreamedModel, manifest: Manifest, prompt: list[int], max_new_tokens: int, chunk: int
) -> list[int]:
    """As `greedy`, the weights streamed and the prompt read `chunk` tokens at a time.

    Raises:
        UsageError: see `check_length`.
    """
    check_length(manifest, len(prompt), max_new_tokens)
    inputs = {spec.name for spec in manifest.graphs["inference"].inputs}
    # The last token that is written is not read.
    cache = model.new_cache(1, len(prompt) + max_new_tokens - 1)

    def batch(ids: list[int]) -> dict[str, np.ndarray]:
        length = len(ids) + (0 if cache is None else cache.length)
        feeds = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, length), np.int64)}
        return {name: value for name, value in feeds.items() if name in inputs}

    unread = list(prompt)
    while cache is not None and len(unread) > chunk:
        model.read(batch(unread[:chunk]), cache)
        unread = unread[chunk:]
    generated: list[int] = []
    while True:
        token = int(model.next_logits(batch(unread), cache)[0].argmax())
        generated.append(token)
        if token in manifest.model.eos_token_ids or len(generated) == max_new_tokens:
            return generated
        unread = [*prompt, *generated] if cache is None else [token]


def greedy_decoder(
    session: GraphSession, manifest: Manifest, prompt: list[int], max_new_tokens: int
) -> list[int]:
    """The most likely answer of an encoder-decoder, as `greedy`. Without a cache: every token costs a run of
    the whole graph."""
    check_length(manifest, len(prompt), max_new_tokens)
    ids = np.array([prompt], np.int64)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    session.bind({name: value for name, value in feeds.items() if name in session.inputs})
    start = manifest.model.decoder_start_token_id
    assert start is not None  # checked with the manifest
    generated: list[int] = []
    while len(generated) < max_new_tokens:
        session.bind({"decoder_input_ids": np.array([[start, *generated]], np.int64)})
        generated.append(int(session.run_for(["logits"])["logits"].numpy()[0, -1].argmax()))
        if generated[-1] in manifest.model.eos_token_ids:
            break
    return generated
