"""The answer to ``--probe``. Needs neither MLX nor mlx-lm to be installed."""

from importlib.metadata import PackageNotFoundError, version

from exo.worker.protocol.probe import Probe

ENGINE = "MLX"


def engine_version() -> str:
    """Such as "mlx 0.32.4 (mlx-lm 0.32.2)". Raises PackageNotFoundError."""
    return f"mlx {version('mlx')} (mlx-lm {version('mlx-lm')})"


def probe() -> Probe:
    """Whether MLX and mlx-lm are installed and load, and which card backends they serve here."""
    try:
        found_version = engine_version()
        from exo.worker.runner_mlx.loading.devices import backends, device
    except (PackageNotFoundError, ImportError, OSError) as error:
        note = f"MLX does not load: {error}"
        return Probe(installed=False, engine=ENGINE, notes=(note,), remedy="pip install 'exo[mlx]'")
    found = backends()
    note = "this MLX build sees no GPU; models run on the CPU, slowly"
    return Probe(
        installed=True,
        engine=ENGINE,
        version=found_version,
        backends=found,
        devices=tuple(device(backend) for backend in found),
        notes=(note,) if found == ("MlxCpu",) else (),
    )
