"""The options that several commands share. ``as_command`` expands the dataclasses into their options."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import JsonValue

from exo.config import Access, Settings
from exo.config_values import SettingsError
from exo.worker.protocol.runners import RUNNERS


def complete_model(incomplete: str) -> list[str]:
    """Model ids and aliases with this beginning, for the shell. Broken model cards are ignored."""
    from exo.cards.catalogue import Catalogue  # most commands complete nothing
    from exo.store.found.finder import Finder

    try:
        settings = Settings.load()
        catalogue = Catalogue.load(settings.cards_directory, Finder(settings.other_folders))
    except SettingsError:
        return []
    return sorted(name for name in {*catalogue.cards, *catalogue.aliases} if name.startswith(incomplete))


Model = Annotated[
    str,
    typer.Argument(
        help="Model id or alias. @RUNNER behind it selects a runner: gemma-3-270m@cuda.", autocompletion=complete_model
    ),
]
AnyModel = Annotated[
    str,
    typer.Argument(
        help="Model id or alias, hf.co/OWNER/NAME[:QUANT], or the path of a GGUF file or model folder. @RUNNER behind"
        " it selects a runner: gemma-3-270m@cuda.",
        autocompletion=complete_model,
        metavar="MODEL",
    ),
]
Card = Annotated[str, typer.Argument(help="Model id or alias.", autocompletion=complete_model, metavar="MODEL")]
ModelsDir = Annotated[Path | None, typer.Option("--models-dir", help="Where models are kept.")]
Runner = Annotated[str | None, typer.Option(help=f"The runner whose files are meant: {', '.join(RUNNERS)}.")]
Quant = Annotated[
    str | None, typer.Option(help="Another quantisation than the model card's, such as Q4_K_M; for GGUF files.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """The server's address, and the keys and certificate that it uses."""

    host: Annotated[str | None, typer.Option(help="The address that the server listens on. Default: 127.0.0.1.")] = None
    port: Annotated[str | None, typer.Option(help="The server's port; 0 is any free one. Default: 52415.")] = None
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME:KEY or KEY; repeatable. Other users see it in the process list, EXO_API_KEY they do not."
        ),
    ] = None
    api_key_file: Annotated[Path | None, typer.Option(help="A file with one key per line.")] = None
    ssl_certfile: Annotated[
        Path | None, typer.Option(help="The server's certificate. The server then speaks HTTPS.")
    ] = None

    def access(self, **further: Any) -> Access:  # noqa: ANN401 -- arguments of ``Access.load``
        """The server's access rules. Raises SettingsError."""
        keys = self.api_key or ()
        return Access.load(keys=keys, key_file=self.api_key_file, certificate=self.ssl_certfile, **further)

    def settings(self, models_dir: Path | None = None) -> Settings:
        """The settings for commands that ask the server. Raises SettingsError."""
        return Settings.load(host=self.host, port=self.port, models_directory=models_dir, access=self.access())


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """The fields of a request that say how its answer is generated. None leaves a field out."""

    max_tokens: Annotated[int | None, typer.Option(min=1, help="The most tokens to generate.")] = None
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0 always takes the most probable token.")] = (
        None
    )
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Keep the most probable tokens up to this sum.")] = (
        None
    )
    top_k: Annotated[int | None, typer.Option(min=0, help="Keep this many tokens; 0 keeps all.")] = None
    min_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Drop tokens below this share of the most probable one.")
    ] = None
    repetition_penalty: Annotated[float | None, typer.Option(min=0.01, max=100, help="1 is no penalty.")] = None
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed gives the same tokens.")] = None
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; repeatable.")] = None

    def request_fields(self) -> dict[str, JsonValue]:
        """The fields that are on the command line."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in given.items() if value is not None}
