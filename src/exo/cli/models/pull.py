"""``exo pull``: downloads a model's files for one runner, with a progress bar."""

from collections.abc import Mapping

import anyio
from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn

from exo.cards.card import ModelCard
from exo.cli.console import err, say, warn
from exo.cli.models.local_models import card_of, catalogue_of, check_runner, store_of
from exo.cli.models.named_model import card_of_reference
from exo.cli.options import Model, ModelsDir, Quant, Runner
from exo.config import Settings
from exo.exit_code import CommandError, ExitCode
from exo.store.discover.hub_reference import HubReference
from exo.store.errors import PullError, PullErrorCode
from exo.store.file_selection import Source, matches
from exo.store.hub import Hub
from exo.store.progress import DownloadProgress
from exo.store.pull import PullPlan, plan
from exo.store.pull import pull as download
from exo.store.store import OnDisk, Store
from exo.worker.router import Refusal, parse_model, route
from exo.worker.supervisor.host_probe import probe_host

_EXIT_CODES: Mapping[PullErrorCode, ExitCode] = {
    "no_match": ExitCode.NOT_FOUND,
    "not_found": ExitCode.NOT_FOUND,
    "offline": ExitCode.UNREACHABLE,
    "unreachable": ExitCode.UNREACHABLE,
}


def pull(model: Model, runner: Runner = None, quant: Quant = None, models_dir: ModelsDir = None) -> None:
    """Download a model's files and verify them. An interrupted download continues where it stopped."""
    wish = parse_model(model)
    check_runner(runner)
    if None not in (runner, wish.runner) and runner != wish.runner:
        raise CommandError(f"--runner: {model} asks for runner {wish.runner} (got {runner!r})", ExitCode.USAGE)
    settings = Settings.load(models_directory=models_dir)
    catalogue, reference = catalogue_of(settings), HubReference.with_prefix(wish.name)
    card = card_of(catalogue, wish.name) if reference is None else card_of_reference(settings, catalogue, reference)
    planned, found = pull_model(settings, card, runner or wish.runner, quant)
    label = f"{planned.quant}, " if planned.quant else ""
    where = f"{found.path} ({label}{planned.total / 1e9:.2f} GB, revision {planned.revision[:12]})"
    say(f"{card.model_id} for {planned.source.runner}: {where}")
    if not _is_loaded_by(card, planned):
        warn(f"the card names another file; file = {planned.files[0].name!r} in its table [cuda] has this one loaded")


def pull_model(settings: Settings, card: ModelCard, runner: str | None, quant: str | None) -> tuple[PullPlan, OnDisk]:
    """Without ``runner``, downloads for the one that would serve the model here. Raises CommandError."""
    chosen = _runner(card, runner)
    hub, store = Hub(settings.hub), store_of(settings)
    try:
        source, *beside = Source.whole(card, chosen, quant)
        source.required_repo()
    except PullError as error:
        raise pull_failure(error) from error
    try:
        pulled = anyio.run(_pull, source, store, hub)
        for each in beside:
            if each.repo is not None:
                anyio.run(_pull, each, store, hub)
        return pulled
    except PullError as error:
        raise pull_failure(error) from error
    except KeyboardInterrupt:
        left = store.on_disk(source)
        share = f"; {left.bytes:,} of {left.total:,} bytes are here" if left.total else ""
        again = f"exo pull {card.model_id} --runner {chosen}" + (f" --quant {quant}" if quant else "")
        raise CommandError(f"interrupted{share}, and `{again}` goes on from there", ExitCode.INTERRUPTED) from None


def _is_loaded_by(card: ModelCard, planned: PullPlan) -> bool:
    """Whether the card's runner loads the downloaded files, which may have another quantisation."""
    if planned.source.quant is None:
        return True
    loads = Source.of(card, planned.source.runner)
    return bool(loads.file) and any(matches(loads.file, file.name) for file in planned.files)


def pull_failure(error: PullError) -> CommandError:
    """The command's error for a failed download."""
    return CommandError(str(error), _EXIT_CODES.get(error.code, ExitCode.FAILED))


async def _pull(source: Source, store: Store, hub: Hub) -> tuple[PullPlan, OnDisk]:
    with _bar() as bar:
        task = bar.add_task(f"asking the hub about {source.repo}", total=None, rate="")
        planned = await plan(source, hub)
        err.print(
            f"pulling {len(planned.files)} files, {planned.total:,} bytes, of {source.repo}"
            f" at {planned.revision[:12]} for runner {source.runner}"
            f"{', the projector for pictures among them' if source.mmproj else ''}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

        def show(progress: DownloadProgress) -> None:
            bar.update(
                task, description=_step(progress), completed=progress.done, total=progress.total, rate=_rate(progress)
            )

        return planned, await download(planned, store, hub, show)


def _bar() -> Progress:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
    )
    return Progress(*columns, console=err, disable=not err.is_terminal, transient=True)


def _step(progress: DownloadProgress) -> str:
    return " ".join(filter(None, (progress.step, progress.file.rpartition("/")[2], progress.note)))


def _rate(progress: DownloadProgress) -> str:
    if progress.step != "downloading" or not progress.rate:
        return ""
    left = int(progress.seconds_left or 0)
    hours, minutes = left // 3600, left // 60 % 60
    return f"{progress.rate / 1e6:.1f} MB/s, {f'{hours}:{minutes:02}' if hours else minutes}:{left % 60:02} left"


def _runner(card: ModelCard, wish: str | None) -> str:
    """The runner to download for. The host is probed only if the card leaves a choice."""
    if wish is not None:
        return wish
    if len(served := card.runners) == 1:
        return served[0]
    decision = route(None, card, anyio.run(probe_host), (), card.needs)
    if isinstance(decision, Refusal):
        raise CommandError(f"{decision.message}; --runner chooses one all the same")
    return decision.runner
