"""Runs all stages after the build, in its environment: ``python -m bench.gpu_check.stages``."""

import os
import sys
import time

from rich.console import Console

from bench.gpu_check import build, checks, report, speed
from bench.gpu_check.options import Options, parse
from bench.gpu_check.record import Record, Step, find, perform


def steps(options: Options) -> list[Step]:
    """The steps of all stages but the build, in order."""
    return [*checks.steps(options), *speed.steps(options)]


def run(options: Options, console: Console) -> int:
    """Runs the chosen stages, and prints and writes all records. Returns the exit status."""
    deadline = time.monotonic() + options.budget
    asked: list[Record] = []
    for step in steps(options):
        if step.stage in options.stages:
            console.print(f"== {step.name}", markup=False, highlight=False)
            record = perform(step, options.results, deadline)
            said = f"   {record.state}, {record.seconds:.0f} s {record.message}"
            console.print(said, markup=False, highlight=False, soft_wrap=True)
            asked.append(record)
    known = (find(options.results, step.name) for step in (*build.steps(options), *steps(options)))
    records = {record.step: record for record in known if record is not None}
    report.show(options, records, console)
    console.print(f"wrote {report.write(options, records)}", markup=False, highlight=False, soft_wrap=True)
    return 0 if all(record.state == "passed" for record in asked) else 1


def main() -> None:
    """Has the command line of ``scripts/gpu_check`` with the rest of its budget."""
    # Otherwise cuBLAS rounds the factors of float32 products to 10 bits.
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    sys.exit(run(parse(sys.argv[1:]), Console(width=160)))


if __name__ == "__main__":
    main()
