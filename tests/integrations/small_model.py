"""A small model of klein's architecture: rows are two groups long, so that every form has something to hold."""

from tiny_dense import TINY

from linocut.models.flux2 import Flux2Config
from linocut.models.synthetic import SyntheticModel

SMALL = SyntheticModel(
    transformer=Flux2Config(in_channels=64, num_layers=1, num_single_layers=2, num_attention_heads=2,
                            joint_attention_dim=384, timestep_guidance_channels=128),
    text_encoder=TINY.text_encoder, vae=TINY.vae, text_taps=TINY.text_taps, text_length=64, default_size=(64, 64),
    ordinary_tokens=300)
