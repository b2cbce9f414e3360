"""Prompts kept in files: the same answers, and files that are not what they should be."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import edgepeft
from edgepeft.bundle.writer import hash_file
from edgepeft.errors import UsageError
from edgepeft.runtime.generation.prompt_cache import open_prompt_cache
from edgepeft.runtime.model import Model

from .. import tiny
from .test_streaming import bundle

__all__ = ["bundle"]  # the fixture
PROMPT = "w5 w9 w2 w7"


@pytest.fixture
def saved(bundle: Path, tmp_path: Path) -> Path:
    with edgepeft.load(bundle) as model:
        cache = model.read_prompt(PROMPT, "one")
        assert len(cache.ids) == 4
        cache.save(tmp_path / "prompt")
    return tmp_path / "prompt"


def result(model: Model, prompt: str, path: Any) -> tuple[str, int]:
    stream = model.stream(prompt, "one", max_new_tokens=6, prompt_cache=path)
    return "".join(stream), stream.result.cached_tokens


@pytest.mark.parametrize(
    ("prompt", "cached"),
    [
        (PROMPT, 3),  # the last token is read for its logits
        (f"{PROMPT} w3 w4", 4),
        ("w5 w9 w3 w7 w1", 2),
        ("w5", 0),
        ("w1 w9", 0),
    ],
)
def test_the_answer_is_the_same(bundle: Path, saved: Path, prompt: str, cached: int) -> None:
    """Whatever part of the prompt the file stands for."""
    with edgepeft.load(bundle) as model:
        expected, _ = result(model, prompt, None)
        assert result(model, prompt, saved) == (expected, cached)
        prompts = [prompt, PROMPT, "w3"]
        texts = model.generate(prompts, "one", max_new_tokens=6)
        assert model.generate(prompts, "one", max_new_tokens=6, prompt_cache=saved) == texts


def test_what_a_stream_has_read_goes_on(bundle: Path) -> None:
    """Prompt and answer but the last token, whether it ended or was closed; for the same adapter."""
    with edgepeft.load(bundle) as model:
        stream = model.stream(PROMPT, "one", max_new_tokens=4, keep=True)
        assert stream.prompt_cache is None
        answer = "".join(stream)
        cache = stream.prompt_cache
        assert cache is not None
        assert cache.ids == [5, 9, 2, 7, *stream.result.ids[:-1]]
        assert cache.held_bytes == len(cache.ids) * 2 * tiny.WIDTH * 4
        following = f"{PROMPT} {answer} w8"
        expected, _ = result(model, following, None)
        for _ in range(2):  # it is not used up
            assert result(model, following, cache) == (expected, len(cache.ids))
        with pytest.raises(UsageError, match="was made with another adapter"):
            model.generate(following, "two", prompt_cache=cache, max_new_tokens=2)
        closed = model.stream(PROMPT, "one", max_new_tokens=4, keep=True)
        next(closed)
        closed.close()
        assert closed.prompt_cache is not None
        assert closed.prompt_cache.ids == [5, 9, 2, 7]
        unread = model.stream(PROMPT, "one", max_new_tokens=4, keep=True)
        unread.close()
        assert unread.prompt_cache is None


def test_messages_are_kept_too(bundle: Path, tmp_path: Path) -> None:
    """The beginning that two conversations share is read once."""
    system = {"role": "system", "content": "w7 w7 w2"}
    with edgepeft.load(bundle) as model:
        model.read_prompt(messages=[system]).save(tmp_path / "system")
        messages = [system, {"role": "user", "content": "w5 w9"}]
        stream = model.stream(messages=messages, max_new_tokens=6, prompt_cache=tmp_path / "system")
        assert "".join(stream) == model.generate(messages=messages, max_new_tokens=6)
        assert stream.result.cached_tokens == 3


def test_another_adapter_or_bundle_is_refused(bundle: Path, saved: Path, tmp_path: Path) -> None:
    """Keys and values depend on both; a copy of the adapter is the same one."""
    other = tiny.write_bundle(tmp_path / "b", "text-generation", tokenizer=tiny.word_tokenizer())
    weights = bytearray((other / "weights.bin").read_bytes())
    with edgepeft.load(bundle) as model:
        for adapter in (None, "two", {"one": 0.5}):
            with pytest.raises(UsageError, match="was made with another adapter"):
                model.generate(PROMPT, adapter, prompt_cache=saved, max_new_tokens=2)
        copied = bundle / "adapters" / "one"
        assert model.generate(PROMPT, copied, prompt_cache=saved, max_new_tokens=2)
    weights[0] ^= 1
    (other / "weights.bin").write_bytes(weights)
    data = json.loads((other / "manifest.json").read_text())
    data["files"]["weights.bin"]["sha256"] = hash_file(other / "weights.bin").sha256
    (other / "manifest.json").write_text(json.dumps(data))
    with edgepeft.load(other) as model, pytest.raises(UsageError, match="was made with another bundle"):
        model.generate(PROMPT, prompt_cache=saved, max_new_tokens=2)


def test_a_context_that_is_too_short_is_said_first(bundle: Path, saved: Path) -> None:
    """Before the file is looked at."""
    with edgepeft.load(bundle) as model:
        with pytest.raises(UsageError, match="context holds 16"):
            model.generate(PROMPT, "one", prompt_cache=saved.parent / "none", max_new_tokens=13)
        with pytest.raises(UsageError, match="17 tokens and 0 more"):
            model.read_prompt(" ".join(["w1"] * 17))
        assert len(model.read_prompt(" ".join(["w1"] * 16)).ids) == 16


def test_a_model_without_keys_and_values_is_refused(classifier: Path) -> None:
    """A classifier generates nothing at all."""
    with edgepeft.load(classifier) as model, pytest.raises(UsageError, match="generates no text"):
        model.read_prompt("w1")


KEY = np.zeros((1, 4, tiny.WIDTH), np.float32)
GOOD = {"0.key": KEY, "0.value": KEY}


@pytest.mark.parametrize(
    ("tensors", "ids", "message"),
    [
        ({"0.key": KEY}, [1, 2, 3, 4], "'0.value' is in one of them only"),
        ({**GOOD, "1.key": KEY}, [1, 2, 3, 4], "'1.key' is in one of them only"),
        (
            {**GOOD, "0.key": KEY[:, :3]},
            [1, 2, 3, 4],
            r"'0.key' is float32 \[1, 3, 8\], the model",
        ),
        ({**GOOD, "0.key": KEY.astype(np.float16)}, [1, 2, 3, 4], "'0.key' is float16"),
        ({**GOOD, "0.key": KEY.astype(np.int64)}, [1, 2, 3, 4], "dtype 'I64'"),
        ({**GOOD, "0.key": np.zeros((10**6, 4, 8), np.uint8)}, [1, 2, 3, 4], "'0.key' is uint8"),
        (GOOD, [1, 2, 3], r"the model has float32 \[1, 3, 8\]"),
        (GOOD, [1, 2, 3, tiny.VOCAB], "no prompt cache of this model"),
        (GOOD, [1, 2, 3, True], "no prompt cache of this model"),
        (GOOD, [1] * 17, "no prompt cache of this model"),
        (GOOD, [], "no prompt cache of this model"),
        (GOOD, None, "no prompt cache of this model"),
        (GOOD, "metadata", "no prompt cache of this model"),
    ],
)
def test_hostile_files_are_refused(
    bundle: Path, tmp_path: Path, tensors: dict[str, np.ndarray], ids: Any, message: str
) -> None:
    """By their headers, before a tensor is read."""
    path = tmp_path / "prompt"
    metadata = {} if ids == "metadata" else {"edgepeft_prompt": json.dumps({"ids": ids})}
    safetensors.numpy.save_file(tensors, path, metadata)
    with edgepeft.load(bundle) as model:
        with pytest.raises(UsageError, match=message):
            model.generate(PROMPT, "one", prompt_cache=path, max_new_tokens=2)
        assert not model._sessions._open


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no prompt cache"),
        (b"not safetensors at all", "its header has"),
        ((2**40).to_bytes(8, "little") + b"{}", "its header has 1,099,511,627,776 B"),
        ((2).to_bytes(8, "little") + b"[]", "is damaged or not safetensors"),
    ],
)
def test_files_that_are_none_are_refused(bundle: Path, tmp_path: Path, content: bytes, message: str) -> None:
    """With what to do."""
    path = tmp_path / "prompt"
    path.write_bytes(content)
    with edgepeft.load(bundle) as model:
        with pytest.raises(UsageError, match=message):
            model.generate(PROMPT, "one", prompt_cache=path, max_new_tokens=2)
        with pytest.raises(UsageError, match="cannot be read"):
            model.generate(PROMPT, "one", prompt_cache=tmp_path / "none", max_new_tokens=2)


def test_damaged_metadata_is_refused(bundle: Path, tmp_path: Path) -> None:
    """Text that is no JSON, or too deep."""
    for text in ("{", "[" * 100_000):
        safetensors.numpy.save_file(GOOD, tmp_path / "prompt", {"edgepeft_prompt": text})
        with edgepeft.load(bundle) as model, pytest.raises(UsageError, match="is no prompt cache"):
            open_prompt_cache(tmp_path / "prompt", model.manifest)
