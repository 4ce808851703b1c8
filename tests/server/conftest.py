"""Servers that tests of this folder share; both draw with the embedded models."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from serving import Serving

TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server for this machine only, so without a token."""
    serving = Serving(tmp_path_factory.mktemp("home"), "--max-side", "256", "--max-queue", "20")
    yield serving
    said = serving.stop()
    assert "Traceback" not in said, said
    assert serving.process.returncode == -signal.SIGTERM, "it stopped as it was told, and by itself"


@pytest.fixture(scope="session")
def lan_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server for the LAN that asks for `TOKEN`."""
    serving = Serving(tmp_path_factory.mktemp("home"), "--host", "0.0.0.0", "--token", TOKEN, "--max-side", "64")
    yield serving
    said = serving.stop()
    assert "Traceback" not in said, said
    assert TOKEN not in said
