from collections.abc import Iterator

import pytest

from exo.worker.protocol.runners import RUNNERS
from tests.support.routing import SPECS


@pytest.fixture(scope="module")
def several_runners() -> Iterator[None]:
    """A table of several runners, since with one there is little to decide."""
    with pytest.MonkeyPatch.context() as patch:
        for name in dict(RUNNERS).keys() - SPECS:
            patch.delitem(RUNNERS, name)
        for name, spec in SPECS.items():
            patch.setitem(RUNNERS, name, spec)
        yield
