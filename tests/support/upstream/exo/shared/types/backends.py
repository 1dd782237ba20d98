from enum import StrEnum


class Backend(StrEnum):
    MlxMetal = "MlxMetal"
    MlxCpu = "MlxCpu"
    LlamaCppCuda = "LlamaCppCuda"
    LlamaCppCpu = "LlamaCppCpu"
