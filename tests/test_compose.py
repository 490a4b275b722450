"""Nexus in containers, as far as it goes without an engine: what install.sh makes, and what the files ask of one."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.running import ROOT

FOLDER = ROOT / "deployments" / "compose"
FILES = sorted(FOLDER.glob("compose*.yaml"))
TOOLS = Path(sys.executable).parent
INSTALL = FOLDER / "install.sh"
ROOT_ONCE = {"ownership"}  # gives new volumes to who uses them, without a network, and ends
OF_OVERRIDES = {"secrets", "networks", "depends_on", "command", "volumes", "image", "build", "deploy"}  # none loosens
HADES = ("--hades", "--accept-arangodb-licence")
DOMAIN = ("--domain", "nexus.example.com", "--email", "ops@example.com")


def services() -> dict[str, dict[str, Any]]:
    """Those that a file defines, and does not only add to."""
    found = {}
    for file in FILES:
        for name, service in yaml.safe_load(file.read_text())["services"].items():
            if "restart" in service:
                found[name] = service
            else:
                assert set(service) <= OF_OVERRIDES, f"{file.name}: {name}"
    return found


SERVICES = services()


@pytest.fixture
def install(tmp_path: Path) -> Any:
    """Runs install.sh with a docker that only says that it is there."""
    stand_ins = tmp_path / "stand-ins"
    stand_ins.mkdir()
    (stand_ins / "docker").write_text("#!/bin/sh\nexit 0\n")
    (stand_ins / "docker").chmod(0o755)

    def run(*options: str, folder: str = "made") -> "subprocess.CompletedProcess[str]":
        environment = {"PATH": f"{stand_ins}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)}
        return subprocess.run(
            [str(INSTALL), "--folder", str(tmp_path / folder), *options], env=environment, capture_output=True,
            text=True, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip

    return run


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


# ── what install.sh makes ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", [(), DOMAIN, (*HADES, *DOMAIN)], ids=["local", "domain", "hades"])
def test_a_second_run_changes_nothing(options: tuple[str, ...], install: Any, tmp_path: Path) -> None:
    first = install(*options)
    assert first.returncode == 0, first.stderr
    made = contents(tmp_path / "made")
    second = install(*options)
    assert second.returncode == 0, second.stderr
    assert contents(tmp_path / "made") == made
    assert "made:" not in second.stdout


def test_secrets_are_their_owners_alone_and_of_one_installation(install: Any, tmp_path: Path) -> None:
    for folder in ("one", "other"):
        assert install(*HADES, folder=folder).returncode == 0
    one, other = ({file.name: file for file in (tmp_path / f / "secrets").iterdir()} for f in ("one", "other"))
    assert set(one) == set(other)
    for name, file in one.items():
        assert file.stat().st_mode & 0o777 == 0o600
        assert file.parent.stat().st_mode & 0o777 == 0o700
        assert file.read_text() != other[name].read_text(), name
        assert file.read_text().strip() not in install(*HADES, folder="one").stdout


def test_what_a_crash_left_out_is_made_by_the_next_run(install: Any, tmp_path: Path) -> None:
    install(*HADES)
    before = contents(tmp_path / "made")
    (tmp_path / "made" / ".env").unlink()
    (tmp_path / "made" / "secrets" / "stores-vectors").unlink()
    assert install(*HADES).returncode == 0
    assert {name: data for name, (data, _) in contents(tmp_path / "made").items()} == {
        name: data for name, (data, _) in before.items()
    }


def test_a_secret_is_never_empty(install: Any, tmp_path: Path) -> None:
    (tmp_path / "stand-ins" / "openssl").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "stand-ins" / "openssl").chmod(0o755)
    done = install()
    assert done.returncode == 1 and "sharing-key" in done.stderr
    assert contents(tmp_path / "made") == {}


def test_a_dry_run_makes_nothing(install: Any, tmp_path: Path) -> None:
    done = install("--dry-run", *HADES)
    assert done.returncode == 0, done.stderr
    assert "would make" in done.stdout and not (tmp_path / "made").exists()


def test_arangodb_is_not_switched_on_before_its_licence_was_said(install: Any, tmp_path: Path) -> None:
    done = install("--hades")
    assert done.returncode == 1 and not (tmp_path / "made").exists()
    for fact in ("Business Source License", "commercially in production", "100 GiB"):
        assert fact in done.stderr


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--domain", "nexus.example.com"), 1, "--email"),
        (("--domain", "Nexus; rm -rf /", "--email", "a@b.cc"), 1, "no name"),
        (("--domain",), 2, "wants a value"),
        (("--email", "a@b.cc"), 1, "--domain"),
        (("--gpu",), 1, "--models"),
        (("--models", "/tmp"), 1, "--gpu"),
        (("--loud",), 2, "no option"),
    ],
)
def test_bad_options_are_refused_before_anything_is_made(
    options: tuple[str, ...], code: int, says: str, install: Any, tmp_path: Path
) -> None:
    done = install(*options)
    assert (done.returncode, says in done.stderr) == (code, True), done.stderr
    assert not (tmp_path / "made").exists()


def test_other_options_than_before_are_refused_and_change_nothing(install: Any, tmp_path: Path) -> None:
    install()
    variables = (tmp_path / "made" / ".env").read_bytes()
    done = install(*DOMAIN)
    assert done.returncode == 1 and "other options" in done.stderr
    assert (tmp_path / "made" / ".env").read_bytes() == variables


def test_without_docker_it_says_what_is_missing(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "id", "env"):
        (tools / name).symlink_to(str(shutil.which(name)))
    done = subprocess.run(
        [str(INSTALL), "--folder", str(tmp_path / "made")], env={"PATH": str(tools), "HOME": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "missing: docker openssl" in done.stderr
    assert not (tmp_path / "made").exists()


def test_nexus_takes_what_was_made(install: Any, tmp_path: Path) -> None:
    """In the container the secrets of compose become variables; here a folder stands for /run/secrets."""
    install(*HADES, *DOMAIN)
    made = tmp_path / "made"
    secrets = tmp_path / "run-secrets"
    secrets.mkdir()
    for file in FILES:
        for name, secret in yaml.safe_load(file.read_text()).get("secrets", {}).items():
            shutil.copy(made / secret["file"].partition("}/")[2], secrets / name)
    say = "from nexus.config import load_config; c = load_config(); print(str(c.stores.vectors));"
    say += (
        "print(str(c.stores.documents)); print(c.sharing.key.get_secret_value(), c.http.allowed_hosts, c.access.mode)"
    )
    environment = {
        "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "SECRETS_FOLDER": str(secrets),
        "NEXUS_CONFIG": str(made / "nexus.yaml"), "NEXUS_HOME": str(tmp_path / "home"),
    }  # fmt: skip
    done = subprocess.run(
        [str(FOLDER / "entrypoint.sh"), sys.executable, "-c", say], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    vectors, documents, rest = done.stdout.splitlines()
    passwords = {
        name: (made / "secrets" / name).read_text().strip() for name in ("milvus-password", "arangodb-password")
    }
    assert vectors == f"milvus://root:{passwords['milvus-password']}@milvus:19530"
    assert documents == f"arango://nexus:{passwords['arangodb-password']}@arangodb:8529/nexus"
    assert rest == f"{(made / 'secrets' / 'sharing-key').read_text().strip()} ('nexus.example.com',) production"


# ── what the files ask of an engine ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_files_are_of_the_compose_specification(file: Path) -> None:
    schema = files("check_jsonschema").joinpath("builtin_schemas/vendor/compose-spec.json").read_text()
    jsonschema.validate(yaml.safe_load(file.read_text()), json.loads(schema))


@pytest.mark.parametrize(
    "options", [(), (*HADES, *DOMAIN), ("--gpu", "--models", "/tmp")], ids=["plain", "hades", "gpu"]
)
def test_docker_compose_takes_them_together(options: tuple[str, ...], install: Any, tmp_path: Path) -> None:
    command = next(
        (
            command
            for command in (["docker", "compose"], ["docker-compose"])
            if shutil.which(command[0])
            and b" v2" in subprocess.run([*command, "version"], capture_output=True, check=False).stdout
        ),
        None,
    )
    if command is None:
        pytest.skip("docker compose (version 2) is not on this machine")
    assert install(*options).returncode == 0
    done = subprocess.run(
        [*command, "--env-file", str(tmp_path / "made" / ".env"), "config", "--format", "json"], cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert ("milvus" in seen["services"]) == ("--hades" in options)
    for name, service in seen["services"].items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
    without = subprocess.run(
        [*command, "--file", str(FOLDER / "compose.yaml"), "config"], cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert without.returncode != 0 and "run install.sh" in without.stderr


def test_nothing_has_a_default() -> None:
    for file in FILES:
        for variable in re.findall(r"(?<!\$)\$\{[^}]*\}", file.read_text()):
            assert ":?run install.sh" in variable, f"{file.name}: {variable}"


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_can_do_little(name: str) -> None:
    service = SERVICES[name]
    assert re.search(r":[A-Za-z.\-]*\d+\.\d+[\w.\-]*$|:RELEASE\.\d{4}-", service["image"]), "no exact version"
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert set(service.get("cap_add", ())) <= ({"CHOWN"} if name in ROOT_ONCE else {"NET_BIND_SERVICE"})
    assert name in ROOT_ONCE or service["user"] == "${NEXUS_UID:?run install.sh}:${NEXUS_GID:?run install.sh}"
    assert {"cpus", "memory", "pids"} <= set(service["deploy"]["resources"]["limits"])
    assert not {"privileged", "pid", "ipc", "userns_mode", "devices", "cgroup_parent"} & set(service)
    assert service.get("network_mode") in (None, "none", "service:nexus")
    assert not re.search(r"docker\.sock|/proc|/sys", str(service.get("volumes", "")))
    is_seen = "healthcheck" in service or service["image"].startswith("nexus")  # whose image says itself
    assert is_seen or service["restart"] == "no"
    if name in ROOT_ONCE:
        assert service["network_mode"] == "none" and service["restart"] == "no"


def test_only_the_front_is_reached_from_outside() -> None:
    networks: dict[str, Any] = {}
    for file in FILES:
        networks |= yaml.safe_load(file.read_text()).get("networks", {})
    for name, service in SERVICES.items():
        if name == "nexus":
            assert [port.rpartition(":")[2] for port in service["ports"]] == ["8080", "8443"]  # which Caddy listens on
            continue
        assert "ports" not in service, name
        assert all(networks[network]["internal"] for network in service.get("networks", ())), name


def test_no_secret_stands_in_a_file() -> None:
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|TOKEN|ACCESS_?KEY|API_KEY", variable):
                assert variable.endswith("_FILE") and value.startswith("/run/secrets/"), f"{name}: {variable}"
    for file in FILES:
        for name, secret in yaml.safe_load(file.read_text()).get("secrets", {}).items():
            assert secret["file"].startswith("${NEXUS_FILES:?run install.sh}/secrets/"), name


# ── the images and the proxy ────────────────────────────────────────────────────────────────────


def test_the_dockerfile_is_clean() -> None:
    done = subprocess.run([TOOLS / "hadolint", FOLDER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_an_image_is_pinned_has_no_secret_and_runs_as_nobody(target: str) -> None:
    text = (FOLDER / "Dockerfile").read_text()
    assert all(re.search(r":(\$\{PYTHON_VERSION\}-slim-bookworm|v?\d+\.\d+\.\d+)$", one) for one in bases(text))
    stage = re.split(r"^FROM .* AS ", text, flags=re.M)
    lines = next(part for part in stage if part.startswith(f"{target}\n")).splitlines()
    assert [line for line in lines if line.startswith("USER ")] == ["USER 10001:10001"]
    assert any(line.startswith("HEALTHCHECK ") for line in lines)
    assert not re.search(r"^(ARG|ENV) .*(PASSWORD|TOKEN|SECRET|KEY)", text, re.M)
    assert "--no-deps --requirement" in text  # what the lock names, and nothing else


def bases(dockerfile: str) -> list[str]:
    return re.findall(r"^FROM (\S+) AS", dockerfile, re.M)


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.sh")), ids=lambda script: script.name)
def test_a_script_is_clean_and_can_be_run(script: Path) -> None:
    done = subprocess.run([TOOLS / "shellcheck", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("site", ["nexus.example.com", "http://localhost:8080"])
def test_caddy_takes_its_file(site: str, tmp_path: Path) -> None:
    environment = {"NEXUS_SITE": site, "NEXUS_EMAIL": "ops@example.com", "HOME": str(tmp_path)}
    done = subprocess.run(
        [TOOLS / "caddy", "adapt", "--validate", "--config", FOLDER / "Caddyfile"], env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["admin"]["disabled"] is True
    assert "Caddyfile input is not formatted" not in done.stderr
    (server,) = seen["apps"]["http"]["servers"].values()
    assert server["listen"] == ([":8443"] if site == "nexus.example.com" else [":8080"])
    if site == "nexus.example.com":  # and Caddy itself sends plain HTTP there
        (policy,) = seen["apps"]["tls"]["automation"]["policies"]
        assert {issuer["email"] for issuer in policy["issuers"]} == {"ops@example.com"}
