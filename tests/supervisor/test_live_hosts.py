"""Models that are divided among this machine and another host, whose devices have memory of their own."""

import sys
from pathlib import Path

import pytest
from pydantic import JsonValue

from exo.cards.card import ModelCard
from exo.worker.host import Host
from exo.worker.protocol.remote_host import RemoteHost
from exo.worker.router import Route
from exo.worker.runner_cuda.loading.gguf_sizes import DEVICE_CONTEXT
from exo.worker.supervisor.live_hosts import LiveHosts
from exo.worker.supervisor.memory.budget import MemoryBudget
from exo.worker.supervisor.memory.memory import Memory
from exo.worker.supervisor.node_messages import HostFound
from exo.worker.supervisor.pool import RunnerPool
from exo.worker.supervisor.runner_error import RunnerError
from tests.support.routing import make_card
from tests.support.rpc_devices import RpcDevice, rpc_devices, variables
from tests.support.runner_pool import finishes
from tests.support.tiny import Shape, write_gguf

ROOM = DEVICE_CONTEXT + (94 << 20)
"""The KV cache takes 96 MiB beside what CUDA itself would take."""
SHAPE = Shape("llama", layers=6, heads=4, kv_heads=4, head_dim=64, context_length=8192)
ROUTE = Route(runner="cuda", instance=None, backend="LlamaCppCuda", reason="the tests")


def found(**memory: int) -> HostFound:
    host = Host("Linux", "x86_64", 2, 1 << 30, 1 << 29, (), {})
    return HostFound(version="1", host=host, memory=memory, directories=("/models",), prefixes="")


def card_of(folder: Path, **fields: object) -> ModelCard:
    """The card of a model that takes more than one device has."""
    write_gguf(folder / "tiny.gguf", SHAPE)
    table: dict[str, JsonValue] = {
        "path": str(folder / "tiny.gguf"), "threads": 1, "slots": 1, "n_ctx": 8192, "n_ubatch": 32, "n_gpu_layers": -1,
        "prefix_cache_bytes": 0, "cache_type_k": "f32", "cache_type_v": "f32",
    }  # fmt: skip
    return make_card(["LlamaCppCuda"]).model_copy(update={"engines": {"cuda": table}, **fields})


async def test_a_model_that_does_not_fit_alone_is_divided_and_ends_when_the_other_host_is_lost(tmp_path: Path) -> None:
    card, far = card_of(tmp_path), RpcDevice(ROOM)
    (variable,) = (f"{name}={value}" for name, value in variables([far]).items())
    hosts = [RemoteHost("gpu2", ("env", variable), sys.executable, "127.0.0.1")]
    with rpc_devices(ROOM) as (near,):
        async with RunnerPool((), tmp_path / "logs", hosts=hosts) as pool:
            pool.set_capacity(Memory(8 << 30, {"RPC0": ROOM}))
            pool.host_up("gpu2", found(memory=8 << 30, RPC0=ROOM))
            alone = pool.acquire(ROUTE, card)
            with pytest.raises(RunnerError, match="bytes of memory on RPC0"):
                await alone.ready()
            assert alone.displaced is not None
            divided = pool.acquire(ROUTE, card)
            capabilities = await divided.ready()
            assert capabilities.layers.keys() == {"RPC0", "gpu2/RPC0"}
            assert sum(capabilities.layers.values()) == 7
            assert await finishes(divided)
            (report,) = (each for each in pool.reports() if each.pid is not None)
            for device, account in ((near, "RPC0"), (far, "gpu2/RPC0")):
                assert 0 < device.used() <= report.reserved.devices[account] <= ROOM
            pool.host_down("gpu2", "is lost")
            assert "host gpu2 is lost" in (await divided.ended()).message
            far.wait_until_empty()
            with pytest.raises(RunnerError, match="bytes of memory on RPC0"):
                await pool.acquire(ROUTE, card).ready()
    far.process.communicate()


def test_a_card_names_the_hosts_and_each_must_be_usable() -> None:
    host, hidden = RemoteHost("gpu2", ("ssh", "gpu2"), "python", "10.0.0.2"), RemoteHost("gpu3", ("ssh", "gpu3"))
    hosts, card = LiveHosts((host, hidden), {}), make_card()
    for each in (host, hidden):
        hosts.add(each.name, found())
    assert hosts.peers(card, "cuda", "x") == ()
    (peer,) = hosts.peers(card.model_copy(update={"divide": ("gpu2",)}), "cuda", "x")
    assert (peer.name, peer.address, peer.directories) == ("gpu2", "10.0.0.2", ("/models",))
    assert peer.command == host.command("exo.worker.runner_cuda", label=f"{hosts.server_id}:x")
    hosts.remove("gpu2")
    for name, why in (("gpu3", "has no address"), ("gpu4", "there is no host gpu4"), ("gpu2", "cannot be used now")):
        with pytest.raises(RunnerError, match=why):
            hosts.peers(card.model_copy(update={"divide": (name,)}), "cuda", "x")


def test_a_measurement_here_leaves_what_is_reserved_on_other_hosts() -> None:
    budget = MemoryBudget(None)
    budget.enter("a", 0.0)
    budget.load("a")
    reservation = budget.reservation("a")
    assert reservation is not None
    reservation.reserved = Memory(10, {"CUDA0": 20, "gpu2/CUDA0": 30})
    budget.loaded("a", 0.0)
    budget.measure("a", 11, {"CUDA0": 21})
    assert reservation.reserved == Memory(11, {"CUDA0": 21, "gpu2/CUDA0": 30})
