"""The environment in which NCCL joins two processes on one GPU, for tests."""

from __future__ import annotations


def one_gpu_environment(worker_id: str) -> dict[str, str]:
    """Makes NCCL take two processes on one GPU for two hosts, which then talk through the loopback device.

    NCCL refuses two ranks on one GPU of one host; it knows a host by NCCL_HOSTID where that is set.
    """
    return {
        "NCCL_HOSTID": worker_id,
        "NCCL_NET": "Socket",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
        "NCCL_P2P_DISABLE": "1",
        "NCCL_SHM_DISABLE": "1",
    }
