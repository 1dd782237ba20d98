from dataclasses import dataclass


class CancelledResponse: ...


class FinishedResponse: ...


@dataclass
class ModelLoadingResponse:
    layers_loaded: int
    total: int
