"""What a server says about its runners: what each is, how busy it is, how often it died and why."""

from collections.abc import Iterator
from typing import Literal, Self

from pydantic import BaseModel

from exo.worker.protocol.messages import CpuUse, ErrorCode, RunnerState
from exo.worker.supervisor.instance import InstanceReport


class LastFailure(BaseModel):
    """Why a runner failed. ``message`` has its exit code or signal, what that means, and its last words."""

    code: ErrorCode
    message: str
    at: int
    """Seconds since 1970."""


class DeviceMemory(BaseModel):
    """Bytes of one device's memory."""

    device: str
    """Its name, such as CUDA0."""
    reserved: int
    """What is kept for it on the device."""
    measured: int | None
    """What it has there; null until that is known."""


class Instance(BaseModel):
    """One runner process, or the last one of a runner that has failed with its model and not worked since."""

    model: str
    runner: str
    instance: str
    backend: str
    devices: list[str]
    """Empty until the model is loaded, as are the sizes."""
    state: RunnerState
    layers_loaded: int
    total_layers: int
    slots: int
    context_length: int = 0
    """Tokens of one sequence, prompt and output together."""
    notes: list[str] = []
    """What to know of the model's files, such as that they make the output worse."""
    active: int
    """Sequences in a slot."""
    waiting: int
    """Sequences that wait for one."""
    model_bytes: int
    pid: int | None
    started: int
    """Seconds since 1970."""
    deaths: int
    """How often this runner has failed with this model and these settings since the server started."""
    last_failure: LastFailure | None
    """The last time; it stays here when the runner works again."""
    tokens_per_second: float
    """Generated over the last seconds, of all sequences together."""
    cpu: CpuUse | None = None
    """How it computes on the CPU; null for a runner that does not, or does not tell."""
    memory_reserved: int
    """Bytes of the processors' memory that are kept for it, and below of all devices together."""
    device_memory_reserved: int
    memory_measured: int | None
    """Bytes that it has; null until the model is loaded."""
    device_memory_measured: int | None
    device_memory: list[DeviceMemory]
    """The same for each device that it uses."""
    pinned: bool
    """Whether it stays loaded until it is told to end."""
    expires_seconds: float | None
    """After which it is unloaded if nobody uses it from now on; null if it is not."""
    outdated: bool = False
    """Whether its model card has changed or gone since it was started. It keeps its settings until it ends; the next
    request for the model starts another by the card as it is then."""
    retry_seconds: float
    """How long this runner is not started again with this model; 0 if it runs or may be started."""

    @classmethod
    def of(cls, report: InstanceReport, *, outdated: bool = False) -> Self:
        """The wire's form of a report."""
        now, failed = report.now, report.last_failure
        model = now.capabilities
        return cls(
            model=now.model_id,
            runner=now.runner,
            instance=now.instance,
            backend=report.backend,
            devices=list(model.devices) if model else [],
            state=now.state,
            layers_loaded=report.status.layers_loaded,
            total_layers=report.status.total_layers,
            slots=now.slots,
            context_length=model.context_length if model else 0,
            notes=list(model.notes) if model else [],
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
            memory_reserved=report.reserved.host,
            device_memory_reserved=report.reserved.device,
            memory_measured=report.measured.host if report.measured else None,
            device_memory_measured=report.measured.device if report.measured else None,
            device_memory=list(_device_memory(report)),
            pinned=report.pinned,
            expires_seconds=None if report.time_left is None else round(report.time_left, 3),
            outdated=outdated,
            retry_seconds=round(report.pause, 3),
        )


def _device_memory(report: InstanceReport) -> Iterator[DeviceMemory]:
    reserved, measured = report.reserved.devices, report.measured and report.measured.devices
    for name in dict.fromkeys((*reserved, *(measured or ()))):
        has = None if measured is None else measured.get(name, 0)
        yield DeviceMemory(device=name, reserved=reserved.get(name, 0), measured=has)


class InstanceList(BaseModel):
    """What the server has running, and what failed."""

    object: Literal["list"] = "list"
    data: list[Instance]
    notices: list[str] = []
    """What the operator should know of this host, such as a GPU that is not used."""
