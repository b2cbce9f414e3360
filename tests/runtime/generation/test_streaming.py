"""Streams, batches of prompts, conversations, and calls from several threads."""

import dataclasses
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgepeft
from edgepeft.adapters import save_adapter
from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import BudgetError, DataError, UsageError
from edgepeft.runtime.model import Model
from edgepeft.runtime.session import GraphSession

from .. import tiny

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}w1{% endif %}"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model with two trained adapters and a chat template."""
    adapters = {
        name: tiny.adapter(rank=rank, seed=seed, task="text-generation", trained=True)
        for name, rank, seed in (("one", 2, 3), ("two", 3, 4))
    }
    return tiny.write_bundle(
        tmp_path_factory.mktemp("streaming") / "b",
        "text-generation",
        adapters=adapters,
        tokenizer=tiny.word_tokenizer(),
        tokenizer_config={"chat_template": TEMPLATE},
    )


def endless(path: Path, budget_bytes: int | None = None) -> Model:
    """The model without its end token, so that answers have the length that was asked for."""
    opened = open_bundle(path)
    model = dataclasses.replace(opened.manifest.model, eos_token_ids=())
    manifest = dataclasses.replace(opened.manifest, model=model)
    return Model(dataclasses.replace(opened, manifest=manifest), budget_bytes, threads=1)


def test_the_pieces_are_the_text(bundle: Path) -> None:
    """Greedy and drawn; the result counts."""
    with endless(bundle) as model:
        for options in ({}, {"temperature": 1.5, "top_k": 20, "seed": 7}):
            text = model.generate("w5 w9", "one", max_new_tokens=6, **options)
            stream = model.stream("w5 w9", "one", max_new_tokens=6, **options)
            pieces = list(stream)
            assert "".join(pieces) == text == stream.result.text
            assert all(pieces)
            result = stream.result
            assert (result.finish_reason, len(result.ids), result.prompt_tokens) == ("length", 6, 2)
            again = model.stream("w5 w9", "one", max_new_tokens=6, **options)
            assert [next(again) for _ in pieces] == pieces
            assert (again.result.text, len(model._sessions._borrowers)) == (text, 0)
            assert result.prefill_s > 0
            assert result.decode_s > 0


def test_a_seed_decides_the_text(bundle: Path) -> None:
    """In other models of the same bundle too."""
    options = {"temperature": 2.0, "max_new_tokens": 10}
    texts = []
    for seed in (1, 1, 2):
        with endless(bundle) as model:
            texts.append(model.generate("w5", seed=seed, **options))
    assert texts[0] == texts[1] != texts[2]


def test_stop_texts_end_the_answer(bundle: Path) -> None:
    """They are not part of it, nor of any piece, also where they lie across two tokens."""
    with endless(bundle) as model:
        whole = model.generate("w5 w9", max_new_tokens=8)
        places = [
            index for index in range(1, len(whole) - 3) if whole.find(whole[index : index + 3]) == index
        ]
        for place in places:
            stop = whole[place : place + 3]
            with model.stream("w5 w9", max_new_tokens=8, stop=[stop, "nowhere"]) as stream:
                pieces = list(stream)
            assert "".join(pieces) == whole[:place] == stream.result.text
            assert stream.result.finish_reason == "stop"
            assert model.generate_ids([5, 9], max_new_tokens=8, stop=stop) == stream.result.ids
        assert model.generate("w5 w9", max_new_tokens=8, stop="nowhere") == whole


def test_a_closed_stream_is_cancelled_and_holds_nothing(bundle: Path) -> None:
    """Closed by the one who reads it, by another thread, or forgotten."""
    with endless(bundle) as model:
        whole = model.generate("w5", max_new_tokens=8)
        with model.stream("w5", max_new_tokens=8) as stream:
            first = next(stream)
            with pytest.raises(UsageError, match="has not ended"):
                _ = stream.result
        assert stream.result.finish_reason == "cancelled"
        assert whole.startswith(stream.result.text)
        assert stream.result.text == first
        assert list(stream) == []
        other = model.stream("w5", max_new_tokens=8)
        next(other)
        thread = threading.Thread(target=other.close)
        thread.start()
        thread.join()
        assert (list(other), other.result.finish_reason) == ([], "cancelled")
        forgotten = model.stream("w5", max_new_tokens=8)
        next(forgotten)
        assert len(model._sessions._borrowers) == 1
        del forgotten
        gc.collect()
        assert len(model._sessions._borrowers) == 0


@pytest.mark.parametrize("whole", [True, False])
def test_a_stream_that_has_ended_keeps_no_session(bundle: Path, whole: bool) -> None:
    """Its result may be looked at long after the model is closed, whose weights are then no longer mapped."""
    with edgepeft.load(bundle) as model:
        stream = model.stream("w5", max_new_tokens=4)
        pieces = [next(stream)]
        (entry,) = model._sessions._open.values()
        assert isinstance(entry.session, GraphSession)
        session = weakref.ref(entry.session._session)
        del entry
        if whole:
            pieces += stream
    assert session() is None
    assert stream.result.text == "".join(pieces)


def test_a_prompt_is_read_in_pieces(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers, alone, in a batch and after a prompt cache; and it may be closed in between."""
    prompts = ["w5 w9 w2 w7 w1", "w3", "w4 w4 w4 w1 w2 w3"]
    with endless(bundle) as model:
        expected = model.generate(prompts, "one", max_new_tokens=6)
        cache = model.read_prompt(prompts[0], "one")
        monkeypatch.setattr("edgepeft.runtime.generation.loop._PIECE", 2)
        assert model.generate(prompts, "one", max_new_tokens=6) == expected
        assert model.generate(prompts, "one", max_new_tokens=6, prompt_cache=cache) == expected
        stream = model.stream(prompts[0], "one", max_new_tokens=6, keep=True)
        assert stream._generation.advance() == [""]
        stream.close()
        assert (stream.result.finish_reason, stream.result.ids) == ("cancelled", [])
        assert stream.prompt_cache is not None
        assert stream.prompt_cache.ids == [5, 9]


def test_calls_between_two_pieces_change_nothing(bundle: Path) -> None:
    """Two streams in turn, and a forward pass of a third adapter."""
    with endless(bundle) as model:
        expected = [
            model.generate(f"w{n}", adapter, max_new_tokens=8) for n, adapter in ((5, "one"), (9, "two"))
        ]
        one = model.stream("w5", "one", max_new_tokens=8)
        two = model.stream("w9", "two", max_new_tokens=8)
        got = ["", ""]
        for pieces in zip(one, two, strict=True):
            got = [text + piece for text, piece in zip(got, pieces, strict=True)]
            model.forward({"input_ids": [[3, 4, 5]]})
        assert got == expected


def test_the_end_of_a_model_ends_its_streams(bundle: Path) -> None:
    """And training, which needs the memory, is refused while one is open."""
    with endless(bundle) as model:
        stream = model.stream("w5", max_new_tokens=8)
        next(stream)
        with pytest.raises(UsageError, match="a stream of this model is open and training needs its memory"):
            model.adapt(tiny.sentences(), bundle.parent / "out")
        next(stream)
    assert list(stream) == []
    assert stream.result.finish_reason == "cancelled"


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.3}])
def test_a_batch_gets_what_its_prompts_get_alone(bundle: Path, options: dict[str, Any]) -> None:
    """Prompts of several lengths, answers that end early; row i draws as seed + i."""
    prompts = ["w5", "w1 w2 w3 w4", "w9 w9", *(f"w{index}" for index in range(1, 20))]
    with edgepeft.load(bundle) as model:
        alone = []
        for index, prompt in enumerate(prompts):
            own = {**options, "seed": options["seed"] + index} if options else {}
            alone.append(model.generate(prompt, "two", max_new_tokens=9, **own))
        assert model.generate(prompts, "two", max_new_tokens=9, **options) == alone
        ids = [model._task.text.encode(prompt)[0] for prompt in prompts]
        texts = map(model._task.text.decode, model.generate_ids(ids, "two", max_new_tokens=9, **options))
        assert list(texts) == alone
        assert len({len(text.split()) for text in alone}) > 2, "the answers all have one length: another seed"
        assert model.generate(prompts[:1], "two", max_new_tokens=9, **options) == alone[:1]


def test_rows_that_have_ended_are_not_run(bundle: Path) -> None:
    """As many runs as tokens; and their keys and values are gone."""
    prompts = [f"w{index}" for index in range(1, 20)]
    with edgepeft.load(bundle) as model:
        ids = [model.generate_ids([prompt], "two", max_new_tokens=9) for prompt in range(1, 20)]
        session = model._sessions._open["inference"].session
        runs = 0
        kind, original = type(session), type(session).run_for

        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal runs
            runs += 1
            return original(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, "run_for", counted)
            model.generate(prompts, "two", max_new_tokens=9)
        assert runs == sum(map(len, ids))


def test_every_prompt_is_checked_before_any_work(bundle: Path) -> None:
    """By its number."""
    with edgepeft.load(bundle) as model:
        with pytest.raises(UsageError, match=r"prompt 2 of 2 has 10 tokens and 7 more .* to 6"):
            model.generate(["w1", " ".join(["w1"] * 10)], max_new_tokens=7)
        with pytest.raises(UsageError, match="there are no prompts"):
            model.generate([])
        with pytest.raises(UsageError, match="prompt 1 of 2 has no tokens"):
            model.generate(["", "w1"])
        with pytest.raises(UsageError, match="either a prompt or messages"):
            model.generate("w1", messages=[{"role": "user", "content": "w1"}])
        with pytest.raises(UsageError, match="either a prompt or messages"):
            model.generate()
        assert not model._sessions._open


def test_a_budget_holds_the_rows(bundle: Path) -> None:
    """Each row's keys and values are in the plan, and those of open streams in the plans of other calls."""
    row_bytes = 2 * tiny.WIDTH * 4 * 15
    with endless(bundle, 2**40) as model:
        model.generate("w1", max_new_tokens=14)
        one = model.predicted_peak_bytes
        model.generate(["w1"] * 5, max_new_tokens=14)
        five = model.predicted_peak_bytes
        assert one is not None
        assert five == one + 4 * row_bytes
        stream = model.stream("w1", max_new_tokens=14)
        model.generate("w1", max_new_tokens=14)
        assert model.predicted_peak_bytes == one + row_bytes - 2 * tiny.WIDTH * 4
        stream.close()
        model.generate("w1", max_new_tokens=14)
        assert model.predicted_peak_bytes == one
    with endless(bundle, 2**20) as model, pytest.raises(BudgetError):
        model.generate(["w1"] * 5, max_new_tokens=14)


def test_a_budget_holds_the_adapters_of_all_rows(bundle: Path, tmp_path: Path) -> None:
    """Each once; loaded ones are counted where they are."""
    adapter = tiny.adapter(rank=64, task="text-generation", trained=True)
    own_bytes = sum(tensor.nbytes for tensor in adapter.tensors.values()) + 64 * 4  # and its scaling
    for name in ("a", "b", "c"):
        save_adapter(adapter, tmp_path / name)
    a, b, c = (str(tmp_path / name) for name in ("a", "b", "c"))

    def peak(*adapters: str) -> int:
        model.generate(["w1"] * 3, list(adapters), max_new_tokens=4)
        assert model.predicted_peak_bytes is not None
        return model.predicted_peak_bytes

    with endless(bundle, 2**40) as model:
        one = peak(a, a, a)
        assert peak(a, b, a) == one + own_bytes
        assert peak(c, a, b) == one + 2 * own_bytes
        model.load_adapter("b", b)
        assert peak("b", "b", "b") == one
        assert peak("b", a, a) == one + own_bytes


def test_messages_go_through_the_chat_template(bundle: Path) -> None:
    """As the prompt that it writes; special tokens are the template's."""
    messages = [{"role": "system", "content": "w7"}, {"role": "user", "content": "w5 w9"}]
    with endless(bundle) as model:
        text = model.generate(messages=messages, max_new_tokens=5)
        assert text == model.generate("w7 w5 w9 w1", max_new_tokens=5)
        assert "".join(model.stream(messages=messages, max_new_tokens=5)) == text
        for wrong in ([], "w5", [{"role": "user"}]):
            with pytest.raises(DataError, match="messages must be a list of"):
                model.generate(messages=wrong)  # type: ignore[call-overload]


def test_threads_get_what_they_asked_for(bundle: Path) -> None:
    """Generation, batches, streams and forward passes with different adapters, all at once."""
    adapters = [None, "one", "two", {"one": 0.4, "two": 0.6}]
    ids = np.array([[3, 4, 5]])
    with edgepeft.load(bundle, threads=1) as model:

        def ask(index: int) -> Any:
            adapter = adapters[index % 4]
            match index // 4 % 4:
                case 0:
                    return model.generate("w5 w9", adapter, max_new_tokens=10)
                case 1:
                    return "".join(model.stream("w5 w9", adapter, max_new_tokens=10))
                case 2:
                    return model.generate(["w1", "w5 w9"], adapter, max_new_tokens=10)[1]
                case _:
                    return model.forward({"input_ids": ids}, adapter)["logits"].tobytes()

        expected = [ask(index) for index in range(16)]
        assert len(set(expected[:4])) > 1
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(ask, [index % 16 for index in range(160)]))
        assert got == expected * 10
