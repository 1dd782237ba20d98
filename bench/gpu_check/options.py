"""The options of ``scripts/gpu_check``."""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ARCHIVE = ROOT / "build" / "gpu-archive.tar.xz"
STAGES = ("self-test", "contract", "parity", "offload", "devices", "sweep", "sampling", "agent")
"""The most valuable first: a run that is cut short has done these."""
BUDGET_MINUTES = 8.0
_MEMORY_FOLDER, _MEMORY_BYTES = Path("/dev/shm"), 40 << 30


@dataclass(frozen=True, slots=True)
class Options:
    """The options of one call. ``stages`` are in the order of ``STAGES``. No step is repeated in the same ``work``."""

    work: Path
    out: Path
    archive: Path
    stages: tuple[str, ...]
    budget: float
    cpu: bool
    small: bool

    @property
    def backend(self) -> str:
        """The back end that is checked, by its name in model cards."""
        return "LlamaCppCpu" if self.cpu else "LlamaCppCuda"

    @property
    def results(self) -> Path:
        return self.work / "results"

    @property
    def logs(self) -> Path:
        return self.work / "logs"

    @property
    def unpacked(self) -> Path:
        return self.work / "archive"

    @property
    def programs(self) -> Path:
        """The folder of llama.cpp's programs and libraries."""
        return self.unpacked / "bin"

    @property
    def plugin(self) -> Path:
        """The folder of the CUDA plug-in, described for this machine."""
        return self.work / "plugin"

    @property
    def python(self) -> Path:
        """The Python of all stages."""
        return self.work / "venv" / "bin" / "python"


def parse(arguments: Sequence[str]) -> Options:
    """Reads the command line. Exits if it is invalid."""
    parser = argparse.ArgumentParser(
        prog="gpu_check", description="Tests and measures exo on the GPU of this machine, which needs no network."
    )
    default = _folder() / "exo-gpu-check"
    parser.add_argument("--work", type=Path, default=default, help=f"programs, models and results; default {default}")
    parser.add_argument("--out", type=Path, help="the folder of gpu-check.json; default WORK/out")
    parser.add_argument(
        "--archive", type=Path, default=ARCHIVE, help=f"the file that make gpu-archive makes; default {ARCHIVE}"
    )
    parser.add_argument("--stages", default=",".join(STAGES), help=f"some of {','.join(STAGES)}; default all")
    parser.add_argument(
        "--budget", type=float, default=BUDGET_MINUTES, metavar="MINUTES", help=f"default {BUDGET_MINUTES:g}"
    )
    parser.add_argument("--cpu", action="store_true", help="use the CPU instead of a GPU, to try the script")
    parser.add_argument("--small", action="store_true", help="use tiny models and loads, whose figures mean nothing")
    given = parser.parse_args(arguments)
    chosen = str(given.stages).split(",")
    if unknown := set(chosen) - set(STAGES):
        parser.error(f"--stages: must be some of {','.join(STAGES)} (got {','.join(sorted(unknown))!r})")
    if not 0 < given.budget <= 24 * 60:
        parser.error(f"--budget: must be minutes, above 0 and at most a day (got {given.budget:g})")
    work = Path(given.work).absolute()
    if work.is_relative_to(ROOT):
        parser.error(f"--work: must be outside the checkout, which is not changed (got {given.work})")
    return Options(
        work=work,
        out=Path(given.out).absolute() if given.out else work / "out",
        archive=Path(given.archive).absolute(),
        stages=tuple(stage for stage in STAGES if stage in chosen),
        budget=60 * given.budget,
        cpu=given.cpu,
        small=given.small,
    )


def _folder() -> Path:
    """A folder in memory where there is room, because the models are large and soon deleted."""
    try:
        free = shutil.disk_usage(_MEMORY_FOLDER).free
    except OSError:
        free = 0
    return _MEMORY_FOLDER if free > _MEMORY_BYTES else Path(tempfile.gettempdir())
