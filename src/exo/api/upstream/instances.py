"""Instances in the form of upstream's API. A model has one instance for each runner, so both make its id.

An instance of one node is a ring of one, the only kind that upstream's clients accept there.
"""

from pydantic import JsonValue
from pydantic.alias_generators import to_camel

from exo.cards.card import ModelCard
from exo.worker.supervisor.instance import InstanceReport

JsonObject = dict[str, JsonValue]
NODE = "local"
"""The id of this machine, the only node."""
_CARD = {
    *("model_id", "n_layers", "hidden_size", "num_key_value_heads", "supports_tensor", "tasks", "backends"),
    *("family", "quantization", "base_model", "capabilities", "context_length"),
}


def instance_id(model_id: str, runner: str) -> str:
    """The id of an instance and of its runner. It is one part of a path."""
    return f"{model_id.replace('/', '--')}@{runner}"


def card_form(card: ModelCard) -> JsonObject:
    """A model card, without the keys that upstream has not."""
    fields: JsonObject = card.model_dump(mode="json", include=_CARD)
    return {
        **{to_camel(name): value for name, value in fields.items()},
        "storageSize": size(card.storage_size.in_bytes),
    }


def shard_form(card: ModelCard) -> JsonObject:
    """All layers of a model."""
    layers: JsonObject = {"startLayer": 0, "endLayer": card.n_layers, "nLayers": card.n_layers}
    return {"PipelineShardMetadata": {"modelCard": card_form(card), "deviceRank": 0, "worldSize": 1, **layers}}


def instance_form(card: ModelCard, runner: str) -> JsonObject:
    """An instance, which need not exist."""
    name = instance_id(card.model_id, runner)
    assignments: JsonObject = {
        "modelId": card.model_id,
        "runnerToShard": {name: shard_form(card)},
        "nodeToRunner": {NODE: name},
    }
    ring: JsonObject = {"hostsByNode": {NODE: []}, "ephemeralPort": 0}
    return {"MlxRingInstance": {"instanceId": name, "shardAssignments": assignments, **ring}}


def preview_form(card: ModelCard, runner: str, error: str | None) -> JsonObject:
    """An instance that could be created, or the reason why it cannot be."""
    return {
        "model_id": card.model_id,
        "sharding": "Pipeline",
        "instance_meta": "MlxRing",
        "instance": instance_form(card, runner) if error is None else None,
        "memory_delta_by_node": {NODE: card.storage_size.in_bytes} if error is None else None,
        "error": error,
    }


def runner_form(report: InstanceReport) -> JsonObject:
    """The state of a runner."""
    facts: JsonObject = {}
    match report.now.state:
        case "Loading":
            facts = {"layersLoaded": report.status.layers_loaded, "totalLayers": report.status.total_layers}
        case "Failed":
            if report.last_failure is None:  # the reason is recorded in a moment
                return {"RunnerShuttingDown": {}}
            facts = {"errorMessage": report.last_failure.message, "diagnostics": []}
        case _:
            pass
    return {f"Runner{report.now.state}": facts}


def size(n_bytes: int) -> JsonObject:
    """A number of bytes."""
    return {"inBytes": n_bytes}
