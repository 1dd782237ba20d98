"""The fake runner in the place of the real one. FAKE_TABLE has further settings of its table."""

import json
import os

from exo.worker.protocol.commands import Load
from tests.support import fake_program, fake_runner
from tests.support.fake_options import FakeOptions

TAKEN = fake_runner.FakeRunner.read_options


def read_options(self: fake_runner.FakeRunner, command: Load) -> FakeOptions:
    table = json.loads(os.environ.get("FAKE_TABLE", "{}"))
    return TAKEN(self, command.model_copy(update={"table": table}))


fake_runner.FakeRunner.read_options = read_options
fake_program.main()
