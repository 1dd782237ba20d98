"""Commands that are refused, and lines that are no command."""

import json
from itertools import islice

from exo.worker.protocol.messages import LINE_BYTES
from tests.contract.cases import long_prompt, one
from tests.support.program import Program, ask, names

name = names()


def test_delivered_tokens_that_the_model_does_not_have_are_refused(program: Program) -> None:
    request = ask(next(name)).model_copy(update={"delivered": (97, 10**6)})
    assert one(program, request).failed.param == "delivered"


def test_a_prompt_that_leaves_no_room_is_refused_before_it_starts(program: Program) -> None:
    refused = one(program, ask(next(name), long_prompt(512))).failed
    assert (refused.code, refused.param) == ("context_length_exceeded", "prompt")
    assert "512" in refused.message
    last = one(program, ask(next(name), long_prompt(511), max_tokens=None))
    assert (last.finished.reason, len(last.tokens)) == ("length", 1)


def test_refusals_name_the_field_and_disturb_nobody(program: Program) -> None:
    good, bad_token, empty, bias, stop = islice(name, 5)
    program.send(ask(good, max_tokens=40))
    results = program.generate(
        ask(bad_token, [1, 10**6]), ask(empty, [-1]), ask(bias, logit_bias={10**7: 1.0}), ask(stop, stop=[""])
    )
    assert [result.failed.param for result in results] == ["prompt", "prompt", "logit_bias", "stop"]
    assert {result.failed.code for result in results} == {"invalid_request"}
    assert "1000000" in results[0].failed.message
    program.until(program.ended(good))
    assert program.results[good].finished.usage.completion_tokens == 40


def test_a_line_that_is_no_command_fails_at_most_the_request_it_names(program: Program) -> None:
    named, unknown = islice(name, 2)
    program.write(b"this is not JSON\n[1, 2]\n")
    program.write(json.dumps({"type": "generate", "id": named, "prompt": "text"}).encode() + b"\n")
    program.write(json.dumps({**json.loads(ask(unknown).model_dump_json()), "surprise": 1}).encode() + b"\n")
    program.until(program.ended(named, unknown))
    assert "surprise" in program.results[unknown].failed.message
    assert one(program, ask(next(name))).finished.reason == "length"


def test_a_line_that_is_too_long_fails_the_request_it_names(program: Program) -> None:
    named = next(name)
    program.write(b'{"type":"generate","id":"%b","prompt":[{"text":"' % named.encode())
    for _ in range(LINE_BYTES >> 20):
        program.write(b"a" * (1 << 20))
    program.write(b'"}],"sampling":{"seed":0}}\n')
    program.until(program.ended(named))
    refused = program.results[named].failed
    assert refused.code == "invalid_request"
    assert str(LINE_BYTES) in refused.message
    assert one(program, ask(next(name))).finished.reason == "length"
