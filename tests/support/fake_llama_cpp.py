"""``exo_llama_cpp``'s program with the fake runner. FAKE_TABLE has further settings of its table."""

import json
import os

import exo_llama_cpp

exo_llama_cpp.extend()

from exo.worker.protocol.commands import Load  # noqa: E402 -- it is found from here on
from tests.support import fake_program, fake_runner  # noqa: E402
from tests.support.fake_options import FakeOptions  # noqa: E402

TAKEN = fake_runner.FakeRunner.read_options


def read_options(self: fake_runner.FakeRunner, command: Load) -> FakeOptions:
    table = json.loads(os.environ.get("FAKE_TABLE", "{}"))
    return TAKEN(self, command.model_copy(update={"table": table}))


fake_runner.FakeRunner.read_options = read_options
fake_program.main()
