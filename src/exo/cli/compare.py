"""``exo compare``."""

from pathlib import Path
from typing import Annotated

import typer

from exo.cli.console import err, out
from exo.cli.models.local_models import card_of, catalogue_of
from exo.cli.options import AsJson, Card, ModelsDir
from exo.compare.plot import draw
from exo.compare.prompts import PROMPTS, read_prompts
from exo.compare.run import CompareOptions
from exo.compare.run import compare as compare_engines
from exo.compare.table import show
from exo.config import Settings
from exo.plot import check_plot


def compare(
    model: Card,
    engines: Annotated[str | None, typer.Option(help="Runners, such as cuda,mlx. Default: all of the card's.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file with one prompt per line.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="The seed of the first prompt's sampled text.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw divergence over position into this file.")] = None,
    models_dir: ModelsDir = None,
    as_json: AsJson = False,
) -> None:
    """Measure how far two engines agree on one model: log-probabilities, tokens, speed, memory."""
    settings = Settings.load(models_directory=models_dir)
    catalogue = catalogue_of(settings)
    card = card_of(catalogue, model)
    if plot is not None:
        check_plot(plot)
    options = CompareOptions(read_prompts(prompts) if prompts else PROMPTS, tokens, seed)
    with err.status("comparing") as status:
        names = engines.split(",") if engines else None
        comparison = compare_engines(settings, catalogue, card.model_id, names, options, status.update)
    if plot is not None:
        draw(comparison, plot)
    if as_json:
        out.print_json(comparison.model_dump_json())
    else:
        show(comparison, out)
