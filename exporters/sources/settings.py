"""Every setting that transformers, its tokenizers and sentence-transformers read of a model and that
changes an answer, and what an export makes of it.

A test has a folder for each row, and one fails where the installed packages read a key that is not here.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from edgepeft.errors import ExportError

HONOURED = "honoured"
REFUSED = "refused"
#: Changes no answer: how fast it comes, what else is returned, what a caller says anyway.
NEUTRAL = "neutral"

GENERATION = "generation_config.json"
TOKENIZER = "tokenizer_config.json"
MODEL = "config.json"
SENTENCES = "sentence_bert_config.json"
PROMPTS = "config_sentence_transformers.json"
MODULES = "modules.json"


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        file: that it stands in.
        key: its name.
        verdict: `HONOURED`, `REFUSED` or `NEUTRAL`.
        how: what is made of it, or why it is refused or changes nothing.
        harmless: of a refused one, the values beside null that say nothing.
        sampling: whether it says something only where tokens are drawn.
    """

    file: str
    key: str
    verdict: str
    how: str
    harmless: tuple[Any, ...] = ()
    sampling: bool = False


def _rows(file: str, verdict: str, keys: str, how: str, **more: Any) -> tuple[Setting, ...]:
    return tuple(Setting(file, key, verdict, how, **more) for key in keys.split())


SETTINGS: tuple[Setting, ...] = (
    # How texts are generated.
    *_rows(GENERATION, HONOURED, "eos_token_id", "all of them end an answer, the first one a text to learn"),
    *_rows(
        GENERATION,
        HONOURED,
        "do_sample temperature top_k top_p min_p repetition_penalty stop_strings",
        "what holds where a caller says nothing",
    ),
    *_rows(
        GENERATION,
        HONOURED,
        "min_length min_new_tokens no_repeat_ngram_size bad_words_ids suppress_tokens begin_suppress_tokens "
        "forced_bos_token_id forced_eos_token_id",
        "rules that hold for every answer",
    ),
    *_rows(GENERATION, REFUSED, "num_beams num_beam_groups", "beams are not searched", harmless=(1,)),
    *_rows(GENERATION, REFUSED, "constraints force_words_ids", "beams are not searched"),
    *_rows(GENERATION, REFUSED, "penalty_alpha", "contrastive search", harmless=(0,)),
    *_rows(GENERATION, REFUSED, "dola_layers", "decoding by contrasting layers"),
    *_rows(GENERATION, REFUSED, "guidance_scale", "classifier-free guidance", harmless=(1,)),
    *_rows(GENERATION, REFUSED, "encoder_repetition_penalty", "a penalty on the prompt", harmless=(1,)),
    *_rows(GENERATION, REFUSED, "encoder_no_repeat_ngram_size", "a rule on the prompt", harmless=(0,)),
    *_rows(GENERATION, REFUSED, "sequence_bias", "a bias on sequences"),
    *_rows(GENERATION, REFUSED, "exponential_decay_length_penalty", "a bias on the end"),
    *_rows(GENERATION, REFUSED, "token_healing", "a rewritten prompt", harmless=(False,)),
    *_rows(GENERATION, REFUSED, "watermarking_config", "a watermark"),
    *_rows(GENERATION, REFUSED, "top_h", "a way to draw", sampling=True),
    *_rows(GENERATION, REFUSED, "typical_p", "a way to draw", harmless=(1,), sampling=True),
    *_rows(GENERATION, REFUSED, "epsilon_cutoff eta_cutoff", "a way to draw", harmless=(0,), sampling=True),
    *_rows(
        GENERATION,
        HONOURED,
        "decoder_start_token_id",
        "what the decoder's input begins with; refused where config.json says another",
    ),
    *_rows(
        GENERATION,
        NEUTRAL,
        "max_length max_new_tokens max_time num_return_sequences",
        "how much is written is the caller's: 64 tokens of one answer unless told otherwise",
    ),
    *_rows(
        GENERATION, NEUTRAL, "bos_token_id pad_token_id", "a prompt is given, rows are padded by themselves"
    ),
    *_rows(
        GENERATION, NEUTRAL, "early_stopping length_penalty diversity_penalty low_memory", "of beams alone"
    ),
    *_rows(
        GENERATION,
        NEUTRAL,
        "renormalize_logits remove_invalid_values",
        "neither the order nor the shares of tokens change; logits that are no numbers are an error",
    ),
    *_rows(
        GENERATION,
        NEUTRAL,
        "use_cache cache_implementation cache_config max_cache_len prefill_chunk_size compile_config "
        "disable_compile continuous_batching_config use_mtp is_assistant num_assistant_tokens "
        "num_assistant_tokens_schedule assistant_confidence_threshold prompt_lookup_num_tokens "
        "max_matching_ngram_size assistant_early_exit assistant_lookbehind target_lookbehind "
        "assistant_ensemble_weight speculation_type",
        "how fast the same answer comes",
    ),
    *_rows(
        GENERATION,
        NEUTRAL,
        "output_attentions output_hidden_states output_scores output_logits return_dict_in_generate",
        "what else is returned",
    ),
    *_rows(GENERATION, NEUTRAL, "transformers_version", "who wrote it"),
    # How texts become tokens, and tokens texts.
    *_rows(
        TOKENIZER,
        HONOURED,
        "tokenizer_class add_bos_token add_eos_token add_prefix_space do_lower_case strip_accents "
        "tokenize_chinese_chars added_tokens_decoder extra_special_tokens additional_special_tokens "
        "model_specific_special_tokens legacy backend",
        "the bundle's tokenizer.json is what transformers makes of all files together",
    ),
    *_rows(TOKENIZER, HONOURED, "truncation_side", "where a text that is too long is cut"),
    *_rows(TOKENIZER, HONOURED, "model_max_length max_len", "bounds the length of a text"),
    *_rows(TOKENIZER, HONOURED, "model_input_names", "whether there are token types"),
    *_rows(TOKENIZER, HONOURED, "split_special_tokens", "how special tokens in a text are read"),
    *_rows(
        TOKENIZER, HONOURED, "chat_template", "by name, too: `default`, and `tool_use` where there are tools"
    ),
    *_rows(
        TOKENIZER,
        HONOURED,
        "bos_token eos_token unk_token sep_token pad_token cls_token mask_token",
        "given to chat templates; the bundle's tokenizer.json knows them",
    ),
    *_rows(
        TOKENIZER,
        REFUSED,
        "clean_up_tokenization_spaces "
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
        "blanks before punctuation would have to be taken out of texts that are written",
        harmless=(False,),
    ),
    *_rows(TOKENIZER, NEUTRAL, "padding_side", "a mask tells padding, which is on the right"),
    *_rows(
        TOKENIZER,
        NEUTRAL,
        "name_or_path processor_class verbose files_loaded response_template response_schema "
        "chat_control_tokens tokenizer_object gguf_file tokenizer_file post_processor tokenizer_truncation "
        "tokenizer_padding fix_mistral_regex vocab merges vocab_file merges_file tokenizer "
        "unk_id",
        "no setting of a folder's own",
    ),
    # How sentence-transformers makes embeddings.
    *_rows(SENTENCES, HONOURED, "max_seq_length", "bounds the length of a text"),
    *_rows(SENTENCES, HONOURED, "do_lower_case", "put into the bundle's tokenizer.json"),
    *_rows(SENTENCES, REFUSED, "transformer_task", "another model inside", harmless=("feature-extraction",)),
    *_rows(SENTENCES, REFUSED, "module_output_name", "another output", harmless=("token_embeddings",)),
    *_rows(SENTENCES, REFUSED, "processing_kwargs", "arguments of the tokenizer's call", harmless=({},)),
    *_rows(SENTENCES, REFUSED, "query_length document_length query_expansion", "lengths by kind of text"),
    *_rows(
        SENTENCES,
        REFUSED,
        "model_args model_kwargs tokenizer_args processor_kwargs config_args config_kwargs",
        "arguments of the loading",
        harmless=({},),
    ),
    *_rows(SENTENCES, NEUTRAL, "modality_config unpad_inputs", "texts are what is embedded"),
    *_rows(PROMPTS, HONOURED, "prompts default_prompt_name", "by name, or before every text"),
    *_rows(PROMPTS, NEUTRAL, "similarity_fn_name model_type __version__", "how embeddings are compared"),
    *_rows(PROMPTS, NEUTRAL, "activation_fn", "a cross-encoder gives its logits, as in transformers"),
    *_rows(MODULES, HONOURED, "Transformer Pooling Normalize", "in this order"),
    *_rows(
        MODULES,
        REFUSED,
        "Dense Dropout LayerNorm LSTM CNN BoW WordEmbeddings WordWeights WeightedLayerPooling "
        "StaticEmbedding CLIPModel Router Asym",
        "another module",
    ),
    *_rows(
        f"{MODULES}: Pooling",
        HONOURED,
        "pooling_mode pooling_mode_mean_tokens pooling_mode_cls_token pooling_mode_max_tokens",
        "mean, CLS or max",
    ),
    *_rows(
        f"{MODULES}: Pooling",
        REFUSED,
        "pooling_mode_mean_sqrt_len_tokens pooling_mode_weightedmean_tokens pooling_mode_lasttoken",
        "another way to pool",
        harmless=(False,),
    ),
    *_rows(f"{MODULES}: Pooling", REFUSED, "include_prompt", "prompts left out of pooling", harmless=(True,)),
    *_rows(f"{MODULES}: Pooling", NEUTRAL, "word_embedding_dimension embedding_dimension", "a size"),
    # What is asked of the model's configuration beside the model itself, which computes as it says.
    *_rows(MODEL, HONOURED, "id2label num_labels problem_type", "names of classes, and the kind of result"),
    *_rows(MODEL, HONOURED, "pad_token_id decoder_start_token_id", "what padding and decoders read"),
    *_rows(
        MODEL,
        HONOURED,
        "max_position_embeddings",
        "bounds the length of a text; what the padding's index takes off",
    ),
    *_rows(
        MODEL,
        HONOURED,
        "rope_parameters",
        "scalings that change with the length of a text (longrope, dynamic) bound it to where they would",
    ),
)


def setting(file: str, key: str) -> Setting | None:
    """The row of a key."""
    return next((row for row in SETTINGS if (row.file, row.key) == (file, key)), None)


def check_refused(model: str, file: str, found: Iterable[tuple[str, Any]], *, sampling: bool = True) -> None:
    """Refuse what changes an answer and is not honoured.

    Args:
        model: its name.
        file: whose settings these are.
        found: keys and values.
        sampling: whether tokens are drawn.

    Raises:
        ExportError: names the first such setting.
    """
    for key, value in found:
        row = setting(file, key)
        if row is None or row.verdict != REFUSED or (row.sampling and not sampling):
            continue
        if value is not None and value not in row.harmless:
            raise ExportError(
                f"{model}: {file} sets {key} to {value!r} ({row.how}), which edgepeft does not do: "
                "take it out of the file and compare what the model then answers"
            )
