from importlib.resources import files
from pathlib import Path

import pytest

from exo.cards.card import ModelCard
from tests.support.model_cards import SMALL, UPSTREAM

BUILT_IN = [Path(str(entry)) for entry in files("exo.cards").joinpath("built_in").iterdir()]


@pytest.mark.parametrize("path", [*BUILT_IN, *UPSTREAM], ids=lambda path: path.stem)
def test_a_card_comes_back_as_it_was(path: Path) -> None:
    card = ModelCard.from_toml(path.read_text())
    assert ModelCard.from_toml(card.to_toml()) == card


@pytest.mark.parametrize(
    "text", ['"', "\\", "\n", "\r", "\t", "\x00", "\x7f", "\x1f", "'''", "ü", "\U0001f600", "#", "="]
)
def test_any_text_comes_back_as_it_was(text: str) -> None:
    table = {"path": text, text or "empty": [text, {text: True}], "number": -1.5e-07, "whole": -3}
    card = ModelCard.from_toml(SMALL).model_copy(update={"base_model": text * 3, "engines": {"cuda": table}})
    assert ModelCard.from_toml(card.to_toml()) == card


def test_what_is_the_default_is_left_out() -> None:
    lines = ModelCard.from_toml(SMALL).to_toml().splitlines()
    keys = [line.partition(" ")[0] for line in lines if line]
    assert keys == [
        "model_id",
        "backends",
        "n_layers",
        "hidden_size",
        "supports_tensor",
        "tasks",
        "[storage_size]",
        "in_bytes",
    ]
