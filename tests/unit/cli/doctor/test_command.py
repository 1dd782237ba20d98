"""What ``exo doctor`` says of NVIDIA GPUs."""

from dataclasses import replace
from pathlib import Path

from exo.cli.doctor.command import as_text, plugin_text, prefix_text
from exo.config import Settings
from exo.setup.cuda import PREBUILT
from exo.setup.gpu_plugin import SelfTest
from exo.worker.host import GpuProcess, Host, NvidiaDevice

GIB = 1 << 30


def machine(*devices: NvidiaDevice) -> Host:
    return Host("Linux", "x86_64", 8, GIB, GIB, devices, {}, driver="580.95.05, CUDA 13.0")


def test_a_gpu_is_shown_with_its_link_and_what_runs_on_it() -> None:
    slow = NvidiaDevice(
        *("RTX 4090", "8.9", 24 * GIB, 20 * GIB, "0000:c1:00.0", "CUDA0"),
        pcie_lanes=(4, 16),
        persistence=False,
        processes=(GpuProcess(77, "blender\x1b", 3 * GIB), GpuProcess(78, "?", None)),
    )
    shown = "\n".join(as_text(machine(slow)))
    assert "driver    NVIDIA 580.95.05, CUDA 13.0" in shown
    assert "4 of 16 PCIe lanes, so it loads models slower; persistence mode off" in shown
    assert "process 77 (blender\\x1b) has 3.0 GiB\n          process 78 (?)" in shown


def test_what_the_driver_does_not_tell_is_left_out() -> None:
    shown = "\n".join(as_text(machine(NvidiaDevice("A2", "8.6", 16 * GIB, 16 * GIB))))
    assert "PCIe" not in shown
    assert "persistence" not in shown


def test_the_plug_in_is_shown_with_its_code_and_what_was_proved() -> None:
    proof = {"device": "CUDA0", "failure": "", "difference": 0.0021, "bound": 0.05, "seconds": 1.84}
    failed = {**proof, "device": "CUDA1", "failure": "only 0% of the layers' bytes are on it"}
    tested = SelfTest((proof, failed), "CUDA1: only 0% of the layers' bytes are on it", broken=True)
    shown = "\n".join(plugin_text(PREBUILT[0].plugin, tested))
    assert "machine code for 86 89 120a 121a; PTX, compiled by the driver at first use, from 75 80 90 on" in shown
    assert "CUDA0: all layers of a tiny model on it, log-probabilities within 0.0021 nats" in shown
    assert "CUDA1: all layers" not in shown
    assert "  failed  CUDA1: only 0%" in shown


def test_computed_prompts_are_named_when_they_take_much_disk(tmp_path: Path) -> None:
    settings = replace(Settings.load(), prefix_directory=tmp_path / "prefixes")
    assert list(prefix_text(settings)) == []
    (tmp_path / "prefixes" / "model" / "key").mkdir(parents=True)
    with (tmp_path / "prefixes" / "model" / "key" / "one.prefix").open("wb") as file:
        file.truncate(5 * GIB)
    assert f"computed prompts take 5.0 GiB in {tmp_path}/prefixes" in prefix_text(settings)
