"""A small model of klein's architecture, which the tests of all forms share."""

from pathlib import Path

import pytest
from small_model import SMALL

from linocut.models.synthetic import write_synthetic


@pytest.fixture(scope="session", params=["binary", "ternary"])
def packed_model(request, tmp_path_factory) -> Path:
    """A small model of klein's architecture; do not change its files."""
    root = tmp_path_factory.mktemp("models") / request.param
    write_synthetic(root, SMALL, request.param)
    return root
