"""Settings that vLLM reads from environment variables only. They are set before vLLM is imported."""

import os


def set_defaults() -> None:
    """Sets the variables that are the same for all models: no downloads, no reports, no listening beyond this host.

    Threads of the CPU build that wait for each other sleep soon. Spinning, they would take the core that the awaited
    thread needs.
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


def set_network(address: str, interface: str) -> None:
    """Sets the address and the network interface over which the processes of several hosts talk to each other."""
    os.environ.update(VLLM_HOST_IP=address, GLOO_SOCKET_IFNAME=interface, NCCL_SOCKET_IFNAME=interface)


def set_compute(threads: int | None, *, eager: bool) -> None:
    """Sets the variables that depend on the model card. ``threads`` is None for a build that computes on GPUs."""
    if eager:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # else a log-probability would compile C++ for twenty seconds
    if threads is not None:
        os.environ.update(OMP_NUM_THREADS=str(threads), VLLM_CPU_OMP_THREADS_BIND="nobind")
