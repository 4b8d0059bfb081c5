"""Closes the network for a process and notes what wanted it; Python imports this at its start."""

import os
import socket


def refuse(*arguments, **options):
    with open(os.environ["NETWORK_LOG"], "a") as log:
        log.write(f"{arguments}\n")
    raise OSError("there is no network in this test")


def connect(self, address):
    return refuse(address) if isinstance(address, tuple) else _connect(self, address)


_connect = socket.socket.connect
socket.socket.connect = connect
socket.getaddrinfo = socket.gethostbyname = refuse
