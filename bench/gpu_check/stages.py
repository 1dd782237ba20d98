"""Runs all stages in the environment that was prepared: ``python -m bench.gpu_check.stages``."""

import os
import sys
import threading
import time
from collections.abc import Mapping

from rich.console import Console

from bench.gpu_check import checks, prepare, report, speed
from bench.gpu_check.models import file_of, models
from bench.gpu_check.options import Options, parse
from bench.gpu_check.record import CheckStep, Record, find, perform


def steps(options: Options) -> list[CheckStep]:
    """The steps of all stages, in order."""
    return [*checks.steps(options), *speed.steps(options)]


def run(options: Options, console: Console) -> int:
    """Runs the chosen stages, and writes all records after each step, then prints them. Returns the exit status."""
    deadline = time.monotonic() + options.budget
    threading.Thread(target=_write_models, args=(options,), daemon=True).start()
    machine = report.machine()
    asked: list[Record] = []
    for step in steps(options):
        if step.stage in options.stages:
            console.print(f"== {step.name}", markup=False, highlight=False)
            record = perform(step, options.results, deadline)
            said = f"   {record.state}, {record.seconds:.0f} s {record.message}"
            console.print(said, markup=False, highlight=False, soft_wrap=True)
            asked.append(record)
            report.write(options, machine, _records(options))
    report.show(options, _records(options), console)
    console.print(f"wrote {report.file_of(options)}", markup=False, highlight=False, soft_wrap=True)
    return 0 if all(record.state == "passed" for record in asked) else 1


def _records(options: Options) -> Mapping[str, Record]:
    known = (find(options.results, step.name) for step in (*prepare.steps(options), *steps(options)))
    return {record.step: record for record in known if record is not None}


def _write_models(options: Options) -> None:
    """Writes the models while the first steps run, which need none."""
    for model in models(options):
        file_of(options, model)


def main() -> None:
    """Has the command line of ``scripts/gpu_check`` with the rest of its budget."""
    # Otherwise cuBLAS rounds the factors of float32 products to 10 bits.
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    options = parse(sys.argv[1:])
    os.environ["EXO_CUDA_PLUGIN"] = str(options.plugin)
    sys.exit(run(options, Console(width=160)))


if __name__ == "__main__":
    main()
