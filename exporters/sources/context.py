"""How long a text may be: what tables of positions hold, and where rotary angles would change."""

from typing import Any

import torch

#: Rotary scalings that change the angles of all positions once a text is longer than a border.
_CHANGING = ("longrope", "dynamic")
_PROBE = 7


def usable_positions(model: Any) -> int | None:
    """Tokens that the model's tables of positions hold; None where it has none of the size that its
    configuration names.

    Some tables begin behind the index of the padding: what they are asked for is seen in a run.
    """
    named = getattr(model.config, "max_position_embeddings", None)
    tables = [
        module
        for module in model.modules()
        if type(module) is torch.nn.Embedding and module.num_embeddings == named
    ]
    if not tables:
        return None
    usable: list[int] = []

    def look(table: Any, args: tuple[Any, ...]) -> None:
        positions = args[0].reshape(-1, args[0].shape[-1])[0].tolist()
        if positions == list(range(positions[0], positions[0] + _PROBE)):
            usable.append(table.num_embeddings - positions[0])

    hooks = [table.register_forward_pre_hook(look) for table in tables]
    ids = torch.tensor([_tokens(model.config)])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception:  # whatever the model's own code raises: the trace will say it
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return min(usable, default=None)


def _tokens(config: Any) -> list[int]:
    """Tokens that are no padding, and not one behind the other."""
    padding = getattr(config, "pad_token_id", None)
    tokens = [token for token in range(config.vocab_size - 1, -1, -1) if token != padding]
    return (tokens[:_PROBE] * _PROBE)[:_PROBE]


def keep_angles(model: Any) -> int | None:
    """Leave the rotary angles of a model at what they are for short texts.

    Returns:
        Tokens that a text may have until transformers would change them, all at once; None: any number.
    """
    borders = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layer_type, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            if kind in _CHANGING:
                parameters = module.config.rope_parameters
                own = parameters if layer_type is None else parameters[layer_type]
                longest = module.config.max_position_embeddings
                borders.append(own["original_max_position_embeddings"] if kind == "longrope" else longest)
        if isinstance(kinds, dict):
            module.rope_type = {name: _steady(kind) for name, kind in kinds.items()}
        elif kinds in _CHANGING:
            module.rope_type = _steady(kinds)
    return min(borders, default=None)


def _steady(kind: str) -> str:
    return "default" if kind in _CHANGING else kind
