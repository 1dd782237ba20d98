"""What only environment variables can tell vLLM. Imports nothing of it."""

import os


def prepare(threads: int | None, *, eager: bool) -> None:
    """Sets what only the environment can tell vLLM, before it is imported.

    Nothing is fetched or reported, and nothing listens on the network. Threads of the CPU part sleep soon while they
    wait for each other: spinning, they would take the core that the one they wait for needs.
    """
    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_USE_V2_MODEL_RUNNER="0",
        VLLM_COMPUTE_NANS_IN_LOGITS="1",
        VLLM_HOST_IP="127.0.0.1",
        VLLM_LOOPBACK_IP="127.0.0.1",
        GLOO_SOCKET_IFNAME="lo",
        TOKENIZERS_PARALLELISM="false",
        GOMP_SPINCOUNT="1000",
        KMP_BLOCKTIME="0",
    )
    if eager:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # else a log-probability would compile C++ for twenty seconds
    if threads is not None:
        os.environ.update(OMP_NUM_THREADS=str(threads), VLLM_CPU_OMP_THREADS_BIND="nobind")
