"""Records with messages: the chat template against transformers, and templates that misbehave."""

import json
from pathlib import Path
from typing import Any

import pytest

from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import EdgePeftError
from edgepeft.runtime.tasks import Task, task_for

from .. import tiny
from ..test_records import encode

CHAT = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} "
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


def chat_bundle(folder: Path, template: Any) -> Task:
    vocabulary = {
        "<pad>": 0,
        "user": 1,
        "assistant": 2,
        **{f"w{index}": index for index in range(3, 23)},
        "</s>": 23,
    }
    content: dict[str, Any] = tiny.word_tokenizer()
    content["model"]["vocab"] = vocabulary
    config = {"chat_template": template, "eos_token": {"content": "</s>"}}
    return task_for(
        open_bundle(tiny.write_bundle(folder, "text-generation", tokenizer=content, tokenizer_config=config))
    )


def test_messages_go_through_the_chat_template(tmp_path: Path) -> None:
    """Only the assistant's last message is learned, the end token it writes included."""
    task = chat_bundle(tmp_path / "b", CHAT)
    messages = [
        {"role": "user", "content": "w5"},
        {"role": "assistant", "content": "w6"},
        {"role": "user", "content": "w7"},
        {"role": "assistant", "content": "w8 w9"},
    ]
    row = encode(task, {"messages": messages}).rows[0]
    assert row.labels is not None
    assert row.input_ids.tolist() == [1, 5, 2, 6, 23, 1, 7, 2, 8, 9, 23]
    assert row.labels.tolist() == [-100] * 8 + [8, 9, 23]


MARKED = CHAT.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
LISTED = [{"name": "tool_use", "template": "none"}, {"name": "default", "template": CHAT}]


@pytest.mark.parametrize("template", [CHAT, MARKED, LISTED])
def test_the_template_agrees_with_transformers(tmp_path: Path, template: Any) -> None:
    """The same text as `apply_chat_template`; also where the assistant's words are marked, or where the
    configuration lists several."""
    import transformers
    from tokenizers import Tokenizer

    task = chat_bundle(tmp_path / "b", template)
    backend = Tokenizer.from_str(json.dumps(tiny.word_tokenizer()))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    theirs.chat_template = CHAT if isinstance(template, list) else template
    messages = [{"role": "user", "content": "ä {{ x }}"}, {"role": "assistant", "content": "w6"}]
    for count, prompt in ((1, True), (2, False)):
        want = theirs.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)
        assert task.chat.render(messages[:count], "here", prompt=prompt) == want


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (CHAT, "hello", "messages must be a list"),
        (CHAT, [{"role": "user"}], "messages must be a list"),
        (CHAT, [{"role": "assistant", "content": "w5"}], "at least two messages"),
        (
            CHAT,
            [{"role": "assistant", "content": "w5"}, {"role": "user", "content": "w6"}],
            "must be the assistant's",
        ),
        ("{{ raise_exception('no') }}", None, "refuses these messages .no"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", None, "refuses these messages"),
        ("{% for i in range(10**9) %}x{% endfor %}", None, "refuses these messages"),
        ("{{ messages|length }}", None, "writes a finished conversation differently"),
        ("{% for i in range(9) %}{{ 'x' * 10**6 }}{% endfor %}", None, "more than"),
        ("{% if", None, "cannot be read"),
        (None, None, "has no chat template"),
    ],
)
def test_templates_and_messages_that_cannot_be_used(
    tmp_path: Path, template: Any, messages: Any, message: str
) -> None:
    """A template is somebody's program: it runs in a sandbox and may not write without end."""
    task = chat_bundle(tmp_path / "b", template)
    default = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    with pytest.raises(EdgePeftError, match=message):
        encode(task, {"messages": default if messages is None else messages})
