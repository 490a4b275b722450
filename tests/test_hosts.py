"""Hosts of tests: each has an address, links are cut and healed, and nothing of them is left behind."""

import signal
import socket
import subprocess
import sys

import pytest

from tests.hosts import Hosts, hosts, ip

PORT = 7000
ECHO = """
import socket
with socket.socket(type=socket.SOCK_DGRAM) as server:
    server.bind(("", 7000))
    print("ready", flush=True)
    while True:
        words, sender = server.recvfrom(99)
        server.sendto(words, sender)
"""


def echoes(address: str) -> bool:
    """Whether a word comes back from there; one of several, for the first may wait for an address."""
    with socket.socket(type=socket.SOCK_DGRAM) as client:
        client.settimeout(0.3)
        for _ in range(5):
            client.sendto(b"word", (address, PORT))
            try:
                return client.recv(99) == b"word"
            except TimeoutError:
                pass
    return False


def listen(made: Hosts, host: str) -> "subprocess.Popen[bytes]":
    server = subprocess.Popen(made.command(host, [sys.executable, "-c", ECHO]), stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    server.stdout.close()
    return server


def end(server: "subprocess.Popen[bytes]") -> None:
    server.kill()
    server.wait()


def test_a_cut_link_carries_nothing_and_a_healed_one_does_again() -> None:
    with hosts("one", "two", "three") as made:
        server = listen(made, "two")
        try:
            address = made.address("two")
            assert made.call("one", echoes, address)
            made.cut("one", "two")
            assert not made.call("one", echoes, address)
            assert made.call("three", echoes, address)
            made.heal()
            assert made.call("one", echoes, address)
            made.cut_one_way("two", "one")
            assert not made.call("one", echoes, address)
            made.heal()
            made.isolate("two")
            assert not made.call("three", echoes, address)
            made.heal()
            assert made.call("three", echoes, address)
        finally:
            end(server)


def test_hosts_end_with_all_that_runs_in_them_also_after_a_failure() -> None:
    with pytest.raises(AssertionError, match=r"exit\(3\) on one exited with 3"), hosts("one") as made:
        server = listen(made, "one")
        assert made.processes("one") == [server.pid]
        made.run("one", [sys.executable, "-c", "exit(3)"])
    assert server.wait() == -signal.SIGKILL
    assert made.mark not in ip("netns", "list")
