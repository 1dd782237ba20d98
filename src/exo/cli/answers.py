"""The commands that have a model answer: run and chat."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from exo.cli.common import (
    ApiKeyFile,
    ApiKeys,
    Host,
    Model,
    ModelsDir,
    Port,
    ServerCertificate,
    access_from,
    catalogue_from,
    err,
    fail,
    out,
    settings_from,
    told_failures,
)
from exo.exit_code import ExitCode

if TYPE_CHECKING:
    from pydantic import JsonValue

System = Annotated[str | None, typer.Option(help="What the model is told before all else.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Most tokens to answer with.")]
Temperature = Annotated[float | None, typer.Option(min=0, max=2, help="0 always takes the most probable token.")]
TopP = Annotated[float | None, typer.Option(min=0, max=1, help="Keep the most probable tokens up to this sum.")]
TopK = Annotated[int | None, typer.Option(min=0, help="Keep this many tokens; 0 keeps all.")]
MinP = Annotated[float | None, typer.Option(min=0, max=1, help="Drop tokens below this share of the largest.")]
RepetitionPenalty = Annotated[float | None, typer.Option(min=0.01, max=100, help="1 is none.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Same seed, same tokens.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be given again.")]


def run(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="What to say; what is piped in goes behind it.")] = None,
    file: Annotated[list[Path] | None, typer.Option(help="A text file to add; may be given again.")] = None,
    system: System = None,
    json_schema: Annotated[Path | None, typer.Option(help="A file with the JSON Schema the answer follows.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it stands, without chat template.")
    ] = False,
    host: Host = None,
    port: Port = None,
    models_dir: ModelsDir = None,
    api_key: ApiKeys = None,
    api_key_file: ApiKeyFile = None,
    ssl_certfile: ServerCertificate = None,
) -> None:
    """Answer one prompt, through the running server or, where there is none, a runner of its own."""
    from exo.cli.embedded_server import some_server
    from exo.cli.run import Screen, compose, read_pipe, run_prompt
    from exo.terminal import printable

    if raw and system is not None:
        fail("--system: not accepted together with --raw, which knows no conversation", ExitCode.USAGE)
    sampling = _given(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=list(stop) if stop else None,
    )
    settings = settings_from(host, port, models_dir, access_from(api_key, api_key_file, ssl_certfile=ssl_certfile))
    with told_failures():
        body: dict[str, object] = {"model": model, **sampling}
        if json_schema is not None:
            body["structured_outputs"] = {"json": _schema(json_schema)}
        whole = compose(prompt, file or (), read_pipe(), raw=raw)
    if raw:
        body["prompt"] = whole
    else:
        first = [{"role": "system", "content": system}] if system is not None else []
        body["messages"] = [*first, {"role": "user", "content": whole}]
    with told_failures(), err.status("starting") as status:

        def show(text: str) -> None:
            status.stop()
            out.file.write(printable(text) if out.is_terminal else text)
            out.file.flush()

        def note(text: str) -> None:
            status.update(printable(text))

        with some_server(settings, lambda: catalogue_from(settings)) as client:
            run_prompt(client, body, Screen(show, note))
        show("\n")


def chat(
    model: Model,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    host: Host = None,
    port: Port = None,
    models_dir: ModelsDir = None,
    api_key: ApiKeys = None,
    api_key_file: ApiKeyFile = None,
    ssl_certfile: ServerCertificate = None,
) -> None:
    """Talk with a model, through the running server or, where there is none, a runner of its own. /help inside."""
    from exo.cli.chat.command import Chat
    from exo.cli.chat.input import ChatInput
    from exo.cli.chat.settings import ChatSettings
    from exo.cli.embedded_server import some_server

    chosen = _given(
        system=system,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=list(stop) if stop else None,
    )
    settings = settings_from(host, port, models_dir, access_from(api_key, api_key_file, ssl_certfile=ssl_certfile))
    with told_failures(), some_server(settings, lambda: catalogue_from(settings)) as client:
        conversation = Chat(client, model, ChatSettings(chosen), ChatInput(settings.history_file), out, err)
        conversation.begin()
        conversation.run()


def _given(**options: "JsonValue") -> "dict[str, JsonValue]":
    """Those that are on the command line."""
    return {name: value for name, value in options.items() if value is not None}


def _schema(path: Path) -> object:
    """Raises CommandError."""
    from exo.cli.run import read_text
    from exo.exit_code import CommandError

    try:
        return json.loads(read_text("--json-schema", path))
    except ValueError as error:
        raise CommandError(f"--json-schema: {path} is not JSON: {error}", ExitCode.USAGE) from error
