"""Nexus on Kubernetes, as far as it goes without a cluster: every object by its schema, and what its pods may do."""

import json
import re
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from cluster import bootstrap
from cluster.inventory import NODE_LABEL
from nexus.config import COUNTS, Config, load_config
from tests.running import ROOT

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray Serve says as it is imported
    from ray.serve.schema import ServeDeploySchema

    from deployments import rayservice

FOLDER = ROOT / "deployments" / "kubernetes"
OVERLAYS = ("small", "sark-clu")
VERSIONS = ("1.30", "1.34")
OF_RESTRICTED = {"configMap", "emptyDir", "persistentVolumeClaim", "secret", "projected", "downwardAPI"}
OF_EACH_POD = {"NEXUS_HOME", COUNTS}  # which `nexus up` puts elsewhere
IMAGE = re.compile(r"[\w./\-]+:v?\d+\.\d+\.\d+")

Object = dict[str, Any]


def objects_of(text: str) -> list[Object]:
    return [one for one in yaml.safe_load_all(text) if one]


@pytest.fixture(scope="module", params=OVERLAYS)
def rendered(request: pytest.FixtureRequest) -> list[Object]:
    """All objects of an overlay."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which renders overlays, is not on this machine")
    done = subprocess.run(
        ["kubectl", "kustomize", str(FOLDER / "overlays" / request.param)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return objects_of(done.stdout)


@pytest.fixture(scope="module")
def base() -> list[Object]:
    """The objects of the base, as they stand in their files."""
    named = yaml.safe_load((FOLDER / "base" / "kustomization.yaml").read_text())["resources"]
    assert set(named) | {"kustomization.yaml", "nexus.yaml"} == {file.name for file in (FOLDER / "base").iterdir()}
    return [one for name in named for one in objects_of((FOLDER / "base" / name).read_text())]


def service_of(objects: list[Object]) -> Object:
    (service,) = (one for one in objects if one["kind"] == "RayService")
    return service


def groups_of(service: Object) -> list[Object]:
    """The head's group first, then those of the workers."""
    cluster = service["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]


def as_pod(template: Object) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "one", **template["metadata"]},
        "spec": template["spec"],
    }


def check_objects(objects: list[Object]) -> None:
    """By Kubernetes' own schemas, where an unknown field is an error, too; a RayService by KubeRay's reference."""
    for one in objects:
        if one["kind"] == "RayService":
            jsonschema.validate(one, json.loads((ROOT / "tests" / "kuberay.json").read_text()))
            pods = [as_pod(group["template"]) for group in groups_of(one)]
        else:
            pods = [one]
        for pod in pods:
            for version in VERSIONS:
                kubernetes_validate.validate(pod, version, strict=True)


def check_pods(objects: list[Object]) -> None:
    """What Pod Security calls restricted, and limits, probes, exact images and no token of the cluster besides."""
    claims = {one["metadata"]["name"] for one in objects if one["kind"] == "PersistentVolumeClaim"}
    for group in groups_of(service_of(objects)):
        spec = group["template"]["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName"} & set(spec)
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True and security["runAsUser"] == 10001
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for volume in spec["volumes"]:
            assert set(volume) - {"name"} <= OF_RESTRICTED, volume
            if claim := volume.get("persistentVolumeClaim"):
                assert claim["claimName"] in claims
            if "emptyDir" in volume:
                assert volume["emptyDir"]["sizeLimit"]
        for container in spec["containers"]:
            check_container(container, {volume["name"] for volume in spec["volumes"]})


def check_container(container: Object, volumes: set[str]) -> None:
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert IMAGE.fullmatch(container["image"]), container["image"]
    for bound in ("requests", "limits"):
        assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"][bound])
    assert {"readinessProbe", "livenessProbe"} <= set(container)
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    for variable in container["env"]:
        if re.search(r"TOKEN$|PASSWORD|SECRET|__KEY|_API_KEY", variable["name"]):
            assert set(variable["valueFrom"]) == {"secretKeyRef"}, variable["name"]


def test_the_base_is_right(base: list[Object]) -> None:
    check_objects(base)
    check_pods(base)


def test_an_overlay_is_right(rendered: list[Object]) -> None:
    check_objects(rendered)
    check_pods(rendered)
    assert {one["metadata"].get("namespace", "nexus") for one in rendered} == {"nexus"}
    assert "Secret" not in {one["kind"] for one in rendered}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("spec", "rayClusterConfig", "authOptions", "mode"), "open"),
        (("spec", "rayClusterConfig", "gcsFaultTolerance"), {}),
        (("spec", "rayClusterConfig", "headGroupSpec", "rayStartParams", "num-cpus"), 4),
        (("spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "containers", 0, "readyProbe"), {}),
        (("spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "volumes", 0, "persistentVolume"), {}),
    ],
    ids=lambda value: str(value[-1]) if isinstance(value, tuple) else "",
)
def test_a_field_that_is_not_there_is_found(base: list[Object], place: tuple[Any, ...], value: object) -> None:
    wrong = json.loads(json.dumps(service_of(base)))
    inner = wrong
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check_objects([wrong])


# ── the network ─────────────────────────────────────────────────────────────────────────────────


def test_nothing_goes_in_or_out_but_what_is_said(base: list[Object]) -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in base if one["kind"] == "NetworkPolicy"}
    assert policies["nothing"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    pods = [group["template"]["metadata"]["labels"] for group in groups_of(service_of(base))]
    for name, policy in policies.items():
        for rule in (*policy.get("ingress", ()), *policy.get("egress", ())):
            others = rule.get("from", rule.get("to"))
            assert others, f"{name}: anybody"
            for other in others:
                assert any(selector.get("matchLabels") for selector in other.values()), f"{name}: anybody"
            is_among_nodes = others == [{"podSelector": policy["podSelector"]}]
            assert is_among_nodes or rule["ports"], f"{name}: any port"
        wanted = policy["podSelector"].get("matchLabels", {})
        assert any(wanted.items() <= labels.items() for labels in pods), f"{name} is of no pod"


# ── and what runs in the pods ───────────────────────────────────────────────────────────────────


def check_serve_file(text: str) -> ServeDeploySchema:
    deployed = ServeDeploySchema.model_validate(yaml.safe_load(text))
    for one in deployed.applications:
        module, _, name = one.import_path.partition(":")
        assert module == rayservice.__name__ and callable(getattr(rayservice, name)), one.import_path
    return deployed


def test_serve_gets_the_same_file_everywhere(base: list[Object]) -> None:
    alone = check_serve_file((ROOT / "deployments" / "serve.yaml").read_text())
    here = check_serve_file(service_of(base)["spec"]["serveConfigV2"])
    assert here.applications == alone.applications and here.proxy_location == alone.proxy_location
    assert (alone.http_options.host, here.http_options.host) == ("127.0.0.1", "0.0.0.0")


def test_an_overlays_settings_are_taken_and_fit_its_pods(
    rendered: list[Object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (settings,) = (one["data"]["nexus.yaml"] for one in rendered if one["kind"] == "ConfigMap")
    file = tmp_path / "nexus.yaml"
    file.write_text(settings)
    monkeypatch.setenv("NEXUS_SHARING__KEY", "of-the-cluster")
    config = load_config(file)
    assert config.http.behind_tls and config.access.mode == "production"
    service = service_of(rendered)
    served = check_serve_file(service["spec"]["serveConfigV2"])
    assert served.http_options.port == config.http.port
    assert [one.name for one in served.applications] == (["models", "nexus"] if config.nodes else ["nexus"])
    head, *workers = groups_of(service)
    if not config.nodes:
        assert not workers
        return
    groups = {group["labels"][NODE_LABEL]: group for group in (head, *workers)}
    assert set(groups) == set(config.nodes) and head["labels"][NODE_LABEL] == config.ray.head
    for name, group in groups.items():
        check_machine(config, name, group)


def check_machine(config: Config, name: str, group: Object) -> None:
    """A group of one, on the Kubernetes node of its name, with the GPUs that the settings say it has."""
    assert group.get("maxReplicas", 1) == group.get("minReplicas", 1) == 1
    assert group["template"]["spec"]["nodeSelector"] == {NODE_LABEL: name}
    assert int(group["rayStartParams"]["num-cpus"]) == int(config.nodes[name].cpus)
    gpus = sum(one.count for one in config.nodes[name].gpus)
    (container,) = group["template"]["spec"]["containers"]
    assert int(container["resources"]["limits"].get("nvidia.com/gpu", 0)) == gpus
    expected = "-".join(map(str, range(gpus)))
    assert group["labels"].get(bootstrap.GPUS_LABEL, "") == expected


def test_pods_have_the_variables_that_nexus_up_gives_ray(base: list[Object], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    usual = bootstrap.environment_of(load_config(environment={}).model_copy(update={"home": tmp_path}), "one")
    for group in groups_of(service_of(base)):
        for variable in group["template"]["spec"]["containers"][0]["env"]:
            if variable["name"] in usual and variable["name"] not in OF_EACH_POD:
                assert variable["value"] == usual[variable["name"]], variable["name"]
    named = {
        variable["name"] for variable in groups_of(service_of(base))[0]["template"]["spec"]["containers"][0]["env"]
    }
    ports = {name for name in usual if name.endswith("_PORT")}  # a pod has all of its own
    of_kuberay = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}
    of_this_machine = {bootstrap.INSTANCE, "PATH", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"}
    started_early = {"RAY_prestart_worker_first_driver", "RAY_enable_worker_prestart"}
    assert set(usual) - named == ports | of_kuberay | of_this_machine | started_early
