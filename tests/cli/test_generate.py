"""`edgepeft generate`: what is asked for, where it comes from and how it is told."""

import builtins
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import edgepeft
from edgepeft import cli
from edgepeft.cli.conversation import converse

from ..runtime.generation.test_streaming import bundle, endless

__all__ = ["bundle"]  # the fixture


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli.main, ["generate", *map(str, arguments)], input=stdin)


LENGTH = ("--max-new-tokens", "6")


def test_options_choose_the_tokens(bundle: Path) -> None:
    """Every one of them reaches the model."""
    options: dict[str, Any] = {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "seed": 3}
    options |= {"repetition_penalty": 1.2, "stop": ["w2", "w4"]}
    flags = ["--stop", "w2", "--stop", "w4", "--repetition-penalty", 1.2]
    flags += ["--temperature", 1.5, "--top-k", 9, "--top-p", 0.9, "--min-p", 0.01, "--seed", 3]
    with edgepeft.load(bundle) as model:
        expected = model.generate("w5 w9", "one", max_new_tokens=6, **options)
        assert expected != model.generate("w5 w9", "one", max_new_tokens=6)
    for flag in ("--stream", "--no-stream"):
        result = run(bundle, "--prompt", "w5 w9", "--adapter", "one", *LENGTH, *flags, flag)
        assert result.stdout == f"{expected}\n"
    answer = json.loads(
        run(bundle, "--prompt", "w5 w9", "--adapter", "one", *LENGTH, *flags, "--json").stdout
    )
    assert answer["text"] == expected
    assert answer.keys() == {
        *("prompt", "adapter", "text", "finish_reason"),
        *("prompt_tokens", "cached_tokens", "new_tokens", "prefill_s", "decode_s"),
    }


def test_a_prompt_from_standard_input(bundle: Path) -> None:
    """All of it but the last line's end."""
    expected = run(bundle, "--prompt", "w5\nw9", *LENGTH)
    assert run(bundle, "--prompt", "-", *LENGTH, stdin="w5\nw9\n").stdout == expected.stdout != ""


def test_one_message(bundle: Path) -> None:
    """Through the chat template, a system message before it."""
    with edgepeft.load(bundle) as model:
        system = {"role": "system", "content": "w7"}
        expected = model.generate(messages=[system, {"role": "user", "content": "w5"}], max_new_tokens=6)
    assert run(bundle, "--chat", "--system", "w7", "--prompt", "w5", *LENGTH).stdout == f"{expected}\n"


def test_prompt_caches(bundle: Path, tmp_path: Path) -> None:
    """Written without generating anything, used by a prompt that goes on."""
    path = tmp_path / "prompt"
    written = run(bundle, "--prompt", "w5 w9 w2", "--save-prompt-cache", path)
    assert written.stdout == f"{path}: 3 tokens, {path.stat().st_size:,} B\n"
    told = json.loads(run(bundle, "--prompt", "w5 w9 w2", "--save-prompt-cache", path, "--json").stdout)
    assert told == {"file": str(path), "prompt_tokens": 3, "nbytes": path.stat().st_size}
    plain = json.loads(run(bundle, "--prompt", "w5 w9 w2 w7", *LENGTH, "--json").stdout)
    cached = json.loads(
        run(bundle, "--prompt", "w5 w9 w2 w7", *LENGTH, "--prompt-cache", path, "--json").stdout
    )
    assert (cached["text"], cached["cached_tokens"]) == (plain["text"], 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is no --prompt"),
        (("--chat",), "there is no --prompt"),  # standard input is no terminal
        (("--prompt", "w1", "--system", "w2"), "--system is part of a conversation: give --chat"),
        (("--prompt", "w1", "--top-k", "3"), "--top-k chooses among draws"),
        (("--prompt", "w1", "--stop", ""), "expected texts that are not empty"),
    ],
)
def test_what_cannot_be_asked(bundle: Path, arguments: tuple[str, ...], message: str) -> None:
    """Exit code 2 and one line."""
    result = run(bundle, *arguments, *LENGTH)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_a_conversation(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every answer follows all that was said before; keys and values go on from one to the next."""
    typed: Iterator[str] = iter(["w5", "", "w9"])

    def type_line(prompt: str) -> str:
        assert prompt == "> "
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", type_line)
    said = [{"role": "system", "content": "w7"}]
    cached = []
    with endless(bundle) as model:
        expected = list(said)
        for text in ("w5", "w9"):
            expected.append({"role": "user", "content": text})
            answer = model.generate(messages=expected, max_new_tokens=3)
            expected.append({"role": "assistant", "content": answer})
        original = model.stream

        def stream(**asked: Any) -> Any:
            cached.append(asked["prompt_cache"] and len(asked["prompt_cache"].ids))
            return original(**asked)

        monkeypatch.setattr(model, "stream", stream)
        converse(model, said, None, {"adapter": None, "max_new_tokens": 3})
    assert said == expected
    assert cached == [None, 3 + 3 - 1]
    assert capsys.readouterr().out.split("\n")[:2] == [expected[2]["content"], expected[4]["content"]]


def test_a_conversation_leaves_its_beginning_out(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the context, of 16 tokens, is full; a message that does not fit alone changes nothing."""
    typed: Iterator[str] = iter(["w5 w6", " ".join(["w3"] * 14), "w9 w9 w9 w8", "w4 w4 w4 w4"])
    monkeypatch.setattr(builtins, "input", lambda _: next(typed, None) or _end())
    said = [{"role": "system", "content": "w7"}]
    with endless(bundle) as model:
        converse(model, said, None, {"max_new_tokens": 6})
        assert said[0]["content"] == "w7"
        assert [message["content"] for message in said if message["role"] == "user"] == ["w4 w4 w4 w4"]
        assert said[2]["content"] == model.generate(messages=said[:2], max_new_tokens=6)
    refused, *left_out = capsys.readouterr().err.splitlines()
    assert refused.startswith("error: the prompt has 16 tokens and 6 more are asked for")
    assert [line[:14] for line in left_out] == ["(the beginning"] * 2


def _end() -> str:
    raise EOFError


def test_an_interrupt_ends_an_answer_and_not_the_conversation(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was said until then is part of it."""
    typed: Iterator[str] = iter(["w5", "w9"])

    def type_line(_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(builtins, "input", type_line)
    interrupted = []

    def echo(text: str = "", nl: bool = True) -> None:
        if not nl and not interrupted:
            interrupted.append(text)
            raise KeyboardInterrupt

    monkeypatch.setattr("click.echo", echo)
    said: list[dict[str, str]] = []
    with endless(bundle) as model:
        converse(model, said, None, {"max_new_tokens": 4})
        assert [message["role"] for message in said] == ["user", "assistant"] * 2
        assert said[1]["content"] == interrupted[0]
        assert said[3]["content"] == model.generate(messages=said[:3], max_new_tokens=4)
