"""The regular expressions in an adapter's configuration that PEFT matches with every module of a model.

PEFT matches them with Python's matcher, which may take hours over one that was made for it. They are tried
before, in a process that can be ended.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgepeft.adapters import CONFIG_FILE
from edgepeft.errors import AdapterError

_LIMIT_S = 10
_TRY = """
import json, re, sys
expressions, names = json.load(sys.stdin)
try:
    for expression in map(re.compile, expressions):
        for name in names:
            expression.fullmatch(name)
except (re.error, RecursionError, OverflowError) as error:
    sys.exit(str(error))
"""


def check_patterns(folder: Path, model: Any) -> None:
    """Refuse an adapter that PEFT could not fit to a model in a reasonable time.

    Args:
        folder: of the adapter; its configuration has been read once.
        model: what it will be fitted to, a module of PyTorch.

    Raises:
        AdapterError: names the file.
    """
    file = Path(folder) / CONFIG_FILE
    expressions = list(_expressions(json.loads(file.read_bytes())))
    if not any(re.search(r"[*+?{|(]", expression) for expression in expressions):
        return
    names = [name for name, _ in model.named_modules()]
    whole = [
        *expressions,
        *(rf"(^|.*\.){expression}($|\..*)" for expression in expressions),
        *(rf"(.*\.)?({expression})$" for expression in expressions),
    ]
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _TRY],
            input=json.dumps([whole, names]),
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise AdapterError(
            f"{file}: its patterns are too costly to match, they took more than {_LIMIT_S} s on the names of "
            "this model: name the modules"
        ) from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise AdapterError(f"{file}: holds a pattern that is no regular expression ({reason})")


def _expressions(config: Mapping[str, Any]) -> Iterator[str]:
    """Those that PEFT interprets: a text alone, in two options every one of a list, and the keys of two."""
    for option in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        value = config.get(option)
        if isinstance(value, str):
            yield value
        elif isinstance(value, list) and option in ("modules_to_save", "layers_pattern"):
            yield from (item for item in value if isinstance(item, str))
    for option in ("rank_pattern", "alpha_pattern"):
        yield from config.get(option) or {}
