"""``exo top``: models, memory and requests of the running server, live in a terminal."""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress

import httpx
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from exo.api.admin.activity import ActivityList, RequestActivity
from exo.api.admin.runners import Instance, InstanceList
from exo.cli.console import out
from exo.cli.options import ServerOptions
from exo.cli.server.http_client import ask, foreign, server_client
from exo.terminal import printable

_REFRESH_SECONDS = 1.0
_MOST_REQUESTS = 200
_LEAST_ROWS = 5
_ENDED_STYLES = {"finished": "dim", "failed": "red", "cancelled": "yellow"}
Devices = Mapping[str, Mapping[str, float]]
"""Bytes of each device, by kind."""


def top(*, server: ServerOptions) -> None:
    """Show models, memory and requests of the running server until interrupted; once if output is no terminal."""
    with server_client(server.settings()) as client:
        if not out.is_terminal:
            out.print(_view(client, _MOST_REQUESTS))
            return
        with suppress(KeyboardInterrupt), Live(_view(client, _room()), console=out, auto_refresh=False) as live:
            while True:
                time.sleep(_REFRESH_SECONDS)
                live.update(_view(client, _room()), refresh=True)


def _room() -> int:
    """The requests that fit on the terminal beside the rest."""
    return max(_LEAST_ROWS, out.height - 12)


def _view(client: httpx.Client, requests: int) -> Group:
    """Raises CommandError."""
    try:
        instances = InstanceList.model_validate_json(ask(client, "/v1/instances"))
        params = {"limit": str(min(requests, _MOST_REQUESTS))}
        activity = ActivityList.model_validate_json(ask(client, "/v1/activity", params=params))
        devices = _memory(ask(client, "/metrics").decode())
    except (ValidationError, ValueError) as error:
        raise foreign(client) from error
    return Group(_models(instances.data), Text(), _devices(devices), Text(), _requests(activity.requests), fit=True)


def _memory(metrics: str) -> Devices:
    found: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples if family.name == "exo:memory_bytes" else ():
            found[sample.labels["device"]][sample.labels["kind"]] = sample.value
    return found


def _models(instances: Iterable[Instance]) -> Table:
    table = _table("Model", "Runner", "State", "Slots", "Waiting", "Context", "Tokens/s", "Deaths")
    for each in instances:
        table.add_row(
            _plain(each.model),
            each.place,
            each.state,
            f"{each.active}/{each.slots}" if each.slots else "-",
            str(each.waiting),
            f"{each.context_length:,}" if each.context_length else "-",
            f"{each.tokens_per_second:.1f}",
            str(each.deaths),
        )
    return table


def _devices(devices: Devices) -> Table:
    table = _table("Memory", "Reserved", "Used", "Free")
    for name, kinds in devices.items():
        table.add_row(_plain(name), *(_gigabytes(kinds.get(kind)) for kind in ("reserved", "used", "free")))
    return table


def _gigabytes(size: float | None) -> str:
    return "-" if size is None else f"{size / 1e9:.2f} GB"


def _requests(requests: Iterable[RequestActivity]) -> Table:
    table = _table("Request", "Client", "Model", "Phase", "In", "Cached", "Out", "Tokens/s", "First", "Seconds", "End")
    for each in requests:
        reading = each.phase in ("queued", "prefill") and each.prompt_tokens
        table.add_row(
            _plain(each.id),
            _plain(each.client),
            _plain(f"{each.model}@{each.runner}" if each.runner else each.model or "-"),
            each.phase,
            f"{each.prefill_done}/{each.prompt_tokens}" if reading else str(each.prompt_tokens),
            str(each.cached_tokens),
            str(each.completion_tokens),
            "-" if each.tokens_per_second is None else f"{each.tokens_per_second:.1f}",
            "-" if each.first_token_s is None else f"{each.first_token_s:.2f} s",
            f"{each.seconds:.1f}",
            " ".join(
                filter(None, (each.error or each.finish_reason, f"{each.replays} replays" if each.replays else ""))
            ),
            style=_ENDED_STYLES.get(each.phase),
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns:
        column.no_wrap = True
    return table


def _plain(text: str) -> Text:
    return Text(printable(text))
