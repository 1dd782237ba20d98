"""Runs steps and records their results as one JSON file each, so that a later call continues an earlier one."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

State = Literal["passed", "failed", "not run"]
_SHOWN_LINES = 12


class CheckError(Exception):
    """A step failed; the message says why."""

    def __init__(self, message: str, facts: Mapping[str, Any] | None = None) -> None:
        """``facts`` are the findings in spite of the failure."""
        super().__init__(message)
        self.facts: dict[str, Any] = dict(facts or {})


@dataclass(frozen=True, slots=True)
class Record:
    """The result of a step. ``facts`` are JSON."""

    step: str
    stage: str
    state: State
    seconds: float = 0.0
    message: str = ""
    facts: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class CheckStep:
    """A step: ``run`` gets a deadline, and returns facts or raises CheckError."""

    name: str
    stage: str
    run: Callable[[float], Mapping[str, Any]]
    least_seconds: float = 5.0
    """With less time the step does not begin."""


def perform(step: CheckStep, folder: Path, deadline: float) -> Record:
    """Runs a step unless an earlier call did, and records its result. ``deadline`` is by ``time.monotonic``."""
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
    except Exception as error:  # noqa: BLE001 -- fails this step only
        message = f"{type(error).__name__}: {error}"
        return _save(folder, Record(step.name, step.stage, "failed", time.monotonic() - began, message))
    return _save(folder, Record(step.name, step.stage, "passed", time.monotonic() - began, facts=facts))


def find(folder: Path, step: str) -> Record | None:
    """The record of an earlier call."""
    file = folder / f"{step}.json"
    return Record(**json.loads(file.read_text())) if file.exists() else None


def _save(folder: Path, record: Record) -> Record:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{record.step}.json").write_text(json.dumps(asdict(record), indent=1) + "\n")
    return record


def run(command: Sequence[str | Path], log: Path, deadline: float, environment: Mapping[str, str] | None = None) -> str:
    """Runs a program and returns its standard output; standard error goes to ``log``.

    Raises CheckError with the end of the log if it fails. At ``deadline`` it is killed with its children.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    output = log.with_suffix(".out")
    with log.open("w") as errors, output.open("w") as file:
        process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=errors,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        try:
            code = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise CheckError(f"{Path(command[0]).name} was not done in time; its log is {log}") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    said = output.read_text(errors="replace")
    if code:
        lines = [line for line in (said + log.read_text(errors="replace")).splitlines() if line.strip()]
        end = "\n".join(lines[-_SHOWN_LINES:])
        raise CheckError(f"{Path(command[0]).name} ended with {code}; its log is {log} and ends with:\n{end}")
    return said
