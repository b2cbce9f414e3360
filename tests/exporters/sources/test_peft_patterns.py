"""Patterns that PEFT would match with a model's modules are tried before."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from edgepeft.errors import AdapterError
from edgepeft.exporters.sources import peft_patterns
from edgepeft.exporters.sources.peft_patterns import check_patterns

from .. import models

SLOW = r"(.*a*)*b\d"


def folder(path: Path, **options: Any) -> Path:
    (path / "adapter_config.json").write_text(json.dumps(options))
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "(x+x+)+y"], "modules_to_save": ["score"]},
        {"target_modules": r".*\.(q|v)_proj", "exclude_modules": "all-linear", "rank_pattern": None},
        {
            "target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:k_proj|v_proj|fc2).*?)|"
            r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:k_proj|v_proj)))"
        },
    ],
    ids=["names", "usual", "unsloth"],
)
def test_what_is_usual_passes(tmp_path: Path, options: dict[str, Any]) -> None:
    """Names in a list are no expressions to PEFT."""
    check_patterns(folder(tmp_path, **options), models.llama(tied=False))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": SLOW},
        {"exclude_modules": SLOW, "target_modules": "all-linear"},
        {"modules_to_save": [SLOW]},
        {"layers_pattern": [SLOW]},
        {"alpha_pattern": {SLOW: 8}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_takes_hours_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """With the file's name."""
    monkeypatch.setattr(peft_patterns, "_LIMIT_S", 1)
    began_s = time.perf_counter()
    with pytest.raises(AdapterError, match=r"adapter_config\.json: its patterns are too costly to match"):
        check_patterns(folder(tmp_path, **options), models.llama(tied=False))
    assert time.perf_counter() - began_s < 5


def test_what_is_none_is_said(tmp_path: Path) -> None:
    """With Python's reason."""
    with pytest.raises(AdapterError, match=r"no regular expression .*unterminated"):
        check_patterns(folder(tmp_path, target_modules="(q_proj"), models.llama(tied=False))
