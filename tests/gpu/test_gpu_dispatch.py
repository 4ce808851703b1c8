"""Choosing on a GPU: routes, their reasons, measurements that are kept, and products through the one door."""

import json

import pytest
import torch
from gpu_cases import normal, random_packed, relative

from linocut.errors import KernelError, UsageError
from linocut.formats.packed import ENCODINGS, dequantize
from linocut.kernels import dispatch
from linocut.kernels.gpu import accuracy, routes, rows, runtime, tuning
from linocut.kernels.gpu.accuracy import KIND
from linocut.kernels.gpu.activations import KINDS, Activations
from linocut.kernels.gpu.gemm import Tile
from linocut.kernels.gpu.routes import Route, Scratch, Shape

KLEIN = Shape(1536, 3072, 27648, "ternary")
FEW = Shape(20, 384, 48, "ternary")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LINOCUT_CACHE", str(tmp_path / "cache"))


def weights(packed, device):
    return [None if part is None else torch.from_numpy(part.copy()).to(device)
            for part in (packed.codes, packed.scales, packed.zeros)]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_decoded_products_match_the_oracle(device, encoding, dtype):
    packed = random_packed(encoding, 70, 768)
    x = normal(9, 768).to(dtype)
    wanted = x.double() @ torch.from_numpy(dequantize(packed)).double().T
    with dispatch.use_kernel("triton"):
        found = dispatch.linear(x.to(device), *weights(packed, device), encoding)
    assert relative(found, wanted) < (5e-6 if dtype == torch.float32 else 1e-3)


def test_gradients_reach_x(device):
    packed = random_packed("ternary", 40, 256)
    x = normal(5, 256).to(device).requires_grad_()
    with dispatch.use_kernel("triton"):
        dispatch.linear(x, *weights(packed, device), "ternary").backward(torch.ones(5, 40, device=device))
    assert relative(x.grad, torch.ones(5, 40) @ torch.from_numpy(dequantize(packed))) < 5e-6


@pytest.mark.parametrize("encoding", ["binary", "ternary"])
@pytest.mark.parametrize("m", [1, 150])
def test_rounded_products_are_near_the_oracle(device, encoding, m):
    packed = random_packed(encoding, 70, 384)
    x = normal(m, 384)
    wanted = x.double() @ torch.from_numpy(dequantize(packed)).double().T
    with dispatch.use_kernel("triton-int8"), torch.no_grad():
        found = dispatch.linear(x.to(device), *weights(packed, device), encoding)
    assert 1e-4 < relative(found, wanted) < 1e-2  # rounded, and by no more than half a step


@pytest.mark.parametrize("name", [each for each in KIND if each != "blocks"])
@pytest.mark.parametrize("encoding", ["binary", "ternary"])
def test_every_route_multiplies(device, name, encoding):
    """Errors are those of the table in routes.py; `blocks` is torch's and needs a GPU of compute capability 9.0."""
    packed, x = random_packed(encoding, 48, 384), normal(20, 384)
    shape = Shape(20, 384, 48, encoding)
    assert routes.why_not(name, shape, device) is None
    wanted = x.double() @ torch.from_numpy(dequantize(packed)).double().T
    codes, scales, _ = weights(packed, device)
    weight = dispatch.checked(codes, scales, None, encoding, 384)
    act = Activations.empty(KIND[name], 20, 384, device, torch.float16)
    rows.quantize(x.to(device), act)
    scratch = Scratch(device)
    for tile in routes.tiles(name, shape, device)[:1]:
        out = torch.zeros(20, 48, device=device)
        routes.run(Route(name, tile), act, weight, out, scratch)
        # The interpreter does not round FP8 as a GPU does.
        limit = {"int8": 0.01, "rows": 0.02, "fp8": 0.035 if device == "cuda" else 0.08, "float": 1e-3}[KIND[name]]
        assert relative(out, wanted) < limit
    least = routes.scratch_bytes(name, 384, 48) - 512
    assert scratch.nbytes == 0 if name in routes.DECODING else scratch.nbytes >= least


def test_blocks_on_a_gpu_that_has_them(device):
    if routes.why_not("blocks", Shape(64, 256, 128, "ternary"), device) is not None:
        pytest.skip("torch's FP8 products in blocks need compute capability 9.0")
    packed, x = random_packed("ternary", 128, 256), normal(64, 256)
    codes, scales, _ = weights(packed, device)
    act = Activations.empty("fp8", 64, 256, device)
    rows.quantize(x.to(device), act)
    out = torch.zeros(64, 128, dtype=torch.bfloat16, device=device)
    routes.run(Route("blocks"), act, dispatch.checked(codes, scales, None, "ternary", 256), out, Scratch(device))
    assert relative(out, act.dequantize().double().cpu() @ torch.from_numpy(dequantize(packed)).double().T) < 1e-2


def test_scaled_products_go_straight_where_they_belong():
    """By torch's operator behind `scaled_mm`, which a CPU has for one scale per operand."""
    a, b = normal(32, 128).to(torch.float8_e4m3fn), normal(64, 128, seed=1).to(torch.float8_e4m3fn)
    scales = torch.tensor([0.5]), torch.tensor([0.25])
    wanted = a.double() @ b.double().T / 8
    for out in (torch.zeros(32, 64, dtype=torch.bfloat16), torch.zeros(32, 64),
                torch.zeros(32, 80, dtype=torch.bfloat16)[:, 8:72]):
        routes.scaled_product(a, b, *scales, torch.nn.functional.ScalingType.TensorWise, out)
        assert relative(out, wanted) < 5e-3


def test_activations_must_fit_the_route(device):
    packed = random_packed("ternary", 48, 384)
    codes, scales, _ = weights(packed, device)
    weight = dispatch.checked(codes, scales, None, "ternary", 384)
    with pytest.raises(KernelError, match="expected rows"):
        routes.run(Route("rows", Tile()), Activations.empty("int8", 2, 384, device), weight,
                   torch.zeros(2, 48, device=device), Scratch(device))
    for kind in KINDS:
        with pytest.raises(KernelError, match="multiple of 128"):
            Activations.empty(kind, 2, 200, device)
    with pytest.raises(KernelError, match="known: int8"):
        Activations.empty("int4", 2, 256, device)


def test_reasons_name_what_is_missing(monkeypatch):
    assert "NVIDIA" in str(runtime.why_not("mps"))
    assert "affine4" in str(routes.why_not("unpacked", Shape(16, 256, 64, "affine4"), "cpu" if runtime.interpreted()
                                           else "cuda"))
    monkeypatch.setattr(runtime, "why_not", lambda device: None)
    for found, name, word in (((7, 5), "unpacked", "8.0"), ((8, 0), "fp8", "8.9"), ((8, 9), "blocks", "9.0")):
        monkeypatch.setattr(runtime, "capability", lambda device="cuda", found=found: found)
        assert word in str(routes.why_not(name, KLEIN, "cuda"))
        assert routes.why_not("library", KLEIN, "cuda") is None
    assert tuning.likely(KLEIN, "cuda").route.name == "unpacked"
    monkeypatch.setattr(runtime, "capability", lambda device="cuda": (7, 5))
    assert tuning.likely(KLEIN, "cuda").route == Route("library")


def test_without_triton_the_reference_computes(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runtime, "triton_version", lambda: None)
    problem = dispatch.Problem("cuda", torch.bfloat16, 64, 256, 128, "ternary")
    assert "not installed" in str(dict(dispatch.explain(problem))["triton"])
    assert dispatch.select(problem).name == "reference"


def test_what_was_measured_is_kept_and_chosen(device):
    given = {"packed": 3.0, "unpacked": 2.0, "rows": 1.0, "folded": 0.5, "library": 9.0, "fp8": 0.7, "fused": 4.0}
    seen = []
    table = tuning.measure([FEW], device, lambda route, shape: given[route.name], names=given,
                           on_result=lambda shape, route, seconds: seen.append(route.name))
    assert set(seen) == set(given)
    again = tuning.Table.of(device)
    assert again.entries == table.entries
    assert again.choose(FEW, device, accuracy.LEVELS["exact"]).route.name == "unpacked"
    assert again.choose(FEW, device, accuracy.LEVELS["rows"]).route.name == "rows"
    chosen = again.choose(Shape(31, 384, 48, "ternary"), device, accuracy.LEVELS["fast"])  # the same bucket of tokens
    assert (chosen.route.name, chosen.seconds) == ("folded", 0.5)
    assert "measured" in chosen.reason
    calls = []
    tuning.measure([FEW], device, lambda route, shape: calls.append(route) or 1.0)
    assert calls == []  # nothing is measured twice


def test_a_measured_route_is_passed_over_where_it_cannot_run(device, monkeypatch):
    """Token counts share a measurement, and some routes run at some of them only."""
    seconds = {"unpacked": 2.0, "rows": 1.0}
    tuning.measure([FEW], device, lambda route, shape: seconds[route.name], names=seconds)
    own = routes.why_not
    monkeypatch.setattr(routes, "why_not", lambda name, shape, where: "odd" if name == "rows" and shape.m % 4 else
                        own(name, shape, where))
    chosen = [tuning.Table.of(device).choose(Shape(m, 384, 48, "ternary"), device, ("unpacked", "rows")).route.name
              for m in (20, 22)]
    assert chosen == ["rows", "unpacked"]


def test_tiles_fit_into_shared_memory(device, monkeypatch):
    """Of compute capability 8.0 and 12.0; where none fits, the smallest is tried."""
    for limit in (163 * 1024, 99 * 1024):
        monkeypatch.setattr(runtime, "shared_memory", lambda where, limit=limit: limit)
        for name in KIND:
            for shape in (KLEIN, FEW):
                tiles = routes.tiles(name, shape, device)
                assert tiles
                assert all(tile is None or tile.shared_bytes <= limit for tile in tiles)
    monkeypatch.setattr(runtime, "shared_memory", lambda where: 1)
    assert [tile.shared_bytes for tile in routes.tiles("rows", KLEIN, device)] == [64 * 1024]
    monkeypatch.undo()
    assert Tile(128, 256, 8, 4, bulk=True) in routes.tiles("folded", KLEIN, device)


def test_the_quickest_routes_can_be_listed(device):
    seconds = {"unpacked": 2.0, "rows": 1.0, "library": 3.0}
    table = tuning.measure([FEW], device, lambda route, shape: seconds[route.name], names=seconds)
    assert table.quickest(("unpacked", "library")) == {"ternary M32 N384 O48": {"route": "unpacked", "seconds": 2.0}}
    assert table.quickest(()) == {}


def test_a_level_of_accuracy_measures_what_another_left_out(device):
    """Who asks for "fast" after drawing with "exact" gets the routes of "fast"."""
    given = {"packed": 3.0, "unpacked": 2.0, "library": 9.0, "fused": 4.0, "folded": 0.5}
    calls: list[str] = []

    def seconds(route, shape):
        calls.append(route.name)
        return given[route.name]

    tuning.measure([FEW], device, seconds, names=accuracy.EXACT)
    assert set(calls) == set(accuracy.EXACT)
    calls.clear()
    table = tuning.measure([FEW], device, seconds, names=(*accuracy.EXACT, "folded"))
    assert set(calls) == {"folded"}
    assert table.choose(FEW, device, accuracy.LEVELS["fast"]).route.name == "folded"


def test_a_route_that_fails_is_left_out_for_good_and_time_is_kept(device):
    calls: list[str] = []

    def seconds(route, shape):
        calls.append(route.name)
        if route.name == "packed":
            raise RuntimeError("out of resource: shared memory")
        if route.name == "library":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    names = ("packed", "unpacked", "library")
    table = tuning.measure([FEW], device, seconds, names=names)
    assert {each["route"] for each in next(iter(table.entries.values())) if each["seconds"]} == {"unpacked"}
    assert table.choose(FEW, device, ("packed", "unpacked")).route.name == "unpacked"
    assert "not measured" in table.choose(FEW, device, ("packed",)).reason
    calls.clear()
    tuning.measure([FEW], device, seconds, names=names)
    assert set(calls) == {"library"}  # memory may be free another time
    assert tuning.measure([KLEIN], device, seconds, budget=-1.0).entries == table.entries
    calls.clear()
    tuning.measure([KLEIN], device, seconds, names=("packed",))
    assert calls == []  # not worth it with so many tokens


def test_a_route_that_breaks_the_gpu_is_not_tried_by_the_next_process(device, monkeypatch):
    def seconds(route, shape):
        if route.name == "rows":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return 1.0

    def synchronize(_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(tuning, "place", lambda device: tuning.Path(tuning.os.environ["LINOCUT_CACHE"]) / "a.json")
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(routes, "why_not", lambda name, shape, device: None)
    other = Shape(40, 384, 48, "ternary")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tuning.measure([FEW, other], "cuda", seconds, names=("unpacked", "rows"))
    calls = []
    table = tuning.measure([FEW, other], "cuda", lambda route, shape: calls.append(route.name) or 1.0,
                           names=("unpacked", "rows"))
    assert set(calls) == {"unpacked"}
    assert table.choose(other, "cuda", ("rows", "unpacked")).route.name == "unpacked"


def test_a_folder_that_cannot_be_written_to_stops_nothing(device, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LINOCUT_CACHE", str(tmp_path / "file"))
    assert tuning.measure([FEW], device, lambda route, shape: 1.0, names=("unpacked",)).entries


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"version": 2, "entries": {"x": [{"route": "magic"}]}}',
                                     '{"version": 2, "entries": {"x": [{"route": "fp8", "tile": {"a": 1}}]}}'])
def test_a_damaged_file_is_measured_anew(device, content):
    path = tuning.place(device)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert tuning.Table.of(device).entries == {}
    assert "not measured" in tuning.Table.of(device).choose(FEW, device, accuracy.LEVELS["exact"]).reason


def test_accuracy_is_asked_for_by_name(monkeypatch):
    assert accuracy.level() == accuracy.DEFAULT == "fast"
    monkeypatch.setenv("LINOCUT_GPU_ACCURACY", "exact")
    assert accuracy.level() == "exact"
    monkeypatch.setenv("LINOCUT_GPU_ACCURACY", "sloppy")
    with pytest.raises(UsageError, match="exact, rows, fast"):
        accuracy.level()


def test_choices_are_told_in_a_file_that_people_can_read(device):
    tuning.measure([FEW], device, lambda route, shape: 0.25, names=("unpacked",))
    found = json.loads(tuning.place(device).read_text())
    assert found["entries"]["ternary M32 N384 O48"][0]["seconds"] == 0.25
