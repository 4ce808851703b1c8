"""Fixtures that several folders of tests share."""

import importlib.util
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    # Triton's own functions are interpreted or not as its import found it, and whoever is first imports it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton.language  # noqa: F401


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So does a shell start what runs in its background, and the processes that tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def no_prompt_cache() -> Iterator[None]:
    """Tests neither use nor touch the user's prompt cache; one that wants a cache sets both variables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINOCUT_PROMPT_CACHE", "0")
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete ternary model of next to no size; do not change its files."""
    from tiny_model import write_tiny_model
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete dense bf16 model of next to no size; do not change its files."""
    from tiny_dense import TINY

    from linocut.models.synthetic import write_synthetic
    root = tmp_path_factory.mktemp("models") / "dense"
    write_synthetic(root, TINY, "bf16")
    return root


@pytest.fixture(scope="session")
def original_file(dense_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The transformer of `dense_model` as one file in the original naming; do not change it."""
    from tiny_dense import write_original_form
    path = tmp_path_factory.mktemp("original") / "tiny.safetensors"
    write_original_form(dense_model / "transformer", path)
    return path
