"""``scripts/gpu_check``: prepares, then runs the stages with the Python of the new environment."""

import subprocess
import sys
import time

from bench.gpu_check import prepare
from bench.gpu_check.options import Options, parse
from bench.gpu_check.record import find, perform


def main() -> None:
    """Exits with status 0 if every step of the chosen stages has passed, in this call or an earlier one."""
    options = parse(sys.argv[1:])
    deadline = time.monotonic() + options.budget
    if problem := _other_work(options):
        sys.exit(f"{options.work} was made {problem}: delete it, or give another --work")
    for step in prepare.steps(options):
        print(f"== {step.name}", flush=True)
        record = perform(step, options.results, deadline)
        if record.state != "passed":
            sys.exit(f"{step.name}: {record.state}: {record.message}")
        print(f"   passed, {record.seconds:.0f} s", flush=True)
    left = f"{max(1.0, deadline - time.monotonic()) / 60:.4f}"
    command = [options.python, "-m", "bench.gpu_check.stages", *sys.argv[1:], "--budget", left]
    sys.exit(subprocess.run(command, check=False).returncode)


def _other_work(options: Options) -> str:
    """How the earlier calls with this work folder differ from this one, or an empty text."""
    unpacked = find(options.results, "unpack")
    if unpacked is None or unpacked.state != "passed":
        return ""
    before = (unpacked.facts["cpu"], unpacked.facts["small"])
    if before != (options.cpu, options.small):
        return f"with cpu = {before[0]} and small = {before[1]}"
    same = not options.archive.exists() or unpacked.facts["sha256"] == prepare.digest(options.archive)
    return "" if same else "from another archive"


if __name__ == "__main__":
    main()
