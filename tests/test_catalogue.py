from importlib.resources import files
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from exo.models.card import ModelCard
from exo.models.catalogue import BrokenCard, Catalogue
from tests.test_card import SMALL

DEMO = "google/gemma-3-270m"


def write(directory: Path, name: str, model_id: str, *aliases: str, layers: int = 2) -> Path:
    path = directory / name
    text = SMALL.replace("someone/small", model_id).replace("n_layers = 2", f"n_layers = {layers}")
    path.write_text(f"aliases = {list(aliases)}\n{text}")
    return path


def test_every_built_in_card_is_sound() -> None:
    catalogue = Catalogue.load()
    assert catalogue.problems == ()
    assert len(catalogue.cards) == len([*files("exo.models").joinpath("cards").iterdir()])


def test_the_demo_card_is_found_by_id_and_alias() -> None:
    catalogue = Catalogue.load()
    card = catalogue.cards[DEMO]
    assert catalogue.get(DEMO) is card
    assert catalogue.get("gemma-3-270m") is card
    assert card.backends.index("LlamaCppCpu") < card.backends.index("MlxCpu"), "MLX is slow on a CPU"
    assert card.engines["cuda"]["slots"] == 16


def test_users_cards_are_added_and_replace_built_in_ones(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    write(tmp_path / "below", "mine.toml", "me/mine", "mine", layers=7)
    write(tmp_path, "demo.toml", DEMO, "demo", layers=3)
    catalogue = Catalogue.load(tmp_path)
    assert catalogue.problems == ()
    assert [card.n_layers for name in ("mine", "demo", DEMO) if (card := catalogue.get(name))] == [7, 3, 3]
    assert catalogue.get("gemma-3-270m") is None, "the replaced card's alias went with it"


def test_no_directory_of_the_users_is_no_problem(tmp_path: Path) -> None:
    assert Catalogue.load(tmp_path / "none") == Catalogue.load()


def test_broken_files_are_reported_and_the_rest_load(tmp_path: Path) -> None:
    write(tmp_path, "good.toml", "me/good")
    write(tmp_path, "layers.toml", "me/layers", layers=0)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "directory.toml").mkdir()
    (tmp_path / "empty.toml").touch()
    (tmp_path / "notes.txt").write_text("not a card")
    catalogue = Catalogue.load(tmp_path)
    assert catalogue.get("me/good")
    assert catalogue.get(DEMO)
    found = {(Path(problem.file).name, problem.key): problem.reason for problem in catalogue.problems}
    assert list(found) == [
        ("binary.toml", ""),
        ("directory.toml", ""),
        ("empty.toml", "model_id"),
        ("layers.toml", "n_layers"),
    ]
    assert "utf-8" in found["binary.toml", ""]
    assert "(got 0)" in found["layers.toml", "n_layers"]


def test_of_two_files_for_one_model_the_first_counts_and_the_second_is_reported(tmp_path: Path) -> None:
    first = write(tmp_path, "a.toml", "me/model", layers=1)
    second = write(tmp_path, "b.toml", "me/model", layers=2)
    catalogue = Catalogue.load(tmp_path)
    assert catalogue.cards["me/model"].n_layers == 1
    assert catalogue.problems == (BrokenCard(str(second), "model_id", f"me/model is already in {first}"),)


def test_an_ambiguous_alias_finds_nothing_and_is_reported_for_both(tmp_path: Path) -> None:
    one = write(tmp_path, "one.toml", "me/one", "it", "one")
    two = write(tmp_path, "two.toml", "me/two", "it", "it")
    catalogue = Catalogue.load(tmp_path)
    assert catalogue.get("it") is None
    assert catalogue.suggest("it") == ("me/one", "me/two")
    assert catalogue.get("one") is catalogue.get("me/one")
    assert catalogue.problems == (
        BrokenCard(str(one), "aliases", "it is also a name of me/two"),
        BrokenCard(str(two), "aliases", "it is also a name of me/one"),
    )


def test_an_alias_never_hides_a_model_id(tmp_path: Path) -> None:
    write(tmp_path, "plain.toml", "plain", layers=1)
    thief = write(tmp_path, "thief.toml", "me/thief", "plain", layers=2)
    catalogue = Catalogue.load(tmp_path)
    card = catalogue.get("plain")
    assert card
    assert card.model_id == "plain"
    assert catalogue.problems == (BrokenCard(str(thief), "aliases", "plain is also a name of plain"),)


@pytest.mark.parametrize("name", ["gemma-3-270", "Gemma-3-270m", "gemma-3-270m ", "google", ""])
def test_a_similar_name_finds_nothing(name: str) -> None:
    assert Catalogue.load().get(name) is None


def test_a_near_miss_is_suggested_and_a_far_one_is_not(tmp_path: Path) -> None:
    write(tmp_path, "llama.toml", "someone/Llama-3.2-1B-4bit")
    catalogue = Catalogue.load(tmp_path)
    assert catalogue.suggest("GEMMA3-270m") == ("gemma-3-270m", "google/gemma-3-270m")
    assert catalogue.suggest("llama-3.2-1b") == ("someone/Llama-3.2-1B-4bit",)
    assert catalogue.suggest("xyzzy") == ()


@pytest.mark.parametrize("blocks", [True, False])
def test_the_demo_cards_chat_template_writes_a_conversation_out(blocks: bool) -> None:
    card = Catalogue.load().get(DEMO)
    assert isinstance(card, ModelCard)
    source = card.engines["cuda"]["chat_template"]
    assert isinstance(source, str)
    template = ImmutableSandboxedEnvironment(trim_blocks=blocks, lstrip_blocks=blocks).from_string(source)
    messages = [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": " Who\nare you? "},
        {"role": "assistant", "content": "{{ messages }}"},
        {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "I?"}]},
    ]
    written = "Be brief.\n\nUser: Who\nare you?\n\nAssistant: {{ messages }}\n\nUser: And I?\n\nAssistant:"
    assert template.render(messages=messages, add_generation_prompt=True) == written
    alone = template.render(messages=messages[1:2], add_generation_prompt=False)
    assert alone.endswith("briefly and correctly.\n\nUser: Who\nare you?\n\n")
