"""An HTTP server that answers as a test says, byte for byte, and notes what it was asked."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Answer = Callable[[socket.socket], None]


class HostileServer:
    """One answer for every connection."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.requests: list[str] = []
        """First lines."""
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()

    def serve(self) -> None:
        """Answers until closed."""
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def close(self) -> None:
        """Stops listening."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _one(self, connection: socket.socket) -> None:
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        with connection, suppress(OSError):
            request = connection.recv(65536).decode()
            self.requests.append(request.partition("\r\n")[0])
            self._answer(connection)
        with self._lock:
            self._now -= 1


@contextmanager
def hostile_server(answer: Answer) -> Iterator[HostileServer]:
    """A running server on this machine."""
    server = HostileServer(answer)
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join()


def sending(body: bytes, status: str = "200 OK", *headers: str) -> Answer:
    """An answer with this body."""
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]

    def answer(connection: socket.socket) -> None:
        connection.sendall("\r\n".join([*head, "", ""]).encode() + body)

    return answer


def pouring(connection: socket.socket) -> None:
    """An answer of unknown length that never ends."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{")
    while True:
        connection.sendall(b" " * 65536)


def dripping(connection: socket.socket) -> None:
    """One byte at a time: every read gets something, and the whole never comes."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{")
    closed = threading.Event()
    while not closed.wait(0.1):
        connection.sendall(b" ")


def silent(connection: socket.socket) -> None:
    """Takes the request and says nothing."""
    connection.recv(1)
