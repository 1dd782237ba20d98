"""Each side of a divided model notices that the other one has gone."""

import subprocess
import sys
import textwrap

import pytest

from exo.worker.protocol.commands import Peer
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.part_process import PartProcess, check_private, own_address, reserved

DEADLINE_SECONDS = 60
PART = """
    from exo.worker.runner_common import part_process
    part_process.SILENCE_SECONDS = {silence}
    for line in part_process.lines_while_needed():
        print(line.decode(), flush=True)
    print("end", flush=True)
"""
RUNNER = """
    import sys
    from exo.worker.runner_common import part_process
    part_process.BEAT_SECONDS = {beat}
    part = part_process.PartProcess("host far", [sys.executable, "-c", {program!r}])
    {then}
"""


def python(program: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(program)]


def part(silence: float) -> str:
    return textwrap.dedent(PART.format(silence=silence))


def run_runner(program: str, then: str, beat: float = 2.0) -> subprocess.CompletedProcess[str]:
    source = textwrap.dedent(RUNNER).format(program=program, then=then, beat=beat)
    return subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False
    )


def test_a_part_ends_when_its_runner_is_silent_although_its_input_stays_open() -> None:
    with subprocess.Popen(python(PART.format(silence=0.2)), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.wait(DEADLINE_SECONDS) == 0
        assert process.stdout is not None
        assert process.stdout.read() == b"end\n"


def test_a_part_gets_whole_lines_and_ends_with_its_input() -> None:
    done = subprocess.run(
        python(PART.format(silence=DEADLINE_SECONDS)), input=b"one\n\ntwo\n", capture_output=True, check=True
    )
    assert done.stdout == b"one\ntwo\nend\n"


def test_a_runner_that_says_nothing_still_keeps_its_parts() -> None:
    then = 'import time; time.sleep(3); part.say(b"still here\\n"); print(part.line()); part.end()'
    assert run_runner(part(silence=2.0), then, beat=0.05).stdout == "still here\n"


@pytest.mark.parametrize("needed_first", [True, False])
def test_a_runner_ends_with_a_part_that_it_needs(needed_first: bool) -> None:
    then = (
        'part.need(); part.say(b"go\\n"); import time; time.sleep(1000)'
        if needed_first
        else 'part.say(b"go\\n"); part.blame(1000); part.need()'
    )
    done = run_runner("input(); raise SystemExit(7)", then)
    assert done.returncode == 1
    assert done.stderr.strip() == "host far exited with code 7; the runner cannot compute without it"


def test_a_part_that_has_ended_is_told_of_with_its_reason() -> None:
    ended = PartProcess("host far", [sys.executable, "-c", "raise SystemExit(3)"])
    assert ended.line() == ""
    assert str(ended.could_not("start", "")) == "host far could not start: it exited with code 3"
    ended.end()
    with pytest.raises(LoadError, match=r"host far could not start: .*No such file"):
        PartProcess("host far", ["/nowhere/program"])


@pytest.mark.parametrize("address", ["10.0.0.2", "172.16.1.1", "192.168.7.7", "127.0.0.1", "100.64.0.7", "198.18.0.1"])
def test_engines_may_talk_in_private_networks(address: str) -> None:
    check_private(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "0.0.0.0", "224.0.0.1", "gpu2", "::1", ""])
def test_engines_may_not_talk_elsewhere(address: str) -> None:
    with pytest.raises(LoadError, match="is no"):
        check_private(address)


def test_hosts_meet_at_the_address_that_leads_to_the_other_one() -> None:
    address = own_address([Peer(name="far", command=(), address="127.0.0.1")])
    with reserved(address) as first, reserved(address) as second:
        assert first.startswith("127.0.0.1:")
        assert first != second
