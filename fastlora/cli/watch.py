"""Ranks that watch each other: who ends without a word is noticed at once.

Each rank holds a connection to rank 0, which the system closes when a process ends, however it ends. The work itself
tells errors in its exchanges (:mod:`fastlora.runtime.ranks`); this finds those who tell nothing any more. A rank that
ends as it should says so before: rank 0 when it has printed all, the others when their part is done.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import threading
from collections.abc import Callable, Mapping

from fastlora.runtime import ranks

BYE = b"."
# A machine that is gone closes nothing: probes find it after 2 + 3 seconds.
KEEPALIVE = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3}


class Watch:
    """The connections of one rank; ``lost(rank)`` is called in a thread of their own when another rank is gone.

    ``first_has_left``: rank 0 has said all, or is gone; ``others_have_left``: so have those that this one watches."""

    def __init__(self, sockets: Mapping[int, socket.socket], lost: Callable[[int], None]) -> None:
        self._sockets, self._lost = sockets, lost
        self._ended = threading.Event()
        self.first_has_left, self.others_have_left = threading.Event(), threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._sockets.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    data = b""
                    with contextlib.suppress(OSError):
                        data = key.fileobj.recv(1)  # type: ignore[union-attr]
                    if not data and (key.data == 0 or not self._ended.is_set()):
                        self._lost(key.data)
                    selector.unregister(key.fileobj)
                    if key.data == 0:
                        self.first_has_left.set()
        self.others_have_left.set()

    def end(self) -> None:
        """Takes leave: from here on, nobody misses this rank."""
        self._ended.set()
        for connection in self._sockets.values():
            with contextlib.suppress(OSError):
                connection.sendall(BYE)


def connected(own: ranks.Ranks) -> dict[int, socket.socket]:
    """Rank 0's connections to all others, or another rank's to rank 0."""
    address = os.environ["MASTER_ADDR"]
    if own.is_first:
        family = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family[0], socket.SOCK_STREAM)
        listening.bind((family[4][0], 0))
        listening.listen(own.count)
        token, port = secrets.token_bytes(16), listening.getsockname()[1]
        ranks.from_first("connecting", lambda: (token, port))
        sockets: dict[int, socket.socket] = {}
        listening.settimeout(60.0)
        while len(sockets) < own.count - 1:
            connection, _ = listening.accept()
            connection.settimeout(10.0)
            with contextlib.suppress(OSError):
                greeting = connection.recv(20, socket.MSG_WAITALL)
                if secrets.compare_digest(greeting[:16], token):
                    sockets[int.from_bytes(greeting[16:], "big")] = connection
        listening.close()
    else:
        token, port = ranks.from_first("connecting", lambda: (b"", 0))
        connection = socket.create_connection((address, port), timeout=60.0)
        connection.sendall(token + own.rank.to_bytes(4, "big"))
        sockets = {0: connection}
    for connection in sockets.values():
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return sockets
