"""The network interface over which NCCL's ranks find each other, and move data where there is no InfiniBand.

NCCL takes the first interface that is not Docker's or the loopback device. On a machine with several networks that need
not be the one by which the worker's peers reach it.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket

import psutil

logger = logging.getLogger(__name__)

VARIABLE = "NCCL_SOCKET_IFNAME"


def use_interface_of(address: str) -> str:
    """Let this process's NCCL use the interface of the address at which its worker is reached, unless the environment
    says which. To be called before NCCL is first used.

    Returns:
        The variable's value; "" where the choice is left to NCCL: on one machine any interface will do.
    """
    if VARIABLE not in os.environ and (name := interface_of(address)) is not None:
        os.environ[VARIABLE] = f"={name}"  # not every interface whose name begins so
    return os.environ.get(VARIABLE, "")


def interface_of(host: str) -> str | None:
    """This machine's interface that has the host's address; None for the loopback device, or if there is none."""
    try:
        found = socket.getaddrinfo(host, None) if host else []
    except OSError as error:
        logger.warning("which interface NCCL should use is not known: %s is no host here (%s)", host, error)
        return None
    addresses = {str(each[4][0]) for each in found}
    if any(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses):
        return None
    for name, own in psutil.net_if_addrs().items():
        if any(each.address in addresses for each in own):
            return name
    return None
