"""CMake's lists of architectures."""

import pytest

from exo.setup.steps import SetupError
from exo.setup.toolkit import parse_architectures


@pytest.mark.parametrize(
    ("architectures", "machine_code", "ptx"),
    [("90-real", ("90",), ()), ("86-real;89", ("86", "89"), ("89",)), ("75-virtual;120-real", ("120a",), ("75",))],
)
def test_machine_code_and_ptx_are_told_apart(
    architectures: str, machine_code: tuple[str, ...], ptx: tuple[str, ...]
) -> None:
    assert parse_architectures(architectures) == (machine_code, ptx)


@pytest.mark.parametrize("architectures", ["native", "", "8.9", "89-real,90-real"])
def test_a_list_that_names_no_architectures_is_refused(architectures: str) -> None:
    with pytest.raises(SetupError, match="89-real;90-real"):
        parse_architectures(architectures)
