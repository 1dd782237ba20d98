"""A remote host in the memory budget, whose decisions do not depend on where a runner is."""

from exo.worker.host import Host
from exo.worker.protocol.events import Estimated, LoadOption
from exo.worker.protocol.remote_host import RemoteHost
from exo.worker.supervisor.memory.budget import MemoryBudget
from exo.worker.supervisor.memory.memory import Memory
from exo.worker.supervisor.memory.remote import RemoteState
from exo.worker.supervisor.node_messages import HostFound, HostUsage, RunnerUse


def state(**memory: int) -> RemoteState:
    host = Host("Linux", "x86_64", 2, 1 << 30, 1 << 29, (), {})
    found = HostFound(version="1", host=host, memory=memory, directories=(), prefixes="")
    return RemoteState(RemoteHost("gpu2", ("ssh", "gpu2")), found, dict(memory))


def test_an_estimate_counts_on_the_accounts_of_its_host() -> None:
    there = state(memory=1000, CUDA0=500)
    option = LoadOption(host=10, device=20, devices={"CUDA1": 30}, later_host=1, later_device=2)
    moved = there.estimate(Estimated(choices=(option,), remedies=(option,))).choices[0]
    assert moved.host == moved.device == 0
    assert moved.devices == {"gpu2/memory": 10, "gpu2/CUDA0": 20, "gpu2/CUDA1": 30}
    assert moved.later_devices == {"gpu2/memory": 1, "gpu2/CUDA0": 2}


def test_a_full_host_refuses_by_name_and_another_ones_memory_does_not_help() -> None:
    there = state(memory=1000, CUDA0=500)
    budget = MemoryBudget(Memory(10_000, {"CUDA0": 10_000, **there.accounts}))
    budget.enter("a", 0.0)
    budget.estimate("a", there.estimate(Estimated(choices=(LoadOption(host=10, device=600),))))
    refused = budget.settle(0.0).refused["a"]
    assert "600 bytes of memory on CUDA0 of gpu2, and at most 500" in refused.message("me/model", "cuda")
    budget.release("a")
    budget.enter("b", 0.0)
    budget.estimate("b", there.estimate(Estimated(choices=(LoadOption(host=2000),))))
    refused = budget.settle(0.0).refused["b"]
    assert "2,000 bytes of memory on gpu2, and at most 1,000" in refused.message("me/model", "cuda")


def test_the_first_device_here_is_none_of_another_host() -> None:
    budget = MemoryBudget(Memory(100, state(memory=1000).accounts))
    assert budget.need(LoadOption(host=1, device=2)).devices == {"a device": 2}


def test_memory_that_others_take_there_is_no_longer_free() -> None:
    there = state(memory=1000, CUDA0=500)
    reserved = {"a": Memory(0, {"gpu2/memory": 100, "gpu2/CUDA0": 200})}
    use = RunnerUse(pid=1, host=90, devices={"CUDA0": 210})
    there.update(HostUsage(free={"memory": 300, "CUDA0": 100}, runners={"a": use}), reserved)
    assert there.capacity == {"memory": 390, "CUDA0": 310}
    assert there.measured("a") == {"gpu2/memory": 90, "gpu2/CUDA0": 210}
    assert there.measured("b") is None


def test_a_device_on_which_a_runner_is_not_seen_keeps_its_capacity() -> None:
    there = state(memory=1000, CUDA0=500)
    reserved = {"a": Memory(0, {"gpu2/CUDA0": 200})}
    use = RunnerUse(pid=1, host=90, devices=None)
    there.update(HostUsage(free={"memory": 2000, "CUDA0": 100}, runners={"a": use}), reserved)
    assert there.capacity == {"memory": 1000, "CUDA0": 500}
    assert there.measured("a") is None
