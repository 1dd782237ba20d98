"""Pulling with a hub, a network and a disk that misbehave."""

import hashlib
import os
import signal
from collections.abc import Generator
from email.utils import formatdate
from pathlib import Path
from time import time

import pytest

from exo.store.errors import PullError
from exo.store.file_selection import Source
from exo.store.store import Store
from tests.support.hub import Fault, LocalHub
from tests.support.pulling import PullProgram, gguf_card, hub_at, pull_card

NAME = "a-Q4_K_M.gguf"
CARD = gguf_card(NAME)
SIZE = 3_000_000
WEIGHTS = os.urandom(SIZE)


@pytest.fixture
def hub() -> Generator[LocalHub]:
    with LocalHub() as local:
        local.commit({NAME: WEIGHTS})
        yield local


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store([tmp_path])


def part(store: Store) -> Path:
    """The one file that is on its way."""
    (found,) = [path for path in (store.directories[0] / "org--model/.exo").iterdir() if path.name != "manifest.json"]
    return found


def final(store: Store) -> Path:
    return store.directories[0] / "org--model" / NAME


async def test_a_lost_connection_is_taken_up_where_it_ended(hub: LocalHub, store: Store) -> None:
    hub.state.faults = [Fault("close", at=1_000_000), Fault("reset", at=1_500_000)]
    await pull_card(CARD, store, hub_at(hub.url))
    assert final(store).read_bytes() == WEIGHTS
    first, second, third = hub.starts
    assert (first, second) == (0, 1_000_000)
    assert 1_000_000 <= third <= 2_500_000  # a reset takes along what was not read yet


async def test_a_connection_that_keeps_failing_is_given_up(hub: LocalHub, store: Store) -> None:
    hub.state.faults = [Fault("close", at=1000)] * 99
    with pytest.raises(
        PullError, match=rf"{NAME}: .* 6000 of {SIZE} bytes; what has come is kept, so pull again"
    ) as error:
        await pull_card(CARD, store, hub_at(hub.url))
    assert error.value.code == "unreachable"
    assert hub.starts == [0, 1000, 2000, 3000, 4000, 5000]
    hub.state.faults.clear()
    await pull_card(CARD, store, hub_at(hub.url))
    assert hub.starts[6:] == [6000]
    assert final(store).read_bytes() == WEIGHTS


async def test_a_long_download_outlives_many_lost_connections(hub: LocalHub, store: Store) -> None:
    hub.commit({NAME: (content := WEIGHTS * 8)})
    hub.state.faults = [Fault("close", at=1_500_000)] * 12
    await pull_card(CARD, store, hub_at(hub.url))
    assert final(store).read_bytes() == content
    assert len(hub.starts) == 13


async def test_a_whole_file_in_answer_to_a_range_is_taken_from_its_start(hub: LocalHub, store: Store) -> None:
    hub.state.faults = [Fault("close", at=1_000_000), Fault("whole")]
    await pull_card(CARD, store, hub_at(hub.url))
    assert hub.starts == [0, 1_000_000]
    assert final(store).read_bytes() == WEIGHTS


async def test_starting_over_for_ever_is_given_up(hub: LocalHub, store: Store) -> None:
    hub.state.faults = [Fault("whole", at=2_000_000)] * 99
    with pytest.raises(PullError, match="what has come is kept"):
        await pull_card(CARD, store, hub_at(hub.url))
    assert len(hub.starts) == 6


async def test_no_more_is_taken_than_the_file_is_long(hub: LocalHub, store: Store) -> None:
    hub.state.faults = [Fault("more")] * 99
    with pytest.raises(PullError, match=f"the server sends more than {SIZE} bytes"):
        await pull_card(CARD, store, hub_at(hub.url))
    assert part(store).stat().st_size == 0


async def test_another_range_than_asked_for_is_not_appended(hub: LocalHub, store: Store) -> None:
    hub.state.faults = [Fault("close", at=1_000_000), Fault("range")]
    await pull_card(CARD, store, hub_at(hub.url))
    assert hub.starts == [0, 1_000_000, 0]
    assert final(store).read_bytes() == WEIGHTS


async def test_compressed_content_is_refused(hub: LocalHub, store: Store) -> None:
    hub.state.faults = [Fault("gzip")]
    with pytest.raises(PullError, match="compresses"):
        await pull_card(CARD, store, hub_at(hub.url))


async def test_wrong_content_never_gets_the_name_and_is_deleted(hub: LocalHub, store: Store) -> None:
    hub.state.faults = [Fault("wrong")]
    with pytest.raises(PullError) as error:
        await pull_card(CARD, store, hub_at(hub.url))
    wrong = hashlib.sha256(bytes(byte ^ 1 for byte in WEIGHTS)).hexdigest()
    assert error.value.code == "wrong_content"
    assert wrong in str(error.value)
    assert hub.sha256(NAME) in str(error.value)
    assert [path.name for path in (store.directories[0] / "org--model/.exo").iterdir()] == ["manifest.json"]
    assert not final(store).exists()
    await pull_card(CARD, store, hub_at(hub.url))
    assert final(store).read_bytes() == WEIGHTS


async def test_a_small_file_is_verified_by_gits_hash(hub: LocalHub, store: Store) -> None:
    hub.commit({NAME: b"small"})
    hub.state.faults = [Fault("wrong")]
    with pytest.raises(PullError, match=hashlib.sha1(b"blob 5\0small").hexdigest()):
        await pull_card(CARD, store, hub_at(hub.url))
    await pull_card(CARD, store, hub_at(hub.url))
    assert final(store).read_bytes() == b"small"


async def test_an_empty_file_is_a_file(hub: LocalHub, store: Store) -> None:
    hub.commit({NAME: b""})
    await pull_card(CARD, store, hub_at(hub.url))
    assert final(store).read_bytes() == b""


async def test_a_part_that_went_bad_on_disk_is_fetched_again(hub: LocalHub, store: Store) -> None:
    hub.state.faults = [Fault("close", at=2_000_000), *[Fault("close")] * 9]
    with pytest.raises(PullError):
        await pull_card(CARD, store, hub_at(hub.url))
    hub.state.faults.clear()
    part(store).write_bytes(bytes(1_200_000))
    await pull_card(CARD, store, hub_at(hub.url))
    assert hub.starts[-2:] == [1_200_000, 0]
    assert final(store).read_bytes() == WEIGHTS


async def test_a_part_that_is_too_long_is_started_over(hub: LocalHub, store: Store) -> None:
    hub.state.faults = [Fault("close", at=2_000_000), *[Fault("close")] * 9]
    with pytest.raises(PullError):
        await pull_card(CARD, store, hub_at(hub.url))
    hub.state.faults.clear()
    part(store).write_bytes(bytes(SIZE + 1))
    await pull_card(CARD, store, hub_at(hub.url))
    assert hub.starts[-1] == 0
    assert final(store).read_bytes() == WEIGHTS


async def test_a_part_of_another_revision_is_not_gone_on_with(hub: LocalHub, store: Store) -> None:
    hub.state.faults = [Fault("close", at=2_000_000), *[Fault("close")] * 9]
    with pytest.raises(PullError):
        await pull_card(CARD, store, hub_at(hub.url))
    hub.state.faults.clear()
    old = part(store)
    commit = hub.commit({NAME: (newer := os.urandom(SIZE))})
    found = await pull_card(CARD, store, hub_at(hub.url))
    assert hub.starts[-1] == 0
    assert final(store).read_bytes() == newer
    assert (found.revision, old.exists()) == (commit, False)


async def test_the_same_content_in_another_revision_is_gone_on_with(hub: LocalHub, store: Store) -> None:
    hub.state.faults = [Fault("close", at=2_000_000), *[Fault("close")] * 9]
    with pytest.raises(PullError):
        await pull_card(CARD, store, hub_at(hub.url))
    hub.state.faults.clear()
    commit = hub.commit({NAME: WEIGHTS, "README.md": b"new"})
    found = await pull_card(CARD, store, hub_at(hub.url))
    assert hub.starts[-1] == 2_000_000
    assert found.revision == commit


@pytest.mark.parametrize("date", [False, True])
async def test_a_busy_hub_is_waited_for_as_long_as_it_asks(hub: LocalHub, store: Store, date: bool) -> None:
    """Only who waits gets it in two requests: the tests' own pause between tries is a hundredth of a second."""
    after = formatdate(time() + 2, usegmt=True) if date else "1"
    opens = time() + 0.9
    hub.state.closed_until = opens
    hub.state.faults = [Fault("status", status=429, retry_after=after)]
    await pull_card(CARD, store, hub_at(hub.url))
    assert hub.starts == [0, 0]
    assert final(store).read_bytes() == WEIGHTS


async def test_a_busy_hub_is_waited_for_when_it_lists_too(hub: LocalHub, store: Store) -> None:
    hub.state.listing_faults = [Fault("status", status=429, retry_after="0"), Fault("status", status=502)]
    await pull_card(CARD, store, hub_at(hub.url))
    assert len(hub.state.listing_tokens) == 3


async def test_a_hub_that_asks_for_hours_is_not_waited_for(hub: LocalHub, store: Store) -> None:
    hub.state.faults = [Fault("status", status=429, retry_after="7200")]
    with pytest.raises(PullError, match=r"the server answers 429; .*it asks to wait 7200 seconds"):
        await pull_card(CARD, store, hub_at(hub.url))
    hub.state.listing_faults = [Fault("status", status=503)] * 99
    with pytest.raises(PullError, match="the hub answered 503 about org/model"):
        await pull_card(CARD, store, hub_at(hub.url))
    assert len(hub.state.listing_tokens) == 1 + 6


async def test_a_hub_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(PullError, match=r"the hub does not answer: .*HF_ENDPOINT is http://127\.0\.0\.1:9") as error:
        await pull_card(CARD, Store([tmp_path]), hub_at("http://127.0.0.1:9"))
    assert error.value.code == "unreachable"


async def test_the_token_does_not_follow_to_another_host(hub: LocalHub, store: Store) -> None:
    hub.state.elsewhere = hub.other_host
    hub.state.faults = [Fault("close", at=1_000_000)]
    await pull_card(CARD, store, hub_at(hub.url, "hf_secret"))
    here = [asked for asked in hub.state.asked if asked.host != hub.other_host]
    there = [asked for asked in hub.state.asked if asked.host == hub.other_host]
    assert [asked.token for asked in here] == ["Bearer hf_secret"] * 2
    assert [(asked.start, asked.token) for asked in there] == [(0, None), (1_000_000, None)]
    assert final(store).read_bytes() == WEIGHTS


async def test_too_little_room_is_said_before_anything_is_fetched(hub: LocalHub, store: Store, tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(SIZE)
    hub.commit({NAME: sparse})
    hub.claim(NAME, 1 << 60)
    with pytest.raises(
        PullError, match=rf"{tmp_path} has [\d,]+ bytes free, 1,152,921,504,606,846,976 are needed"
    ) as error:
        await pull_card(CARD, store, hub_at(hub.url))
    assert error.value.code == "disk_full"
    assert hub.state.asked == []


async def test_a_disk_that_fills_up_keeps_what_has_come(hub: LocalHub, store: Store) -> None:
    with PullProgram(hub.url, store.directories[0], NAME, limit=1_300_000) as program:
        status, _, error = program.finish()
    assert status == 1
    assert f"disk_full: no room in {store.directories[0]}: {NAME} needs {len(WEIGHTS) - 1_300_000:,} bytes" in error
    assert part(store).stat().st_size == 1_300_000
    await pull_card(CARD, store, hub_at(hub.url))
    assert hub.starts == [0, 1_300_000]
    assert final(store).read_bytes() == WEIGHTS


async def test_a_killed_pull_is_gone_on_with(hub: LocalHub, store: Store) -> None:
    hub.state.faults = [Fault("stall", at=1_234_567)]
    with PullProgram(hub.url, store.directories[0], NAME) as program:
        program.wait_for(1_234_567)
        program.process.send_signal(signal.SIGKILL)
        program.finish()
    hub.state.go_on.set()
    assert store.on_disk(Source.of(CARD, "cuda")).bytes == 1_234_567
    await pull_card(CARD, store, hub_at(hub.url))
    assert hub.starts == [0, 1_234_567]
    assert final(store).read_bytes() == WEIGHTS
