"""Reports the records of all steps as tables and as a JSON file."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.gpu_check.options import Options
from bench.gpu_check.record import Record
from bench.gpu_check.speed import BATCHED_BENCH, EXO, LLAMA_SERVER, Workload, name_of, workloads
from bench.peer_report import Ceiling
from bench.servers import commit
from exo.bench.report import Report, Stage
from exo.compare.comparison import HostFacts
from exo.worker.host import Host
from exo.worker.supervisor.host_probe import probe_host

SCHEMA_VERSION = 3
_WIDTH = 200
_COLUMNS = ("load", "streams", EXO, LLAMA_SERVER, "exo / llama-server", BATCHED_BENCH)


def file_of(options: Options) -> Path:
    return options.out / "gpu-check.json"


def machine() -> dict[str, Any]:
    """The commit that is checked, and this machine with its GPUs and driver."""
    host = anyio.run(_host)
    return {"commit": commit(), "host": HostFacts.of(host).model_dump(mode="json"), "driver": host.driver}


async def _host() -> Host:
    return await probe_host({})


def write(options: Options, machine: Mapping[str, Any], records: Mapping[str, Record]) -> None:
    """Writes the JSON file: date, commit, machine, and each step with its facts or failure."""
    found: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **machine,
        "backend": options.backend,
        "small": options.small,
        "steps": [asdict(record) for record in records.values()],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    unfinished = file_of(options).with_suffix(".part")
    unfinished.write_text(json.dumps(found, indent=1) + "\n")
    unfinished.rename(file_of(options))


def show(options: Options, records: Mapping[str, Record], console: Console) -> None:
    """Prints a line for each step, and one for each load and number of streams."""
    table = Table("check", "", "seconds", "", box=None)
    for record in records.values():
        seconds = f"{record.seconds:.0f}" if record.seconds else ""
        table.add_row(Text(record.step), Text(record.state), seconds, Text(_short(record.message) or _found(record)))
    console.print(table)
    rates = Table(*_COLUMNS, box=None, title="output tokens/s (time to first token, ms, median)", title_justify="left")
    for row in rows(options, records):
        rates.add_row(*map(Text, row))
    if rates.row_count:
        console.print(rates)


def _short(message: str) -> str:
    """The first line of a message, and the last one, which is the end of a log and mostly states the cause."""
    first, *quoted = message.strip().splitlines() or [""]
    return "\n".join(line[-_WIDTH:] for line in (first, *quoted[-1:]))


def rows(options: Options, records: Mapping[str, Record]) -> Iterator[Sequence[str]]:
    """The rows of the second table: each measured load with each number of streams."""
    for load in workloads(options):
        ours, theirs = (_stages(records.get(name_of(load, each))) for each in (EXO, LLAMA_SERVER))
        ceilings = _ceilings(load, records)
        for streams in load.streams:
            found = ours.get(streams), theirs.get(streams)
            ceiling = ceilings.get(streams)
            if any(found) or ceiling is not None:
                limit = f"{streams * ceiling.output_tokens / ceiling.seconds:.1f}" if ceiling is not None else "-"
                yield load.name, str(streams), *map(_cell, found), _ratio(*found), limit


def _stages(record: Record | None) -> dict[int | None, Stage]:
    if record is None or "report" not in record.facts:
        return {}
    report = Report.model_validate(record.facts["report"])
    return {stage.load.concurrency: stage for stage in report.stages if stage.requests.whole}


def _ceilings(load: Workload, records: Mapping[str, Record]) -> dict[int, Ceiling]:
    record = records.get(name_of(load, BATCHED_BENCH))
    batches: list[Any] = record.facts.get("batches", []) if record is not None else []
    return {batch.streams: batch for batch in map(Ceiling.model_validate, batches)}


def _cell(stage: Stage | None) -> str:
    if stage is None:
        return "-"
    return f"{stage.output_tokens_per_second:.1f}" + (f" ({stage.ttft.p50:.0f})" if stage.ttft else "")


def _ratio(ours: Stage | None, theirs: Stage | None) -> str:
    rate = theirs.output_tokens_per_second if theirs is not None else 0.0
    return f"{ours.output_tokens_per_second / rate:.2f}" if ours is not None and rate else "-"


def _found(record: Record) -> str:
    facts = record.facts
    match record.stage:
        case "self-test":
            return ", ".join(f"{each['device']}: {each['difference']:.1e} nats" for each in facts["proofs"])
        case "contract":
            return ", ".join(f"{count} {ending}" for ending, count in facts["tests"].items() if ending != "deselected")
        case "parity" | "devices" if "max_abs" in facts:
            return f"largest difference {facts['max_abs']:.1e} nats, KL {facts['kl_mean']:.1e}, {facts['greedy']}"
        case "offload":
            taken = (f"{name}: {facts[name]['taken_bytes'] / 1e9:.2f} GB" for name in ("all", "half", "none"))
            return f"{'+'.join(facts['all']['devices'])}; layers on the GPU, {', '.join(taken)}"
        case "devices":
            estimated = sum(facts["estimated_bytes"].values())
            return f"{facts['taken_bytes'] / 1e9:.2f} GB taken, {estimated / 1e9:.2f} GB reserved"
        case _:
            return ""
