"""What can be asked of ``exo bench``, and what it then asks."""

import json

import pytest

from exo.bench.client import Client
from exo.bench.options import BenchOptions, Objective
from exo.bench.prompts import Prompts, body
from exo.exit_code import CommandError, ExitCode


def options(**fields: object) -> BenchOptions:
    return BenchOptions.check(url="http://127.0.0.1:1", model="some/model", **fields)


def test_an_objective_reads_and_writes_the_same() -> None:
    assert str(Objective.parse("ttft:1000, itl:99.5")) == "ttft:1000,itl:99.5"


@pytest.mark.parametrize("text", ["", "ttft", "ttft:", "ttft:-1", "ttft:nan", "speed:3", "ttft:1000;itl:3"])
def test_an_objective_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(CommandError, match="--goodput"):
        Objective.parse(text)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"concurrency": (0,)}, "--concurrency: "),
        ({"concurrency": (1.5,)}, "--concurrency: "),
        ({"rates": (float("inf"),)}, "--rate: "),
        ({"workload": "mixed"}, "--workload"),
        ({"endpoint": "embeddings"}, "--endpoint"),
        ({"temperature": 3}, "--temperature"),
        ({"output_tokens": 0}, "--output-tokens"),
        ({"workload": "long-prompt", "rates": (1.0,)}, "--rate: not accepted with --workload long-prompt"),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_its_name(fields: dict[str, object], named: str) -> None:
    with pytest.raises(CommandError) as refused:
        options(**fields)
    assert named in str(refused.value)
    assert refused.value.code == ExitCode.USAGE


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:99999", "http://host:0", "://"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(CommandError, match="URL"):
        Client(BenchOptions(url=url, model="m"))


def test_a_key_is_in_no_report_and_in_no_repr() -> None:
    secret = options(api_key="sesame")
    assert "sesame" not in secret.model_dump_json() + repr(secret)


def test_a_greedy_request_asks_for_no_more_than_it_must() -> None:
    assert json.loads(body(options(ignore_eos=False), "hello", 3, 9)) == {
        "model": "some/model",
        "prompt": "hello",
        "max_tokens": 9,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_sampled_chat_asks_for_everything() -> None:
    asked = options(
        endpoint="chat", temperature=0.8, top_k=40, top_p=0.95, seed=5, token_ids=True, extra={"min_p": 0.1}
    )
    found = json.loads(body(asked, "hello", 3, 9))
    assert found["messages"] == [{"role": "user", "content": "hello"}]
    assert "prompt" not in found
    expected = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "seed": 8, "min_p": 0.1}
    assert {name: found[name] for name in expected} == expected
    assert found["return_token_ids"] is True
    assert found["ignore_eos"] is True


def first_prompts(stage: str = "one", **fields: object) -> list[str]:
    prompts = Prompts(options(**fields), stage)
    return [next(prompts) for _ in range(4)]


def test_random_prompts_have_their_length_and_share_nothing() -> None:
    prompts = first_prompts(prompt_words=40)
    assert [len(prompt.split()) for prompt in prompts] == [40] * 4
    assert len({tuple(prompt.split()[:3]) for prompt in prompts}) == 4
    assert prompts == first_prompts(prompt_words=40)
    assert not set(prompts) & set(first_prompts(prompt_words=40, seed=1))
    assert not set(prompts) & set(first_prompts("two", prompt_words=40))


def test_prompts_with_a_shared_prefix_share_just_that() -> None:
    words = [prompt.split() for prompt in first_prompts(workload="shared-prefix", shared_words=30, prompt_words=10)]
    assert [len(each) for each in words] == [40] * 4
    assert len({tuple(each[:30]) for each in words}) == 1
    assert len({tuple(each[30:]) for each in words}) == 4


def test_sessions_have_their_shared_words_in_turn() -> None:
    prompts = first_prompts(workload="shared-prefix", shared_words=30, prompt_words=10, sessions=2)
    words = [prompt.split() for prompt in prompts]
    assert words[0][:30] == words[2][:30] != words[1][:30] == words[3][:30]
    assert len({tuple(each[30:]) for each in words}) == 4


def test_a_repeated_text_repeats_itself() -> None:
    (first, *_) = first_prompts(workload="repeat", prompt_words=40)
    lines = first.splitlines()
    assert len(lines) == 4
    assert len(set(lines)) == 1
    assert len(lines[0].split()) == 10


def test_the_long_prompt_is_as_long_as_asked() -> None:
    assert len(Prompts(options(workload="long-prompt", long_words=500), "one").long().split()) == 500
