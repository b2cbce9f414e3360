"""Compare what costs no time: a bundle's tokens, its chat template and its labels, with transformers' own."""

from pathlib import Path
from typing import Any

import numpy as np

from edgepeft.bundle.reader import Bundle, open_bundle
from edgepeft.errors import DataError, MissingExtraError, VerificationError
from edgepeft.runtime.tasks import task_for
from edgepeft.runtime.text.tokenizer import TOKENIZER_FILE, Text

from ..sources.base import ModelSource
from ..sources.quiet import quiet
from ..sources.settings import SENTENCES
from ..sources.tasks import CLASSIFICATION
from ..sources.tokenizer import lowers

#: Letters of several scripts, punctuation, blanks, digits, capitals.
TEXTS = (
    "The quick brown Fox doesn't jump over 13 lazy dogs , does it ?",
    " Überraschung:\n\tdéjà vu — “北京”  🙂… ",
)
#: Tokens that texts are cut to.
SHORT = 9
_MESSAGES = (
    {"role": "user", "content": TEXTS[0]},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Really?"},
)


def verify_text(folder: Path, source: ModelSource) -> None:
    """Compare how texts are read and written, and what classes are called.

    Raises:
        VerificationError: something is not as in transformers.
    """
    bundle = open_bundle(folder)
    if source.tokenizer is not None and TOKENIZER_FILE in bundle.manifest.files:
        _check_tokens(bundle, source)
        if bundle.manifest.task == "text-generation":
            _check_template(bundle, source)
    if bundle.manifest.task in CLASSIFICATION:
        _check_labels(bundle, source)


def _check_tokens(bundle: Bundle, source: ModelSource) -> None:
    text, theirs = Text(bundle), source.tokenizer
    shipped = getattr(source, "shipped", None)
    embeds = source.pooling is not None or source.architecture == "SentenceClassifier"
    lower = embeds and shipped is not None and lowers(shipped)
    special = " ".join(theirs.special_tokens_map.values())
    pairs = (None, TEXTS[1]) if bundle.manifest.task == "text-classification" else (None,)
    cuts = {min(SHORT, bundle.manifest.model.max_length), bundle.manifest.model.max_length}
    spelled = () if lower else (f"a{special}a",)  # lower case leaves special tokens alone
    for written in (*TEXTS, *spelled, f"{TEXTS[0]} " * (2 * SHORT)):
        for pair in pairs:
            for length in sorted(cuts):
                given = [part.lower() if lower else part for part in (written, pair) if part is not None]
                want = _read(theirs, *given, truncation=True, max_length=length)
                if want is None:  # no token stands for what it does not know
                    continue
                types = want.get("token_type_ids") or [0] * len(want["input_ids"])
                got = text.cut(written, length, pair)
                if (got.ids, got.type_ids) != (want["input_ids"], types):
                    what = f"{written[:40]!r}" + ("" if pair is None else f" and {pair[:40]!r}")
                    raise VerificationError(
                        f"{what}, cut to {length} tokens, is read as {got.ids[:12]} (types "
                        f"{got.type_ids[:12]}), by transformers as {want['input_ids'][:12]} (types "
                        f"{types[:12]}): nothing was written"
                        + (f"; {SENTENCES} has do_lower_case" if lower else "")
                    )
        if bundle.manifest.task.endswith("-generation"):
            if (read := _read(theirs, written)) is None:
                continue
            ids = read["input_ids"]
            with quiet():
                expected = theirs.decode(ids, skip_special_tokens=True)
            if text.decode(ids) != expected:
                raise VerificationError(
                    f"tokens {ids[:12]} are written as {text.decode(ids)[:60]!r}, by transformers as "
                    f"{expected[:60]!r}: nothing was written"
                )


def _read(tokenizer: Any, *texts: str, **options: Any) -> Any:
    """What transformers makes of texts; None where it cannot read them."""
    try:
        with quiet():
            return tokenizer(*texts, **options)
    except Exception:  # the package `tokenizers` raises bare ones
        return None


def _check_template(bundle: Bundle, source: ModelSource) -> None:
    """A conversation with and without tools, where the template takes it."""
    theirs = source.tokenizer
    if theirs.chat_template is None:
        return
    tools = [{"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}]
    for messages, beside in ((_MESSAGES[:1], {}), (_MESSAGES, {}), (_MESSAGES, {"tools": tools})):
        try:
            expected: str | None = theirs.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, **beside
            )
        except Exception:  # whatever a template raises
            expected = None
        try:
            got: str | None = task_for(bundle).chat.prompt(messages, "verification", beside)
        except DataError:
            got = None
        except MissingExtraError:
            return
        if got != expected:
            raise VerificationError(
                f"the chat template writes {_shown(got)} where transformers writes {_shown(expected)}: "
                "nothing was written"
            )


def _shown(text: str | None) -> str:
    return "nothing" if text is None else repr(text if len(text) < 120 else text[:60] + " … " + text[-60:])


def _check_labels(bundle: Bundle, source: ModelSource) -> None:
    """What each class is called where it is the likeliest."""
    model = bundle.manifest.model
    named = source.config.id2label or {}
    task: Any = task_for(bundle)
    output = np.eye(len(model.labels), dtype=np.float32)
    single = bundle.manifest.task != "token-classification" and model.problem_type in (
        None,
        "single_label_classification",
    )
    found = (
        [result["label"] for result in task.results({task.output: output}, {})] if single else model.labels
    )
    for number, label in enumerate(found):
        declared = named.get(number, named.get(str(number), f"LABEL_{number}"))
        # Of a name that stands there twice, the second has its class behind it.
        if label != str(declared) and not label.startswith(f"{declared}_"):
            raise VerificationError(
                f"class {number} is called {label!r}, its configuration calls it {declared!r}: nothing was "
                "written"
            )
    if len(model.labels) != source.config.num_labels:
        raise VerificationError(
            f"there are {len(model.labels)} labels for {source.config.num_labels} classes: nothing was "
            "written"
        )
