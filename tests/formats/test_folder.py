"""Finding a model by name, by path and through the hub's cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_server import Hub, environment, serving
from malicious import good_packed

from linocut.errors import FormatError, ModelNotFoundError, UsageError
from linocut.formats import folder as folder_module
from linocut.formats.checkpoint import write_checkpoint
from linocut.formats.folder import ModelFolder


def make_model(root: Path, index: dict | None = None, transformer: str = "transformer") -> Path:
    for part in (transformer, "text_encoder", "vae", "scheduler", "tokenizer"):
        (root / part).mkdir(parents=True, exist_ok=True)
    (root / "model_index.json").write_text(json.dumps(index if index is not None else {"is_distilled": True}))
    (root / transformer / "config.json").write_text(json.dumps({"num_layers": 2}))
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps({"shift": 3.0}))
    write_checkpoint(root / transformer / "diffusion_pytorch_model.safetensors", {"layer": good_packed()})
    write_checkpoint(root / "vae" / "diffusion_pytorch_model.safetensors", {"w": np.zeros(3, np.float32)})
    write_checkpoint(root / "text_encoder" / "model.safetensors", {"layer": good_packed("affine4")})
    return root


def test_a_local_folder(tmp_path):
    model = ModelFolder.open(make_model(tmp_path / "mine"))
    assert model.name == "mine"
    assert model.transformer_dir == "transformer"
    assert model.config("transformer") == {"num_layers": 2}
    assert model.config("scheduler") == {"shift": 3.0}
    assert list(model.checkpoint("transformer").packed) == ["layer"]
    assert model.settings == {"text_length": 512, "text_taps": [9, 18, 27], "default_size": [1024, 1024],
                              "default_steps": 4, "default_guidance": 4.0, "trained_sizes": [], "is_distilled": True}
    assert len(model.hash()) == 12
    assert model.hash() == ModelFolder.open(str(tmp_path / "mine")).hash()
    with pytest.raises(UsageError, match="unknown component"):
        model.config("../vae")
    with pytest.raises(ModelNotFoundError, match=r"vae.config\.json: no such file"):
        model.config("vae")
    write_checkpoint(tmp_path / "mine" / "vae" / "diffusion_pytorch_model.safetensors", {"w": np.ones(3, np.float32)})
    assert model.hash() != ModelFolder.open(tmp_path / "mine").hash()


def test_settings(tmp_path):
    own = {"text_length": 64, "text_taps": [2, 4, 6], "default_size": [256, 256]}
    assert ModelFolder.open(make_model(tmp_path, {"linocut": own})).settings == own | {
        "default_steps": 4, "default_guidance": 4.0, "trained_sizes": [], "is_distilled": False}
    for key, value in [("text_length", 0), ("text_length", True), ("text_taps", [3, 2, 1]), ("text_taps", [1, 2]),
                       ("default_size", [100, 100]), ("default_size", "256"), ("default_steps", 0),
                       ("default_guidance", -1), ("default_guidance", 101), ("default_guidance", True),
                       ("trained_sizes", [256, 256])]:
        with pytest.raises(FormatError, match=key):
            _ = ModelFolder.open(make_model(tmp_path, {"linocut": own | {key: value}})).settings
    with pytest.raises(FormatError, match="is_distilled"):
        _ = ModelFolder.open(make_model(tmp_path, {"is_distilled": "yes"})).settings


def test_embedded_names(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "_embedded_root", lambda: tmp_path)
    with pytest.raises(ModelNotFoundError, match="not part of this installation"):
        ModelFolder.open("embedded")
    make_model(tmp_path)
    make_model(tmp_path, transformer="transformer-binary")
    assert ModelFolder.open("embedded").path("transformer") == tmp_path / "transformer"
    binary = ModelFolder.open("embedded-binary")
    assert binary.transformer_dir == "transformer-binary"
    assert binary.checkpoint("transformer").path.parent.name == "transformer-binary"
    assert binary.path("vae") == tmp_path / "vae"


@pytest.mark.parametrize("name", ["nothing", "/no/such/folder", "", "a/b/c", "../x/y", "org/na me", "org//name", "-/x"])
def test_unknown_names_give_one_line_with_what_is_possible(name, monkeypatch):
    monkeypatch.setattr(folder_module, "_from_hub", lambda name: pytest.fail("looked on the hub"))
    monkeypatch.chdir("/")
    with pytest.raises(ModelNotFoundError) as caught:
        ModelFolder.open(name)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in ("embedded", "embedded-binary", "org/name", "folder"))


def test_wrong_places(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFoundError, match=r"model_index\.json"):
        ModelFolder.open(tmp_path / "empty")
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match="this is a file"):
        ModelFolder.open(tmp_path / "x.safetensors")
    for text, words in [("[]", "object"), ("{", "JSON"), ('{"a":1,"a":2}', "twice")]:
        (tmp_path / "empty" / "model_index.json").write_text(text)
        with pytest.raises(FormatError, match=words):
            ModelFolder.open(tmp_path / "empty")


REVISION = "a" * 40
SRC = str(Path(folder_module.__file__).resolve().parents[2])
HUB = """
import sys
from linocut.errors import LinocutError
from linocut.formats.folder import ModelFolder
try:
    model = ModelFolder.open(sys.argv[1])
    print(model.name, model.checkpoint("transformer").verify(), model.settings["default_steps"],
          sorted(p.name for p in model.root.rglob("*") if p.is_file()))
except LinocutError as error:
    print(type(error).__name__, error)
"""


def run_hub(name: str, **env: str) -> str:
    done = subprocess.run([sys.executable, "-c", HUB, name], capture_output=True, text=True, check=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": SRC, "HF_HUB_DISABLE_XET": "1"} | env)
    return done.stdout.strip()


def test_a_hub_id_in_the_local_cache(tmp_path):
    repository = tmp_path / "hub" / "models--org--tiny"
    make_model(repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    found = run_hub("org/tiny", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert found.startswith("org/tiny 2 4 ")
    missing = run_hub("org/absent", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert missing.startswith("ModelNotFoundError no model 'org/absent': offline (HF_HUB_OFFLINE is set) and not in "
                              "the cache; possible are")
    assert "\n" not in missing
    unreachable = run_hub("org/absent", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9",
                          NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    assert "'org/absent': offline (the hub cannot be reached) and not in the cache; possible are" in unreachable


def test_a_hub_id_is_fetched_once_and_only_what_is_needed(tmp_path):
    root = make_model(tmp_path / "served")
    (root / "flux-single-file.safetensors").write_bytes(b"x" * 1000)
    (root / "text_encoder" / "pytorch_model.bin").write_bytes(b"x")
    (root / "README.md").write_text("hello")
    (root / "tokenizer" / "tokenizer.json").write_text("{}")
    hub = Hub()
    hub.add("org/tiny", root)
    with serving(hub) as address:
        found = run_hub("org/tiny", **environment(tmp_path / "home", address))
        assert found.startswith("org/tiny 2 4 "), found
        assert "tokenizer.json" in found
        assert "model_index.json" in hub.fetched()
        assert not {"flux-single-file.safetensors", "text_encoder/pytorch_model.bin", "README.md"} & set(hub.fetched())
        before = len(hub.requests)
        assert run_hub("org/tiny", **environment(tmp_path / "home", address)) == found
        assert len(hub.requests) == before, "a model in the cache is opened without asking the network"
