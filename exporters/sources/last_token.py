"""Classifiers that read the last token and whose configuration has no token that pads: the mask tells it.

transformers takes the rightmost token that is not the padding, and without one the last position, for one row
only. A bundle pads rows of a batch on the right whatever the token.
"""

from typing import Any

import torch


def pool_by_mask(model: Any) -> None:
    """Have a sequence classifier without a usable `pad_token_id` read the last token that its mask counts.

    Every family compares `input_ids` with `config.pad_token_id` itself. While the model runs, that is a
    tensor that equals them where the mask is 0, and nowhere else.
    """
    if not lacks_pad(model.config):
        return
    declared = getattr(model.config.get_text_config(), "pad_token_id", None)

    def tell(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if ids is not None:
            padded = torch.zeros_like(ids, dtype=torch.bool) if mask is None else mask == 0
            _set_pad(module, torch.where(padded, ids, -1))

    def forget(module: Any, *_: Any) -> None:
        _set_pad(module, declared)

    model.register_forward_pre_hook(tell, with_kwargs=True)
    model.register_forward_hook(forget, always_call=True)


def lacks_pad(config: Any) -> bool:
    """Whether a classifier of this configuration cannot tell padding by a token of its vocabulary."""
    text = config.get_text_config()
    declared = getattr(text, "pad_token_id", None)
    return not config.is_encoder_decoder and (declared is None or not 0 <= declared < text.vocab_size)


def _set_pad(model: Any, value: Any) -> None:
    """Past the configuration's own checks, which know numbers only."""
    vars(model.config.get_text_config())["pad_token_id"] = value
