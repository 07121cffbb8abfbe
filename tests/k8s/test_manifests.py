"""The committed manifests: what `springtide k8s render` writes, what KubeRay and Ray Serve accept, and nothing secret."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from cluster import config as configuration
from cluster.pool import k8s
from cluster.pool.local import SERVING_ENVIRONMENT

ROOT = Path(__file__).parents[2]
CRDS = ROOT.parent / "shared/crds"
BASE = {path.name: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "k8s/base").glob("*.yaml"))}
CUSTOM = {name: document for name, document in BASE.items() if document["apiVersion"] == "ray.io/v1"}
GPU = configuration.load("gpu", Path("/nonexistent"))


@functools.cache
def crd_schema(kind: str) -> dict[str, Any]:
    path = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not path.exists():
        pytest.skip(f"KubeRay's CRDs are not at {CRDS}; fetch them from the operator's release to run this check")
    versions = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]  # a megabyte each
    return next(version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")


def unknown_keys(value: Any, schema: dict[str, Any], at: str = "") -> list[str]:
    """Keys that the schema does not name. Kubernetes drops those silently, and JSON Schema allows them."""
    if isinstance(value, list):
        return [key for n, item in enumerate(value) for key in unknown_keys(item, schema.get("items", {}), f"{at}[{n}]")]
    if not isinstance(value, dict) or schema.get("x-kubernetes-preserve-unknown-fields"):
        return []
    named, others = schema.get("properties", {}), schema.get("additionalProperties")
    if not named and others is None:  # `metadata` of the object itself: the API server's own, not the CRD's
        return []
    found = [f"{at}.{key}" for key in value if key not in named and others is None]
    return found + [key for k, v in value.items() for key in unknown_keys(v, named.get(k, others or {}), f"{at}.{k}")]


def crd_problems(document: dict[str, Any]) -> list[str]:
    schema = crd_schema(document["kind"])
    errors = [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(document)]
    return errors + unknown_keys(document, schema)


def pods(document: Any) -> list[dict[str, Any]]:
    """Every pod specification anywhere in a document."""
    if isinstance(document, list):
        return [pod for item in document for pod in pods(item)]
    if not isinstance(document, dict):
        return []
    return ([document] if "containers" in document else []) + [pod for value in document.values() for pod in pods(value)]


ALL_PODS = [pod for document in BASE.values() for pod in pods(document)]


def test_committed_files_are_what_the_default_command_renders() -> None:
    committed = {path.name: path.read_text() for path in (ROOT / "k8s/base").iterdir()}
    assert committed == k8s.render(GPU), "run: springtide k8s render --into k8s/base"


def test_rendering_does_not_depend_on_where_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert k8s.render(configuration.load("gpu", Path("/nonexistent"))) == k8s.render(GPU)


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_resources_satisfy_the_crds_with_no_unknown_key(name: str) -> None:
    assert crd_problems(CUSTOM[name]) == []


@pytest.mark.parametrize("preset", ["gpu", "laptop"])
@pytest.mark.parametrize("store", ["", "s3://bucket/springtide"])
def test_every_preset_and_kind_of_store_satisfies_the_crds(preset: str, store: str) -> None:
    files = k8s.render(configuration.load(preset, Path("/nonexistent"), {"store": store}))
    assert crd_problems(yaml.safe_load(files["rayservice.yaml"])) == []


def test_the_crd_check_finds_a_typo_and_a_wrong_type() -> None:
    broken = copy.deepcopy(BASE["rayservice.yaml"])
    cluster = broken["spec"]["rayClusterConfig"]
    cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resuorces"] = {}
    cluster["authOptions"]["mode"] = "tokne"
    problems = crd_problems(broken)
    assert len(problems) == 2
    assert "'tokne' is not one of" in problems[0]
    assert problems[1].endswith("containers[0].resuorces")


def test_kustomization_lists_every_state_and_not_the_job() -> None:
    assert set(BASE["kustomization.yaml"]["resources"]) == set(BASE) - {"kustomization.yaml", "rayjob.yaml"}


def test_pods_are_unprivileged_and_not_root() -> None:
    for pod in ALL_PODS:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_pods_serve_with_the_environment_of_a_laptop() -> None:
    for pod in ALL_PODS:
        variables = {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}
        assert variables.items() >= SERVING_ENVIRONMENT.items()


def test_a_job_in_a_pod_resolves_the_configuration_that_was_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounted = tmp_path / "springtide.yaml"
    mounted.write_text(BASE["config.yaml"]["data"][mounted.name])
    monkeypatch.setenv("SPRINGTIDE_CONFIG", str(mounted))
    assert configuration.load() == k8s.in_pods(GPU)


def test_kubernetes_service_variables_stay_out_of_the_configuration() -> None:
    """Service links would set SPRINGTIDE_HEAD_SVC_PORT and the like, and `config.load` refuses keys it does not know."""
    assert all(pod["enableServiceLinks"] is False for pod in ALL_PODS)


def test_token_authentication_is_on_and_no_manifest_holds_a_secret() -> None:
    assert BASE["rayservice.yaml"]["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    assert not [name for name, document in BASE.items() if document["kind"] == "Secret"]
    variables = [variable for pod in ALL_PODS for container in pod["containers"] for variable in container["env"]]
    words = ("TOKEN", "SECRET", "PASSWORD", "ACCESS_KEY", "CREDENTIAL")
    suspicious = [
        v["name"] for v in variables if any(word in v["name"] for word in words) and v["name"] != "TOKENIZERS_PARALLELISM"
    ]
    assert suspicious == []


def test_only_the_gateway_port_is_open_to_everyone() -> None:
    spec = BASE["networkpolicy.yaml"]["spec"]
    to_everyone = [rule for rule in spec["ingress"] if "from" not in rule]
    assert to_everyone == [{"ports": [{"protocol": "TCP", "port": GPU.gateway.port}]}]
    templates = [BASE["rayservice.yaml"]["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]]
    templates += [group["template"] for group in BASE["rayservice.yaml"]["spec"]["rayClusterConfig"]["workerGroupSpecs"]]
    assert all(template["metadata"]["labels"].items() >= spec["podSelector"]["matchLabels"].items() for template in templates)


def test_a_folder_store_becomes_a_shared_volume_and_an_object_store_needs_none() -> None:
    assert BASE["store.yaml"]["spec"]["accessModes"] == ["ReadWriteMany"]
    files = k8s.render(configuration.load("gpu", Path("/nonexistent"), {"store": "s3://bucket/springtide"}))
    assert "store.yaml" not in files
    assert "persistentVolumeClaim" not in files["rayservice.yaml"]
    assert "store: s3://bucket/springtide" in files["config.yaml"]


def test_workers_hold_one_gpu_per_slot_and_are_bounded_by_what_both_sides_need() -> None:
    group = BASE["rayservice.yaml"]["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == str(GPU.fleet.tensor_parallel_size)
    assert (group["minReplicas"], group["maxReplicas"]) == (1, 4)  # one replica at rest; one replica beside six trainers at most
