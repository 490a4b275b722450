"""Bring the application up on a Ray head, wait until it answers, and keep it so."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from cluster import bootstrap
from cluster.bootstrap import RAYLET, STATE_SERVER, Instance
from nexus import __version__
from nexus.config import Config
from nexus.errors import AlreadyRunning, NexusError, Unavailable

JOIN_SECONDS = 60.0  # that the other machines have to join a new head
RECOVER_SECONDS = 60.0  # that a running application has to be ready again by itself
LOOK_SECONDS = 1.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0  # between attempts that fail
NOTE = "note: "  # begins what the deploying process has to say to whoever runs `nexus up`

Outcome = Literal["ran already", "was healed", "started"]
Tell = Callable[[str], None]


def ensure_up(
    config: Config, config_file: Path | None, wait_seconds: float, join_seconds: float, tell: Tell
) -> tuple[Instance, Outcome]:
    """Start what is missing, and nothing else. The caller holds the home's lock. Raises NexusError.

    What ended of a cluster's head is started with the state that it had. Its application, where it is not ready, is
    given a moment, then deployed again; what is well of it stays as it is.
    """
    instance = bootstrap.find_instance(Path(config.home))
    was_whole = instance is not None and is_whole(instance)
    if instance and not was_whole:
        instance = _heal(config, instance, tell)
    if instance is None or not (config.nodes or is_ready(instance.url)):
        return bring_up(config, config_file, wait_seconds, join_seconds, tell), "started"
    if was_whole and is_ready(instance.url):
        return instance, "ran already"
    try:
        await_ready(instance.url, time.monotonic() + min(RECOVER_SECONDS, wait_seconds))
    except Unavailable:
        apply(config, instance, config_file, wait_seconds, tell)
    return instance, "was healed"


def is_whole(instance: Instance) -> bool:
    """Whether of a head nothing has ended without which it is none."""
    return bootstrap.living(instance) == {RAYLET, STATE_SERVER}


def _heal(config: Config, instance: Instance, tell: Tell) -> Instance | None:
    """A cluster's head, once what has ended of it runs again. None where it does not."""
    home = Path(config.home)
    if not config.nodes:
        return None
    ended = " and ".join(sorted({RAYLET, STATE_SERVER} - bootstrap.living(instance)))
    tell(f"Ray's {ended} has ended here; starting that again")
    try:
        bootstrap.revive(home, instance)
        return bootstrap.find_instance(home)
    except Unavailable as error:
        tell(f"that failed ({error.message}); beginning anew")
        return None


def apply(config: Config, instance: Instance, config_file: Path | None, wait_seconds: float, tell: Tell) -> None:
    """Have a running cluster be as the settings say, by a plan of its machines as they are now. Raises NexusError."""
    _settle(config, tell)
    deadline = time.monotonic() + wait_seconds
    home = Path(config.home)
    deploy(config, instance, bootstrap.environment_of_head(home), config_file, deadline, tell)
    bootstrap.record_settings(home, instance, config_file)
    await_ready(instance.url, deadline)


def bring_up(
    config: Config, config_file: Path | None, wait_seconds: float, join_seconds: float, tell: Tell
) -> Instance:
    """Head, machines, Serve, application, ready. On failure everything started is stopped again."""
    tell(f"Starting Nexus {__version__} in {config.home} …")
    _settle(config, tell)
    try:
        instance, environment = bootstrap.start_head(config, config_file)
        if config.nodes:
            _await_machines(config, instance, environment, join_seconds, tell)
        deadline = time.monotonic() + wait_seconds
        deploy(config, instance, environment, config_file, deadline, tell)
        await_ready(instance.url, deadline)
    except (NexusError, KeyboardInterrupt):
        bootstrap.stop(Path(config.home))
        raise
    return instance


def _settle(config: Config, tell: Tell) -> None:
    """Before there is anything that it could keep waiting."""
    from nexus import precision  # with the tokenizers: not at every start of the command line

    precision.settle(config, tell)


def _await_machines(
    config: Config, instance: Instance, environment: dict[str, str], seconds: float, tell: Tell
) -> None:
    """Until all have joined, or for so long: what belongs to a machine that is late starts when it comes."""
    tell(f"Ray's head runs at {instance.ray_address}; waiting for {', '.join(config.nodes)}")
    command = [sys.executable, "-m", "deployments.machines", instance.ray_address, str(seconds), *config.nodes]
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            timeout=seconds + bootstrap.START_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Unavailable("Ray's state server does not say which machines have joined") from None
    if done.returncode:
        raise Unavailable(f"Ray's state server does not say which machines have joined: {done.stderr[-500:]}")
    for name in config.nodes:
        if name not in done.stdout.split():
            tell(f"{name} has not joined; start it with `nexus node start` there ({config.nodes[name].address})")


def deploy(
    config: Config, instance: Instance, environment: dict[str, str], config_file: Path | None, deadline: float,
    tell: Tell,
) -> None:  # fmt: skip
    """In a process of its own: it needs the head's environment, and `ray.init` may wait for ever."""
    log_file = Path(config.home) / "logs" / "deploy.log"
    command = [sys.executable, "-m", "deployments.app", instance.ray_address, str(instance.vectors_port)]
    if config_file is not None:
        command.append(str(config_file.absolute()))
    with log_file.open("wb") as log:
        try:
            done = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False,
                timeout=max(1.0, deadline - time.monotonic()),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Unavailable(f"the application was not deployed in time; {log_file} says how far it came") from None
    lines = [line for line in log_file.read_text(errors="replace").splitlines() if line.strip()]
    for line in lines:
        if line.startswith(NOTE):
            tell(line.removeprefix(NOTE))
    if done.returncode:
        reason = re.sub(r"^nexus\.errors\.\w+: ", "", lines[-1]) if lines else "no reason given"
        raise Unavailable(f"the application was not deployed ({reason}); see {log_file}")


def is_ready(url: str) -> bool:
    """Does `/readyz` say 200?"""
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=6) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False


def await_ready(url: str, deadline: float) -> None:
    """Return once `/readyz` says 200. Raises Unavailable when it does not by the deadline (monotonic seconds)."""
    while not is_ready(url):
        if time.monotonic() > deadline:
            raise Unavailable(f"{url}/readyz is not ready yet; `nexus status` says which part is missing")
        time.sleep(0.2)


# ── in the foreground ───────────────────────────────────────────────────────────────────────────


def keep_up(
    config: Config, config_file: Path | None, wait_seconds: float, join_seconds: float, tell: Tell,
    tend: Callable[[], object] = lambda: None,
) -> None:  # fmt: skip
    """Start again what ends of Ray, for ever; return when `nexus down` has ended it.

    `tend` is called each second in which nothing of it has ended, for what runs beside it.
    """
    home = Path(config.home)
    pause = 0.0  # before the next attempt, while they fail: a failed one leaves no record
    while (instance := bootstrap.find_instance(home)) or pause:
        if instance and is_whole(instance):
            pause = 0.0
            tend()
            time.sleep(LOOK_SECONDS)
            continue
        time.sleep(pause)
        try:
            with bootstrap.lock_home(home):
                if bootstrap.find_instance(home) or pause:
                    _, outcome = ensure_up(config, config_file, wait_seconds, join_seconds, tell)
                    tell(f"Nexus {outcome} at {config.url}")
        except AlreadyRunning:  # somebody starts or stops it just now
            time.sleep(LOOK_SECONDS)
        except NexusError as error:
            pause = longer(pause)
            tell(f"{error.message}; again in {pause:.0f} s")


def longer(pause: float) -> float:
    """Seconds before the next attempt, after this many before the last."""
    return min(2 * pause, LONGEST_PAUSE_SECONDS) or FIRST_PAUSE_SECONDS


@contextmanager
def stopped_by_signals(stop: Callable[[], object]) -> Iterator[None]:
    """SIGTERM, as Ctrl-C, ends the block wherever it is; then `stop` is called, undisturbed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        stop()
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def tell_systemd(state: str) -> None:
    """What sd_notify(3) says of its protocol; nothing where no systemd asked to be told."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            systemd.sendto(state.encode(), address.replace("@", "\0", 1) if address.startswith("@") else address)
