"""The model card: what it says of a quantized model, and that nothing in a file can break out of its place."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard

from linocut.errors import FormatError, UsageError
from linocut.integrations.card import is_ours, read_report
from linocut.integrations.convert import convert
from linocut.integrations.publish import prepare


def test_the_recipe_comes_from_the_quantization_config(packed_model, tmp_path):
    convert(packed_model, tmp_path / "own", "linocut")
    (tmp_path / "own" / "LICENSES").mkdir()
    card = prepare(tmp_path / "own", "me/model", license="mit").card
    data = ModelCard(card).data
    encoding = json.loads((tmp_path / "own/transformer/config.json").read_text())["quantization_config"]["policy"]
    kind = encoding["rules"][0]["encoding"]
    assert kind in data.tags
    assert data.license == "mit"
    assert data.base_model is None
    assert f"Policy `{encoding['name']}`" in card
    assert card.count(f"` | {kind} |") == sum(rule["encoding"] == kind for rule in encoding["rules"])


@pytest.mark.parametrize("to", ["mlx", "diffusers"])
def test_other_forms_have_cards_too(packed_model, tmp_path, to):
    convert(packed_model, tmp_path / to, to)
    card = prepare(tmp_path / to, "me/model").card
    assert ("linocut convert me/model FOLDER --to linocut" in card) == (to == "mlx")
    assert ModelCard(card).data.library_name == ("linocut" if to == "mlx" else "diffusers")


def test_texts_from_files_stay_in_their_cells(packed_model, tmp_path):
    convert(packed_model, tmp_path / "own", "linocut")
    config = json.loads((tmp_path / "own/transformer/config.json").read_text())
    config["quantization_config"]["policy"]["rules"] = [
        {"pattern": "a|b`\n---\nlicense: evil\n---\n<script>", "encoding": "ternary"}, "nonsense"]
    (tmp_path / "own/transformer/config.json").write_text(json.dumps(config))
    card = prepare(tmp_path / "own", "me/model").card
    assert "<script>" not in card
    assert r"| `a\|b' --- license: evil --- &lt;script>` | ternary |" in card
    assert ModelCard(card).data.license is None


def test_an_edited_card_is_known(packed_model, tmp_path):
    shutil.copytree(packed_model, tmp_path / "model")
    card = prepare(tmp_path / "model", "me/model").card
    assert is_ours(card)
    assert is_ours(card.replace("\n", "\r\n"))
    for edited in (card.replace("weights", "Weights", 1), card + "x", card.replace("<!-- written", "<!-- w"), "", "#"):
        assert not is_ours(edited)
    (tmp_path / "model" / "README.md").write_text(card)
    assert prepare(tmp_path / "model", "me/other").card != card
    (tmp_path / "model" / "README.md").write_text(card + "x")
    with pytest.raises(UsageError, match="--replace-card"):
        prepare(tmp_path / "model", "me/model")
    assert is_ours(prepare(tmp_path / "model", "me/model", replace_card=True).card)


def test_reports_of_other_things_are_refused(tmp_path):
    for text in ("[]", "{}", '{"scores": {"a": {"tasks": {}, "overall": {}}}, "count": 1, "images": 1}', "{"):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(FormatError):
            read_report(tmp_path)
