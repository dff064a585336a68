"""Servers that speak Redis badly."""

import socket
import threading
from contextlib import contextmanager, suppress


@contextmanager
def tcp_server(answer):
    """A port where each connection that has sent something is handed to `answer`."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads = []
    connections = []

    def serve(connection):
        with connection:
            try:
                while connection.recv(65536):
                    answer(connection)
            except OSError:
                pass  # the client has had enough

    def accept():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # the test is over
            connections.append(connection)
            thread = threading.Thread(target=serve, args=(connection,))
            threads.append(thread)
            thread.start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        acceptor.join()
        for connection in connections:
            with suppress(OSError):  # closed by then
                connection.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
