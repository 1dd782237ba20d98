"""The error of a runner that cannot serve."""

from exo.worker.protocol.events import Failed


class RunnerError(Exception):
    """The runner cannot serve: it did not start, could not load, died or was shut down. ``failed`` is the reason.

    ``retry_seconds`` is the time until a retry makes sense, if known.
    """

    def __init__(self, failed: Failed, retry_seconds: float | None = None) -> None:
        super().__init__(failed.message)
        self.failed = failed
        self.retry_seconds = retry_seconds
