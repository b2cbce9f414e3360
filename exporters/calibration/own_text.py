"""Text that a language model writes itself, to be calibrated on where there are no records.

What it writes is what it expects, and so near what it will read: it gains nine tenths of what text of users
gains (docs/decisions/quantization.md). Half of the texts begin with any token, so that nothing is left out;
the others as the model's own conversations do, where it has a template for such, or as its texts do.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import transformers

from edgepeft.errors import ExportError

from ..sources.transformers_model import Source
from .groups import Feeds
from .passes import fast_products, requiring_gradients

#: Texts, and tokens that are written of each.
TEXTS, TOKENS = 64, 144
#: Texts that are read together afterwards.
_TOGETHER = 8
#: Stands for what a user says, in a template.
_CONTENT = "\N{OBJECT REPLACEMENT CHARACTER}"


def own_text(source: Source, seed: int) -> list[Feeds]:
    """The model's keyword arguments for texts that it has written, a few texts of one length each.

    Args:
        source: a model for text generation.
        seed: of what is drawn.

    Raises:
        ExportError: transformers cannot let the model write.
    """
    openings = [opening for opening in (_start(source), _user_turn(source)) if opening]
    begun = [openings[number % len(openings)] for number in range(TEXTS // 2)] if openings else []
    generator = torch.Generator().manual_seed(seed)
    words = int(source.config.get_text_config().vocab_size)
    before = _before_a_text(source)
    drawn = torch.randint(words, (TEXTS - len(begun),), generator=generator)
    begun += [[*before, int(token)] for token in drawn]
    try:
        texts = _continued(source.model, begun, min(TOKENS, source.max_length), seed)
    except Exception as error:  # whatever a model's own code raises
        raise ExportError(
            f"{source.name}: cannot write the text that it is to be calibrated on ({error}): name texts with "
            "--calibration, or round to the nearest with --quick"
        ) from error
    return [{"input_ids": part} for part in texts.split(_TOGETHER)]


def _before_a_text(source: Source) -> list[int]:
    return [] if source.tokenizer is None else list(source.tokenizer("")["input_ids"])


def _start(source: Source) -> list[int]:
    start = getattr(source.tokenizer, "bos_token_id", None)
    return [] if start is None else [start]


def _user_turn(source: Source) -> list[int]:
    """A conversation up to where the user's words begin; empty where there is no such template."""
    if getattr(source.tokenizer, "chat_template", None) is None:
        return []
    try:
        text = source.tokenizer.apply_chat_template([{"role": "user", "content": _CONTENT}], tokenize=False)
    except Exception:  # whatever a model's own template raises
        return []
    before, found, _ = text.partition(_CONTENT)
    return list(source.tokenizer(before, add_special_tokens=False)["input_ids"]) if found else []


def _continued(model: Any, begun: Sequence[Sequence[int]], length: int, seed: int) -> torch.Tensor:
    """Beginnings and what the model writes behind them, drawn from its own distribution alone, int64
    `[texts, length]`."""
    chosen = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_length=length, pad_token_id=0
    )  # without an end token: what comes after one is a text, too
    begun = [one[:length] for one in begun]

    def prescribed(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Beginnings differ in length: those that are longer are written, too, and padding is none."""
        place = tokens.shape[1]
        for row, one in enumerate(begun):
            if place < len(one):
                scores[row] = -torch.inf
                scores[row, one[place]] = 0
        return scores

    first = torch.tensor([one[:1] for one in begun])
    with ExitStack() as stack:
        stack.enter_context(requiring_gradients(model, True))  # only of such autocast keeps what it has cast
        # What is not given is taken from there.
        stack.callback(setattr, model, "generation_config", model.generation_config)
        model.generation_config = chosen
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.no_grad())
        stack.enter_context(fast_products(cache_enabled=True))
        torch.manual_seed(seed)
        written: torch.Tensor = model.generate(
            first, attention_mask=torch.ones_like(first), logits_processor=[prescribed], use_cache=True
        )
    return written
