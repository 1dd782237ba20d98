"""``exo serve`` on a host whose CUDA plug-in crashes: the CPU serves, and the server says why."""

from pathlib import Path

import httpx

from tests.support.nvidia_driver import CRASHES, StandIn, install_driver, install_plugin, needs_gcc
from tests.support.server import ServeProgram, write_card
from tests.support.tiny import Shape, write_gguf


@needs_gcc
def test_a_plug_in_that_crashes_leaves_the_cpu_and_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", Shape())
    write_card(tmp_path, "tiny", {"cuda": {"path": str(tmp_path / "tiny.gguf"), "n_ctx": 512, "threads": 1}})
    driver = install_driver(tmp_path / "driver", StandIn())["LD_LIBRARY_PATH"]
    plugin = install_plugin(tmp_path / "plugin", CRASHES)["EXO_CUDA_PLUGIN"]
    without = str(tmp_path / "nothing")
    variables = {"LD_LIBRARY_PATH": driver, "EXO_CUDA_PLUGIN": plugin, "EXO_VULKAN_PLUGIN": without}
    with ServeProgram(tmp_path, fake=False, **variables) as server:
        reply = server.complete("tiny", max_tokens=2)
        assert reply.status_code == 200
        assert reply.headers["x-exo-runner"] == "cuda"
        [notice] = httpx.get(f"{server.url}/ready", timeout=60).json()["notices"]
    assert notice.startswith(
        "llama.cpp does not use Stand-in: CUDA is not used: trying the CUDA plug-in ended with SIGABRT"
    )
    assert notice.endswith("; models run on the CPU; to fix it: exo setup cuda")
    assert server.log.read_text().count("ended with SIGABRT") == 1
