"""Tiny bundles, written once a session."""

from pathlib import Path

import pytest

from . import tiny


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-classification bundle; read only."""
    return tiny.write_bundle(
        tmp_path_factory.mktemp("classifier") / "tiny.edge", tokenizer=tiny.word_tokenizer()
    )


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feature-extraction bundle; read only."""
    return tiny.write_bundle(
        tmp_path_factory.mktemp("encoder") / "tiny.edge",
        "feature-extraction",
        tokenizer=tiny.word_tokenizer(),
    )


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-generation bundle; read only."""
    return tiny.write_bundle(
        tmp_path_factory.mktemp("lm") / "tiny.edge", "text-generation", tokenizer=tiny.word_tokenizer()
    )
