"""Where the processes of a run find one another."""

import contextlib
import os
import random
import socket

import psutil


def free_port() -> int:
    """One that nobody listens on, and that the system gives to nobody by itself: before it is used,
    some seconds pass."""
    while True:
        port = random.SystemRandom().randrange(20000, 29000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def name_interface() -> None:
    """Tell gloo which network card leads to the first process. By itself it takes that of this
    machine's own name, which is often 127.0.1.1 and then reaches no other machine."""
    if os.environ["LOCAL_SIZE"] == os.environ["WORLD_SIZE"]:
        return
    first = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        family, kind, *_, address = socket.getaddrinfo(*first, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            # Of a datagram socket this sends nothing.
            probe.connect(address)
            own = probe.getsockname()[0]
    except OSError:
        # Joining them then says more about it.
        return
    cards = {
        name: [a.address for a in found if a.family == family]
        for name, found in psutil.net_if_addrs().items()
    }
    outward = [
        n for n, found in cards.items() if found and not found[0].startswith(("127.", "::1"))
    ]
    leading = [name for name in outward if own in cards[name]]
    # Of the first machine's own name nothing is learned, where it is one of 127.0.0.0/8.
    if len(leading or outward) == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", (leading or outward)[0])
