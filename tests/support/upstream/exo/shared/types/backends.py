from enum import StrEnum


class Backend(StrEnum):
    MlxCpu = "MlxCpu"
    LlamaCppCuda = "LlamaCppCuda"
    LlamaCppCpu = "LlamaCppCpu"
