"""Words that a model never met are named, with near ones; and what it can draw is listed."""

import json
import shutil
import subprocess
import sys

import pytest

from linocut.cli import main
from linocut.errors import FormatError
from linocut.formats.folder import VOCABULARY_FILE, ModelFolder
from linocut.pipeline.vocabulary import Vocabulary

TABLE = {"things": [{"name": "telephone", "plural": "telephones", "synonyms": ["old phone"]},
                    {"name": "ladybug", "plural": "ladybugs", "synonyms": []},
                    {"name": "t-rex", "plural": "t-rexes", "synonyms": ["fire-breathing dragon"]}],
         "most": 6, "lists": {"colours": ["red", "blue"]}, "other_words": ["a", "and", "i'd", "like", "draw"]}


def folder(path, table=TABLE) -> ModelFolder:
    (path / "model_index.json").write_text("{}")
    if table is not None:
        (path / VOCABULARY_FILE).write_text(json.dumps(table))
    return ModelFolder(path, "small")


@pytest.mark.parametrize(("prompt", "unknown"), [
    ("A red telephone, and 2 LADYBUGS!", ["2"]),
    ("I'd like a xylophone", ["xylophone"]),
    ("I\u2019d like a blue-red T-Rex", []),
    ("draw a fire dragon and a lovely phone and a lovely fire", ["lovely"]),
    ("eine Katze \U0001f431 und \u4e00\u53ea\u732b", ["eine", "Katze", "und", "\u4e00\u53ea\u732b"]),
    ("!?", []),
])
def test_unknown_words(tmp_path, prompt, unknown):
    assert Vocabulary.of(folder(tmp_path)).unknown(prompt) == unknown


def test_a_note_names_near_words_and_is_one_line(tmp_path):
    known = Vocabulary.of(folder(tmp_path))
    assert known.note("a red ladybug") is None
    assert known.near("Telefone") == ["telephone", "telephones"]
    assert known.note("a telefone") == ("this model never met 'telefone' (near: telephone, telephones); "
                                        "what it can draw: linocut inspect --vocabulary")
    many = known.note(" ".join(f"q{i}zz" for i in range(20)))
    assert many.count("q") == 6 + "linocut inspect --vocabulary".count("q")
    assert "and 14 more" in many
    assert "\n" not in many


def test_a_model_trained_on_free_text_has_none(tmp_path):
    assert Vocabulary.of(folder(tmp_path, None)) is None


@pytest.mark.parametrize("change", [{"things": 3}, {"things": [{"name": "a"}]}, {"lists": []}, {"most": "many"},
                                    {"other_words": [1]}, {"lists": {"colours": "red"}}])
def test_malformed_files(tmp_path, change):
    with pytest.raises(FormatError, match="not a vocabulary") as caught:
        Vocabulary.of(folder(tmp_path, TABLE | change))
    assert VOCABULARY_FILE in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_shipped_models_list_their_words():
    for model in ("embedded", "embedded-binary"):
        known = Vocabulary.of(ModelFolder.open(model))
        assert len(known.things) >= 150
        assert known.note("two red apples and a blue cup on a white background") is None
        assert "'xylophone'" in known.note("a xylophone")


def test_no_torch_is_needed():
    code = ("import sys; from linocut.formats.folder import ModelFolder; "
            "from linocut.pipeline.vocabulary import Vocabulary; "
            "assert Vocabulary.of(ModelFolder.open('embedded')).note('qq'); "
            "assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


def inspect(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["inspect", *words])
    return ended.value.code


def test_inspect_lists_what_can_be_drawn(tmp_path, capsys):
    assert inspect(str(folder(tmp_path).root), "--vocabulary") == 0
    said = capsys.readouterr().out
    assert "up to 6 of 3 things" in said
    assert "telephone (old phone)" in said
    assert "red, blue" in said
    assert max(map(len, said.splitlines())) <= 100
    assert inspect(str(tmp_path), "--vocabulary", "--json") == 0
    assert json.loads(capsys.readouterr().out) == TABLE


def test_pictures_carry_the_note(tiny_model, tmp_path):
    from linocut.pipeline.generate import Pipeline

    root = shutil.copytree(tiny_model, tmp_path / "model")
    (root / VOCABULARY_FILE).write_text(json.dumps(TABLE))
    with pytest.warns(UserWarning, match="never met 'ladybag' \\(near: ladybug"):
        result = Pipeline.from_pretrained(root)("a ladybag", seed=0, num_inference_steps=1, width=32, height=32)
    assert len(result.warnings) >= 1


@pytest.mark.parametrize(("words", "message"), [
    (["--vocabulary", "--verify"], "leave out --verify and --tensors"),
    (["--vocabulary"], "was trained on free text"),
])
def test_mistakes(tmp_path, capsys, words, message):
    assert inspect(str(folder(tmp_path, None).root), *words) == 2
    assert message in capsys.readouterr().err
