"""Noise levels equal diffusers' to the last bit; Euler steps follow a known flow."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from linocut.errors import Cancelled, UsageError
from linocut.pipeline.sampler import empirical_mu, euler, sigmas

KLEIN = {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15,
         "base_image_seq_len": 256, "max_image_seq_len": 4096, "time_shift_type": "exponential"}
TOKENS = [1, 4, 64, 256, 1024, 1025, 4056, 4096, 4300, 4301, 8192, 65536]
STEPS = [1, 2, 3, 4, 5, 7, 8, 10, 20, 28, 50, 100, 200, 1000]


@pytest.mark.parametrize("tokens", TOKENS)
def test_sigmas_equal_diffusers_to_the_last_bit(tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**KLEIN)
    for steps in STEPS:
        mu = compute_empirical_mu(tokens, steps)
        assert empirical_mu(tokens, steps) == mu
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        found = sigmas(tokens, steps)
        assert found.dtype == torch.float32
        assert torch.equal(found, scheduler.sigmas), (tokens, steps)


def test_known_values_at_512_pixels() -> None:
    assert empirical_mu(1024, 4) == pytest.approx(2.0306897079499455, abs=1e-12)
    assert sigmas(1024, 4).tolist() == pytest.approx([1, 0.958085, 0.883982, 0.717497, 0], abs=1e-6)


@pytest.mark.parametrize(("tokens", "steps"), [(0, 4), (256, 0), (256, -1)])
def test_senseless_numbers_are_refused(tokens: int, steps: int) -> None:
    with pytest.raises(UsageError):
        sigmas(tokens, steps)


def test_euler_equals_the_scheduler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**KLEIN)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 6, 6), mu=compute_empirical_mu(64, 6))
    scheduler.set_begin_index(0)
    torch.manual_seed(0)
    start, matrix = torch.randn(2, 64, 8), torch.randn(8, 8) / 3
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x @ matrix) + t / 1000, t, x, return_dict=False)[0]
    found = euler(lambda x, sigma: torch.tanh(x @ matrix) + sigma * 1000 / 1000, start, sigmas(64, 6))
    assert torch.equal(found, x)


def test_euler_keeps_float32_and_reports_the_clean_prediction() -> None:
    torch.manual_seed(0)
    clean, noise = torch.randn(1, 16, 4), torch.randn(1, 16, 4)
    seen: list[tuple[int, float]] = []

    def on_step(i: int, sigma: float, x: torch.Tensor, x0: torch.Tensor) -> None:
        seen.append((i, sigma))
        assert x.dtype == x0.dtype == torch.float32
        assert torch.allclose(x0, clean, atol=1e-2)

    levels = sigmas(16, 4)
    found = euler(lambda x, sigma: (noise - clean).bfloat16(), noise, levels, on_step)
    assert found.dtype == torch.float32
    assert torch.allclose(found, clean, atol=2e-2)
    assert seen == [(i, float(levels[i])) for i in range(4)]


def test_a_callback_may_stop_the_run() -> None:
    def stop(*_: object) -> None:
        raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        euler(lambda x, sigma: x, torch.zeros(1, 1, 1), sigmas(1, 4), stop)
