"""``exo ps``: what the running server has loaded, how busy it is, and what died of what."""

import math
import time
from collections.abc import Iterator

import httpx
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from exo.api.admin.runners import Instance, InstanceList
from exo.cli.http_client import ask, foreign

TOLD_DELAY, TOLD_SLOWDOWN = 0.1, 1.3
"""From which on the cost of other programs is worth a line."""


def ask_server(client: httpx.Client) -> InstanceList:
    """The server's instances. Raises CommandError."""
    reply = ask(client, "/v1/instances")
    try:
        return InstanceList.model_validate_json(reply)
    except ValidationError as error:
        raise foreign(client) from error


def show(instances: InstanceList, out: Console) -> None:
    """A table, and below it how each model computes on the CPU and why each runner failed that has."""
    if not instances.data:
        out.print("no model is loaded; one is when it is asked for")
        return
    table = Table("Model", "Runner", "Backend", "Devices", "State", "Slots", "Size", "PID", "Up", "Deaths", box=None)
    table.columns[0].overflow = "fold"
    now = time.time()
    for each in instances.data:
        slots = f"{each.active}/{each.slots} busy" + (f", {each.waiting} wait" if each.waiting else "")
        table.add_row(
            each.model,
            each.runner,
            each.backend,
            _devices(each),
            _state(each),
            slots if each.slots else "-",
            f"{each.model_bytes / 1e9:.2f} GB" if each.model_bytes else "-",
            str(each.pid or "-"),
            _span(now - each.started) if each.pid else "-",
            str(each.deaths),
        )
    out.print(table, markup=False, highlight=False)
    for line in (*_cpu_use(instances), *_failures(instances, now)):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def _devices(instance: Instance) -> str:
    """With what it has there, or what is kept for it until that is known."""
    sizes = {each.device: each.reserved if each.measured is None else each.measured for each in instance.device_memory}
    names = dict.fromkeys((*instance.devices, *sizes))
    return ", ".join(f"{name} {sizes[name] / 1e9:.2f} GB" if name in sizes else name for name in names) or "-"


def _state(instance: Instance) -> str:
    loading = instance.state == "Loading" and instance.total_layers
    state = f"Loading {instance.layers_loaded}/{instance.total_layers}" if loading else instance.state
    return f"{state}, old settings" if instance.outdated else state


def _cpu_use(instances: InstanceList) -> Iterator[str]:
    """Threads and why, and what other programs cost the model."""
    for each in instances.data:
        if (cpu := each.cpu) is None:
            continue
        yield ""
        yield f"{each.model}@{each.runner} computes with {cpu.threads} thread{'s'[: cpu.threads > 1]}, {cpu.reason}"
        if cpu.delay >= TOLD_DELAY and each.active:
            yield f"its threads wait {cpu.delay:.0%} of the time for a core"
        if cpu.slowdown >= TOLD_SLOWDOWN and each.active:
            yield f"CPU is shared: steps take {cpu.slowdown:.1f} times as long as when quiet"


def _failures(instances: InstanceList, now: float) -> Iterator[str]:
    """Once for each model and runner, however many processes they have now."""
    kinds = {(each.model, each.runner): each for each in instances.data}
    for (model, runner), each in kinds.items():
        if (failed := each.last_failure) is not None:
            yield ""
            yield f"{model}@{runner} failed {_span(now - failed.at)} ago: {_printable(failed.message)}"
            if each.retry_seconds:
                yield f"it may be started again in {_span(math.ceil(each.retry_seconds))}"


def _span(seconds: float) -> str:
    seconds = max(0, int(seconds))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def _printable(text: str) -> str:
    """A runner's last words may hold anything; nothing but text and line ends reaches the terminal."""
    return "".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text)
