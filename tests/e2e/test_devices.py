"""``exo serve`` on devices with memory of their own: each model goes on the emptiest one that holds it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.rpc_devices import rpc_devices
from tests.support.server import ServeProgram, write_card
from tests.support.tiny import Shape, write_gguf


def loaded(server: ServeProgram, model: str) -> dict[str, int]:
    """Loads a model; the bytes that the budget counts in each place for it."""
    assert server.complete(model, max_tokens=4).status_code == 200
    instances = server.client.get("/v1/instances").json()["data"]
    (instance,) = [each for each in instances if each["model"] == f"test/{model}"]
    return instance["plan"]["memory"]


def test_two_models_go_on_two_devices_and_one_that_fits_none_is_refused_by_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", Shape())
    table = {"path": str(tmp_path / "tiny.gguf"), "threads": 1, "slots": 2, "n_ctx": 2048}
    for name in ("first", "second"):
        write_card(tmp_path, name, {"cuda": table}, backends=["LlamaCppCuda"])
    whole = {**table, "n_ctx": 1 << 22, "n_gpu_layers": -1}
    write_card(tmp_path, "large", {"cuda": whole}, backends=["LlamaCppCuda"])
    with rpc_devices((6 << 28) - (1 << 20), 6 << 28) as devices, ServeProgram(tmp_path) as server:
        assert loaded(server, "first").keys() == {"memory", "RPC1"}
        assert [each.used() > 0 for each in devices] == [False, True]
        assert loaded(server, "second").keys() == {"memory", "RPC0"}
        assert all(each.used() > 0 for each in devices)
        refused = server.complete("large")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "out_of_memory")
        assert "bytes of memory on RPC" in refused.json()["error"]["message"]


def test_a_device_with_room_for_one_long_context_gets_a_pool_that_several_requests_share(tmp_path: Path) -> None:
    """The plan holds when the pool is full: the device takes no more than the budget counts."""
    shape = Shape(layers=4, heads=8, kv_heads=8, head_dim=64, context_length=8192)
    write_gguf(tmp_path / "tiny.gguf", shape)
    write_card(
        tmp_path,
        "tiny",
        {"cuda": {"path": str(tmp_path / "tiny.gguf"), "threads": 1, "n_ubatch": 512}},
        backends=["LlamaCppCuda"],
    )
    cache = 8192 * 2 * 2 * 4 * 8 * 64  # tokens, keys and values, bytes, layers, elements
    with rpc_devices((570 << 20) + cache + cache // 2) as (device,), ServeProgram(tmp_path) as server:
        counted = loaded(server, "tiny")["RPC0"]
        (instance,) = server.client.get("/v1/instances").json()["data"]
        plan = instance["plan"]
        assert (plan["kv"], plan["slots"]) == ("pool", 4)
        assert plan["context_length"] == 8192
        assert server.client.get("/props").json()["default_generation_settings"]["n_ctx"] == plan["context_length"]
        (model,) = [each for each in server.client.get("/v1/models").json()["data"] if each["id"] == "test/tiny"]
        assert model["max_model_len"] == plan["context_length"]
        slots = server.client.get("/slots").json()
        assert [each["n_ctx"] for each in slots] == [plan["context_length"]] * 4
        prompt = [97 + at * at % 23 for at in range(plan["context_length"] - 600)]
        with ThreadPoolExecutor() as pool:
            long = pool.submit(server.complete, "tiny", prompt=prompt, max_tokens=64)
            short = [pool.submit(server.complete, "tiny", prompt=f"request {at}", max_tokens=32) for at in range(2)]
            assert [each.result().status_code for each in (long, *short)] == [200] * 3
        assert device.used() <= counted
        refused = server.complete("tiny", prompt=[97] * (plan["context_length"] + 1))
        assert refused.status_code == 400
        assert f"{plan['context_length']}" in refused.json()["error"]["message"]
