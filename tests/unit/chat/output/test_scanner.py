"""How text waits until it can be told from a marker."""

from exo.chat.output.scanner import MORE, Scanner, markers


def test_what_waits_is_never_longer_than_a_marker() -> None:
    """Otherwise each new piece of text would copy all that waits."""
    scanner = Scanner()
    found = markers("<tool_call>")
    seen: list[str] = []
    steps = scanner.until(found, seen.append)
    for _ in range(1000):
        scanner.feed("<tool_call")
        for step in steps:
            if step is MORE:
                break
        assert scanner.waiting < len("<tool_call>")
