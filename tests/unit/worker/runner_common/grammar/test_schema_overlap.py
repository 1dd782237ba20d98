"""Whether a value can match two schemas."""

from pydantic import JsonValue

from exo.worker.runner_common.grammar.schema_overlap import disjoint

Schema = dict[str, JsonValue]


def test_a_comparison_of_schemas_ends() -> None:
    reference: JsonValue = {"$ref": "#/$defs/a"}
    several: list[JsonValue] = [reference] * 10
    looping: Schema = {"$defs": {"a": {"allOf": several, "anyOf": several}}}
    assert not disjoint([reference, reference], looping)
    many: list[JsonValue] = [{"enum": [*range(n, n + 500)]} for n in range(0, 500_000, 500)]
    assert not disjoint(many, {})
