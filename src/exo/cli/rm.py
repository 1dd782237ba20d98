"""``exo rm``: the files that were pulled for a model, unless a server has it loaded."""

import json
from dataclasses import dataclass

from exo.cards.card import ModelCard
from exo.cli.http_client import ask, is_up, server_client
from exo.cli.list import Kept, kept, runners_of, store_of
from exo.config import Settings
from exo.exit_code import CommandError, ExitCode
from exo.store.errors import PullError
from exo.store.store import Store


@dataclass(frozen=True, slots=True)
class Removal:
    """What is to be deleted, before it is."""

    store: Store
    wanted: tuple[Kept, ...]
    notes: tuple[str, ...]
    """What could not be found out."""

    def lines(self) -> list[str]:
        """One for each runner."""
        return [f"{each.source.runner}: {each.found.path}, {each.found.bytes:,} bytes" for each in self.wanted]

    def carry_out(self) -> tuple[int, int]:
        """Deletes. Returns how many files and bytes. Raises CommandError, before which some may be deleted."""
        try:
            removed = [self.store.remove(each.source) for each in self.wanted]
        except PullError as error:
            raise CommandError(
                str(error), ExitCode.NOT_FOUND if error.code == "not_found" else ExitCode.FAILED
            ) from error
        return sum(len(each.files) for each in removed), sum(each.bytes for each in removed)


def begin_removal(settings: Settings, card: ModelCard, runner: str | None, quant: str | None) -> Removal:
    """Raises CommandError where there is nothing, or it is in use."""
    store, runners = store_of(settings), [runner] if runner else runners_of(card)
    # A card's path is the user's own file. What else was not pulled by exo, the store leaves alone.
    found = [each for each in kept(store, card, runners, quant) if each.source.repo is not None]
    there = [each for each in found if each.found.state != "absent"]
    # What was put there by hand has no revision, and stays; alone, it gets the store's word for that.
    wanted = tuple([each for each in there if each.found.revision is not None] or there)
    if not wanted:
        raise CommandError(f"nothing was pulled of {card.model_id} for {', '.join(runners)}", ExitCode.NOT_FOUND)
    return Removal(store, wanted, _check_use(settings, card, {each.source.runner for each in wanted}))


def _check_use(settings: Settings, card: ModelCard, runners: set[str]) -> tuple[str, ...]:
    """Raises CommandError where the server has the model loaded; a server elsewhere is nobody's business here."""
    with server_client(settings) as client:
        if not is_up(client):
            return ()
        try:
            instances = json.loads(ask(client, "/v1/instances"))["data"]
        except CommandError as error:
            return (f"whether the server at {settings.url()} has it loaded is not known: {error}",)
    for each in instances:
        if each["model"] == card.model_id and each["runner"] in runners and each["pid"] is not None:
            raise CommandError(
                f"the server at {settings.url()} has {card.model_id} loaded by {each['runner']};"
                f" `exo stop {card.model_id}` unloads it"
            )
    return ()
