"""`linocut bench` on next to nothing: that everything is measured, kept and drawn; how fast it is, no test can say."""

import json
import struct
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_model import TRANSFORMER, VAE

from linocut.cli import main
from linocut.cli.bench import SUBCOMMANDS, baselines, report, sdcpp
from linocut.cli.bench.arms import interleave, summary
from linocut.cli.bench.rounds import Rounds
from linocut.errors import FormatError, UsageError
from linocut.formats.names import bfl_plan
from linocut.kernels import native
from linocut.models.flux2 import Flux2Transformer, image_position_ids, text_position_ids


@pytest.fixture
def bench(capsys, monkeypatch):
    monkeypatch.setenv("LINOCUT_THREADS", "1")
    before = torch.get_num_threads()

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["bench", *map(str, arguments)])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    yield run
    torch.set_num_threads(before)


def test_all_subcommands_explain_themselves(bench):
    for name in SUBCOMMANDS:
        code, out, _ = bench(name, "--help")
        assert (code, out.startswith(f"Usage: linocut bench {name}")) == (0, True)
    code, _, err = bench("kernel")
    assert code == 2
    assert "did you mean 'kernels'" in err


# ------------------------------------------------------------------------------------------------- kernels

def test_kernels_measures_ours_torchs_and_the_peak(bench, tmp_path):
    file = tmp_path / "results" / "kernels.json"
    code, out, _ = bench("kernels", "--shapes", "64x128,96x256", "--m", 3, "--rounds", 2, "-o", file)
    assert code == 0
    assert "M = 3" in out
    assert "together" in out
    content = report.read(file, "kernels")
    rows = content["results"]
    assert [(row["m"], row["o"], row["n"]) for row in rows] == 2 * [(3, 64, 128), (3, 96, 256), (3, "all", "all")]
    assert set(rows[0]["gops"]) == {"binary", "ternary", "torch fp32", "torch bf16", "torch int8"}
    assert set(rows[3]["gops"]) == {"affine4", "torch fp32", "torch bf16", "torch int8"}
    for row in rows:
        for rate in row["gops"].values():
            assert 0 < rate["min"] <= rate["median"] <= rate["max"]
    slow, fast = sorted(row["gops"]["ternary"]["median"] for row in rows[:2])
    assert slow <= rows[2]["gops"]["ternary"]["median"] <= fast
    if native.why_no_module() is None:
        assert all(row["peak"]["median"] > 0 for row in rows)


def test_kernels_refuses_shapes_that_cannot_be(bench):
    assert "no list of shapes" in bench("kernels", "--shapes", "64")[2]
    assert "multiple of 128" in bench("kernels", "--shapes", "64x100")[2]


def test_every_variant_of_the_product_has_a_peak():
    if native.why_no_module() is not None:
        pytest.skip("there is no C++ module here")
    module = native.module()
    for name, _, reason in module.gemm_variants():
        if reason:
            with pytest.raises(ValueError, match=name):
                module.int8_peak(name, 1, 0.001)
        else:
            assert (module.int8_peak(name, 1, 0.001) > 1e9) == (name != "generic")


# ------------------------------------------------------------------------------------------------- stages

def test_stages_measures_each_stage_beside_torch_and_goes_on_where_it_stopped(bench, tiny_model, tmp_path):
    file = tmp_path / "stages.json"
    arguments = ("stages", tiny_model, "--size", "64x64", "-o", file, "--json")
    code, out, err = bench(*arguments, "--rounds", 1, "--stage", "encode")
    assert code == 0, err
    beside = ("torch fp32", "torch bf16", "torch int8")
    assert set(json.loads(out)["results"]) == {f"encode/{arm}" for arm in ("linocut", *beside)}
    before = report.read(file)["results"]["encode/torch bf16"]["samples"]
    _, out, _ = bench(*arguments, "--rounds", 2)
    results = json.loads(out)["results"]
    assert set(results) == {f"{stage}/{arm}" for stage in ("encode", "step", "decode") for arm in ("linocut", *beside)
                            if (stage, arm) != ("decode", "torch int8")}
    assert all(len(found["samples"]) == 2 and found["min"] > 0 for found in results.values())
    assert results["encode/torch bf16"]["samples"][:1] == before
    _, again, _ = bench(*arguments, "--rounds", 2)
    assert json.loads(again)["results"] == results
    code, _, err = bench("stages", tiny_model, "--size", "96x96", "-o", file)
    assert code == 2
    assert "holds results of other settings" in err


def test_torchs_networks_compute_what_ours_define():
    """With shared weights of one block, quantized or not, the output is finite and of the right size."""
    image, text = torch.randn(1, 16, TRANSFORMER.in_channels), torch.randn(1, 8, TRANSFORMER.joint_attention_dim)
    places = image_position_ids(4, 4), text_position_ids(8)
    with torch.inference_mode():
        for precision, dtype in baselines.DTYPES.items():
            network = baselines.transformer(TRANSFORMER, precision)
            quantized = [name for name, module in network.named_modules(remove_duplicate=False)
                         if isinstance(module, baselines.Int8Linear)]
            assert len(quantized) == (12 + 2 * 2 if precision == "int8" else 0)
            out = network(image.to(dtype), text.to(dtype), torch.ones(1), *places)
            assert out.dtype == dtype
            assert out.shape == image.shape
            assert out.isfinite().all()
        pixels = baselines.decoder(VAE, torch.float32).image_from_latents(torch.randn(1, 16, 4, 4))
        assert pixels.shape == (1, 3, 64, 64)


def test_int8_layers_are_close_to_dense_ones():
    weight, x = torch.randn(64, 128), torch.randn(7, 128)
    expected = x @ weight.T
    assert (baselines.Int8Linear(weight)(x) - expected).norm() / expected.norm() < 0.03


def test_the_plain_autoencoder_computes_the_same(tiny_model):
    from linocut.models.autoencoder import Autoencoder, GroupNorm

    model = Autoencoder(VAE).eval()
    latents = torch.randn(1, 16, 3, 4)
    with torch.no_grad():
        ours = model.image_from_latents(latents)
        plain = baselines.plain(model)
        assert not any(type(module) is GroupNorm for module in plain.modules())
        assert (plain.image_from_latents(latents) - ours).abs().max() < 1e-4


# -------------------------------------------------------------------------------------------------- image

@pytest.mark.slow
def test_image_measures_whole_processes(bench, tiny_model, tmp_path):
    file = tmp_path / "image.json"
    wanted = ("linocut", "linocut, known prompt", "torch int8", "torch bf16", "torch fp32")
    arms = [word for arm in wanted for word in ("--arm", arm)]
    code, out, err = bench("image", tiny_model, "--work", tmp_path / "work", "--size", "64x64", "--steps", 2,
                           "--rounds", 1, "--threads", 1, *arms, "-o", file)
    assert code == 0, err
    results = report.read(file, "image")["results"]
    for arm in wanted:
        assert 0 < results[f"{arm}/step"]["median"] < results[arm]["median"]
        assert 0.1 < results[arm]["median"] < 120
        assert results[f"{arm}/peak_rss"]["median"] > 50e6
        assert arm in out
    assert {str(path.relative_to(tmp_path / "work")) for path in (tmp_path / "work").glob("*/*")} == {
        f"torch-{kind}/{name}.safetensors" for kind in ("int8", "bf16") for name in ("text_encoder", "transformer")}


def test_image_says_what_it_needs(bench, tiny_model, monkeypatch):
    assert "say --work" in bench("image", tiny_model, "--arm", "torch int8")[2]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install stable-diffusion-cpp-python" in bench("image", tiny_model, "--arm", "stable-diffusion.cpp")[2]


def test_gguf_files_hold_every_tensor_of_the_original_file(tmp_path):
    tensors = sdcpp.transformer_tensors(TRANSFORMER)
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in Flux2Transformer(TRANSFORMER).state_dict().items()}
    assert {name: source.shape for name, source in bfl_plan({n: s for n, (_, s) in tensors.items()}).items()} == wanted
    path = tmp_path / "x.gguf"
    small = {"a": ("TQ2_0", (2, 512)), "b": ("F32", (3,)), "c": ("Q4_0", (1, 64))}
    sdcpp.write_gguf(path, small)
    data = path.read_bytes()
    assert struct.unpack_from("<4sIQQ", data) == (b"GGUF", 3, 3, 0)
    header = 24 + sum(8 + 1 + 4 + 8 * len(shape) + 4 + 8 for _, shape in small.values())
    start = -(-header // 32) * 32
    assert len(data) == start + -(-4 * 66 // 32) * 32 + 32 + -(-2 * 18 // 32) * 32
    codes = data[start:start + 64]
    assert all((byte >> shift) & 3 < 3 for byte in codes for shift in (0, 2, 4, 6))


# ------------------------------------------------------------------------------------------ results and plots

def test_results_say_where_they_are_from_but_not_whose(tmp_path):
    content = report.document("kernels", 3, {"x": 1}, [])
    text = json.dumps(content)
    assert content["machine"]["threads"] == 3
    assert content["versions"]["torch"] == str(torch.__version__)
    assert content["date"].endswith("Z")
    import getpass
    import socket
    assert socket.gethostname() not in text
    assert str(Path.home()) not in text
    assert f'"{getpass.getuser()}"' not in text


def test_results_of_other_kinds_are_refused(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("{]")
    with pytest.raises(FormatError, match="not a benchmark's result"):
        report.read(path)
    report.write(path, report.document("kernels", 1, {}, {}))
    with pytest.raises(FormatError, match="expected stages, found kernels"):
        Rounds("stages", 1, {}, path)
    Rounds("kernels", 1, {}, path)
    with pytest.raises(UsageError, match="other machine"):
        Rounds("kernels", 2, {}, path)


def test_arms_take_turns():
    seen = []
    seconds = interleave({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 3)
    assert "".join(seen) == "abababab"
    assert [len(times) for times in seconds.values()] == [3, 3]
    assert summary([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "samples": [3.0, 1.0, 2.0]}


def test_plot_draws_each_kind(bench, tmp_path):
    pytest.importorskip("matplotlib")

    def one(value: float) -> dict:
        return summary([value, value * 1.1])

    kernels = [{"m": m, "o": "all", "n": "all", "peak": one(900), "gops": {"ternary": one(700), "torch bf16": one(300)}}
               for m in (16, 64)]
    text = [{"m": 64, "o": 5, "n": 128, "peak": one(900), "gops": {"affine4": one(700)}}]
    files = []
    stages = {"step/linocut": one(1), "step/torch bf16": one(2)}
    image = {"linocut": one(1), "linocut/peak_rss": one(9), "linocut/step": one(0.2)}
    for kind, settings, results in (("kernels", {}, kernels + text), ("stages", {"size": [64, 64]}, stages),
                                    ("image", {"size": [64, 64], "steps": 4}, image)):
        files.append(tmp_path / f"{kind}.json")
        report.write(files[-1], report.document(kind, 1, settings, results))
    picture = tmp_path / "plot.png"
    code, out, err = bench("plot", *files, "-o", picture)
    assert (code, out.strip()) == (0, str(picture)), err
    with Image.open(picture) as image:
        assert image.width > 3 * image.height
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20
    assert "exists" in bench("plot", *files, "-o", picture)[2]
    assert "expected a name that ends" in bench("plot", *files, "-o", tmp_path / "plot.txt")[2]


def test_plot_without_matplotlib_says_what_to_install(bench, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    report.write(tmp_path / "r.json", report.document("kernels", 1, {}, []))
    assert "pip install 'linocut[plot]'" in bench("plot", tmp_path / "r.json", "-o", tmp_path / "p.png")[2]
