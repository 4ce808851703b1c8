"""The pipeline around the GPU's step: device, memory plan, layers that visit, and the same picture as on the CPU."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from linocut.cli import main
from linocut.cli.plan import ways_in_words
from linocut.errors import UsageError
from linocut.formats.folder import ModelFolder
from linocut.formats.packed import packed_nbytes
from linocut.kernels import fusible
from linocut.models.configs import Flux2Config
from linocut.models.flux2_gpu import GpuTransformer, runner
from linocut.pipeline import budget, footprint, memory_gpu
from linocut.pipeline.components import Components, visit
from linocut.pipeline.device import choose
from linocut.pipeline.generate import Pipeline
from linocut.pipeline.memory import Ways
from linocut.pipeline.memory_gpu import GpuPlanner
from linocut.pipeline.run import explain_memory
from linocut.server.catalogue import Catalogue, TooLarge
from linocut.server.settings import Settings


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LINOCUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LINOCUT_GPU_TUNE", "0")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_picture(tiny_model, device, monkeypatch):
    """On a GPU by --device; in the interpreter by putting the GPU's step where the CPU's was."""
    wanted = Pipeline.from_pretrained(tiny_model, device="cpu")("a red apple", seed=3, width=32, height=32)
    seen: list[GpuTransformer] = []

    def ours(self, network, rows=None):
        if hasattr(network, "transformer_blocks"):
            seen.append(runner(network))
            return seen[-1]
        return network

    if device == "cpu":
        monkeypatch.setattr(Components, "runner", ours)
    found = Pipeline.from_pretrained(tiny_model, device=device)("a red apple", seed=3, width=32, height=32)
    assert device == "cuda" or isinstance(seen[0], GpuTransformer)
    a, b = (np.asarray(result.images[0]).astype(float) for result in (wanted, found))
    assert 10 * np.log10(255**2 / max(((a - b) ** 2).mean(), 1e-3)) > 30


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps", "cpu"])
def test_devices_are_asked_for_by_name(name):
    assert choose(name).name == name


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match="mps or mlx"):
        choose("vulkan")
    with pytest.raises(UsageError, match="CUDA devices only"):
        choose("mps", max_memory="2GB")
    assert choose("cuda", max_memory="2GB").name == "cuda"
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no CUDA device"):
            Pipeline.from_pretrained("embedded", device="cuda")
    if not torch.backends.mps.is_available():
        with pytest.raises(UsageError, match="no such device"):
            Pipeline.from_pretrained("embedded", device="mps")


def test_a_layer_visits_the_device_and_leaves_nothing_there():
    layers = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))]).eval()
    home = {name: tensor.data_ptr() for name, tensor in layers.state_dict().items()}
    given, seen = torch.randn(2, 4), []
    wanted = layers[0](given)
    visit(layers, torch.device("cpu") if not torch.cuda.is_available() else torch.device("cuda"))
    layers[0][0].register_forward_hook(lambda module, *_: seen.append(module.weight.device))
    where = "cuda" if torch.cuda.is_available() else "cpu"
    for _ in range(2):
        assert torch.allclose(layers[0](given.to(where)).cpu(), wanted, atol=1e-6)
    assert [each.type for each in seen] == [where, where]
    assert {name: tensor.data_ptr() for name, tensor in layers.state_dict().items()} == home


def test_a_visit_that_fails_leaves_nothing_either():
    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    layers = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
    home = layers[0].weight.data_ptr()
    visit(layers, torch.device("cuda" if torch.cuda.is_available() else "meta"))
    layers[0].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        layers[0](torch.randn(2, 4))
    assert layers[0].weight.device.type == "cpu"
    assert layers[0].weight.data_ptr() == home


def test_layers_that_visit_a_gpu_are_not_computed_on_the_cpu(tiny_model):
    components = Components(ModelFolder.open(tiny_model), torch.float32, torch.device("cpu"), keep=False)
    with components.use("text_encoder") as encoder:
        components.device = torch.device("cuda")
        assert components.runner(encoder) is encoder


def test_klein_fits_what_a_step_may_take():
    """Packed weights as they are stored, the edges and the memory of a step: within 1.5 GB and 2.0 GB at 1024 px."""
    config = Flux2Config()
    shapes = [(3072, 3072)] * 40 + [(18432, 3072)] * 10 + [(3072, 9216)] * 10 + [(27648, 3072), (3072, 12288)] * 20
    step = footprint.gpu_step_bytes(config, 512, 4096)
    for encoding, most in (("binary", 1.5e9), ("ternary", 2.0e9)):
        packed = sum(packed_nbytes(encoding, shape) for shape in shapes)
        assert packed + 48.8e6 + step < most


def test_planning_keeps_within_a_limit_or_says_what_would_fit(tiny_model):
    planner = GpuPlanner(ModelFolder.open(tiny_model), "cuda")
    whole = planner.plan(64, 64)
    assert whole.ways.keep_loaded
    assert {phase.name for phase in whole.phases} == {"encode", "denoise", "decode"}
    assert all(phase.base == memory_gpu.BASE_BYTES for phase in whole.phases)
    held = next(phase for phase in whole.phases if phase.name == "decode").held
    assert held > 0
    plan = budget.fit(planner, 64, 64, limit=whole.peak - 1)
    assert not plan.ways.keep_loaded
    assert plan.peak < whole.peak
    with pytest.raises(UsageError, match="would need"):
        budget.fit(planner, 64, 64, limit=memory_gpu.BASE_BYTES // 2)
    assert json.dumps(whole.to_dict())


@pytest.fixture
def gpus(monkeypatch) -> SimpleNamespace:
    """Two GPUs of 100 GB: `told` is what torch is told of its share of them, `reserved` what it holds there."""
    made = SimpleNamespace(told=[], reserved=0, emptied=0, share=1.0)

    def tell(share: float, number: int) -> None:
        made.told.append((pytest.approx(share), number))
        made.share = share

    monkeypatch.setattr(memory_gpu, "_shares", {})
    monkeypatch.setattr(memory_gpu.runtime, "there", lambda device: device.startswith("cuda"))
    for name, value in {"current_device": lambda: 1, "set_per_process_memory_fraction": tell,
                        "get_per_process_memory_fraction": lambda _: made.share,
                        "memory_reserved": lambda _: made.reserved,
                        "empty_cache": lambda: made.told.append("emptied"),
                        "get_device_properties": lambda _: SimpleNamespace(total_memory=100 * 10**9)}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return made


@pytest.mark.parametrize(("device", "limit", "share", "number"), [
    ("cuda:0", memory_gpu.BASE_BYTES + 2 * 10**9, 0.02, 0), ("cuda", 10**12, 1.0, 1), ("cuda", 1, 0.0, 1)])
def test_torch_takes_no_more_of_a_gpu_than_a_limit_leaves_it(gpus, device, limit, share, number):
    with memory_gpu.holding(device, limit):
        assert gpus.told == [(share, number)]
    assert gpus.told[1:] == [(1.0, number)]


def test_of_two_limits_the_least_holds_and_then_what_was_there_before(gpus):
    gpus.share = 0.5  # the program's own
    first, second = (memory_gpu.holding("cuda:0", memory_gpu.BASE_BYTES + each * 10**9) for each in (3, 60))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # threads end in any order
    second.__exit__(None, None, None)
    assert [share for share, _ in gpus.told] == [0.03, 0.03, 0.5, 0.5]
    assert memory_gpu._shares == {}


def test_what_earlier_work_left_goes_before_a_limit_holds(gpus):
    gpus.reserved = 10**9
    with memory_gpu.holding("cuda:0", memory_gpu.BASE_BYTES + 10**9):
        assert "emptied" not in gpus.told
    with memory_gpu.holding("cuda:0", memory_gpu.BASE_BYTES + 9 * 10**8):
        assert "emptied" in gpus.told


def test_no_limit_and_no_gpu_change_nothing(gpus):
    for device, limit in (("cuda", None), ("cpu", 1)):
        with memory_gpu.holding(device, limit):
            pass
    assert gpus.told == []


def test_pictures_on_a_gpu_are_drawn_within_the_limit(tiny_model, gpus, monkeypatch):
    """Pictures come one by one; the limit holds until the last was taken, or no more are wanted."""
    pipe = Pipeline.from_pretrained(tiny_model, device="cpu", max_memory="3GB")
    list(pipe.draw("a red apple", width=32, height=32))
    assert gpus.told == []  # on a CPU
    pipe.choice = replace(pipe.choice, name="cuda:0")
    monkeypatch.setattr(budget, "available_on", lambda _: None)
    monkeypatch.setattr("linocut.pipeline.run.Run._limit", 3 * 10**9)
    monkeypatch.setattr("linocut.pipeline.run.Run._pictures", lambda _: iter([1, 2]))
    for end in (list, lambda pictures: pictures.close()):
        pictures = pipe.draw("a red apple", width=32, height=32)
        assert gpus.told == []
        next(pictures)
        assert gpus.told == [((3 * 10**9 - memory_gpu.BASE_BYTES) / 1e11, 0)]
        end(pictures)
        assert gpus.told[1:] == [(1.0, 0)]
        gpus.told.clear()


def test_running_out_within_a_limit_names_it():
    request = SimpleNamespace(width=64, height=32)
    with pytest.raises(UsageError, match=r"64x32 within 2\.50 GB, all.*or a higher limit"), \
            explain_memory(request, 2_500_000_000):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(UsageError, match=r"drawing 64x32; choose a smaller size \(see"), explain_memory(request):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("model", ["embedded", "embedded-binary"])
def test_layers_outside_the_blocks_are_no_reason_against_the_fused_step(model, monkeypatch):
    """The embedded models' modulations are affine4."""
    folder = ModelFolder.open(model)
    with folder.checkpoint("transformer") as checkpoint:
        assert "affine4" in {entry.encoding for entry in checkpoint.packed.values()}
    before = GpuPlanner(folder, "cuda").plan(256, 256)
    monkeypatch.setattr(memory_gpu.runtime, "why_not_fused", lambda device, width: None)
    after = GpuPlanner(folder, "cuda").plan(256, 256)
    assert before.phases[1].activations != after.phases[1].activations
    assert after.phases[1].activations >= footprint.gpu_step_bytes(Flux2Config.from_dict(folder.config("transformer")),
                                                                   64, 256)


def test_affine4_in_the_blocks_is_one(tiny_model, monkeypatch):
    monkeypatch.setattr(memory_gpu.runtime, "why_not_fused", lambda device, width: None)
    assert fusible.dense_in_blocks(ModelFolder.open(tiny_model).checkpoint("text_encoder")) is None
    assert fusible.dense_in_blocks(ModelFolder.open(tiny_model).checkpoint("text_encoder"), fusible.ON_GPU) is not None


def test_only_networks_that_stay_leave_blocks_of_memory_that_nothing_fits(tiny_model):
    planner = GpuPlanner(ModelFolder.open(tiny_model), "cuda")
    kept, dropped = (planner.plan(64, 64, ways=replace(planner.default_ways(64, 64), keep_loaded=keep)).phases[2]
                     for keep in (True, False))
    assert kept.scratch > dropped.scratch
    assert dropped.held == 0


def test_a_gpu_that_is_not_there_is_refused(tiny_model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="cuda:9 was asked for, and the last CUDA device that torch finds is cuda:1"):
        Pipeline.from_pretrained(tiny_model, device="cuda:9")
    with pytest.raises(SystemExit) as ended:  # memory is planned before anything is opened
        main(["generate", "a fox", "--model", str(tiny_model), "--device", "cuda:9", "-o", str(tmp_path / "a.png")])
    assert ended.value.code == 2
    assert "is cuda:1" in capsys.readouterr().err


def test_a_plan_says_what_streams_on_a_gpu():
    ways = Ways(keep_loaded=False, tile=None, stream=True)
    assert "layers of the text encoder are on the GPU while they run" in ways_in_words(ways, "cuda:1")
    assert "blocks of the transformer leave memory" in ways_in_words(ways, "cpu")


def test_a_server_plans_the_memory_of_what_it_draws_on(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_gpu, "available_bytes", lambda device: 10**12 if device == "cuda:1" else 0)
    catalogue = Catalogue(Settings(home=tmp_path, devices=("cuda:1",)))
    name, request = catalogue.request(None, "a fox", width=None, height=None, steps=None, seed=None, num_images=1,
                                      guidance=None)
    plan, free, why_not = catalogue._plan(name, request.width, request.height)
    assert (free, why_not) == (10**12, None)
    assert plan.phases[0].base == memory_gpu.BASE_BYTES
    monkeypatch.setattr(memory_gpu, "available_bytes", lambda device: 10**6)
    with pytest.raises(TooLarge):
        catalogue.request(None, "a fox", width=None, height=None, steps=None, seed=None, num_images=1, guidance=None)


def test_streaming_the_text_encoder_takes_less(tiny_model):
    planner = GpuPlanner(ModelFolder.open(tiny_model), "cuda")
    ways = replace(planner.default_ways(64, 64), keep_loaded=False)
    resident, streamed = (planner.plan(64, 64, ways=replace(ways, stream=stream)) for stream in (False, True))
    assert streamed.phases[0].weights < resident.phases[0].weights
    assert streamed.phases[1] == resident.phases[1]
