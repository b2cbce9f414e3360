"""The table of settings, row by row: a folder in which the setting matters, against transformers and
sentence-transformers; and that the installed packages read none that the table does not name."""

import dataclasses
import inspect
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from tokenizers import models as token_models
from tokenizers import pre_tokenizers, processors

import edgepeft
from edgepeft.bundle.reader import Bundle, open_bundle
from edgepeft.bundle.writer import hash_folder
from edgepeft.errors import ExportError
from edgepeft.exporters.sources.loading import load_source
from edgepeft.exporters.sources.model_info import model_info
from edgepeft.exporters.sources.settings import (
    GENERATION,
    HONOURED,
    MODEL,
    MODULES,
    NEUTRAL,
    PROMPTS,
    REFUSED,
    SENTENCES,
    SETTINGS,
    TOKENIZER,
    setting,
)
from edgepeft.runtime.model import Model
from edgepeft.runtime.records import Record

from .. import models, task_models
from ..sharing import Shared

PROMPT = [5, 9, 17, 33]
TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m.content }}{{ cls_token is defined }}{% endfor %}"
POOLING = f"{MODULES}: Pooling"


def rows(file: str, verdict: str) -> list[str]:
    return [row.key for row in SETTINGS if (row.file, row.verdict) == (file, verdict)]


def change(folder: Path, file: str, **values: Any) -> Path:
    path = folder / file
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **values}))
    return folder


def words(*more: str) -> transformers.PreTrainedTokenizerFast:
    """Words and pairs, BERT's way; three of them of capitals."""
    known = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "one",
        "two",
        "three",
        "four",
        "ONE",
        "TWO",
        "é",
        "e",
        *more,
    ]
    tokenizer = tokenizers.Tokenizer(
        token_models.WordPiece({word: index for index, word in enumerate(known)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        mask_token="[MASK]",
        **special,
    )


MAKERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: models.llama(tied=True),
    "classifier": models.bert_classifier,
    "encoder": models.bert_encoder,
    "bart": task_models.bart,
}


@pytest.fixture(scope="module")
def exported(shared: Shared) -> Callable[[str], Path]:
    """`exported(name)`: a folder with `model` and its bundle `b`, at 32 bits."""

    def make(name: str) -> Path:
        def write(root: Path) -> None:
            MAKERS[name]().save_pretrained(str(root / "model"))
            words().save_pretrained(str(root / "model"))
            edgepeft.export(str(root / "model"), root / "b", bits=32, train=False, verify=False)

        return shared(f"settings/{name}", write)

    return make


@pytest.fixture
def folder(exported: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a model's folder, to be changed."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(exported(name) / "model", tmp_path / "model"))

    return copy


@pytest.fixture
def opened(exported: Callable[[str], Path], tmp_path: Path) -> Iterator[Callable[[str, Path], Model]]:
    """`opened(name, folder)`: the bundle as an export of the changed folder would have it; its graphs are
    those of the unchanged one."""
    made: list[Model] = []

    def make(name: str, changed: Path) -> Model:
        target = Path(shutil.copytree(exported(name) / "b", tmp_path / "b"))
        source = load_source(str(changed))
        for file, data in source.tokenizer_files.items():
            (target / file).write_bytes(data)
        manifest = open_bundle(exported(name) / "b").manifest
        manifest = dataclasses.replace(manifest, model=model_info(source), files=hash_folder(target))
        made.append(Model(Bundle(target, manifest), None))
        return made[-1]

    yield make
    for model in made:
        model.close()


def free(model: Any, count: int = 12) -> list[int]:
    """What the model writes without any setting."""
    with torch.no_grad():
        plain = transformers.GenerationConfig(pad_token_id=0)
        written = model.generate(torch.tensor([PROMPT]), plain, max_new_tokens=count, do_sample=False)
    return list(written[0, len(PROMPT) :].tolist())


#: For each honoured setting of generation, what to set it to, given what the model writes without.
RULES: dict[str, Callable[[list[int]], Any]] = {
    "eos_token_id": lambda free: [310, free[2]],
    "repetition_penalty": lambda _: 0.2,
    "min_length": lambda _: 9,
    "min_new_tokens": lambda _: 6,
    "no_repeat_ngram_size": lambda _: 2,
    "bad_words_ids": lambda free: [[free[1]], [free[0], free[2]]],
    "suppress_tokens": lambda free: free[:3],
    "begin_suppress_tokens": lambda free: free[:1],
    "forced_eos_token_id": lambda _: 7,
}
DRAWN = {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.8, "min_p": 0.02}


@pytest.mark.parametrize("key", RULES)
def test_rules_of_generation_hold_as_in_transformers(
    key: str, folder: Callable[[str], Path], opened: Callable[[str, Path], Model]
) -> None:
    """With tokens that end a text where that matters."""
    changed = folder("llama")
    written = free(models.llama(tied=True))
    values = {key: RULES[key](written)}
    if key.startswith("min_"):
        values["eos_token_id"] = written[1]
    if key == "no_repeat_ngram_size":
        values["repetition_penalty"] = 0.2
    change(changed, GENERATION, **values)
    reference = transformers.AutoModelForCausalLM.from_pretrained(changed).eval()
    with torch.no_grad():
        expected = reference.generate(torch.tensor([PROMPT]), max_new_tokens=12)[0, len(PROMPT) :].tolist()
    assert expected != written
    assert opened("llama", changed).generate_ids(PROMPT, max_new_tokens=12) == expected


@pytest.mark.slow
def test_the_first_token_of_an_encoder_decoder_is_forced(
    folder: Callable[[str], Path], opened: Callable[[str, Path], Model]
) -> None:
    rules = {"forced_bos_token_id": 9, "begin_suppress_tokens": [11, 12], "num_beams": 1}
    changed = change(folder("bart"), GENERATION, **rules)
    reference = transformers.AutoModelForSeq2SeqLM.from_pretrained(changed).eval()
    with torch.no_grad():
        expected = reference.generate(torch.tensor([PROMPT]), max_new_tokens=8)[0, 1:].tolist()
    assert expected[0] == 9
    assert opened("bart", changed).generate_ids(PROMPT, max_new_tokens=8) == expected


def test_draws_are_the_models_own_unless_told_otherwise(
    folder: Callable[[str], Path], opened: Callable[[str, Path], Model]
) -> None:
    changed = change(folder("llama"), GENERATION, **DRAWN)
    model = opened("llama", changed)
    given = {name: value for name, value in DRAWN.items() if name != "do_sample"}
    own = model.generate_ids(PROMPT, max_new_tokens=12, seed=1)
    assert own == model.generate_ids(PROMPT, max_new_tokens=12, seed=1, **given)
    assert own != model.generate_ids(PROMPT, max_new_tokens=12, seed=1, temperature=1.5)
    assert model.generate_ids(PROMPT, max_new_tokens=12, temperature=0) == free(models.llama(tied=True))


def test_draws_are_among_fifty_as_in_transformers(folder: Callable[[str], Path]) -> None:
    changed = change(folder("llama"), GENERATION, do_sample=True)
    config = transformers.GenerationConfig()
    assert load_settings(changed).top_k == config._get_default_generation_params()["top_k"]


def load_settings(changed: Path) -> Any:
    return model_info(load_source(str(changed))).generation


def test_words_that_the_vocabulary_has_not_are_no_other_words(folder: Callable[[str], Path]) -> None:
    words = [[5000], [3, 5000], [7], [8, 9]]
    assert load_settings(change(folder("llama"), GENERATION, bad_words_ids=words)).bad_words_ids == (
        (7,),
        (8, 9),
    )


def test_a_tokenizer_without_an_unknown_token_keeps_its_settings(folder: Callable[[str], Path]) -> None:
    """It reads no word that it does not know."""
    changed = folder("classifier")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "a": 1, "c": 2}))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, truncation_side="left")
    made.save_pretrained(changed)
    source = load_source(str(changed))
    assert source.tokenizer is not None
    assert source.text_settings.truncation_side == "left"


def test_the_context_may_have_another_name() -> None:
    config = transformers.MptConfig(d_model=32, n_heads=2, n_layers=1, max_seq_len=96, vocab_size=320)
    assert load_source(transformers.MptForCausalLM(config)).max_length == 96


def test_a_model_that_begins_answers_with_a_language_is_refused() -> None:
    config = transformers.MBartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2
    )
    config.vocab_size, config.decoder_start_token_id = 320, 0
    with pytest.raises(ExportError, match="begins an answer with the last token of what it is to learn"):
        load_source(transformers.MBartForConditionalGeneration(config))


def test_texts_that_stop_an_answer(folder: Callable[[str], Path]) -> None:
    assert load_settings(change(folder("llama"), GENERATION, stop_strings="one")).stop_strings == ("one",)


#: For each refused setting, a value that says something.
REFUSALS: dict[tuple[str, str], Any] = {
    (GENERATION, "num_beams"): 4,
    (GENERATION, "num_beam_groups"): 2,
    (GENERATION, "constraints"): [1],
    (GENERATION, "force_words_ids"): [[1]],
    (GENERATION, "penalty_alpha"): 0.6,
    (GENERATION, "dola_layers"): "high",
    (GENERATION, "guidance_scale"): 1.5,
    (GENERATION, "encoder_repetition_penalty"): 1.2,
    (GENERATION, "encoder_no_repeat_ngram_size"): 3,
    (GENERATION, "sequence_bias"): [[[5], -1.0]],
    (GENERATION, "exponential_decay_length_penalty"): [5, 1.5],
    (GENERATION, "token_healing"): True,
    (GENERATION, "watermarking_config"): {"greenlist_ratio": 0.25},
    (GENERATION, "top_h"): 0.4,
    (GENERATION, "typical_p"): 0.9,
    (GENERATION, "epsilon_cutoff"): 0.1,
    (GENERATION, "eta_cutoff"): 0.1,
    (TOKENIZER, "clean_up_tokenization_spaces"): True,
    (SENTENCES, "transformer_task"): "fill-mask",
    (SENTENCES, "module_output_name"): "sentence_embedding",
    (SENTENCES, "processing_kwargs"): {"text": {"max_length": 3}},
    (SENTENCES, "query_length"): 8,
    (SENTENCES, "document_length"): 8,
    (SENTENCES, "query_expansion"): True,
    (SENTENCES, "model_args"): {"a": 1},
    (SENTENCES, "model_kwargs"): {"a": 1},
    (SENTENCES, "tokenizer_args"): {"a": 1},
    (SENTENCES, "processor_kwargs"): {"a": 1},
    (SENTENCES, "config_args"): {"a": 1},
    (SENTENCES, "config_kwargs"): {"a": 1},
    (POOLING, "pooling_mode_mean_sqrt_len_tokens"): True,
    (POOLING, "pooling_mode_weightedmean_tokens"): True,
    (POOLING, "pooling_mode_lasttoken"): True,
    (POOLING, "include_prompt"): False,
}
#: That goes with the longer name and matters to BPE alone.
LONGER = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


def sentence_folder(folder: Path, *, last: str = "Normalize") -> Path:
    """A folder of sentence-transformers': mean, then `last`."""
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), (last, f"2_{last}")]
    listed = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(modules)
    ]
    (folder / MODULES).write_text(json.dumps(listed))
    for _, path in modules[1:]:
        (folder / path).mkdir()
    config = {
        "word_embedding_dimension": 64,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_cls_token": False,
    }
    change(folder / "1_Pooling", "config.json", **config)
    change(folder, SENTENCES, max_seq_length=32, do_lower_case=False)
    return folder


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row[1])
def test_what_is_refused_is_named(row: tuple[str, str], folder: Callable[[str], Path]) -> None:
    file, key = row
    if file in (SENTENCES, POOLING):
        changed = sentence_folder(folder("encoder"))
        if file == POOLING:
            change(
                changed / "1_Pooling",
                "config.json",
                **{key: REFUSALS[row], "pooling_mode_mean_tokens": False},
            )
            change(changed, PROMPTS, prompts={"query": "one "})
            if key == "include_prompt":
                change(changed / "1_Pooling", "config.json", pooling_mode_mean_tokens=True)
        else:
            change(changed, SENTENCES, **{key: REFUSALS[row]})
    else:
        changed = change(folder("llama"), file, **{key: REFUSALS[row]})
        if file == GENERATION and (made := setting(file, key)) is not None and made.sampling:
            change(changed, GENERATION, do_sample=True)
    with pytest.raises(
        ExportError, match=re.escape(key.removeprefix("pooling_mode_").removesuffix("_tokens"))
    ):
        load_source(str(changed))


@pytest.mark.parametrize("kind", rows(MODULES, REFUSED))
def test_other_modules_are_refused_by_name(kind: str, folder: Callable[[str], Path]) -> None:
    with pytest.raises(ExportError, match=kind):
        load_source(str(sentence_folder(folder("encoder"), last=kind)))


TEXTS = ["one two three", "ONE é two [SEP] four", "four four one two three one two"]
#: Settings of a tokenizer that change its tokens; of some also the texts to read.
TOKENS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "truncation_side": {"truncation_side": "left"},
    "model_input_names": {"model_input_names": ["input_ids", "attention_mask"]},
    "split_special_tokens": {"split_special_tokens": True},
    "tokenizer_class": {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "strip_accents": True},
    "do_lower_case": {"tokenizer_class": "BertTokenizer", "do_lower_case": False},
    "extra_special_tokens": {"extra_special_tokens": ["four"]},
    "added_tokens_decoder": {
        "added_tokens_decoder": {
            "5": {"content": "one", "special": True, "lstrip": False, "normalized": False, "rstrip": False,
                  "single_word": False}
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("key", TOKENS)
def test_texts_become_the_tokens_of_transformers(
    key: str, folder: Callable[[str], Path], opened: Callable[[str, Path], Model]
) -> None:
    """Alone and in pairs, whole and cut."""
    changed = change(folder("classifier"), TOKENIZER, **TOKENS[key])
    reference = transformers.AutoTokenizer.from_pretrained(changed)
    model = opened("classifier", changed)
    task = model._task
    for length in (5, 64):
        for text in TEXTS:
            for pair in (None, "four one two"):
                fields = {"text": text} | ({} if pair is None else {"text_pair": pair})
                (row,) = task.encode(Record("record 1", fields), length, training=False).rows
                want = reference(text, pair, truncation=True, max_length=length)
                types = want.get("token_type_ids", [0] * len(want["input_ids"]))
                assert (row.input_ids.tolist(), row.type_ids.tolist()) == (want["input_ids"], types)


def test_bounds_of_a_text(folder: Callable[[str], Path]) -> None:
    assert load_source(str(change(folder("classifier"), TOKENIZER, model_max_length=9))).max_length == 9


def test_templates_are_given_what_transformers_gives(
    folder: Callable[[str], Path], opened: Callable[[str, Path], Model]
) -> None:
    """Its special tokens, the time, reasoning by every name, parts, no nulls, and the template for tools."""
    changed = folder("llama")
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    named = [
        {"name": "default", "template": TEMPLATE + "{{ strftime_now('%Y') }}{{ messages|tojson }}"},
        {"name": "tool_use", "template": "{{ tools|tojson }}{{ documents|tojson }}{{ messages|length }}"},
    ]
    change(changed, TOKENIZER, chat_template=named, bos_token="one")
    (changed / "special_tokens_map.json").unlink(missing_ok=True)
    reference = transformers.AutoTokenizer.from_pretrained(changed)
    chat = opened("llama", changed)._task.chat
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "one"}], "name": None},
        {"role": "assistant", "content": "two", "thinking": "three"},
    ]
    for beside in ({}, {"tools": tools, "documents": [{"title": "a", "text": "b"}]}):
        expected = reference.apply_chat_template(messages, tokenize=False, **beside)
        assert chat.prompt(messages, "here", beside) == expected


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_sentences_are_embedded_as_sentence_transformers_does(
    mode: str, lower: bool, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    changed = sentence_folder(folder("encoder"))
    modes = {
        f"pooling_mode_{name}": name.startswith(mode) for name in ("mean_tokens", "cls_token", "max_tokens")
    }
    change(changed / "1_Pooling", "config.json", **modes)
    change(changed, SENTENCES, do_lower_case=lower, max_seq_length=6)
    change(changed, PROMPTS, prompts={"query": "ONE "}, default_prompt_name="query")
    edgepeft.export(str(changed), tmp_path / "b", bits=32, train=False, verify=False)
    reference = sentence_transformers.SentenceTransformer(str(changed), device="cpu")
    with edgepeft.load(tmp_path / "b") as model:
        torch.testing.assert_close(
            torch.tensor(model.embed(TEXTS)), torch.tensor(reference.encode(TEXTS)), rtol=1e-4, atol=1e-5
        )


def test_a_cross_encoder_is_a_classifier_of_pairs(folder: Callable[[str], Path]) -> None:
    """Though it has a list of modules."""
    changed = change(folder("classifier"), SENTENCES, transformer_task="sequence-classification")
    (changed / MODULES).write_text("[]")
    assert load_source(str(changed)).task == "text-classification"


POSITIONS: dict[str, Callable[[], Any]] = {
    "roberta": lambda: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(
            **models.SIZES, max_position_embeddings=34, pad_token_id=1, type_vocab_size=1
        )
    ),
    "mpnet": lambda: transformers.MPNetForSequenceClassification(
        transformers.MPNetConfig(**models.SIZES, max_position_embeddings=34, pad_token_id=1)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=320, hidden_size=64, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4,
            max_position_embeddings=32, word_embed_proj_dim=64,
        )
    ),
    "longrope": lambda: transformers.Phi3ForCausalLM(
        transformers.Phi3Config(
            **models.SIZES, max_position_embeddings=64, original_max_position_embeddings=32, pad_token_id=0,
            rope_parameters={
                "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
                "original_max_position_embeddings": 32,
            },
        )
    ),
    "dynamic": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **models.SIZES, max_position_embeddings=32,
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", POSITIONS)
def test_a_text_is_as_long_as_the_positions_are(name: str) -> None:
    """Behind the index of the padding, and before rotary angles would change."""
    torch.manual_seed(0)
    model = POSITIONS[name]()
    source = load_source(model)
    assert source.max_length == 32
    ids = torch.arange(5, 5 + 32)[None]
    with torch.no_grad():
        longest = source.model(input_ids=ids).logits
        torch.testing.assert_close(longest, reference(name)(input_ids=ids).logits)


def reference(name: str) -> Any:
    torch.manual_seed(0)
    return POSITIONS[name]().eval()


def test_every_row_is_walked() -> None:
    """By a test above, or because it changes no answer."""
    generation = {*RULES, *DRAWN, "forced_bos_token_id", "decoder_start_token_id", "stop_strings"}
    assert set(rows(GENERATION, HONOURED)) == generation
    refused = {(row.file, row.key) for row in SETTINGS if row.verdict == REFUSED and row.file != MODULES}
    assert refused == {*REFUSALS, (TOKENIZER, LONGER)}
    assert len({(row.file, row.key) for row in SETTINGS}) == len(SETTINGS)


def test_the_table_names_every_setting_of_generation() -> None:
    public = {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    assert public <= {row.key for row in SETTINGS if row.file == GENERATION}


def test_the_table_names_every_setting_of_tokenizers() -> None:
    """What the base classes read; what a class of its own reads goes into the tokenizer that is written."""
    base = transformers.PreTrainedTokenizerBase
    sources = [inspect.getsource(cls.__init__) for cls in (base, transformers.PreTrainedTokenizerFast)]
    read = set(re.findall(r'kwargs\.(?:pop|get)\(\s*"([a-z]\w*)"', "".join(sources)))
    read |= set(base.SPECIAL_TOKENS_ATTRIBUTES)
    assert read <= {row.key for row in SETTINGS if row.file == TOKENIZER}


def test_the_table_names_every_setting_of_sentence_transformers() -> None:
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import models as modules

    keys = set(modules.Transformer.config_keys)
    assert keys <= {row.key for row in SETTINGS if row.file == SENTENCES}
    known = {row.key for row in SETTINGS if row.file == POOLING}
    assert set(modules.Pooling.config_keys) <= known
    found = {name for name, value in vars(modules).items() if inspect.isclass(value)}
    found -= {"Module", "InputModule"}  # what others derive from
    assert found <= {row.key for row in SETTINGS if row.file == MODULES}


def test_a_neutral_setting_says_why() -> None:
    assert all(row.how for row in SETTINGS if row.verdict == NEUTRAL)
    assert {row.file for row in SETTINGS} == {
        GENERATION,
        TOKENIZER,
        SENTENCES,
        PROMPTS,
        MODULES,
        POOLING,
        MODEL,
    }
