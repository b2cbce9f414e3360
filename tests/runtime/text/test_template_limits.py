"""Chat templates that loop for years or build gigabytes are refused, by the file that they are in."""

import sys
import time
from pathlib import Path

import pytest

from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import BundleError, EdgePeftError
from edgepeft.runtime.text import template_limits
from edgepeft.runtime.text.chat import ChatTemplate

from .. import tiny

USER = [{"role": "user", "content": "hi"}]


def render(folder: Path, template: str) -> str:
    bundle = tiny.write_bundle(
        folder / "b",
        "text-generation",
        tokenizer=tiny.word_tokenizer(),
        tokenizer_config={"chat_template": template},
    )
    return ChatTemplate(open_bundle(bundle)).prompt(USER, "here")


DOUBLE = "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
SLOW = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "program": "{{ 1 }}" * 100_000,
    "lipsum": "{{ lipsum(n=10**7) }}",
}
LARGE = {
    "doubling": DOUBLE + "{{ ns.x|length }}",
    "center": "{{ 'x'|center(10**9) }}",
    "constant": "{{ 'x'.ljust(10**9) }}",
    "format": "{{ '%1000000000d' % 1 }}",
    "replace": "{{ ('a'*4000000)|replace('a','b'*1000) }}",
    "concatenation": "{% set x='a'*4000000 %}{{ (" + "~".join(["x"] * 2000) + ")|length }}",
}
REFUSED = {
    "product": "{{ 'x' * 10**9 }}",
    "list": "{{ [1] * 10**9 }}",
    "power": "{{ 3**(10**8) }}",
    "squares": "{% set ns=namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "endless": "{% macro f(n) %}{{ f(n+1) }}{% endmacro %}{{ f(1) }}",
    "deep": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "division": "{{ 1 % 0 }}",
    "blocks": "{% for i in [1] %}" * 60 + "{% endfor %}" * 60,
    "output": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
}


@pytest.mark.parametrize("template", SLOW.values(), ids=SLOW)
def test_time_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    """While it is read and while it runs."""
    monkeypatch.setattr(template_limits, "LIMIT_S", 0.5)
    before, began_s = sys.gettrace(), time.thread_time()
    with pytest.raises(BundleError, match=r"b/tokenizer_config\.json: the chat template computes for more"):
        render(tmp_path, template)
    assert time.thread_time() - began_s < 2
    assert sys.gettrace() is before


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no memory is limited")
@pytest.mark.parametrize("template", LARGE.values(), ids=LARGE)
def test_memory_is_bounded(tmp_path: Path, template: str) -> None:
    """And the process has all the address space afterwards that it had before."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(
        BundleError, match=r"b/tokenizer_config\.json: the chat template takes more than 64 MiB"
    ):
        render(tmp_path, template)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize("template", REFUSED.values(), ids=REFUSED)
def test_what_is_too_large_or_deep_is_refused(tmp_path: Path, template: str) -> None:
    """Without waiting for a limit, on every system."""
    with pytest.raises(EdgePeftError):
        render(tmp_path, template)


def test_arithmetic_stays(tmp_path: Path) -> None:
    """Products and powers that templates use."""
    assert render(tmp_path, "{{ '-' * 3 }}{{ 2 * 3 }}{{ 2 ** 10 }}{{ 2 ** -1 }}{{ [1] * 2 }}") == (
        "---610240.5[1, 1]"
    )


def test_a_template_file_that_is_no_text(tmp_path: Path) -> None:
    """It is named."""
    bundle = tiny.write_bundle(tmp_path / "b", "text-generation", tokenizer=tiny.word_tokenizer())
    (bundle / "chat_template.jinja").write_bytes(b"\xff\xfe")
    from ..test_hostile_bundles import rehash

    rehash(bundle)
    with pytest.raises(BundleError, match=r"chat_template\.jinja: cannot be read"):
        ChatTemplate(open_bundle(bundle))
