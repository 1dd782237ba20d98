"""Control tokens for filling in the middle of a text: named by each runner, and special only where a prompt says so."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from exo.worker.protocol.commands import Text, Tokenize
from tests.contract.cases import SAMPLING, TWIN, Case, Start
from tests.support.tiny.filling import FIM, FIRST_FIM, write_filling, write_filling_folder


@pytest.mark.parametrize("runner", SAMPLING)
def test_control_tokens_for_a_middle_are_named_and_used(runner: str, cases: Mapping[str, Case], tmp_path: Path) -> None:
    write_filling(tmp_path / "tiny.gguf")
    write_filling_folder(tmp_path / "tiny", TWIN)
    start = Start(cases[runner], tmp_path, [])
    try:
        program = start.bare()
        program.load(start.load_command())
        assert program.capabilities is not None
        fim = program.capabilities.fim
        assert (fim.prefix, fim.suffix, fim.middle, fim.repository, fim.file) == FIM
        parts = [Text(text=fim.prefix, special=True), Text(text="a<|fim_middle|>"), Text(text=fim.middle, special=True)]
        program.send(Tokenize(id="t", prompt=tuple(parts), add_bos=False))
        program.until(lambda: "t" in program.results and program.results["t"].end is not None)
        first, *text, last = program.results["t"].tokenized.tokens
        assert (first >= FIRST_FIM, bytes(text), last) == (True, b"a<|fim_middle|>", first + 2)
    finally:
        for each in start.running:
            each.__exit__(None, None, None)
