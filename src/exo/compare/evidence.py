"""What one must know to believe the numbers: which machine, which engines, set up how."""

import platform
from pathlib import Path

from exo.compare.comparison import EngineReport, HostFacts
from exo.compare.engine import Engine
from exo.compare.generation import Generated
from exo.compare.scoring import Scoring
from exo.worker.host import Host


def host_facts(host: Host) -> HostFacts:
    """The machine, from its probe."""
    return HostFacts(
        system=f"{host.system} {host.machine}",
        processor=_processor(),
        cpu_count=host.cpu_count,
        memory_total=host.memory_total,
        nvidia_devices=tuple(device.name for device in host.nvidia_devices),
    )


def engine_report(engine: Engine, scoring: Scoring, likelihood: float | None, generated: Generated) -> EngineReport:
    """One engine, from what it said of itself and what it was seen to do."""
    can = scoring.capabilities
    return EngineReport(
        name=engine.name,
        engine=can.engine,
        version=can.engine_version,
        backend=can.backend,
        devices=can.devices,
        table=dict(engine.load.table),
        settings=dict(scoring.settings),
        model_bytes=can.model_bytes,
        context_length=can.context_length,
        vocabulary=can.vocabulary,
        negative_log_likelihood=likelihood,
        speed=generated.speed,
        memory=generated.memory,
    )


def _processor() -> str:
    """The model's name where Linux tells it, else what Python knows, which may be nothing but the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
