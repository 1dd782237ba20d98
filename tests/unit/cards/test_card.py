from pathlib import Path

import pytest
from pydantic import ValidationError

from exo.cards.card import CardError, ModelCard, SamplingValues
from exo.worker.protocol.commands import SamplingParams
from exo.worker.protocol.runners import RUNNERS, RunnerSpec
from tests.support.model_cards import SMALL, UPSTREAM


@pytest.mark.parametrize("path", UPSTREAM, ids=lambda path: path.stem)
def test_upstreams_cards_load_unchanged(path: Path) -> None:
    card = ModelCard.from_toml(path.read_text())
    assert card.model_id.replace("/", "--") == path.stem
    assert card.runner == "auto"
    assert card.backends[0] == "MlxMetal"
    assert card.engines == {}


def test_upstreams_fields_arrive() -> None:
    cards = {path.stem: ModelCard.from_toml(path.read_text()) for path in UPSTREAM}
    kimi = cards["mlx-community--Kimi-K2.5"]
    assert kimi.vision is not None
    assert kimi.vision.image_token_id == 163605
    assert kimi.context_length == 262144
    assert kimi.reasoning_dialect == "suffix"
    assert (kimi.sampling_defaults.temperature, kimi.sampling_defaults.min_p) == (1.0, 0.01)
    assert kimi.sampling_defaults.non_thinking == SamplingValues(temperature=0.6, top_p=0.95, min_p=0.01)
    assert kimi.sampling_defaults.thinking is None
    flux = cards["exolabs--FLUX.1-dev-4bit"]
    assert flux.tasks == ("TextToImage",)
    assert flux.components is not None
    assert [component.n_layers for component in flux.components] == [12, 24, 57, None]
    assert cards["mlx-community--Qwen3-VL-4B-Instruct-4bit"].num_key_value_heads is None


def test_what_is_added_to_upstreams_format() -> None:
    card = ModelCard.from_toml(
        f"""
        runner = "cuda"
        aliases = ["small", "small:latest"]
        is_custom = true
        {SMALL}
        [cuda]
        file = "small.gguf"
        no_such_key_yet = [1, {{ deep = true }}]
        """
    )
    assert (card.runner, card.aliases) == ("cuda", ("small", "small:latest"))
    assert card.engines == {"cuda": {"file": "small.gguf", "no_such_key_yet": [1, {"deep": True}]}}


def test_a_card_cannot_be_changed() -> None:
    card = ModelCard.from_toml(SMALL)
    with pytest.raises(ValidationError, match="frozen"):
        card.n_layers = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("old", "new", "key", "reason"),
    [
        ("n_layers = 2", "n_layer = 2", "n_layer", "unknown key; accepted are .*n_layers"),
        ("n_layers = 2", "", "n_layers", "required"),
        ("n_layers = 2", 'n_layers = "2"', "n_layers", "valid integer"),
        ("n_layers = 2", "n_layers = 0", "n_layers", "greater than or equal to 1"),
        ("n_layers = 2", "n_layers = 2\nengines = {}", "engines", "unknown key"),
        ("n_layers = 2", "n_layers = 2\nbogus = { path = 'x' }", "bogus", r"and the tables \[cuda\]"),
        ("n_layers = 2", "n_layers = 2\ncuda = 3", "cuda", "valid dictionary"),
        ("n_layers = 2", "n_layers = 2\ncuda = { since = 2020-01-01 }", "cuda.since", "JSON"),
        ("n_layers = 2", "n_layers = 2\ncontext_length = -1", "context_length", "greater than or equal to 0"),
        ("n_layers = 2", "n_layers = 2\nruner = 'cuda'", "runer", "unknown key; accepted are .*runner"),
        ("n_layers = 2", "n_layers = 2\nrunner = 'tpu'", "runner", "accepted are auto, cuda.*tpu"),
        ("n_layers = 2", "n_layers = 2\nprefer = 'speed'", "prefer", "latency.*throughput.*speed"),
        ("n_layers = 2", "n_layers = 2\nsampling_defaults = { top_p = 1.5 }", "sampling_defaults.top_p", "equal to 1"),
        ("n_layers = 2", "n_layers = 2\nsampling_defaults = { heat = 1 }", "sampling_defaults.heat", "not permitted"),
        ("1000", "1000.5", "storage_size.in_bytes", "valid integer"),
        ('"someone/small"', '"../small"', "model_id", "pattern"),
        ('"someone/small"', '"small@cuda"', "model_id", "pattern"),
        ('"TextGeneration"', '"Juggling"', "tasks.0", "TextGeneration.*Juggling"),
        ('"LlamaCppCpu"', '"LlamaCpu"', "backends", "accepted are LlamaCppCuda, .*MlxMetal.*LlamaCpu"),
        ('"LlamaCppCpu"', '"LlamaCppCuda"', "backends", "once"),
        ('["LlamaCppCuda", "LlamaCppCpu"]', "[]", "backends", "at least 1"),
        ("model_id", "aliases = ['a b']\nmodel_id", "aliases.0", "pattern"),
        ("n_layers = 2", "n_layers == 2", "", "not TOML: .*line 4"),
        ("n_layers = 2", f"n_layers = {'9' * 5000}", "", "not TOML: .*digits"),
        ("n_layers = 2", f"n_layers = {'[' * 5000}", "", "nested too deeply"),
    ],
)
def test_a_bad_card_is_refused_by_key_and_reason(old: str, new: str, key: str, reason: str) -> None:
    assert old in SMALL
    with pytest.raises(CardError, match=f"(?s){reason}") as error:
        ModelCard.from_toml(SMALL.replace(old, new))
    assert error.value.key == key


def test_a_runner_that_serves_none_of_the_backends_is_a_contradiction() -> None:
    text = SMALL.replace('["LlamaCppCuda", "LlamaCppCpu"]', '["MlxCpu"]').replace(
        "n_layers", 'runner = "cuda"\nn_layers'
    )
    served = "LlamaCppCuda, LlamaCppVulkan, LlamaCppCpu"
    with pytest.raises(CardError, match=f"runner cuda serves none of these; it serves {served}"):
        ModelCard.from_toml(text)


def test_a_new_runner_needs_no_change_to_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    text = f'runner = "abacus"\n{SMALL}\n[abacus]\nbeads = 10'.replace('"LlamaCppCuda"', '"AbacusWood"')
    with pytest.raises(CardError):
        ModelCard.from_toml(text)
    monkeypatch.setitem(RUNNERS, "abacus", RunnerSpec("exo.worker.runner_abacus", ("AbacusWood",)))
    card = ModelCard.from_toml(text)
    assert (card.runner, card.backends) == ("abacus", ("AbacusWood", "LlamaCppCpu"))
    assert card.engines["abacus"] == {"beads": 10}


@pytest.mark.parametrize("name", SamplingValues.model_fields)
def test_a_default_may_be_what_a_request_may_ask_for(name: str) -> None:
    assert SamplingValues.model_fields[name].metadata == SamplingParams.model_fields[name].metadata
