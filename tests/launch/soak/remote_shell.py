"""What stands in for ssh between nodes that are network namespaces: lines for a shell, over TCP, without a password.

    remote_shell.py serve ADDRESS           on the node
    remote_shell.py connect ADDRESS LINE    where `ssh ADDRESS LINE` would be called; its ends are those of the line

As with ssh, the end of one's input is the end of the other's, and neither side hears of a cable that is cut.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time

PORT = 2222
LEAVING_S = 30.0  # for the line to end after its input has


def serve(address: str) -> None:
    """Each line has two connections: one for input and output, one for errors. They are the line's own ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    waiting: dict[str, tuple[str, socket.socket]] = {}
    with socket.create_server((address, PORT), backlog=64) as server:
        while True:
            connection, _ = server.accept()
            token, _, line = connection.makefile().readline().rstrip("\n").partition(" ")
            if token not in waiting:
                waiting[token] = line, connection
                continue
            line, talk = waiting.pop(token)
            subprocess.Popen(["sh", "-c", line], stdin=talk, stdout=talk, stderr=connection, start_new_session=True)
            talk.close()
            connection.close()


def connect(address: str, line: str) -> None:
    token = secrets.token_hex(8)
    assert "\n" not in line
    talk = socket.create_connection((address, PORT))
    talk.sendall(f"{token} {line}\n".encode())
    errors = socket.create_connection((address, PORT))
    errors.sendall(f"{token} -\n".encode())
    threading.Thread(target=_give, args=(talk,), daemon=True).start()
    threading.Thread(target=_pass_on, args=(errors, 2), daemon=True).start()
    _pass_on(talk, 1)


def _give(talk: socket.socket) -> None:
    while data := os.read(0, 65536):
        talk.sendall(data)
    talk.shutdown(socket.SHUT_WR)
    time.sleep(LEAVING_S)  # a node that is no more does not answer
    os._exit(1)


def _pass_on(connection: socket.socket, descriptor: int) -> None:
    try:
        while data := connection.recv(65536):
            os.write(descriptor, data)
    except OSError:
        return


if __name__ == "__main__":
    {"serve": serve, "connect": connect}[sys.argv[1]](*sys.argv[2:])
