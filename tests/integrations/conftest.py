"""A small model of klein's architecture, which the tests of all forms share."""

from pathlib import Path

import pytest
from tiny_dense import TINY

from linocut.models.flux2 import Flux2Config
from linocut.models.synthetic import SyntheticModel, write_synthetic


@pytest.fixture(scope="session", params=["binary", "ternary"])
def packed_model(request, tmp_path_factory) -> Path:
    """A small model of klein's architecture; do not change its files."""
    small = SyntheticModel(
        transformer=Flux2Config(in_channels=64, num_layers=1, num_single_layers=2, num_attention_heads=2,
                                joint_attention_dim=384, timestep_guidance_channels=128),
        text_encoder=TINY.text_encoder, vae=TINY.vae, text_taps=TINY.text_taps, text_length=64, default_size=(64, 64),
        ordinary_tokens=300)
    root = tmp_path_factory.mktemp("models") / request.param
    write_synthetic(root, small, request.param)
    return root
