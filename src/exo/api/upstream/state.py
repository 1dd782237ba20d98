"""The state of a cluster in the form of upstream's API, with what upstream's clients read. The cluster is this machine.

A model has one instance for each runner, so both make its id. An instance of one node is a ring of one, the only kind
that these clients accept there.
"""

import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import final

import psutil
from anyio.to_thread import run_sync
from pydantic import JsonValue

from exo.api.http.errors import ApiError
from exo.cards.card import ModelCard
from exo.serving.app_state import Services
from exo.serving.model_facts import model_facts
from exo.worker.supervisor.instance import InstanceReport
from exo.worker.supervisor.nvml import GpuGauges, read_gpus

JsonObject = dict[str, JsonValue]
NODE = "local"
"""The id of this machine, the only node."""
SECTIONS = ("instances", "runners", "downloads", "topology", "nodeIdentities", "nodeMemory", "nodeDisk", "nodeSystem")


def instance_id(card: ModelCard, runner: str) -> str:
    """The id of an instance and of its runner. It is one part of a path."""
    return f"{card.model_id.replace('/', '--')}@{runner}"


def instance_form(card: ModelCard, runner: str) -> JsonObject:
    """An instance, which need not exist."""
    name = instance_id(card, runner)
    shards: JsonObject = {"runnerToShard": {name: _shard(card)}, "nodeToRunner": {NODE: name}}
    return {"MlxRingInstance": {"instanceId": name, "shardAssignments": {"modelId": card.model_id, **shards}}}


def inside(value: JsonValue, *path: str) -> JsonValue:
    """What a JSON value holds at ``path``, in which a list has its indexes; None if it holds nothing there."""
    for key in path:
        if isinstance(value, list):
            value = {str(index): each for index, each in enumerate(value)}
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _shard(card: ModelCard) -> JsonObject:
    return {"PipelineShardMetadata": {"modelCard": {"modelId": card.model_id}}}


def _runner(report: InstanceReport) -> JsonObject:
    state, failure = report.now.state, report.last_failure
    facts: JsonObject = {"layersLoaded": report.status.layers_loaded, "totalLayers": report.status.total_layers}
    if state == "Failed" and failure is None:  # the reason is recorded in a moment
        return {"RunnerShuttingDown": facts}
    return {f"Runner{state}": {**facts, "errorMessage": failure.message if failure is not None else None}}


def _download(card: ModelCard) -> JsonObject:
    """A model on disk. The API has no means to delete it."""
    total: JsonObject = {"inBytes": card.storage_size.in_bytes}
    return {"DownloadCompleted": {"shardMetadata": _shard(card), "total": total, "readOnly": True}}


def _gpus(gpus: Sequence[GpuGauges]) -> JsonObject:
    """The busiest and the hottest GPU, and the power of all; nothing without GPUs."""
    if not gpus:
        return {}
    busy, hot = max(each.utilisation or 0.0 for each in gpus), max(each.celsius or 0.0 for each in gpus)
    return {NODE: {"gpuUsage": busy, "temp": hot, "sysPower": sum(each.watts or 0.0 for each in gpus)}}


@final
class ClusterState:
    """Makes the parts of the state that a request names."""

    def __init__(self, services: Services, models_directory: Path) -> None:
        self._services, self._models_directory = services, models_directory

    def reports(self) -> Mapping[str, InstanceReport]:
        """The instances by id; of those with the same id, the youngest."""
        return {instance_id(each.card, each.now.runner): each for each in self._services.pool.reports()}

    def report(self, name: str) -> InstanceReport:
        """The instance with this id. Raises ``ApiError``."""
        if (report := self.reports().get(name)) is None:
            raise ApiError(404, f"there is no instance {name!r}", code="not_found")
        return report

    async def at(self, path: str) -> JsonValue:
        """The part of the state at ``path``, whose parts are separated by "/". Raises ``ApiError``."""
        section, *keys = path.split("/")
        if (part := inside(await self.section(section), *keys)) is None:
            raise ApiError(404, f"the state has nothing at {path[:200]!r}", code="not_found")
        return part

    async def section(self, name: str) -> JsonValue:
        """One of ``SECTIONS``; None for another name."""
        match name:
            case "instances":
                return {key: instance_form(each.card, each.now.runner) for key, each in self.reports().items()}
            case "runners":
                return {key: _runner(each) for key, each in self.reports().items()}
            case "downloads":
                cards = list(self._services.cards.known.cards.values())
                return {
                    NODE: [_download(each.card) for each in await model_facts(self._services, cards) if each.on_disk]
                }
            case "topology":
                return {"nodes": [NODE]}
            case "nodeIdentities":
                return {NODE: {"friendlyName": platform.node()}}
            case "nodeMemory":
                return {NODE: {"ramTotal": {"inBytes": psutil.virtual_memory().total}}}
            case "nodeDisk":
                folders = (self._models_directory, *self._models_directory.parents)  # the first may not exist yet
                usage = await run_sync(shutil.disk_usage, next(each for each in folders if each.exists()))
                return {NODE: {"available": {"inBytes": usage.free}}}
            case "nodeSystem":
                names = [each.address for each in self._services.host.nvidia_devices] if self._services.host else []
                return _gpus(await run_sync(read_gpus, names, abandon_on_cancel=True))
            case _:
                return None
