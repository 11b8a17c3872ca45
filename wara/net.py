"""Is a host there? Answered within seconds, never by a time-out of minutes."""

from __future__ import annotations

import os
import socket
import threading
from urllib.parse import urlsplit
from urllib.request import getproxies

REACH_SECONDS = 2.0


def reachable(url: str, seconds: float = REACH_SECONDS) -> bool:
    """Tell whether the host of `url`, or the proxy in front of it, takes a connection.

    Decided within about `seconds`: looking up a name can block for much longer than a socket's
    timeout, so it happens in a thread that is left behind. `WARA_OFFLINE=1` means no.

    Args:
        url: address with its scheme.
        seconds: how long to wait.

    Returns:
        True when a connection was made.
    """
    if os.environ.get("WARA_OFFLINE", "") not in ("", "0"):
        return False
    target = urlsplit(url)
    proxy = getproxies().get(target.scheme)
    address = urlsplit(proxy if proxy and "://" in proxy else f"//{proxy}") if proxy else target
    port = address.port or (443 if address.scheme == "https" else 80)
    answered = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((address.hostname or "", port), timeout=seconds).close()
        except OSError:
            return  # not reachable is an answer, given by the event that stays unset
        answered.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds + 0.5)
    return answered.is_set()
