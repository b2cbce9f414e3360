"""A Llama with tied embeddings as a GGUF file, written by the package gguf."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import transformers

#: What is stored of a matrix, and its type.
Stored = tuple[np.ndarray, gguf.GGMLQuantizationType]


def write(
    path: Path,
    model: transformers.PreTrainedModel,
    stored: Callable[[str, np.ndarray], Stored | None] = lambda _name, _matrix: None,
    *,
    without: str = "",
) -> None:
    """Write `model` with a tokenizer of words.

    Args:
        path: the file.
        model: the model.
        stored: of a matrix by its name in the model, its rows in llama.cpp's order; None: float32.
        without: name of a weight in the file that it lacks.
    """
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    names = ["<unk>", "<s>", "</s>", "w", "0", *(f"w{index}" for index in range(config.vocab_size - 5))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(names)
    writer.add_token_types([3] * 3 + [1] * (config.vocab_size - 3))
    writer.add_token_merges(["w 0", "w1 0"])  # of one, transformers 5.14 makes a text
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        found = mapping.get_name(name, try_suffixes=(".weight", ".bias"))
        if not found or name in ("lm_head.weight", without):
            continue
        array = interleaved(model, name, tensor.numpy())
        kept = stored(name, array) if array.ndim == 2 else None
        if kept is None:
            writer.add_tensor(found, array)
        else:
            writer.add_tensor(found, kept[0], raw_dtype=kept[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(
    model: transformers.PreTrainedModel, name: str, array: np.ndarray, *, back: bool = False
) -> np.ndarray:
    """The rows of a projection of queries or keys in the order of llama.cpp's rotary embedding, or `back`;
    other weights as they are."""
    heads = {
        "q_proj": model.config.num_attention_heads,
        "k_proj": model.config.num_key_value_heads,
    }.get(name.split(".")[-2])
    if heads is None:
        return array
    halves = (heads, -1, 2) if back else (heads, 2, -1)
    rows = array.reshape(*halves, array.shape[1]).swapaxes(1, 2)
    return np.ascontiguousarray(rows.reshape(array.shape))
