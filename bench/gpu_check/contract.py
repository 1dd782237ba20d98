"""The contract tests, the llama.cpp runner's cases on the back end that is checked."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from bench.gpu_check.options import ROOT, Options
from bench.gpu_check.program import run
from bench.gpu_check.record import CheckError, Step

FILES = ("test_contract", "test_embed")
BACKEND_VARIABLE = "EXO_TEST_LLAMA_BACKEND"
"""Which tests/contract/test_contract.py reads."""


def steps(options: Options) -> list[Step]:
    """One for each file."""
    return [Step(name.replace("test_", ""), "contract", partial(_test, options, name), 30) for name in FILES]


def _test(options: Options, name: str, deadline: float) -> Mapping[str, Any]:
    command = [options.python, "-m", "pytest", "-p", "no:cacheprovider", "-k", "cuda", "--rootdir", ROOT]
    file = ROOT / "tests" / "contract" / f"{name}.py"
    said = run([*command, file], options.logs / f"{name}.log", deadline, {BACKEND_VARIABLE: options.backend})
    return {"backend": options.backend, "tests": counted(said)}


def counted(said: str) -> dict[str, int]:
    """Of pytest's last line, how many tests ended how. Raises CheckError where none has passed."""
    last = said.strip().splitlines()[-1] if said.strip() else ""
    counts = {ending: int(count) for count, ending in re.findall(r"(\d+) (passed|failed|skipped|deselected)", last)}
    if not counts.get("passed"):
        raise CheckError(f"pytest ran no test: {last}")
    return counts
