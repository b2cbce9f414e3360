"""Chat templates: the Jinja program in `tokenizer_config.json` that turns messages into text (the `chat`
extra).

A template is a program that came with the bundle, so it runs in Jinja's immutable sandbox, as in
transformers, and its output, its time and its memory are bounded.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from edgepeft.bundle.reader import Bundle
from edgepeft.errors import BundleError, DataError, MissingExtraError

_CONFIG_FILE = "tokenizer_config.json"
_TEMPLATE_FILE = "chat_template.jinja"
_MAX_CHARACTERS = 2**22
_DEFAULT, _TOOL_USE = "default", "tool_use"
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REASONING = ("reasoning_content", "thinking", "reasoning")
BESIDE = ("tools", "documents")
"""What templates are given beside the messages."""
Beside = Mapping[str, Any]
NOTHING: Beside = {}


class ChatTemplate:
    """The bundle's chat template.

    Raises:
        MissingExtraError: the package `jinja2` is not installed.
        BundleError: the bundle has no chat template, or one that cannot be read.
    """

    def __init__(self, bundle: Bundle) -> None:
        try:
            import jinja2
            import jinja2.ext

            from .chat_extension import Generation
            from .template_limits import BoundedEnvironment, limited
        except ImportError as error:
            raise MissingExtraError("jinja2", "chat", "reading messages") from error
        config = _read_config(bundle)
        in_file = _TEMPLATE_FILE in bundle.manifest.files
        self._origin = str(bundle.path / (_TEMPLATE_FILE if in_file else _CONFIG_FILE))
        sources = {_DEFAULT: _read_template(bundle)} if in_file else _templates(config.get("chat_template"))
        if _DEFAULT not in sources:
            raise BundleError(
                f"{bundle.path}: the model has no chat template: give prompt (and completion) instead of "
                "messages, and no --chat"
            )
        self._limited = limited
        environment = BoundedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(
            value, ensure_ascii=False, **options
        )
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _now
        found = {name: _token(config.get(name)) for name in _TOKENS}
        self._tokens = {name: token for name, token in found.items() if token is not None}
        raised = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
        self._errors = (jinja2.TemplateError, *raised)
        try:
            with limited(self._origin):
                self._templates = {name: environment.from_string(source) for name, source in sources.items()}
        except (*self._errors, SyntaxError) as error:  # what Python says of the program that Jinja made
            raise BundleError(f"{self._origin}: the chat template cannot be read ({error})") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], where: str, *, prompt: bool, beside: Beside = NOTHING
    ) -> str:
        """The messages as text; with `prompt`, the beginning of the assistant's answer is added.

        Args:
            beside: what the template is given besides, such as `tools`.

        Raises:
            DataError: the template refuses the messages.
        """
        given = {name: beside.get(name) for name in BESIDE}
        chosen = _TOOL_USE if given["tools"] is not None and _TOOL_USE in self._templates else _DEFAULT
        parts, size = [], 0
        try:
            with self._limited(self._origin):
                for part in self._templates[chosen].generate(
                    messages=messages, add_generation_prompt=prompt, **given, **self._tokens
                ):
                    size += len(part)
                    if size > _MAX_CHARACTERS:
                        raise DataError(
                            f"{where}: the chat template wrote more than {_MAX_CHARACTERS:,} characters"
                        )
                    parts.append(part)
        except self._errors as error:
            raise DataError(f"{where}: the model's chat template refuses these messages ({error})") from error
        return "".join(parts)

    def prompt(self, messages: object, where: str, beside: Beside = NOTHING) -> str:
        """The messages as text, up to where the assistant's answer begins.

        Args:
            beside: as for `render`.

        Raises:
            DataError: the messages are no conversation, or the template refuses them.
        """
        return self.render(_checked(messages, where), where, prompt=True, beside=beside)

    def split(self, messages: object, where: str, beside: Beside = NOTHING) -> tuple[str, str]:
        """Text up to the assistant's last message, and that message as the template writes it.

        Args:
            beside: as for `render`.

        Raises:
            DataError: the messages are not a conversation that ends with the assistant.
        """
        messages = _checked(messages, where)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise DataError(
                f"{where}: the last of at least two messages must be the assistant's, it is what is learned"
            )
        prompt = self.render(messages[:-1], where, prompt=True, beside=beside)
        whole = self.render(messages, where, prompt=False, beside=beside)
        if not whole.startswith(prompt):
            raise DataError(
                f"{where}: the model's chat template writes a finished conversation differently from its "
                "beginning, so the answer cannot be cut out: use prompt and completion"
            )
        return prompt, whole[len(prompt) :]


def _checked(messages: object, where: str) -> Sequence[Mapping[str, Any]]:
    if (
        not isinstance(messages, list | tuple)
        or not messages
        or not all(
            isinstance(item, Mapping) and isinstance(item.get("role"), str) and _has_content(item)
            for item in messages
        )
    ):
        raise DataError(
            f'{where}: messages must be a list of {{"role": text, "content": text}}; content may be a list'
            ' of parts {"type": "text", "text": text}, or null where there are tool_calls'
        )
    return [_plain(item) for item in messages]


def _has_content(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    if isinstance(content, list):
        return all(
            isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content
        )
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers hands it on: without what is null, and with its reasoning by all names."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, _REASONING[0]: reasoning}


def _read_template(bundle: Bundle) -> str:
    path = bundle.file(_TEMPLATE_FILE)
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: cannot be read ({error})") from error


def _read_config(bundle: Bundle) -> dict[str, Any]:
    if _CONFIG_FILE not in bundle.manifest.files:
        return {}
    path = bundle.file(_CONFIG_FILE)
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: is not JSON ({error})") from error
    return config if isinstance(config, dict) else {}


def _templates(value: object) -> dict[str, str]:
    """Templates by name, of a tokenizer configuration that may list several."""
    listed = value if isinstance(value, list) else [{"name": _DEFAULT, "template": value}]
    named = {item.get("name"): item.get("template") for item in listed if isinstance(item, dict)}
    return {str(name): template for name, template in named.items() if isinstance(template, str)}


def _token(value: object) -> str | None:
    """A special token, which tokenizer configurations write as a text or as `{"content": text}`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)


def _raise(message: str) -> NoReturn:
    raise ValueError(message)
