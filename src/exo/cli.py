"""The command line. Nothing heavy is imported before the command that needs it runs, so that --help is instant."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from exo.config import Access, Limits, Settings
    from exo.models.catalogue import Catalogue

app = typer.Typer(
    name="exo",
    help="One OpenAI-compatible endpoint over several local inference engines.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console()
err = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="Model id or alias, perhaps with @runner, such as gemma-3-270m@cuda.")]
Host = Annotated[str | None, typer.Option(help="Address to listen on, or where the server is. Default 127.0.0.1.")]
Port = Annotated[str | None, typer.Option(help="Port of the server; 0 is any free one. Default 52415.")]
ModelsDir = Annotated[Path | None, typer.Option("--models-dir", help="Where models are kept.")]
ApiKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key", help="NAME:KEY or KEY; may be given again. Other users see it in the process list. EXO_API_KEY."
    ),
]
ApiKeyFile = Annotated[Path | None, typer.Option("--api-key-file", help="A file of keys, one a line.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Entry point of the ``exo`` command."""
    app()


def fail(message: str, code: int = 1) -> NoReturn:
    """Ends the command with an error on standard error. Exit code 2 is for what the user typed, 1 for the rest."""
    err.print(f"exo: {message}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def settings_from(
    host: str | None = None,
    port: str | None = None,
    models_dir: Path | None = None,
    access: "Access | None" = None,
    limits: "Limits | None" = None,
) -> "Settings":
    """Settings from flags and environment, or the error that names the one at fault."""
    from exo.config import Settings, SettingsError

    try:
        return Settings.load(host=host, port=port, models_directory=models_dir, access=access, limits=limits)
    except SettingsError as error:
        fail(str(error), code=2)


def access_from(
    api_key: list[str] | None,
    api_key_file: Path | None,
    allowed_host: list[str] | None = None,
    cors_origin: list[str] | None = None,
    insecure: bool = False,
    ssl_certfile: Path | None = None,
    ssl_keyfile: Path | None = None,
) -> "Access":
    """Who may use the server, from flags and environment, or the error that names the one at fault."""
    from exo.config import Access, SettingsError

    try:
        return Access.load(
            keys=api_key or (),
            key_file=api_key_file,
            allowed_hosts=allowed_host or (),
            cors_origins=cors_origin or (),
            insecure=insecure,
            certificate=ssl_certfile,
            certificate_key=ssl_keyfile,
        )
    except SettingsError as error:
        fail(str(error), code=2)


def limits_from(max_queue: str | None, drain_timeout: str | None, stall_timeout: str | None) -> "Limits":
    """How much the server takes on, from flags and environment, or the error that names the one at fault."""
    from exo.config import Limits, SettingsError

    try:
        return Limits.load(max_queue=max_queue, drain=drain_timeout, stall=stall_timeout)
    except SettingsError as error:
        fail(str(error), code=2)


def catalogue_from(settings: "Settings") -> "Catalogue":
    """The catalogue; what is wrong with single cards goes to standard error and stops nothing."""
    from exo.models.catalogue import Catalogue

    catalogue = Catalogue.load(settings.cards_directory)
    for problem in catalogue.problems:
        where = f"{problem.file}: {problem.key}" if problem.key else problem.file
        err.print(f"exo: model card {where}: {problem.reason}", markup=False, highlight=False, soft_wrap=True)
    return catalogue


@app.command()
def serve(
    host: Host = None,
    port: Port = None,
    models_dir: ModelsDir = None,
    load: Annotated[list[str] | None, typer.Option(help="Load this model at the start; may be given again.")] = None,
    api_key: ApiKeys = None,
    api_key_file: ApiKeyFile = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let other machines in without a key, where --host does.")
    ] = False,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="A further host name that clients may use; * is any.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="A web origin whose pages may use the server; * is any.")
    ] = None,
    ssl_certfile: Annotated[Path | None, typer.Option(help="Serve HTTPS with this certificate.")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="The certificate's private key.")] = None,
    max_queue: Annotated[
        str | None, typer.Option(help="Sequences of one model that may wait for a slot. Default 256.")
    ] = None,
    drain_timeout: Annotated[
        str | None, typer.Option(help="Seconds that running requests have when the server is stopped. Default 30.")
    ] = None,
    stall_timeout: Annotated[
        str | None, typer.Option(help="Seconds until a client that does not read is cut off. Default 60.")
    ] = None,
) -> None:
    """Serve models on one OpenAI-compatible endpoint until interrupted."""
    from exo.api.server import ListenError, serve_forever

    access = access_from(api_key, api_key_file, allowed_host, cors_origin, insecure, ssl_certfile, ssl_keyfile)
    limits = limits_from(max_queue, drain_timeout, stall_timeout)
    settings = settings_from(host, port, models_dir, access, limits)
    catalogue = catalogue_from(settings)

    def announce(url: str) -> None:
        out.print(f"exo is listening on {url} (API documentation: {url}/docs)", highlight=False, soft_wrap=True)

    try:
        serve_forever(settings, catalogue, load or (), announce)
    except ListenError as error:
        fail(str(error))


@app.command()
def run(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")],
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens to answer with.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2)] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it stands, without chat template.")
    ] = False,
    host: Host = None,
    port: Port = None,
    models_dir: ModelsDir = None,
    api_key: ApiKeys = None,
    api_key_file: ApiKeyFile = None,
    ssl_certfile: Annotated[Path | None, typer.Option(help="The server speaks HTTPS with this certificate.")] = None,
) -> None:
    """Answer one prompt, through the running server or, where there is none, a runner of its own."""
    from exo.run import RunError, Screen, run_prompt

    access = access_from(api_key, api_key_file, ssl_certfile=ssl_certfile)
    settings = settings_from(host, port, models_dir, access)
    body: dict[str, object] = {"model": model}
    body |= {"prompt": prompt} if raw else {"messages": [{"role": "user", "content": prompt}]}
    given = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    body |= {name: value for name, value in given.items() if value is not None}
    with err.status("starting") as status:

        def show(text: str) -> None:
            if text:
                status.stop()
                out.print(text, end="", markup=False, highlight=False, soft_wrap=True)

        try:
            run_prompt(settings, catalogue_from(settings), body, Screen(show, status.update))
        except RunError as error:
            status.stop()
            fail(str(error))
    out.print()


@app.command("list")
def list_models(models_dir: ModelsDir = None, as_json: AsJson = False) -> None:
    """List the models that have a card."""
    catalogue = catalogue_from(settings_from(models_dir=models_dir))
    rows = [
        {
            "model_id": card.model_id,
            "aliases": list(card.aliases),
            "family": card.family,
            "quantization": card.quantization,
            "size_bytes": card.storage_size.in_bytes,
            "runner": card.runner,
            "backends": list(card.backends),
        }
        for card in catalogue.cards.values()
    ]
    if as_json:
        out.print_json(json.dumps(rows))
        return
    table = Table("Model", "Also", "Size", "Quantization", "Runner", "Backends", box=None)
    for column in table.columns:
        column.overflow = "fold"
    for card in catalogue.cards.values():
        size = f"{card.storage_size.in_bytes / 1e9:.2f} GB"
        also = ", ".join(card.aliases)
        table.add_row(card.model_id, also, size, card.quantization, card.runner, ", ".join(card.backends))
    out.print(table)


@app.command()
def route(model: Model, models_dir: ModelsDir = None, as_json: AsJson = False) -> None:
    """Say which runner would serve a model here, and why, without running anything."""
    import anyio

    from exo.worker.host import probe_host
    from exo.worker.router import Refusal, model_not_found, parse_model
    from exo.worker.router import route as decide

    catalogue = catalogue_from(settings_from(models_dir=models_dir))
    wish = parse_model(model)
    card = catalogue.get(wish.name)
    if card is None:
        decision = model_not_found(wish.name, catalogue.suggest(wish.name))
    else:
        decision = decide(wish.runner, card, anyio.run(probe_host), (), {})
    if isinstance(decision, Refusal):
        if as_json:
            out.print_json(json.dumps({"code": decision.code, "message": decision.message, "param": decision.param}))
            raise typer.Exit(1)
        fail(decision.message)
    if as_json:
        out.print_json(json.dumps({"runner": decision.runner, "backend": decision.backend, "reason": decision.reason}))
        return
    out.print(f"{model} -> runner {decision.runner}, backend {decision.backend}", highlight=False)
    out.print(decision.reason, markup=False, highlight=False, soft_wrap=True)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine has, which engines work on it, and the command that mends what does not."""
    import anyio

    from exo.doctor import as_json as to_json
    from exo.doctor import as_text, healthy
    from exo.worker.host import probe_host

    host = anyio.run(probe_host)
    if as_json:
        out.print_json(json.dumps(to_json(host)))
    else:
        for line in as_text(host):
            out.print(line, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(0 if healthy(host) else 1)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A GGUF file, or a folder with safetensors.")],
    target: Annotated[Path, typer.Argument(help="The folder, or the .gguf file, to write.")],
    dtype: Annotated[str, typer.Option(help="f32, f16 or bf16; for a GGUF also q8_0.")] = "bf16",
    quant: Annotated[int | None, typer.Option(help="Bits of MLX's own quantisation, 4 or 8.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a target that exists.")] = False,
) -> None:
    """Convert a model between llama.cpp's GGUF and the safetensors that MLX loads."""
    from typing import cast

    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as ProgressBar

    from exo.models.convert import Bits, ConvertError, Dtype, Format, Progress
    from exo.models.convert import convert as carry_over

    to: Format = "gguf" if target.suffix == ".gguf" else "mlx"
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with ProgressBar(*columns, console=err) as bar:
        task = bar.add_task("reading", total=None)

        def show(progress: Progress) -> None:
            bar.update(task, description=progress.tensor, completed=progress.done_bytes, total=progress.total_bytes)

        try:
            # What is not one of these values is refused by name.
            report = carry_over(
                source,
                target,
                to=to,
                dtype=cast(Dtype, dtype),
                bits=cast(Bits | None, quant),
                overwrite=overwrite,
                on_progress=show,
            )
        except (ConvertError, OSError) as error:
            bar.stop()
            fail(str(error))
    size = f"{report.bytes_written / 1e9:.2f} GB"
    out.print(f"{report.target}: {report.architecture}, {report.tensors} tensors, {size}", highlight=False)
    if report.left_out:
        err.print(f"left out, changing no result: {', '.join(report.left_out)}", highlight=False, soft_wrap=True)


@app.command()
def compare(
    model: Annotated[str, typer.Argument(help="Model id or alias.")],
    engines: Annotated[
        str | None, typer.Option(help="Runners, such as cuda,mlx; by default all of the card's.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts, one a line.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first prompt's sampled text.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw divergence over position into this file.")] = None,
    models_dir: ModelsDir = None,
    as_json: AsJson = False,
) -> None:
    """Show on real numbers how far two engines agree on one model."""
    from exo.compare.comparison import CompareError
    from exo.compare.plot import check_plot, draw
    from exo.compare.prompts import PROMPTS, read_prompts
    from exo.compare.run import Options
    from exo.compare.run import compare as run_comparison
    from exo.compare.table import show

    settings = settings_from(models_dir=models_dir)
    try:
        if plot is not None:
            check_plot(plot)
        options = Options(read_prompts(prompts) if prompts else PROMPTS, tokens, seed)
        with err.status("comparing") as status:
            names = engines.split(",") if engines else None
            comparison = run_comparison(settings, catalogue_from(settings), model, names, options, status.update)
        if plot is not None:
            draw(comparison, plot)
    except CompareError as error:
        fail(str(error))
    if as_json:
        out.print_json(comparison.model_dump_json())
    else:
        show(comparison, out)
