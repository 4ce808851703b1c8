"""Fixtures that several folders of tests share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete ternary model of next to no size; do not change its files."""
    from tiny_model import write_tiny_model
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
