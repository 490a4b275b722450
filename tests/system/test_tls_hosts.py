"""Ray's machines speak TLS: on three hosts, who has no certificate of the cluster's authority is not heard.

Ray alone, by the product's commands; the whole of Nexus is upon it in test_cluster_hosts.py, without TLS.
"""

import json
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import bootstrap, certificates
from nexus.config import load_config
from tests.hosts import Hosts, hosts
from tests.running import ROOT

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

HEAD, ONE, TWO = "head", "one", "two"
CANARY = b"canary-4711-" * 40_000  # more than Ray sends beside a call
LISTEN = """
import socket, sys
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as wire, open(sys.argv[1], "wb") as file:
    wire.bind(("eth0", 0))
    print("ready", flush=True)
    while True:
        file.write(wire.recv(65535))
        file.flush()
"""
WORK = """
import ray, sys
ray.init(address="auto", namespace="nexus", log_to_driver=False, logging_level="ERROR")
canary = b"canary-4711-" * 40_000

@ray.remote(num_cpus=0.1, label_selector={"nexus.io/node": sys.argv[1]})
def turn(text):
    return text[::-1]

assert ray.get(turn.remote(ray.put(canary)), timeout=60) == canary[::-1]
print(len([node for node in ray.nodes() if node["Alive"]]))
"""


@dataclass
class There:
    hosts: Hosts
    folder: Path

    def home(self, host: str) -> Path:
        return self.folder / host

    def environment(self, host: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("NEXUS_", "RAY_"))}
        own = {"NEXUS_HOME": str(self.home(host)), "NEXUS_CONFIG": str(self.folder / "nexus.yaml")}
        return {**kept, **own, "PYTHONPATH": str(ROOT)}

    def nexus(self, host: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = self.hosts.command(host, [sys.executable, "-m", "deployments.cli", *arguments])
        return subprocess.run(
            command, cwd=ROOT, env=self.environment(host), text=True, timeout=120, stdin=subprocess.DEVNULL,
            capture_output=True, check=False,
        )  # fmt: skip

    def join(self, host: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.nexus(host, "node", "start", host, "--token-file", str(self.home(HEAD) / "ray-token"), *arguments)


def start(settings: str) -> dict[str, str]:
    """The head, with its port; what a driver of it needs in its environment."""
    config = load_config(Path(settings))
    bootstrap.prepare_home(Path(config.home))
    instance, _ = bootstrap.start_head(config, Path(settings))
    return bootstrap.driver_environment(config, instance)


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[There]:
    folder = tmp_path_factory.mktemp("tls")
    with hosts(HEAD, ONE, TWO) as made:
        machines = {
            host: {"address": made.address(host), "cpus": 1, "memory": "1GiB"} for host in (HEAD, ONE, TWO)
        }  # fmt: skip
        ray = {"head": HEAD, "tls": True, "dashboard_port": 0, "object_store_bytes": 100 * 2**20}
        (folder / "nexus.yaml").write_text(yaml.safe_dump({"nodes": machines, "ray": ray}))
        yield There(made, folder)


def greeted(address: str, home: str) -> str:
    """How a head answers who has this certificate, or none."""
    context = ssl.create_default_context(cafile=str(Path(home) / certificates.FOLDER / certificates.AUTHORITY))
    context.set_alpn_protocols(["h2"])
    host, port = address.split(":")
    try:
        with (
            socket.create_connection((host, int(port)), 10) as plain,
            context.wrap_socket(plain, server_hostname=host) as channel,
        ):
            return "heard" if channel.recv(1) else "closed"
    except ssl.SSLError as error:
        return str(error.reason)
    except ConnectionResetError:
        return "closed"


def spoken(address: str) -> Any:
    """What comes of a call in the clear."""
    import grpc

    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=5)
        except grpc.RpcError as error:
            return error.code().name  # type: ignore[attr-defined]
    return "OK"


def test_machines_with_a_certificate_of_the_cluster_are_a_cluster_and_nobody_else_is(there: There) -> None:
    driver = there.hosts.call(HEAD, start, str(there.folder / "nexus.yaml"), environment=there.environment(HEAD),
                              seconds=120)  # fmt: skip
    bundle = {host: there.folder / f"{host}.pem" for host in (ONE, TWO)}
    for host, file in bundle.items():
        made = there.nexus(HEAD, "node", "certificate", host, str(file))
        assert made.returncode == 0 and file.stat().st_mode & 0o077 == 0, made.stderr

    # Who has none, another cluster's, or speaks in the clear.
    without = there.join(TWO)
    assert without.returncode != 0 and "this machine has no certificate" in without.stderr, without.stderr
    stranger = there.folder / "stranger"
    stranger.mkdir()
    certificates.make_authority(stranger)
    (there.folder / "other.pem").write_bytes(certificates.issue(stranger, TWO, there.hosts.address(TWO)))
    other = there.join(TWO, "--certificate-file", str(there.folder / "other.pem"))
    assert other.returncode != 0 and "do not take each other's certificates" in other.stderr, other.stderr
    address = driver["RAY_ADDRESS"]
    assert there.hosts.call(TWO, greeted, address, str(there.home(HEAD))) in (
        "closed",
        "TLSV13_ALERT_CERTIFICATE_REQUIRED",
    )
    assert there.hosts.call(TWO, spoken, address) == "UNAVAILABLE"

    # Who has one.
    for host, file in bundle.items():
        joined = there.join(host, "--certificate-file", str(file))
        assert joined.returncode == 0, joined.stderr
    heard = there.folder / "heard"
    with subprocess.Popen(
        there.hosts.command(TWO, [sys.executable, "-c", LISTEN, str(heard)]), stdout=subprocess.PIPE
    ) as listener:
        assert listener.stdout is not None and listener.stdout.readline() == b"ready\n"
        printed = there.hosts.run(
            HEAD, [sys.executable, "-c", WORK, TWO], {**there.environment(HEAD), **driver}, seconds=120
        )
        listener.kill()
    assert printed.split()[-1] == "3", printed
    wire = heard.read_bytes()
    assert len(wire) > len(CANARY) and b"canary-4711" not in wire and CANARY[::-1][:11] not in wire
    assert json.dumps(driver["RAY_AUTH_TOKEN"])[1:-1].encode() not in wire
