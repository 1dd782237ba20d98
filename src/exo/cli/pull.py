"""``exo pull``: a model's files for one runner, with a bar that shows how far it is."""

from collections.abc import Mapping

import anyio
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as ProgressBar

from exo.cards.card import ModelCard
from exo.config import Settings
from exo.exit_code import CommandError, ExitCode
from exo.store.errors import PullError, PullErrorCode
from exo.store.file_selection import Source, matches
from exo.store.hub import Hub
from exo.store.progress import DownloadProgress
from exo.store.pull import PullPlan, plan, pull
from exo.store.store import OnDisk, Store
from exo.worker.protocol.runners import RUNNERS
from exo.worker.router import Refusal, route
from exo.worker.supervisor.host_probe import probe_host

_EXIT_CODES: Mapping[PullErrorCode, ExitCode] = {
    "no_match": ExitCode.NOT_FOUND,
    "not_found": ExitCode.NOT_FOUND,
    "offline": ExitCode.UNREACHABLE,
    "unreachable": ExitCode.UNREACHABLE,
}


def pull_model(
    settings: Settings, card: ModelCard, runner: str | None, quant: str | None, console: Console
) -> tuple[PullPlan, OnDisk]:
    """Pulls, and shows how far it is on ``console``. Without ``runner``, for the one that would serve the model here.

    Raises CommandError.
    """
    chosen = _runner(card, runner)
    hub, store = Hub(settings.hub), Store(settings.models_directories, settings.read_only_directories)
    try:
        source, draft = Source.of(card, chosen, quant), Source.of_draft(card, chosen)
        source.required_repo()
    except PullError as error:
        raise pull_failure(error) from error
    try:
        pulled = anyio.run(_pull, source, store, hub, console)
        if draft is not None and draft.repo is not None:
            anyio.run(_pull, draft, store, hub, console)
        return pulled
    except PullError as error:
        raise pull_failure(error) from error
    except KeyboardInterrupt:
        left = store.on_disk(source)
        share = f"; {left.bytes:,} of {left.total:,} bytes are here" if left.total else ""
        again = f"exo pull {card.model_id} --runner {chosen}" + (f" --quant {quant}" if quant else "")
        raise CommandError(f"interrupted{share}, and `{again}` goes on from there", ExitCode.INTERRUPTED) from None


def is_what_the_card_loads(card: ModelCard, planned: PullPlan) -> bool:
    """Whether a runner will find what was pulled, which may be of another quantisation."""
    if planned.source.quant is None:
        return True
    loads = Source.of(card, planned.source.runner)
    return bool(loads.file) and any(matches(loads.file, file.name) for file in planned.files)


def pull_failure(error: PullError) -> CommandError:
    """A pull's failure as a command's."""
    return CommandError(str(error), _EXIT_CODES.get(error.code, ExitCode.FAILED))


async def _pull(source: Source, store: Store, hub: Hub, console: Console) -> tuple[PullPlan, OnDisk]:
    with _bar(console) as bar:
        task = bar.add_task(f"asking the hub about {source.repo}", total=None, rate="")
        planned = await plan(source, hub)
        console.print(
            f"pulling {len(planned.files)} files, {planned.total:,} bytes, of {source.repo}"
            f" at {planned.revision[:12]} for runner {source.runner}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

        def show(progress: DownloadProgress) -> None:
            bar.update(
                task, description=_what(progress), completed=progress.done, total=progress.total, rate=_rate(progress)
            )

        return planned, await pull(planned, store, hub, show)


def _bar(console: Console) -> ProgressBar:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
    )
    return ProgressBar(*columns, console=console, disable=not console.is_terminal, transient=True)


def _what(progress: DownloadProgress) -> str:
    return " ".join(filter(None, (progress.step, progress.file.rpartition("/")[2], progress.note)))


def _rate(progress: DownloadProgress) -> str:
    if progress.step != "downloading" or not progress.rate:
        return ""
    left = int(progress.seconds_left or 0)
    hours, minutes = left // 3600, left // 60 % 60
    return f"{progress.rate / 1e6:.1f} MB/s, {f'{hours}:{minutes:02}' if hours else minutes}:{left % 60:02} left"


def _runner(card: ModelCard, wish: str | None) -> str:
    """The runner to pull for. The host is asked only where the card leaves a choice."""
    if wish is not None:
        return wish
    served = [name for name, spec in RUNNERS.items() if set(spec.backends) & set(card.backends)]
    if card.runner != "auto":
        return card.runner
    if len(served) == 1:
        return served[0]
    decision = route(None, card, anyio.run(probe_host), (), card.needs)
    if isinstance(decision, Refusal):
        raise CommandError(f"{decision.message}; --runner says for which to pull all the same")
    return decision.runner
