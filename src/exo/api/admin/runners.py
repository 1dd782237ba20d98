"""The state of runners in the form of the API: identity, load, memory and failures."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel

from exo.worker.protocol.events import CpuUse, ErrorCode, PrefixUse, RunnerState
from exo.worker.supervisor.placement_plan import PlacementPlan

if TYPE_CHECKING:  # exo ps has no use for the rest of the supervisor
    from exo.worker.supervisor.instance import InstanceReport


class LastFailure(BaseModel):
    """A runner's failure. ``message`` contains the exit code or signal, an explanation, and the end of its log."""

    code: ErrorCode
    message: str
    at: int
    """Seconds since 1970."""


class DeviceMemory(BaseModel):
    """Bytes of one device's memory."""

    device: str
    reserved: int
    """The reservation on the device."""
    measured: int | None
    """The memory that it uses there; null until it is measured."""


class Instance(BaseModel):
    """One runner process, or the last failed one of a runner that has not worked with its model since."""

    model: str
    runner: str
    host: str = ""
    """The other host where it runs; empty for this machine. ``pid`` is the process there."""
    instance: str
    backend: str
    devices: list[str]
    """Empty until the model is loaded; sizes are 0 until then."""
    state: RunnerState
    layers_loaded: int
    total_layers: int
    slots: int
    context_length: int = 0
    """Tokens of one sequence, prompt and output together."""
    notes: list[str] = []
    """Notes about the model's files, such as a fault that makes the output worse."""
    active: int
    """The number of sequences in a slot."""
    waiting: int
    """The number of sequences that wait for a slot."""
    model_bytes: int
    pid: int | None
    started: int
    """Seconds since 1970."""
    deaths: int
    """The number of failures of this runner with this model and these settings since the server started."""
    last_failure: LastFailure | None
    """It stays after the runner works again."""
    tokens_per_second: float
    """The recent rate of generation of all sequences together."""
    cpu: CpuUse | None = None
    """Its use of the CPU; null if it does not compute there or does not report it."""
    prefixes: PrefixUse | None = None
    """Its prompts and the prefixes found for them; null if it does not report that."""
    memory_reserved: int
    """The reservation of RAM, in bytes. The next field is that of all devices together."""
    device_memory_reserved: int
    memory_measured: int | None
    """The RAM that it uses, in bytes; null until the model is loaded."""
    device_memory_measured: int | None
    device_memory: list[DeviceMemory]
    """Reservation and use of each device."""
    plan: PlacementPlan | None = None
    """How it is loaded; null before that is decided."""
    layers: Mapping[str, int] = {}
    """The number of layers in each place, "RAM" or a device, by the engine's own account; the output counts as one."""
    experts_in_ram: int = 0
    """The number of layers on a device whose experts are in RAM, by the engine's own account."""
    pinned: bool
    """Whether it stays loaded until it is unloaded by hand."""
    expires_seconds: float | None
    """The time until it is unloaded if it stays unused; null if it never is."""
    outdated: bool = False
    """Whether its model card has changed or gone since it was started. It keeps its settings until it ends; the next
    request for the model starts another by the card as it is then."""
    retry_seconds: float
    """The time until this runner may be started with this model again; 0 if it runs or may be started now."""

    @property
    def place(self) -> str:
        """Runner and host, such as "cuda@gpu2"; the runner alone for this machine."""
        return f"{self.runner}@{self.host}" if self.host else self.runner

    @classmethod
    def of(cls, report: "InstanceReport", *, outdated: bool = False) -> Self:
        """The form of the API."""
        now, failed = report.now, report.last_failure
        model = now.capabilities
        return cls(
            model=now.model_id,
            runner=now.runner,
            host=now.host,
            instance=now.instance,
            backend=report.backend,
            devices=list(model.devices) if model else [],
            state=now.state,
            layers_loaded=report.status.layers_loaded,
            total_layers=report.status.total_layers,
            slots=now.slots,
            context_length=model.context_length if model else 0,
            notes=list(report.notes),
            layers=model.layers if model else {},
            experts_in_ram=model.experts_in_ram if model else 0,
            active=now.active,
            waiting=now.waiting,
            model_bytes=model.model_bytes if model else 0,
            pid=report.pid,
            started=int(report.started),
            deaths=report.deaths,
            last_failure=LastFailure(code=failed.code, message=failed.message, at=int(report.failed))
            if failed
            else None,
            tokens_per_second=round(report.tokens_per_second, 2),
            cpu=report.cpu,
            prefixes=report.prefixes,
            memory_reserved=report.reserved.host,
            device_memory_reserved=report.reserved.device,
            memory_measured=report.measured.host if report.measured else None,
            device_memory_measured=report.measured.device if report.measured else None,
            device_memory=list(_device_memory(report)),
            plan=report.plan,
            pinned=report.pinned,
            expires_seconds=None if report.time_left is None else round(report.time_left, 3),
            outdated=outdated,
            retry_seconds=round(report.pause, 3),
        )


def _device_memory(report: "InstanceReport") -> Iterator[DeviceMemory]:
    reserved, measured = report.reserved.devices, report.measured and report.measured.devices
    for name in dict.fromkeys((*reserved, *(measured or ()))):
        has = None if measured is None else measured.get(name, 0)
        yield DeviceMemory(device=name, reserved=reserved.get(name, 0), measured=has)


class InstanceList(BaseModel):
    """The runners, and those that failed."""

    object: Literal["list"] = "list"
    data: list[Instance]
    notices: list[str] = []
    """Notes for the operator about this host, such as a GPU that is not used."""
