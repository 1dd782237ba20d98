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

from bench.gpu_check.models import Model, models
from bench.gpu_check.options import Options
from bench.gpu_check.record import Record
from bench.gpu_check.speed import SERVERS, SETTINGS, concurrency, name_of
from bench.peer_report import Ceiling
from bench.servers import commit
from exo.bench.report import Report, Stage
from exo.compare.comparison import HostFacts
from exo.worker.supervisor.host_probe import probe_host

SCHEMA_VERSION = 2
FILE = "gpu-check.json"


def write(options: Options, records: Mapping[str, Record]) -> Path:
    """Writes the JSON file and returns its path: date, commit, machine, and each step with its facts or failure."""
    tools = records.get("tools")
    found: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "host": anyio.run(_host).model_dump(mode="json"),
        "backend": options.backend,
        "small": options.small,
        "gpu": tools.facts["cuda"]["gpu"] if tools is not None and tools.facts.get("cuda") else None,
        "steps": [asdict(record) for record in records.values()],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / FILE
    file.write_text(json.dumps(found, indent=1) + "\n")
    return file


async def _host() -> HostFacts:
    return HostFacts.of(await probe_host({}))


def show(options: Options, records: Mapping[str, Record], console: Console) -> None:
    """Prints a line for each step, and one for each model and load."""
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


_WIDTH = 200
_COLUMNS = ("model", "streams", *SERVERS, "exo / best", "llama-batched-bench", *SETTINGS)


def rows(options: Options, records: Mapping[str, Record]) -> Iterator[Sequence[str]]:
    """The rows of the second table: each model at each measured load."""
    for model in models(options):
        stages = {server: _stages(records.get(name_of(model, server))) for server in (*SERVERS, *SETTINGS)}
        ceilings = _ceilings(model, records)
        for streams in concurrency(options):
            found = [stages[server].get(streams) for server in SERVERS]
            ceiling = ceilings.get(streams)
            if any(found) or ceiling is not None:
                limit = f"{streams * ceiling.output_tokens / ceiling.seconds:.1f}" if ceiling is not None else "-"
                set_so = (_cell(stages[setting].get(streams)) for setting in SETTINGS)
                yield model.name, str(streams), *map(_cell, found), _ratio(*found), limit, *set_so


def _stages(record: Record | None) -> dict[int | None, Stage]:
    if record is None or "report" not in record.facts:
        return {}
    report = Report.model_validate(record.facts["report"])
    return {stage.load.concurrency: stage for stage in report.stages if stage.requests.whole}


def _ceilings(model: Model, records: Mapping[str, Record]) -> dict[int, Ceiling]:
    record = records.get(f"batched_bench {model.name}")
    batches: list[Any] = record.facts.get("batches", []) if record is not None else []
    return {batch.streams: batch for batch in map(Ceiling.model_validate, batches)}


def _cell(stage: Stage | None) -> str:
    if stage is None:
        return "-"
    return f"{stage.output_tokens_per_second:.1f}" + (f" ({stage.ttft.p50:.0f})" if stage.ttft else "")


def _ratio(ours: Stage | None, *theirs: Stage | None) -> str:
    best = max((stage.output_tokens_per_second for stage in theirs if stage is not None), default=0.0)
    return f"{ours.output_tokens_per_second / best:.2f}" if ours is not None and best else "-"


def _found(record: Record) -> str:
    facts = record.facts
    match record.stage:
        case "contract":
            return ", ".join(f"{count} {ending}" for ending, count in facts["tests"].items() if ending != "deselected")
        case "parity":
            return f"largest difference {facts['max_abs']:.1e} nats, KL {facts['kl_mean']:.1e}, {facts['greedy']}"
        case "offload":
            taken = (f"{name}: {facts[name]['taken_bytes'] / 1e9:.2f} GB" for name in ("all", "half", "none"))
            return f"{'+'.join(facts['all']['devices'])}; layers on the GPU, {', '.join(taken)}"
        case "ceiling" if "rates" in facts:
            named = ("prefill" if rate["n_prompt"] else "decode" for rate in facts["rates"])
            return ", ".join(
                f"{name} {rate['avg_ts']:.0f} tokens/s" for name, rate in zip(named, facts["rates"], strict=True)
            )
        case _:
            return ""
