"""Which devices a model goes on. The devices are invented, llama.cpp and its rules are real."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from gguf import GGUFWriter
from gguf.constants import MODEL_ARCH_NAMES
from pydantic import JsonValue, ValidationError

from exo.worker.protocol.commands import Estimate, Load
from exo.worker.protocol.events import Estimated, Failed, LoadOption
from exo.worker.protocol.runners import RUNNERS
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.model_files.gguf import GgufHeader
from exo.worker.runner_cuda.bindings import Context, Logits, Rows
from exo.worker.runner_cuda.loading import estimate as estimates
from exo.worker.runner_cuda.loading import peers
from exo.worker.runner_cuda.loading.devices import Gpu
from exo.worker.runner_cuda.loading.gguf_sizes import DEVICE_CONTEXT
from exo.worker.runner_cuda.loading.llama_log import Log
from exo.worker.runner_cuda.loading.model import Model
from exo.worker.runner_cuda.loading.options import CudaOptions
from exo.worker.runner_cuda.loading.placement import WITHOUT_TENSOR, Placement, check_architecture, chosen
from tests.support.gguf_bytes import field, header, read, text
from tests.support.program import Program, runner_command
from tests.support.tiny import Shape, write_gguf

MIB = 1 << 20
LAYERS = 6
WIDE = Shape("llama", layers=LAYERS, heads=4, kv_heads=4, head_dim=64)


class Card(Gpu):
    """A device that no machine here has; its handle is the MiB that are free of 1,000."""

    def memory(self) -> tuple[int, int]:
        return self.handle * MIB, 1000 * MIB


CARDS = tuple(Card(f"CUDA{index}", free, splits_rows=False) for index, free in enumerate((900, 300)))


def options(**table: JsonValue) -> CudaOptions:
    return CudaOptions.model_validate({"path": "model.gguf", **table})


def names(**table: JsonValue) -> list[str]:
    return [each.name for each in chosen(options(**table), "LlamaCppCuda", CARDS)]


def test_all_gpus_are_used_or_those_of_the_card_in_its_order() -> None:
    assert names() == ["CUDA0", "CUDA1"]
    assert names(devices=["CUDA1", "CUDA0"]) == ["CUDA1", "CUDA0"]
    assert names(devices=["CUDA1"]) == ["CUDA1"]
    assert names(devices=["CPU"]) == []
    assert names(n_gpu_layers=0) == []
    assert names(split_mode="none") == ["CUDA0"]
    assert names(split_mode="none", main_gpu=1) == ["CUDA1"]
    assert names(split_mode="none", main_gpu=1, devices=["CUDA1", "CUDA0"]) == ["CUDA0"]
    assert names(split_mode="tensor", tensor_split=[3, 1]) == ["CUDA0", "CUDA1"]


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({"devices": ["CUDA0", "CUDA2"]}, "devices: LlamaCppCuda has no device 'CUDA2' here; it has CUDA0, CUDA1"),
        ({"tensor_split": [1]}, "tensor_split: has 1 numbers, but must have one for each device .*: CUDA0, CUDA1"),
        ({"tensor_split": [1, 2, 3]}, "tensor_split: has 3 numbers"),
        ({"tensor_split": [1, 2], "devices": ["CUDA1"]}, "tensor_split: has 2 numbers, .*: CUDA1"),
        ({"tensor_split": [1, 2], "devices": ["CPU"]}, "tensor_split: has 2 numbers, .*: none"),
        ({"split_mode": "row"}, 'split_mode: .* cannot split rows over CUDA0, CUDA1; "tensor"'),
        ({"split_mode": "tensor", "devices": ["CPU"]}, 'split_mode: "tensor" needs a GPU'),
        ({"split_mode": "none", "main_gpu": 2}, "main_gpu: is 2, but must be an index from 0 .*: CUDA0, CUDA1"),
        ({"split_mode": "none", "main_gpu": 1, "devices": ["CUDA1"]}, "main_gpu: is 1, .*: CUDA1"),
    ],
)
def test_what_the_machine_or_the_build_does_not_have_is_refused_by_the_keys_name(
    table: dict[str, JsonValue], why: str
) -> None:
    with pytest.raises(LoadError, match=rf"model card, \[cuda\] {why}"):
        names(**table)


@pytest.mark.parametrize("built", [False, True])
def test_shares_of_a_layer_on_three_cuda_devices_need_a_build_with_nccl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: bool
) -> None:
    (tmp_path / "libggml-cuda.so").write_bytes(b"\x7fELF" + b"ncclCommInitAll\0" * built)
    monkeypatch.setenv("EXO_CUDA_PLUGIN", str(tmp_path))
    three = [Gpu(f"CUDA{at}", 1, splits_rows=False, cuda=True) for at in range(3)]
    tensor = options(split_mode="tensor")
    assert len(chosen(tensor, "LlamaCppCuda", three[:2])) == 2
    if built:
        assert len(chosen(tensor, "LlamaCppCuda", three)) == 3
        return
    with pytest.raises(LoadError, match=r"\[cuda\] split_mode: .* without NCCL"):
        chosen(tensor, "LlamaCppCuda", three)


def test_rows_are_split_where_the_build_can() -> None:
    able = [Gpu("CUDA0", 1, splits_rows=True), Gpu("CUDA1", 1, splits_rows=True)]
    assert [each.name for each in chosen(options(split_mode="row"), "LlamaCppCuda", able)] == ["CUDA0", "CUDA1"]


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({"devices": []}, "at least 1"),
        ({"devices": ["CUDA0", "CUDA0"]}, "each device once"),
        ({"devices": ["CPU", "CUDA0"]}, "must be the only name"),
        ({"tensor_split": [0, 0]}, "a number above 0"),
        ({"tensor_split": [1, -1]}, "greater than or equal to 0"),
        ({"tensor_split": [1, 1], "split_mode": "none"}, 'split_mode "none" uses one'),
        ({"main_gpu": 1}, 'only if split_mode is "none"'),
        ({"split_mode": "tensor", "flash_attn": "off"}, "needs flash_attn"),
        ({"split_mode": "tensor", "cache_type_k": "q8_0"}, "needs cache types among f32, f16, bf16, not q8_0 and f16"),
        ({"split_mode": "sideways"}, "'none', 'layer', 'row' or 'tensor'"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(table: dict[str, JsonValue], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        options(**table)


@pytest.mark.parametrize(
    ("shares", "n_device", "layers"),
    [
        ((1, 1), 5, ["CUDA0", "CUDA0", "CUDA0", "CUDA1", "CUDA1"]),
        ((3, 1), 5, ["CUDA0", "CUDA0", "CUDA0", "CUDA0", "CUDA1"]),
        ((1, 1), 2, ["", "", "", "CUDA0", "CUDA1"]),
        ((1, 1), 99, ["CUDA0", "CUDA0", "CUDA0", "CUDA1", "CUDA1"]),
        ((0, 1), 5, ["CUDA1"] * 5),
        ((1, 0), 3, ["", "", "CUDA0", "CUDA0", "CUDA0"]),
        ((1, 1), 0, [""] * 5),
    ],
)
def test_whole_layers_go_on_the_devices_in_their_order_and_the_first_ones_stay(
    shares: tuple[float, ...], n_device: int, layers: list[str]
) -> None:
    where = Placement(("CUDA0", "CUDA1"), shares).layers(4, n_device)
    assert where == [{name: 1.0} if name else {} for name in layers]


def test_by_tensor_each_device_has_its_share_of_each_layer() -> None:
    where = Placement(("CUDA0", "CUDA1"), (3, 1), by_tensor=True).layers(2, 2)
    assert where == [{}, {"CUDA0": 0.75, "CUDA1": 0.25}, {"CUDA0": 0.75, "CUDA1": 0.25}]


def test_llama_cpp_refuses_to_share_out_the_layers_of_exactly_these_architectures(tmp_path: Path) -> None:
    """It looks at the architecture first, then at the devices, of which there are none, and then at the rest."""
    log, path = Log(), tmp_path / "bare.gguf"
    params = llama_cpp.llama_model_default_params()
    params.split_mode = llama_cpp.LLAMA_SPLIT_MODE_TENSOR
    nothing = (ctypes.c_void_p * 1)()
    params.devices = ctypes.cast(nothing, ctypes.c_void_p)  # pyright: ignore[reportAttributeAccessIssue]
    refused: set[str] = set()
    for architecture in sorted({*MODEL_ARCH_NAMES.values(), *WITHOUT_TENSOR}):
        writer = GGUFWriter(path, architecture)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        log.errors.clear()
        assert not llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if any("not implemented for architecture" in line for line in log.errors):
            refused.add(architecture)
    assert refused == WITHOUT_TENSOR


def test_such_an_architecture_is_refused_before_it_is_loaded() -> None:
    def of(architecture: str) -> GgufHeader:
        return read(header(field("general.architecture", 8, text(architecture))))

    with pytest.raises(LoadError, match=r'split_mode: llama\.cpp cannot split "olmo2" models by "tensor"'):
        check_architecture(options(split_mode="tensor"), of("olmo2"))
    check_architecture(options(split_mode="tensor"), of("llama"))
    check_architecture(options(), of("olmo2"))


def first_logits(path: Path, devices: Sequence[Gpu], **table: JsonValue) -> Logits:
    chosen_options, log = options(n_ctx=512, slots=2, threads=1, **table), Log()
    model = Model(path, chosen_options, devices, lambda _: None, log)
    context = Context(model, chosen_options, 512, Rows(step=8, graph=8, outputs=2), log)
    context.batch.tokens[:3], context.batch.positions[:3] = (1, 2, 3), range(3)
    context.batch.outputs[2] = 1
    context.decode(3)
    logits = context.logits(1).copy()
    context.free()
    model.free()
    return logits


def test_layers_on_the_devices_of_a_list_compute_what_they_compute_without_one(tmp_path: Path) -> None:
    """The processors stand in for two devices: llama.cpp takes any that ggml has."""
    write_gguf(tmp_path / "wide.gguf", WIDE)
    llama_library = llama_cpp.llama_cpp._lib  # pyright: ignore[reportPrivateUsage]
    llama_library.ggml_backend_dev_get.restype = ctypes.c_void_p
    processors = Gpu("CPU", llama_library.ggml_backend_dev_get(ctypes.c_size_t(0)), splits_rows=False)
    expected = first_logits(tmp_path / "wide.gguf", ())
    found = first_logits(tmp_path / "wide.gguf", (processors, processors), tensor_split=[1, 2])
    assert np.isfinite(expected).all()
    assert np.array_equal(found, expected)


# --- what goes on which device ---


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:

    def cards(_: str) -> Sequence[Gpu]:
        return CARDS

    monkeypatch.setattr(peers, "gpus", cards)
    write_gguf(tmp_path / "wide.gguf", WIDE)
    return tmp_path / "wide.gguf"


def ask(path: Path, **table: JsonValue) -> Estimated:
    given = {"path": str(path), "threads": 1, "n_ctx": 1024, "slots": 2, "prefix_cache_bytes": 0}
    stated = {"n_gpu_layers": -1, "split_mode": "layer"}
    table = {key: value for key, value in {**given, **stated, **table}.items() if value is not None}
    return estimates.estimate(Estimate(load=Load(model_id="test/wide", backend="LlamaCppCuda", table=table)))


def only(path: Path, **table: JsonValue) -> LoadOption:
    (choice,) = ask(path, **table).choices
    return choice


def test_a_model_on_one_card_takes_nothing_of_the_other(model: Path) -> None:
    first, second = only(model, devices=["CUDA0"]), only(model, devices=["CUDA1"])
    assert (first.devices.keys(), second.devices.keys()) == ({"CUDA0"}, {"CUDA1"})
    assert first.devices["CUDA0"] == second.devices["CUDA1"] > DEVICE_CONTEXT
    assert only(model, split_mode="none", main_gpu=1) == second
    assert only(model, devices=["CPU"]).devices == {}


def test_layers_and_their_cache_are_divided_and_nothing_is_lost(model: Path) -> None:
    one = only(model, devices=["CUDA0"])
    two = only(model, tensor_split=[1, 1])
    assert two.devices.keys() == {"CUDA0", "CUDA1"}
    assert (two.parts["weights"], two.parts["KV cache"]) == (one.parts["weights"], one.parts["KV cache"])
    assert two.host - two.later_host == one.host - one.later_host
    assert two.later_devices.keys() == {"CUDA0", "CUDA1"}


def test_the_cache_is_where_its_layers_are(model: Path) -> None:
    """Six layers and what is behind them, of which the devices have five and two, or the other way round."""
    layer = 2 * 1024 * 2 * (4 * 64) * 2  # slots, tokens, keys and values, elements, bytes
    masks = 4 * 512 * 1024 * 2  # copies, rows, tokens, bytes
    for first, second, layers in ((2, 1, (5, 1)), (1, 3, (2, 4))):
        short, long = (only(model, tensor_split=[first, second], n_ctx=n_ctx) for n_ctx in (1024, 2048))
        for device, count in zip(("CUDA0", "CUDA1"), layers, strict=True):
            before, after = (each.devices[device] - each.later_devices[device] for each in (short, long))
            assert after - before == count * layer + masks


def test_by_tensor_each_card_has_its_share_and_a_copy_of_what_cannot_be_shared(model: Path) -> None:
    one = only(model, devices=["CUDA0"])
    two = only(model, split_mode="tensor")
    assert two.devices["CUDA0"] == two.devices["CUDA1"]
    assert two.parts["KV cache"] == one.parts["KV cache"]
    assert one.parts["weights"] < two.parts["weights"] < 1.5 * one.parts["weights"]
    assert not [each for each in ask(model, split_mode="tensor").remedies if "cache_type_k" in each.settings]
    uneven = only(model, split_mode="tensor", tensor_split=[3, 1])
    assert uneven.devices["CUDA0"] > two.devices["CUDA0"] > uneven.devices["CUDA1"]


def test_what_the_card_leaves_open_is_divided_by_what_is_free_and_others_go_for_all_there_is(model: Path) -> None:
    estimated = ask(model)
    assert [each.settings for each in estimated.choices] == [
        {"devices": ["CUDA0", "CUDA1"], "tensor_split": [0.75, 0.25]},
        {"devices": ["CUDA0", "CUDA1"], "tensor_split": [0.5, 0.5]},
    ]
    assert estimated.enough == 1
    for each in estimated.choices:
        assert each.devices == only(model, tensor_split=each.settings["tensor_split"]).devices


def test_an_open_context_and_open_layers_are_tried_with_each_way_to_divide_them(model: Path) -> None:
    estimated = ask(model, n_gpu_layers="auto")
    settings = [(each.settings["n_gpu_layers"], each.settings["tensor_split"]) for each in estimated.choices]
    assert settings[:4] == [(7, [0.75, 0.25]), (7, [0.5, 0.5]), (6, [0.75, 0.25]), (6, [0.5, 0.5])]
    assert settings[estimated.enough] == (7, [0.5, 0.5])
    assert set(estimated.choices[-1].devices.values()) == {DEVICE_CONTEXT}
    usual = ask(model, n_ctx="auto").choices
    assert all(each.settings.keys() == {"n_ctx", "kv", "devices", "tensor_split"} for each in usual)


def test_a_card_that_says_nothing_of_devices_goes_on_one_of_them_the_emptiest_first(model: Path) -> None:
    estimated = ask(model, split_mode=None, n_gpu_layers=None)
    assert [each.settings["devices"] for each in estimated.choices[:4]] == [
        ["CUDA0"],
        ["CUDA1"],
        ["CUDA0", "CUDA1"],
        ["CUDA0", "CUDA1"],
    ]
    assert (estimated.enough, estimated.as_good) == (0, 3)
    first = estimated.choices[0]
    assert first.devices == only(model, devices=["CUDA0"]).devices
    assert first.layout is not None
    assert (first.layout.layers, first.layout.context_length, first.layout.slots) == ({"CUDA0": LAYERS + 1}, 1024, 2)
    fewer = next(each for each in estimated.choices if each.settings["n_gpu_layers"] == 5)
    assert fewer.layout is not None
    assert sum(count for place, count in fewer.layout.layers.items() if place != "RAM") == 5


def test_on_a_device_a_context_that_nobody_sets_is_the_trained_one(model: Path) -> None:
    estimated = ask(model, n_ctx=None, slots=None, devices=["CUDA0"], n_gpu_layers=None)
    first = estimated.choices[0]
    assert first.settings == {"n_ctx": WIDE.context_length, "slots": 4, "kv": "split", "n_gpu_layers": LAYERS + 1}
    assert estimated.trained == WIDE.context_length
    assert estimated.longest_because == ""


def test_other_devices_are_a_remedy(model: Path) -> None:
    remedies = ask(model, devices=["CUDA1"]).remedies
    elsewhere = [each for each in remedies if "devices" in each.settings]
    assert [each.settings for each in elsewhere] == [
        {"devices": ["CUDA0"]},
        {"devices": ["CUDA0", "CUDA1"], "tensor_split": [1, 1]},
    ]
    assert elsewhere[0].devices == only(model, devices=["CUDA0"]).devices
    assert elsewhere[1].devices == only(model, tensor_split=[1, 1]).devices


# --- the runner itself, which has no such device here ---


@pytest.fixture
def program() -> Program:
    return Program(runner_command(RUNNERS["cuda"].module))


def load(path: Path, **table: JsonValue) -> Load:
    table = {"path": str(path), "threads": 1, "n_ctx": 512, **table}
    return Load(model_id="test/wide", backend="LlamaCppCpu", table=table)


@pytest.mark.parametrize("estimating", [False, True])
@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({"devices": ["CUDA0"]}, "devices: LlamaCppCpu has no device 'CUDA0' here; it has CPU"),
        ({"split_mode": "tensor"}, 'split_mode: "tensor" needs a GPU'),
        ({"tensor_split": [1, 1]}, "tensor_split: has 2 numbers"),
        ({"main_gpu": 1}, 'main_gpu chooses a device only if split_mode is "none"'),
    ],
)
def test_a_device_that_is_not_there_is_refused_by_the_runner(
    tmp_path: Path, program: Program, table: dict[str, JsonValue], why: str, estimating: bool
) -> None:
    write_gguf(tmp_path / "wide.gguf", WIDE)
    command = load(tmp_path / "wide.gguf", **table)
    with program:
        program.send(Estimate(load=command) if estimating else command)
        program.until(lambda: program.failure is not None)
        assert isinstance(program.failure, Failed)
        assert program.failure.code == "model_misconfigured"
        assert why in program.failure.message
        assert program.drain() == 1


def test_without_any_device_the_processors_compute(tmp_path: Path, program: Program) -> None:
    write_gguf(tmp_path / "wide.gguf", WIDE)
    with program:
        assert program.load(load(tmp_path / "wide.gguf", devices=["CPU"])).devices == ("CPU",)
