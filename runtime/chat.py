"""Chat templates: the Jinja program in `tokenizer_config.json` that turns messages into text (the `chat`
extra).

A template is a program that came with the bundle, so it runs in Jinja's immutable sandbox, as in
transformers, and its output, its time and its memory are bounded.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from edgepeft.bundle.reader import Bundle
from edgepeft.errors import BundleError, DataError, MissingExtraError

_CONFIG_FILE = "tokenizer_config.json"
_TEMPLATE_FILE = "chat_template.jinja"
_MAX_CHARACTERS = 2**22


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

            from edgepeft.runtime.chat_extension import Generation
            from edgepeft.runtime.template_limits import BoundedEnvironment, limited
        except ImportError as error:
            raise MissingExtraError("jinja2", "chat", "reading messages") from error
        config = _read_config(bundle)
        in_file = _TEMPLATE_FILE in bundle.manifest.files
        self._origin = str(bundle.path / (_TEMPLATE_FILE if in_file else _CONFIG_FILE))
        source = _read_template(bundle) if in_file else _template(config.get("chat_template"))
        if not isinstance(source, str):
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
        self._tokens = {
            name: _token(config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        raised = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
        self._errors = (jinja2.TemplateError, *raised)
        try:
            with limited(self._origin):
                self._template = environment.from_string(source)
        except (*self._errors, SyntaxError) as error:  # what Python says of the program that Jinja made
            raise BundleError(f"{self._origin}: the chat template cannot be read ({error})") from error

    def render(self, messages: Sequence[Mapping[str, Any]], where: str, *, prompt: bool) -> str:
        """The messages as text; with `prompt`, the beginning of the assistant's answer is added.

        Raises:
            DataError: the template refuses the messages.
        """
        parts, size = [], 0
        try:
            with self._limited(self._origin):
                for part in self._template.generate(
                    messages=messages, add_generation_prompt=prompt, **self._tokens
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

    def prompt(self, messages: object, where: str) -> str:
        """The messages as text, up to where the assistant's answer begins.

        Raises:
            DataError: the messages are no conversation, or the template refuses them.
        """
        return self.render(_checked(messages, where), where, prompt=True)

    def split(self, messages: object, where: str) -> tuple[str, str]:
        """Text up to the assistant's last message, and that message as the template writes it.

        Raises:
            DataError: the messages are not a conversation that ends with the assistant.
        """
        messages = _checked(messages, where)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise DataError(
                f"{where}: the last of at least two messages must be the assistant's, it is what is learned"
            )
        prompt = self.render(messages[:-1], where, prompt=True)
        whole = self.render(messages, where, prompt=False)
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
            isinstance(item, Mapping)
            and isinstance(item.get("role"), str)
            and isinstance(item.get("content"), str)
            for item in messages
        )
    ):
        raise DataError(f'{where}: messages must be a list of {{"role": text, "content": text}}')
    return messages


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


def _template(value: object) -> object:
    """The template, of a tokenizer configuration that may list several by name."""
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        return named.get("default")
    return value


def _token(value: object) -> str:
    """A special token, which tokenizer configurations write as a text or as `{"content": text}`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _raise(message: str) -> NoReturn:
    raise ValueError(message)
