"""What became of each step: one small JSON file each, so that a later call goes on where an earlier one ended."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

State = Literal["passed", "failed", "not run"]


class CheckError(Exception):
    """A step failed, and this sentence says why."""

    def __init__(self, message: str, facts: Mapping[str, Any] | None = None) -> None:
        """``facts`` are what was found all the same."""
        super().__init__(message)
        self.facts: dict[str, Any] = dict(facts or {})


@dataclass(frozen=True, slots=True)
class Record:
    """One step. ``facts`` are JSON."""

    step: str
    stage: str
    state: State
    seconds: float = 0.0
    message: str = ""
    facts: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Step:
    """Something to do: ``run`` returns facts or raises CheckError, and has to end by the moment that it is given."""

    name: str
    stage: str
    run: Callable[[float], Mapping[str, Any]]
    least_seconds: float = 5.0
    """It is not begun with less time than this."""


def perform(step: Step, folder: Path, deadline: float) -> Record:
    """Runs a step unless an earlier call did, and records what became of it. ``deadline`` is by ``time.monotonic``."""
    before = find(folder, step.name)
    if before is not None and before.state == "passed":
        return before
    began = time.monotonic()
    if deadline - began < step.least_seconds:
        return _save(folder, Record(step.name, step.stage, "not run", message="the time is used up"))
    try:
        facts = dict(step.run(deadline))
    except CheckError as error:
        seconds = time.monotonic() - began
        return _save(folder, Record(step.name, step.stage, "failed", seconds, str(error), error.facts))
    except Exception as error:  # noqa: BLE001 -- whatever it is, it is this step's failure and the rest goes on
        message = f"{type(error).__name__}: {error}"
        return _save(folder, Record(step.name, step.stage, "failed", time.monotonic() - began, message))
    return _save(folder, Record(step.name, step.stage, "passed", time.monotonic() - began, facts=facts))


def find(folder: Path, step: str) -> Record | None:
    """What an earlier call recorded."""
    file = folder / f"{step}.json"
    return Record(**json.loads(file.read_text())) if file.exists() else None


def _save(folder: Path, record: Record) -> Record:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{record.step}.json").write_text(json.dumps(asdict(record), indent=1) + "\n")
    return record
