"""The last moments of a server that stops: no connection is broken off that could still get an answer."""

import socket
import time

from uvicorn.protocols.http.h11_impl import H11Protocol

OPEN_SECONDS = 0.5  # that a connection stays open without a request when the server stops
ENDING_SECONDS = 1.0  # for all connections that nobody has accepted
READ_SECONDS, REQUEST_BYTES = 0.1, 1 << 16  # to wait for the request of one of them, and to read of it
REFUSAL = b'{"detail":"the server is stopping: try again in a moment"}'
ANSWER = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%b" % (len(REFUSAL), REFUSAL)
)


class PatientProtocol(H11Protocol):
    """uvicorn's protocol, which answers a request that is on its way when the server stops."""

    def shutdown(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(OPEN_SECONDS, self._close)
        else:
            super().shutdown()

    def _close(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()


def turn_away(taken: socket.socket) -> None:
    """Answer connections that nobody has accepted: to close their socket would reset them."""
    taken.setblocking(False)
    until = time.monotonic() + ENDING_SECONDS
    while time.monotonic() < until:
        try:
            connection, _ = taken.accept()
        except OSError:  # there are no more
            return
        with connection:
            try:
                connection.settimeout(READ_SECONDS)
                connection.recv(REQUEST_BYTES)  # or to close it would reset it
                connection.sendall(ANSWER)
            except OSError:  # the client has gone
                continue
