"""Generation from exported bundles, whole and streamed, against transformers' `generate`."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import tokenizers
import torch
import transformers

import edgepeft
from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import UsageError
from edgepeft.exporters.decoder.build import ROLE as DECODER
from edgepeft.runtime.memory.inference import RESIDENT, STREAMED
from edgepeft.runtime.model import Model

from .. import models, task_models
from ..sharing import Shared

MIB = 2**20
ENDS = [7, 300]
TEXTS = ["a", "the cat, abc", "ä?"]
COUNT = 24


def byte_level() -> tokenizers.Tokenizer:
    """As many tokens as the models have: bytes, and pairs of letters."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [(left, right) for left in "abcdehst" for right in "aehinotu"]
    tokens = [*alphabet, *(left + right for left, right in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


PROMPTS = [byte_level().encode(text).ids for text in TEXTS]


def decoder() -> transformers.PreTrainedModel:
    """Several tokens end a text."""
    model = models.llama(tied=True)
    model.generation_config.eos_token_id = model.config.eos_token_id = ENDS
    return model


@pytest.fixture(scope="module")
def bundle(shared: Shared) -> Callable[[str], Path]:
    """`bundle(name)`: a decoder or an encoder-decoder at 32 bits, with a tokenizer."""

    def make(name: str) -> Path:
        def write(root: Path) -> None:
            model = decoder() if name == "decoder" else task_models.t5()
            model.save_pretrained(str(root / "model"))
            byte_level().save(str(root / "model" / "tokenizer.json"))
            edgepeft.export(str(root / "model"), root / "b", bits=32, rank=2, train=False, verify=False)

        return shared(f"generation/{name}", write) / "b"

    return make


@pytest.fixture(params=[DECODER, RESIDENT, STREAMED])
def device(request: pytest.FixtureRequest, bundle: Callable[[str], Path]) -> Iterator[Model]:
    """A language model with its cache in place, with the inference graph, and with its weights streamed."""
    opened = open_bundle(bundle("decoder"))
    manifest = opened.manifest
    if request.param != DECODER:
        manifest = dataclasses.replace(manifest, decoder=None)
    if request.param == STREAMED:
        large = dataclasses.replace(manifest.inference_memory, session_bytes=10_000 * MIB)
        manifest = dataclasses.replace(manifest, inference_memory=large)
    opened = dataclasses.replace(opened, manifest=manifest)
    with Model(opened, 4000 * MIB, threads=1) as model:
        yield model
        assert set(model._sessions._open) <= {request.param, f"{request.param}.plain"}


def theirs(model: Any, prompt: list[int], **options: Any) -> list[int]:
    """The new tokens by transformers."""
    ids = torch.tensor([prompt])
    answer = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=COUNT,
        do_sample=False,
        pad_token_id=0,
        **options,
    )[0].tolist()
    return answer[1:] if model.config.is_encoder_decoder else answer[len(prompt) :]


@pytest.mark.parametrize("penalty", [1.0, 1.4, 0.8])
def test_tokens_are_those_of_transformers(device: Model, penalty: float) -> None:
    """Greedy with and without a penalty, to whichever end token comes first."""
    assert device.manifest.model.eos_token_ids == tuple(ENDS)
    model = decoder()
    expected = [theirs(model, prompt, repetition_penalty=penalty) for prompt in PROMPTS]
    for prompt, ids in zip(PROMPTS, expected, strict=True):
        assert device.generate_ids(prompt, max_new_tokens=COUNT, repetition_penalty=penalty) == ids
    answers = device.generate(TEXTS, max_new_tokens=COUNT, repetition_penalty=penalty)
    for text, ids in zip(answers, expected, strict=True):
        assert text == byte_level().decode([token for token in ids if token not in ENDS]).rstrip("�")


def with_adapters(build: Callable[[], Any], root: Path, targets: dict[str, list[str]]) -> peft.PeftModel:
    """PEFT over adapters of different ranks, saved as `root`'s folders; and one that mixes them."""
    for rank, (name, modules) in enumerate(targets.items(), 2):
        models.save_adapter(build(), root / name, rank, r=rank, lora_alpha=3, target_modules=modules)
    first, *others = targets
    model = peft.PeftModel.from_pretrained(build(), root / first, first)
    for name in others:
        model.load_adapter(root / name, name)
    model.add_weighted_adapter(list(targets), MIXED, "mixed", combination_type="cat")
    return model.eval()


def by_row_in_torch(
    model: peft.PeftModel, prompts: list[list[int]], rows: list[str | None]
) -> list[list[int]]:
    """Each prompt alone, with its adapter."""
    answers = []
    for prompt, name in zip(prompts, rows, strict=True):
        if name is None:
            with model.disable_adapter():
                answers.append(theirs(model, prompt))
        else:
            model.set_adapter(name)
            answers.append(theirs(model, prompt))
    return answers


MIXED = [0.7, 0.3]
ROWS = ["one", None, "mixed", "two", "one"]


def specs(root: Path) -> list[Any]:
    """`ROWS` as the device takes them."""
    folders = {"one": root / "one", "two": root / "two", None: None}
    mixed = {str(root / name): weight for name, weight in zip(("one", "two"), MIXED, strict=True)}
    return [mixed if name == "mixed" else folders[name] for name in ROWS]


def test_every_prompt_has_an_adapter_of_its_own(device: Model, tmp_path: Path) -> None:
    """Of different ranks and modules, a mixture and none, two prompts with the same: PEFT's tokens, and those
    of each prompt alone."""
    targets = {"one": ["q_proj", "v_proj", "down_proj"], "two": ["k_proj", "o_proj", "up_proj"]}
    model = with_adapters(decoder, tmp_path, targets)
    prompts = [*PROMPTS, PROMPTS[0], PROMPTS[1]]
    expected = by_row_in_torch(model, prompts, ROWS)
    assert len({tuple(ids) for ids in expected}) == len(ROWS)
    asked = specs(tmp_path)
    assert device.generate_ids(prompts, asked, max_new_tokens=COUNT) == expected
    alone = [
        device.generate_ids(prompt, spec, max_new_tokens=COUNT)
        for prompt, spec in zip(prompts, asked, strict=True)
    ]
    assert alone == expected
    device.load_adapter("one", tmp_path / "one")
    texts = device.generate(TEXTS, ["one", None, asked[2]], max_new_tokens=COUNT)
    assert texts == [device._task.text.decode([t for t in ids if t not in ENDS]) for ids in expected[:3]]
    with pytest.raises(UsageError, match="is a list of 2, the batch has 3 prompts: give one for each"):
        device.generate(TEXTS, ["one", None], max_new_tokens=COUNT)
    cache = device.read_prompt("XYZ")
    with pytest.raises(UsageError, match="made with another adapter"):
        device.generate(TEXTS[:2], [None, "one"], prompt_cache=cache, max_new_tokens=COUNT)


def test_stop_texts_are_those_of_transformers(device: Model) -> None:
    """It ends with the same token; their text has the stop text at its end, ours has not."""
    model = decoder()
    model.generation_config.eos_token_id = None
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level())
    whole = tokenizer.decode(theirs(model, PROMPTS[1]))
    endless = dataclasses.replace(device.manifest.model, eos_token_ids=())
    opened = dataclasses.replace(device._bundle, manifest=dataclasses.replace(device.manifest, model=endless))
    with Model(opened, 4000 * MIB, threads=1) as mine:
        stops = [stop for place in range(1, 20) if "�" not in (stop := whole[place : place + 3])]
        assert len(stops) > 2
        for stop in stops:
            ids = theirs(model, PROMPTS[1], stop_strings=[stop], tokenizer=tokenizer)
            stream = mine.stream(TEXTS[1], max_new_tokens=COUNT, stop=stop)
            assert "".join(stream) == whole[: whole.find(stop)]
            assert (stream.result.ids, stream.result.finish_reason) == (ids, "stop")


def test_a_prompt_cache_changes_nothing(device: Model, tmp_path: Path) -> None:
    """All of the prompt, its beginning, more than it; in a batch too."""
    device.read_prompt("XYZ 123?").save(tmp_path / "prompt")
    prompts = ["XYZ 123?", "XYZ 123? !", "XY.", "a"]
    expected = [device.generate(text, max_new_tokens=COUNT) for text in prompts]
    for text, answer, cached in zip(prompts, expected, (7, 8, 2, 0), strict=True):
        stream = device.stream(text, max_new_tokens=COUNT, prompt_cache=tmp_path / "prompt")
        assert "".join(stream) == answer
        assert stream.result.cached_tokens == cached
    assert device.generate(prompts, max_new_tokens=COUNT, prompt_cache=tmp_path / "prompt") == expected


@pytest.mark.slow  # the export is
def test_an_encoder_decoder_answers_as_in_transformers(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    """One prompt and several; it has nothing to keep in a prompt cache."""
    model = task_models.t5()
    with edgepeft.load(bundle("t5"), threads=1) as device:
        for penalty in (1.0, 1.5):
            expected = [theirs(model, prompt, repetition_penalty=penalty) for prompt in PROMPTS]
            options = {"max_new_tokens": COUNT, "repetition_penalty": penalty}
            assert [device.generate_ids(prompt, **options) for prompt in PROMPTS] == expected
            answers = device.generate(TEXTS, **options)
            assert answers == [device.generate(text, **options) for text in TEXTS]
        targets = {"one": ["q", "v"], "two": ["o", "wi"]}
        adapted = with_adapters(task_models.t5, tmp_path, targets)
        prompts = [*PROMPTS, *PROMPTS[:2]]
        expected = by_row_in_torch(adapted, prompts, ROWS)
        assert device.generate_ids(prompts, specs(tmp_path), max_new_tokens=COUNT) == expected
        with pytest.raises(UsageError, match="no key/value cache"):
            device.read_prompt("a")
        with pytest.raises(UsageError, match="no key/value cache"):
            device.generate("a", prompt_cache=tmp_path / "prompt")
