"""Values in a model's configs that no network can have: one line that names the key, exit code 2, no traceback."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from linocut.cli import main

Break = Callable[[str, dict[str, Any]], Path]

BROKEN = [
    ("vae", {"layers_per_block": "x"}), ("vae", {"layers_per_block": 0}), ("vae", {"layers_per_block": 10**9}),
    ("vae", {"norm_num_groups": 0}), ("vae", {"norm_num_groups": 7}), ("vae", {"latent_channels": 2.0}),
    ("vae", {"block_out_channels": ["a"]}), ("vae", {"block_out_channels": []}), ("vae", {"block_out_channels": "abc"}),
    ("vae", {"block_out_channels": [16] * 6}), ("vae", {"block_out_channels": [16, 16, 32, 10**9]}),
    ("vae", {"decoder_block_out_channels": [16]}), ("vae", {"decoder_block_out_channels": {}}),
    ("vae", {"batch_norm_eps": "x"}), ("vae", {"batch_norm_eps": -1}), ("vae", {"batch_norm_eps": 10**400}),
    ("vae", {"use_quant_conv": "no"}), ("vae", {"preview": 1}), ("vae", {"out_channels": 4}), ("vae", {"act_fn": []}),
    ("text_encoder", {"num_key_value_heads": 0}), ("text_encoder", {"num_key_value_heads": True}),
    ("text_encoder", {"rope_parameters": None, "rope_scaling": "x"}), ("text_encoder", {"rope_parameters": [1]}),
    ("text_encoder", {"rope_parameters": None, "rope_theta": "x"}),
    ("text_encoder", {"rope_parameters": None, "rope_theta": 0}),
    ("text_encoder", {"rope_parameters": {"rope_theta": {}}, "rope_theta": None}),
    ("text_encoder", {"hidden_size": None}), ("text_encoder", {"hidden_size": 10**9}),
    ("text_encoder", {"num_hidden_layers": 10**9}),
    ("text_encoder", {"head_dim": 63}), ("text_encoder", {"rms_norm_eps": "x"}), ("text_encoder", {"vocab_size": []}),
    ("text_encoder", {"hidden_act": {}}),
    ("transformer", {"eps": "x"}), ("transformer", {"eps": None}), ("transformer", {"mlp_ratio": "x"}),
    ("transformer", {"mlp_ratio": 10**400}), ("transformer", {"mlp_ratio": 0}), ("transformer", {"num_layers": 10**9}),
    ("transformer", {"num_layers": -1}), ("transformer", {"num_single_layers": 1e3}),
    ("transformer", {"num_attention_heads": 65536}), ("transformer", {"rope_theta": "x"}),
    ("transformer", {"axes_dims_rope": 64}), ("transformer", {"axes_dims_rope": ["a"] * 4}),
    ("transformer", {"axes_dims_rope": [32, 32]}), ("transformer", {"axes_dims_rope": [8, 8, 8, 8]}),
    ("transformer", {"timestep_guidance_channels": 3}), ("transformer", {"out_channels": "x"}),
    ("transformer", {"guidance_embeds": "x"}),
]


@pytest.fixture
def broken(tiny_model: Path, tmp_path: Path) -> Break:
    """Make a copy of the tiny model with other values in one config."""
    def make(component: str, change: dict[str, Any]) -> Path:
        root = tmp_path / "broken"
        shutil.copytree(tiny_model, root)
        path = root / component / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        return root
    return make


@pytest.mark.parametrize(("component", "change"), BROKEN, ids=lambda value: json.dumps(value)[:60])
def test_impossible_values_are_refused_in_one_line(broken: Break, component: str, change: dict[str, Any],
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    root = str(broken(component, change))
    for arguments in (["plan", root], ["generate", "a red apple", "-m", root, "-o", f"{root}/a.png"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        out, err = capsys.readouterr()
        assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("error: ")
        assert list(change)[-1] in err
        assert "expected" in err
        assert "found" in err
        assert len(err) < 300


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads"])
def test_missing_keys_are_named(broken: Break, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = broken("text_encoder", {})
    path = root / "text_encoder" / "config.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != key}))
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(root)])
    assert ended.value.code == 2
    assert f"key {key!r} is missing" in capsys.readouterr().err


def test_a_vae_that_only_names_the_widths_of_its_decoder(broken: Break, capsys: pytest.CaptureFixture[str]) -> None:
    """The absent widths are diffusers' own, of four stages; the drawing itself reads the decoder's alone."""
    root = broken("vae", {"block_out_channels": None, "decoder_block_out_channels": [16, 16, 32, 32]})
    with pytest.raises(SystemExit) as ended:
        main(["generate", "a red apple", "-m", str(root), "-o", str(root / "a.png"), "--threads", "1"])
    assert (ended.value.code, (root / "a.png").is_file()) == (0, True), capsys.readouterr().err


def test_planning_loads_no_torch(tiny_model: Path) -> None:
    code = ("import sys\nfrom linocut.cli import main\ntry:\n    main(sys.argv[1:])\n"
            "finally:\n    print('TORCH', 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, "plan", str(tiny_model)], capture_output=True, text=True,
                          check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr
    assert "TORCH False" in done.stdout
