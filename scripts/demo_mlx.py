"""Converts the demo model for the MLX runner, once, into the folder that the built-in card names."""

from typing import cast

from exo.cards.catalogue import Catalogue
from exo.config import Settings
from exo.convert import convert


def main() -> None:
    """Does nothing if the folder is there: it appears whole or not at all."""
    card = Catalogue.load().cards["google/gemma-3-270m"]
    folder = Settings.load().models_directory / "google--gemma-3-270m"
    target = folder / cast(str, card.engines["mlx"]["path"])
    template = target / "chat_template.jinja"
    if not target.exists():
        print(f"==> converting the demo model for MLX into {target}", flush=True)
        convert(folder / cast(str, card.engines["cuda"]["file"]), target, to="mlx", dtype="bf16", bits=8)
    # The GGUF has no chat template; MLX's folder gets the one that the card gives llama.cpp.
    template.write_text(cast(str, card.engines["cuda"]["chat_template"]))


if __name__ == "__main__":
    main()
