"""Graphs are recorded one at a time, each on a stream of its own GPU. Which GPU that is can be seen without one."""

import threading
import time
from contextlib import contextmanager

import pytest
import torch

from linocut.kernels.gpu import graphs


@pytest.fixture
def seen(monkeypatch):
    """What torch was asked for, in place of a GPU."""
    calls = []

    @contextmanager
    def graph(made, stream=None, capture_error_mode="global"):
        calls.append(("begin", made, stream, capture_error_mode))
        yield
        calls.append(("end", made, stream, capture_error_mode))

    @contextmanager
    def device(which):
        calls.append(("device", which))
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "Stream", lambda which: ("stream of", which))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(graphs, "_STREAMS", {})
    return calls


def test_each_gpu_has_a_stream(seen):
    for where in ("cuda:0", "cuda:1", "cuda"):
        with graphs.recorded(where):
            pass
    begun = [call for call in seen if call[0] == "begin"]
    assert [call[2] for call in begun] == [("stream of", torch.device("cuda", index)) for index in (0, 1, 0)]
    assert {call[3] for call in begun} == {"thread_local"}
    assert begun[0][2] is begun[2][2]  # libraries keep a workspace for each stream
    assert [call[1] for call in seen if call[0] == "device"] == [torch.device("cuda", index) for index in (0, 1, 0)]


def test_one_at_a_time_also_after_a_failure(seen):
    with pytest.raises(RuntimeError, match="not here"), graphs.recorded("cuda:0"):
        raise RuntimeError("not here")

    def record(where):
        with graphs.recorded(where):
            time.sleep(0.05)

    threads = [threading.Thread(target=record, args=(f"cuda:{index % 2}",)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    order = [call[0] for call in seen if call[0] in ("begin", "end")][1:]  # without the one that failed
    assert order == ["begin", "end"] * 4
