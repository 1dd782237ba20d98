from importlib.resources import files
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from exo.cards.card import ModelCard
from exo.cards.catalogue import BrokenCard, Catalogue
from exo.worker.runner_cuda.loading import options as cuda_options
from exo.worker.runner_mlx.loading import options as mlx_options
from tests.support.model_cards import write

DEMO = "google/gemma-3-270m"


def test_every_built_in_card_is_sound() -> None:
    catalogue = Catalogue.load()
    assert catalogue.problems == ()
    assert len(catalogue.cards) == len([*files("exo.cards").joinpath("built_in").iterdir()])


BUILT_IN = Catalogue.load().cards


def test_people_find_what_they_run() -> None:
    assert len(BUILT_IN) > 20
    assert {task for card in BUILT_IN.values() for task in card.tasks} == {"TextGeneration", "TextEmbedding"}
    sizes = [card.storage_size.in_bytes for card in BUILT_IN.values()]
    assert min(sizes) < 500_000_000
    assert max(sizes) > 40_000_000_000
    catalogue = Catalogue.load()
    for name in ("llama3.1:8b", "llama3.3:70b", "qwen3:8b", "gemma3:4b", "mistral:7b", "gpt-oss:20b", "phi4"):
        assert catalogue.get(name), name


@pytest.mark.parametrize("model_id", BUILT_IN)
def test_a_built_in_cards_tables_are_those_of_the_runners(model_id: str) -> None:
    card = BUILT_IN[model_id]
    assert not card.is_custom
    options = cuda_options.CudaOptions.model_validate(card.engines["cuda"])
    assert (options.repo or "").count("/") == 1
    assert (options.file or "").endswith(".gguf")
    assert card.quantization.lower() in (options.file or "").lower()
    assert any(backend.startswith("Mlx") for backend in card.backends) is ("mlx" in card.engines)
    if "mlx" in card.engines:
        mlx_options.MlxOptions.model_validate(card.engines["mlx"])
    for alias in card.aliases:
        assert Catalogue.load().get(alias) == card


def test_the_demo_card_is_found_by_id_and_alias() -> None:
    catalogue = Catalogue.load()
    card = catalogue.cards[DEMO]
    assert catalogue.get(DEMO) is card
    assert catalogue.get("gemma-3-270m") is card
    assert card.backends.index("LlamaCppCpu") < card.backends.index("MlxCpu"), "MLX is slow on a CPU"


def test_users_cards_are_added_and_replace_built_in_ones(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    write(tmp_path / "below", "mine.toml", "me/mine", "mine", layers=7)
    write(tmp_path, "demo.toml", DEMO, "demo", layers=3)
    catalogue = Catalogue.load(tmp_path)
    assert catalogue.problems == ()
    assert [card.n_layers for name in ("mine", "demo", DEMO) if (card := catalogue.get(name))] == [7, 3, 3]
    assert catalogue.get("gemma-3-270m") is None, "the replaced card's alias went with it"


def test_no_directory_of_the_users_is_no_problem(tmp_path: Path) -> None:
    catalogue = Catalogue.load(tmp_path / "none")
    assert (catalogue.cards, catalogue.problems) == (Catalogue.load().cards, ())
    assert catalogue.refreshed() is catalogue


def test_broken_files_are_reported_and_the_rest_load(tmp_path: Path) -> None:
    write(tmp_path, "good.toml", "me/good")
    write(tmp_path, "layers.toml", "me/layers", layers=0)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "dangling.toml").symlink_to("nowhere")
    (tmp_path / "directory.toml").mkdir()
    (tmp_path / "empty.toml").touch()
    (tmp_path / "notes.txt").write_text("not a card")
    catalogue = Catalogue.load(tmp_path)
    assert catalogue.get("me/good")
    assert catalogue.get(DEMO)
    found = {(Path(problem.file).name, problem.key): problem.reason for problem in catalogue.problems}
    assert list(found) == [
        ("binary.toml", ""),
        ("dangling.toml", ""),
        ("empty.toml", "model_id"),
        ("layers.toml", "n_layers"),
    ]
    assert "utf-8" in found["binary.toml", ""]
    assert "No such file" in found["dangling.toml", ""]
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
    assert catalogue.unknown("it") == "no model card is called 'it'; did you mean me/one or me/two?"
    assert catalogue.get("one") is catalogue.get("me/one")
    assert catalogue.problems == (
        BrokenCard(str(one), "aliases", f"it is also a name of me/two ({two})"),
        BrokenCard(str(two), "aliases", f"it is also a name of me/one ({one})"),
    )


def test_an_alias_never_hides_a_model_id(tmp_path: Path) -> None:
    plain = write(tmp_path, "plain.toml", "plain", layers=1)
    thief = write(tmp_path, "thief.toml", "me/thief", "plain", layers=2)
    catalogue = Catalogue.load(tmp_path)
    card = catalogue.get("plain")
    assert card
    assert card.model_id == "plain"
    assert catalogue.problems == (BrokenCard(str(thief), "aliases", f"plain is also a name of plain ({plain})"),)


def test_a_built_in_card_gives_way_where_a_users_card_has_its_alias(tmp_path: Path) -> None:
    built_in = Catalogue.load().get("qwen3:8b")
    assert built_in is not None
    write(tmp_path, "mine.toml", "me/mine", "qwen3:8b")
    write(tmp_path, "named.toml", "qwen3-8b")
    catalogue = Catalogue.load(tmp_path)
    assert catalogue.problems == ()
    assert catalogue.get("qwen3:8b") is catalogue.cards["me/mine"]
    assert catalogue.get("qwen3-8b") is catalogue.cards["qwen3-8b"]
    assert catalogue.get(built_in.model_id) is built_in


@pytest.mark.parametrize("name", ["gemma-3-270", "Gemma-3-270m", "gemma-3-270m ", "google", ""])
def test_a_similar_name_finds_nothing(name: str) -> None:
    assert Catalogue.load().get(name) is None


def test_a_near_miss_is_suggested_and_a_far_one_is_not(tmp_path: Path) -> None:
    write(tmp_path, "llama.toml", "someone/Llama-3.2-1B-4bit")
    catalogue = Catalogue.load(tmp_path)
    assert catalogue.suggest("GEMMA-3-270")[:2] == ("gemma-3-270m", "gemma-3-27b")
    assert catalogue.suggest("qwen3:8")[0] == "qwen3:8b"
    assert catalogue.suggest("llama-3.2-1b-4bits")[0] == "someone/Llama-3.2-1B-4bit"
    assert catalogue.suggest("xyzzy") == ()
    assert catalogue.unknown("xyzzy") == "no model card is called 'xyzzy'"


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
