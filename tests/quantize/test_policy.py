"""Policies: klein's 100 and 9, reasons, and lossless files."""

import json

import pytest

from linocut.errors import PolicyError
from linocut.quantize.policy import DENSE, Policy, Rule

D = 3072


def klein_shapes(double: int = 5, single: int = 20) -> dict[str, tuple[int, ...]]:
    """Every weight of the klein transformer by module path."""
    shapes: dict[str, tuple[int, ...]] = {
        "time_guidance_embed.timestep_embedder.linear_1": (D, 256),
        "time_guidance_embed.timestep_embedder.linear_2": (D, D),
        "double_stream_modulation_img.linear": (6 * D, D),
        "double_stream_modulation_txt.linear": (6 * D, D),
        "single_stream_modulation.linear": (3 * D, D),
        "x_embedder": (D, 128), "context_embedder": (D, 7680), "norm_out.linear": (2 * D, D), "proj_out": (128, D),
    }
    for i in range(double):
        block = f"transformer_blocks.{i}"
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            shapes[f"{block}.attn.{name}"] = (D, D)
        for name in ("ff", "ff_context"):
            shapes[f"{block}.{name}.linear_in"] = (6 * D, D)
            shapes[f"{block}.{name}.linear_out"] = (D, 3 * D)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            shapes[f"{block}.attn.{name}"] = (128,)
    for i in range(single):
        block = f"single_transformer_blocks.{i}.attn"
        shapes |= {f"{block}.to_qkv_mlp_proj": (9 * D, D), f"{block}.to_out": (D, 4 * D)}
        shapes |= {f"{block}.norm_q": (128,), f"{block}.norm_k": (128,)}
    return shapes


def count(plan: dict[str, tuple[str, str]], shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, (encoding, _) in plan.items():
        if len(shapes[name]) == 2:
            found[encoding] = found.get(encoding, 0) + 1
    return found


@pytest.mark.parametrize("encoding", ["binary", "ternary"])
def test_flux2_picks_exactly_kleins_hundred(encoding):
    shapes = klein_shapes()
    plan = Policy.preset("flux2", encoding).plan(shapes)
    assert count(plan, shapes) == {encoding: 100, DENSE: 9}
    packed = sum(shapes[name][0] * shapes[name][1] for name, (chosen, _) in plan.items() if chosen != DENSE)
    assert packed == 3_680_501_760
    assert plan["proj_out"] == (DENSE, "no rule matches")


def test_flux2_embedded_also_packs_the_time_layers():
    shapes = klein_shapes(2, 6)
    plan = Policy.preset("flux2-embedded", "ternary").plan(shapes)
    assert count(plan, shapes) == {"ternary": 36, "affine4": 5, DENSE: 4}
    assert plan["time_guidance_embed.timestep_embedder.linear_1"][0] == DENSE
    assert plan["norm_out.linear"][0] == "affine4"


def test_flux2_compact_packs_modulations_as_blocks_and_edges_in_int8():
    shapes = klein_shapes(2, 6)
    plan = Policy.preset("flux2-compact", "binary").plan(shapes)
    assert count(plan, shapes) == {"binary": 40, "affine4": 1, "int8": 3, DENSE: 1}
    assert plan["norm_out.linear"][0] == plan["single_stream_modulation.linear"][0] == "binary"
    assert plan["context_embedder"][0] == "int8"
    assert plan["time_guidance_embed.timestep_embedder.linear_1"][0] == DENSE
    with pytest.raises(PolicyError, match="found 35 and 9"):
        Policy.preset("flux2-compact", "binary").plan({name: shape for name, shape in shapes.items()
                                                       if name != "transformer_blocks.1.attn.to_v"})


def test_flux2_notices_missing_and_unknown_layers():
    policy = Policy.preset("flux2", "binary")
    shapes = klein_shapes()
    del shapes["transformer_blocks.3.attn.to_v"]
    with pytest.raises(PolicyError, match=r"expected 100 block linears and 9 others.* found 99 and 9"):
        policy.plan(shapes)
    with pytest.raises(PolicyError, match="not known: extra"):
        policy.plan(klein_shapes() | {"extra": (128, 128)})
    with pytest.raises(PolicyError, match="policy file"):
        policy.plan({"blocks.0.attn.qkv": (384, 128)})


def test_qwen3_takes_linears_and_embedding_with_or_without_prefix():
    policy = Policy.preset("qwen3", "affine4")
    for prefix in ("", "model."):
        for name in ("layers.0.self_attn.q_proj", "layers.11.self_attn.o_proj", "layers.3.mlp.down_proj",
                     "embed_tokens"):
            assert policy.decide(prefix + name, (256, 256))[0] == "affine4"
        for name in ("layers.0.self_attn.q_norm", "layers.0.input_layernorm", "norm"):
            assert policy.decide(prefix + name, (256,))[0] == DENSE
    assert policy.decide("lm_head", (256, 256))[0] == DENSE


def test_decisions_have_reasons_and_the_first_rule_wins():
    policy = Policy((Rule(r"a\.special", DENSE), Rule(r"a\..*", "ternary")))
    assert policy.decide("a.special", (128, 128)) == (DENSE, r"rule a\.special")
    assert policy.decide("a.other", (128, 128)) == ("ternary", r"rule a\..*")
    assert policy.decide("a.odd", (128, 100)) == (DENSE, "100 inputs are no multiple of 128")
    assert policy.decide("a.norm", (128,)) == (DENSE, "1 dimensions, only matrices are packed")
    assert policy.decide("b.a.other", (128, 128)) == (DENSE, "no rule matches"), "the whole path must match"


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_files_are_lossless(tmp_path, suffix):
    for policy in (Policy.preset("flux2-embedded", "ternary"),
                   Policy((Rule('odd "quotes" \\d+ \'single\' ü \U0001f5bc \x7f \t', "binary"),), name="my\\dit")):
        path = tmp_path / f"policy{suffix}"
        policy.save(path)
        assert Policy.from_file(path) == policy
        assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


def test_encoding_fills_rules_that_name_none(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text("[[rules]]\npattern = 'x'\n[[rules]]\npattern = 'y'\nencoding = 'affine4'\n")
    assert [rule.encoding for rule in Policy.from_file(path, "binary").rules] == ["binary", "affine4"]
    with pytest.raises(PolicyError, match="pass --encoding"):
        Policy.from_file(path)


@pytest.mark.parametrize(("text", "message"), [
    ("rules = 3", "non-empty list"), ("[[rules]]\nencoding='binary'", "text `pattern`"), ("rulez = []", "unknown key"),
    ("[[rules]]\npattern='('\nencoding='binary'", "no regular expression"), ("= 1", "not a TOML or JSON"),
    ("[[rules]]\npattern='a'\nencoding='int4'", "unknown encoding"),
    ("[[rules]]\npattern='a'\nencoding='dense'\ngroup=3", "unknown key 'group'"),
])
def test_bad_files_are_refused_with_their_path(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(PolicyError, match=message) as caught:
        Policy.from_file(path)
    assert str(path) in str(caught.value)
    with pytest.raises(PolicyError, match="cannot read"):
        Policy.from_file(tmp_path / "absent.toml")


def test_unknown_presets_and_useless_policies():
    with pytest.raises(PolicyError, match="unknown policy preset"):
        Policy.preset("flux3", "binary")
    with pytest.raises(PolicyError, match="unknown encoding"):
        Policy.preset("flux2", "int4")
    with pytest.raises(PolicyError, match="matches no weight"):
        Policy((Rule("nothing", "binary"),)).plan({"a": (128, 128)})
