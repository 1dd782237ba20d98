"""``exo ps``: the models that the running server has loaded, their load, and why runners failed."""

import math
import time
from collections.abc import Iterator
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from exo.api.admin.runners import Instance, InstanceList
from exo.cli.console import out
from exo.cli.options import AsJson, ServerOptions
from exo.cli.server.http_client import ask, foreign, server_client
from exo.terminal import printable
from exo.worker.protocol.events import RAM
from exo.worker.supervisor.memory.memory import HOST
from exo.worker.supervisor.placement_plan import layers_in_words

TOLD_DELAY, TOLD_SLOWDOWN = 0.1, 1.3
"""The cost of other programs is shown from these values on."""
_COLUMNS = ("Model", "Runner", "Backend", "Devices", "State", "Slots", "Context", "Size", "PID", "Up", "Deaths")


def ps(
    *,
    server: ServerOptions,
    as_json: AsJson = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Also show context, layers and memory of each model.")
    ] = False,
) -> None:
    """Show the models that the running server has loaded, how busy they are, and why runners failed."""
    with server_client(server.settings()) as client:
        reply = ask(client, "/v1/instances")
        try:
            instances = InstanceList.model_validate_json(reply)
        except ValidationError as error:
            raise foreign(client) from error
    if as_json:
        out.print_json(instances.model_dump_json())
    else:
        show(instances, out, verbose=verbose)


def show(instances: InstanceList, console: Console, *, verbose: bool = False) -> None:
    """Prints a table, then each model's use of the CPU and each runner's last failure. Notices come first.

    With ``verbose``, it also prints how each model is loaded.
    """
    for notice in instances.notices:
        console.print(printable(notice), markup=False, highlight=False, soft_wrap=True)
    if not instances.data:
        console.print("no model is loaded; the first request for a model loads it")
        return
    table = Table(*_COLUMNS, box=None)
    table.columns[0].overflow = "fold"
    now = time.time()
    for each in instances.data:
        slots = f"{each.active}/{each.slots} busy" + (f", {each.waiting} wait" if each.waiting else "")
        table.add_row(
            each.model,
            each.place,
            each.backend,
            _devices(each),
            _state(each),
            slots if each.slots else "-",
            f"{each.context_length:,}" if each.context_length else "-",
            f"{each.model_bytes / 1e9:.2f} GB" if each.model_bytes else "-",
            str(each.pid or "-"),
            _span(now - each.started) if each.pid else "-",
            str(each.deaths),
        )
    console.print(table, markup=False, highlight=False)
    placed = _placed(instances) if verbose else ()
    for line in (*_notes(instances), *placed, *_cpu_use(instances), *_prefixes(instances), *_failures(instances, now)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _devices(instance: Instance) -> str:
    """Each device with the memory that the runner has there, or its reservation until that is measured."""
    sizes = {each.device: each.reserved if each.measured is None else each.measured for each in instance.device_memory}
    names = dict.fromkeys((*instance.devices, *sizes))
    return ", ".join(f"{name} {sizes[name] / 1e9:.2f} GB" if name in sizes else name for name in names) or "-"


def _state(instance: Instance) -> str:
    loading = instance.state == "Loading" and instance.total_layers
    state = f"Loading {instance.layers_loaded}/{instance.total_layers}" if loading else instance.state
    return f"{state}, old settings" if instance.outdated else state


def _notes(instances: InstanceList) -> Iterator[str]:
    for each in instances.data:
        for note in each.notes:
            yield ""
            yield f"{each.model}@{each.place}: {printable(note)}"


def _placed(instances: InstanceList) -> Iterator[str]:
    """Where each model's layers are, what limits its context, and its memory in each place."""
    for each in instances.data:
        yield ""
        if each.layers:
            layers = layers_in_words(each.layers, each.experts_in_ram)
            yield f"{each.model}@{each.place}: layers {printable(layers)}"
        if (plan := each.plan) is None or plan.problem is not None:
            continue
        if plan.context_length:
            trained = f" of {plan.trained_length:,}" if plan.context_length < plan.trained_length else ""
            limit = f": {plan.limit}" if plan.limit else ""
            yield f"{each.model}@{each.place}: context {plan.context_length:,}{trained} tokens{printable(limit)}"
        sizes = (f"{size / 1e9:.2f} GB of {name.replace(HOST, RAM)}" for name, size in plan.memory.items())
        yield f"{each.model}@{each.place}: {printable(', '.join(sizes))} reserved by its plan"


def _cpu_use(instances: InstanceList) -> Iterator[str]:
    """The number of threads, the reason for it, and the cost of other programs."""
    for each in instances.data:
        if (cpu := each.cpu) is None:
            continue
        yield ""
        yield f"{each.model}@{each.place} computes with {cpu.threads} thread{'s'[: cpu.threads > 1]}, {cpu.reason}"
        if cpu.delay >= TOLD_DELAY and each.active:
            yield f"its threads wait {cpu.delay:.0%} of the time for a core"
        if cpu.slowdown >= TOLD_SLOWDOWN and each.active:
            yield f"CPU is shared: steps take {cpu.slowdown:.1f} times as long as when quiet"


def _prefixes(instances: InstanceList) -> Iterator[str]:
    """Where prompts have found prefixes, and the memory and disk that these take."""
    for each in instances.data:
        if (use := each.prefixes) is None or not use.prompts:
            continue
        found = f"{use.from_slots} in a slot, {use.from_ram} in RAM, {use.from_disk} on disk"
        kept = f"RAM has {use.ram_bytes / 1e9:.2f} GB, the disk {use.disk_bytes / 1e9:.2f} GB"
        yield ""
        yield f"{each.model}@{each.place}: of {use.prompts} prompts, prefixes were found: {found}"
        yield f"{use.tokens:,} tokens were not computed again; {kept}"
        if use.diverged_at is not None:
            place = f"differs at token {use.diverged_at + 1:,} and is the same later"
            yield f"the last prompt that {place} was computed again from there"


def _failures(instances: InstanceList, now: float) -> Iterator[str]:
    """One failure per model and place, for however many processes."""
    kinds = {(each.model, each.place): each for each in instances.data}
    for (model, runner), each in kinds.items():
        if (failed := each.last_failure) is not None:
            yield ""
            yield f"{model}@{runner} failed {_span(now - failed.at)} ago: {printable(failed.message)}"
            if each.retry_seconds:
                yield f"it may be started again in {_span(math.ceil(each.retry_seconds))}"


def _span(seconds: float) -> str:
    seconds = max(0, int(seconds))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
