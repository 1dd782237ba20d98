"""How a runner loads its model, shows that it lives, and ends."""

from itertools import islice

from exo.worker.protocol.commands import Cancel, Cores
from tests.contract.cases import Start, one
from tests.support.program import Program, ask, names

name = names()


def test_states_lead_to_ready_which_says_what_the_runner_can_do_and_nothing_is_accepted_before(start: Start) -> None:
    program = start.bare()
    assert one(program, ask(next(name))).failed.code == "invalid_request"
    capabilities = program.load(start.load_command(slots=3, n_ctx=512))
    assert program.states[0] == "Idle"
    assert program.states[-1] == "Ready"
    assert {"Loading", "Loaded"} <= set(program.states)
    assert program.states.count("Ready") == 1
    assert (capabilities.slots, capabilities.context_length) == (3, 512)
    assert capabilities.vocabulary > 0
    assert capabilities.engine_version
    assert one(program, ask(next(name))).finished.reason == "length"


def test_a_model_that_does_not_load_fails_the_runner(start: Start) -> None:
    program = start.bare()
    program.send(start.load_command(no_such_key=1))
    assert program.drain() != 0
    assert program.failure is not None
    assert "no_such_key" in program.failure.message


def test_a_share_of_the_cores_may_come_at_any_time_and_changes_no_token(start: Start) -> None:
    program = start.slow(n_ctx=512, slots=2, **start.case.free_threads)
    undisturbed = one(program, ask(next(name), max_tokens=40))
    first, exact = next(name), next(name)
    program.send(Cores(count=1), ask(first, max_tokens=40))
    program.until(lambda: first in program.results and len(program.results[first].tokens) > 2)
    program.send(Cores(count=2), ask(exact, max_tokens=40).model_copy(update={"exact": True}), Cores(count=1))
    program.until(program.ended(first, exact))
    assert program.results[first].tokens == program.results[exact].tokens == undisturbed.tokens


def test_shutdown_fails_what_is_in_flight_and_exits_cleanly(start: Start) -> None:
    program = start.slow(slots=1, n_ctx=4096)
    running, waiting = islice(name, 2)
    program.send(ask(running, max_tokens=4000), ask(waiting))
    program.until(lambda: running in program.results and len(program.results[running].tokens) > 0)
    assert program.shutdown() == 0
    assert {program.results[each].failed.code for each in (running, waiting)} == {"shutdown"}
    assert program.states[-2:] == ["ShuttingDown", "Shutdown"]


def test_a_runner_whose_input_closes_exits(start: Start) -> None:
    program = start.slow(slots=1, n_ctx=4096)
    program.send(ask(next(name), max_tokens=4000))
    assert program.process.stdin is not None
    program.process.stdin.close()
    assert program.process.wait(60) is not None


def test_heartbeats_come_while_idle_and_while_busy(slow_program: Program) -> None:
    program = slow_program
    before = program.heartbeats
    program.until(lambda: program.heartbeats >= before + 1)
    busy = [next(name) for _ in range(3)]
    program.send(*(ask(each, max_tokens=None) for each in busy))
    before = program.heartbeats
    program.until(lambda: program.heartbeats >= before + 2)
    program.send(*(Cancel(id=each) for each in busy))
    program.until(program.ended(*busy))
