"""Schedules that keep to the clock, and processes."""

import itertools
import math
import os
import signal
import time

import pytest
import torch
from torch import nn

from linocut.train import loop
from linocut.train.loop import Ranks, Schedule, stop_in_order, stopped
from linocut.train.recipe import StageSettings


def alone(**fields) -> Ranks:
    return Ranks(0, 1, torch.device("cpu"), **fields)


def rates(**settings) -> list[float]:
    schedule = Schedule(StageSettings(**settings), alone())
    return [schedule.rate for _ in schedule]


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A clock that stands still unless it is moved."""
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(loop.time, "time", lambda: 1000 + now[0])
    return now


def test_the_rate_warms_up_and_comes_down():
    found = rates(steps=1000, warmup=100)
    assert len(found) == 1000
    assert found[0] == pytest.approx(0.01, abs=0.001)
    assert max(found) == pytest.approx(1.0, abs=0.03)
    assert 95 <= found.index(max(found)) <= 105
    assert found[-1] == pytest.approx(0.01, abs=0.001)
    assert all(later <= earlier for earlier, later in itertools.pairwise(found[100:]))


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_short_schedules(steps):
    assert len(rates(steps=steps, warmup=0)) == steps


def test_a_slow_machine_gets_a_shorter_schedule_that_still_comes_down(clock, capsys):
    schedule = Schedule(StageSettings(steps=1000, warmup=10, max_seconds=200), alone(began=0.0))
    last = math.inf
    for _ in schedule:
        clock[0] += 1.0  # a step takes a second
        last = schedule.rate
    assert schedule.step == schedule.steps == pytest.approx(200, abs=2)
    assert last < 0.02
    assert "1000 ms a step, 20" in capsys.readouterr().out


@pytest.mark.parametrize("limit", [{"max_seconds": 300}, {"deadline": 1300}])
def test_what_came_before_the_steps_counts_and_so_does_a_machine_that_slows_down(clock, limit):
    ranks = alone(began=0.0, deadline=limit.pop("deadline", math.inf))
    clock[0] = 100.0  # scenes were made, blocks compiled
    schedule = Schedule(StageSettings(steps=1000, **limit), ranks)
    found = []
    for step in schedule:
        clock[0] += 0.5 if step < 200 else 1.5
        found.append(schedule.rate)
    assert 270 < clock[0] <= 303
    assert found[-1] < 0.03
    assert len(found) == pytest.approx(200 + 100 / 1.5, abs=3)


def test_a_limit_that_has_passed_ends_the_schedule(clock):
    schedule = Schedule(StageSettings(steps=1000, max_seconds=5), alone(began=0.0))
    for _ in schedule:
        clock[0] += 1.0
    assert schedule.step == 10  # the first look at the clock
    assert list(Schedule(StageSettings(steps=1000, max_seconds=5), alone(began=0.0))) == []
    assert list(Schedule(StageSettings(steps=1000), alone(began=0.0, deadline=999.0))) == []


def test_after_a_cut_a_schedule_goes_on_where_it_was(clock):
    schedule = Schedule(StageSettings(steps=100, warmup=1), alone(began=0.0), done=60)
    assert schedule.progress == 0.6
    assert list(schedule) == list(range(60, 100))


def test_sigterm_ends_the_schedule_in_order():
    before = signal.getsignal(signal.SIGTERM)
    try:
        stop_in_order()
        done = 0
        for done in Schedule(StageSettings(steps=10_000), alone()):
            if done == 100:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
        assert 100 <= done < 200
        assert stopped()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the next one kills
    finally:
        loop._stop.clear()
        signal.signal(signal.SIGTERM, before)


def test_log_every(capsys):
    schedule = Schedule(StageSettings(steps=7, log_every=3), alone())
    for step in schedule:
        schedule.log(lambda s=step: f"at {s}")
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit(" ", 1)[1] for line in lines if "at" in line and "ms" not in line] == ["0", "3", "6"]


def test_when_a_state_is_due():
    schedule = Schedule(StageSettings(steps=7, save_every=3), alone())
    assert [step for step in schedule if schedule.due] == [3, 6]


def test_one_process_needs_no_messages():
    tensor = torch.tensor([1.0, 3.0])
    alone().average([tensor, None])
    alone().share(nn.Linear(2, 2))
    assert tensor.tolist() == [1.0, 3.0]
    assert alone().same(2.5) == 2.5
    assert alone().first
