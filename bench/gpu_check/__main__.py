"""``scripts/gpu_check``: builds, then runs the other stages with the Python of the new environment."""

import subprocess
import sys
import time

from bench.gpu_check import build
from bench.gpu_check.options import Options, parse
from bench.gpu_check.record import find, perform


def main() -> None:
    """Exits with status 0 if every step of the chosen stages has passed, in this call or an earlier one."""
    options = parse(sys.argv[1:])
    deadline = time.monotonic() + options.budget
    if problem := _other_work(options):
        sys.exit(f"{options.work} was made {problem}: delete it, or give another --work")
    if "build" in options.stages and not _build(options, deadline):
        sys.exit(1)
    if find(options.results, "llama.cpp") is None:
        sys.exit(f"nothing is built in {options.work}: run the stage build first, with the same --work")
    left = f"{max(1.0, deadline - time.monotonic()) / 60:.4f}"
    command = [options.python, "-m", "bench.gpu_check.stages", *sys.argv[1:], "--budget", left]
    sys.exit(subprocess.run(command, check=False).returncode)


def _other_work(options: Options) -> str:
    """How the earlier calls with this work folder differ from this one, or an empty text."""
    tools, unpacked = find(options.results, "tools"), find(options.results, "unpack")
    if tools is not None and tools.state == "passed":
        before = (tools.facts["cpu"], tools.facts["small"])
        if before != (options.cpu, options.small):
            return f"with cpu = {before[0]} and small = {before[1]}"
    if unpacked is not None and unpacked.state == "passed" and options.archive.exists():
        return "" if unpacked.facts["sha256"] == build.digest(options.archive) else "from another archive"
    return ""


def _build(options: Options, deadline: float) -> bool:
    for step in build.steps(options):
        print(f"== {step.name}", flush=True)
        record = perform(step, options.results, deadline)
        if record.state != "passed":
            print(f"{step.name}: {record.state}: {record.message}", file=sys.stderr)
            return False
        print(f"   passed, {record.seconds:.0f} s", flush=True)
    return True


if __name__ == "__main__":
    main()
