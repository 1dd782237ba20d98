"""The state of a cluster in the form of upstream's API. The cluster is this machine."""

import platform
import shutil
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import final

import psutil
from anyio.to_thread import run_sync
from pydantic import JsonValue

from exo.api.http.errors import ApiError
from exo.api.upstream.instances import NODE, JsonObject, instance_form, instance_id, runner_form, shard_form, size
from exo.serving.app_state import Services
from exo.serving.model_facts import model_facts
from exo.worker.supervisor.instance import InstanceReport
from exo.worker.supervisor.nvml import read_gpus


@final
class ClusterState:
    """Makes the parts of the state that a request names. Nothing is kept."""

    def __init__(self, services: Services, models_directory: Path) -> None:
        self._services = services
        self._models_directory = models_directory
        self._sections: Mapping[str, Callable[[], Awaitable[JsonValue]]] = {
            "instances": self._instances,
            "runners": self._runners,
            "downloads": self._downloads,
            "topology": self._topology,
            "nodeIdentities": self._identity,
            "nodeMemory": self._memory,
            "nodeDisk": self._disk,
            "nodeSystem": self._system,
        }

    def reports(self) -> Mapping[str, InstanceReport]:
        """The instances by id; of those with the same id, the youngest."""
        return {instance_id(each.now.model_id, each.now.runner): each for each in self._services.pool.reports()}

    async def at(self, path: str) -> JsonValue:
        """The part of the state at ``path``, whose parts are separated by "/". Raises ``ApiError``."""
        names = [name for name in path.split("/") if name]
        if not names:
            return {name: await section() for name, section in self._sections.items()}
        section = self._sections.get(names[0])
        value = None if section is None else await section()
        for name in names[1:]:
            if isinstance(value, list):
                value = value[int(name)] if name.isascii() and name.isdigit() and int(name) < len(value) else None
            else:
                value = value.get(name) if isinstance(value, dict) else None
        if value is None:
            raise ApiError(404, f"the state has nothing at {path[:200]!r}", code="not_found")
        return value

    async def _instances(self) -> JsonObject:
        return {name: instance_form(each.card, each.now.runner) for name, each in self.reports().items()}

    async def _runners(self) -> JsonObject:
        return {name: runner_form(each) for name, each in self.reports().items()}

    async def _downloads(self) -> JsonObject:
        """Says that the files cannot be deleted, which this API has no means for."""
        facts = await model_facts(self._services, list(self._services.cards.known.cards.values()))
        done: list[JsonValue] = [
            {
                "DownloadCompleted": {
                    "nodeId": NODE,
                    "shardMetadata": shard_form(each.card),
                    "modelDirectory": "",
                    "total": size(each.card.storage_size.in_bytes),
                    "readOnly": True,
                }
            }
            for each in facts
            if each.on_disk
        ]
        return {NODE: done}

    async def _topology(self) -> JsonObject:
        return {"nodes": [NODE], "connections": {}}

    async def _identity(self) -> JsonObject:
        host = self._services.host
        chips = [] if host is None else [each.name for each in host.nvidia_devices] or [host.processor]
        return {
            NODE: {
                "modelId": f"{platform.system()} {platform.machine()}",
                "chipId": ", ".join(filter(None, chips)) or "Unknown",
                "friendlyName": platform.node(),
                "osVersion": platform.release(),
                "osBuildVersion": platform.version(),
            }
        }

    async def _memory(self) -> JsonObject:
        ram, swap = psutil.virtual_memory(), psutil.swap_memory()
        return {
            NODE: {
                "ramTotal": size(ram.total),
                "ramAvailable": size(ram.available),
                "swapTotal": size(swap.total),
                "swapAvailable": size(swap.free),
            }
        }

    async def _disk(self) -> JsonObject:
        """The file system of the models directory, which may not have been made yet."""
        folder = self._models_directory
        there = next(each for each in (folder, *folder.parents) if each.exists())
        usage = await run_sync(shutil.disk_usage, there)
        return {NODE: {"total": size(usage.total), "available": size(usage.free)}}

    async def _system(self) -> JsonObject:
        """The busiest and the hottest GPU, and the power of all; nothing without GPUs."""
        host = self._services.host
        names = [] if host is None else [each.id or each.address for each in host.nvidia_devices]
        gpus = await run_sync(read_gpus, names, abandon_on_cancel=True)
        if not gpus:
            return {}
        return {
            NODE: {
                "gpuUsage": max(each.utilisation or 0.0 for each in gpus),
                "temp": max(each.celsius or 0.0 for each in gpus),
                "sysPower": sum(each.watts or 0.0 for each in gpus),
                "pcpuUsage": psutil.cpu_percent() / 100,
                "ecpuUsage": 0.0,
            }
        }
