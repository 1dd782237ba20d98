"""``exo serve`` on devices with memory of their own: each model goes on the emptiest one that holds it."""

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
