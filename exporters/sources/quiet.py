"""Silence what transformers says while it loads."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Without progress bars and without its report on a head that the checkpoint does not have: it was asked
    for."""
    settings = transformers.utils.logging
    verbosity, progress = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity_error()
    settings.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        settings.set_verbosity(verbosity)
        if progress:
            settings.enable_progress_bar()
