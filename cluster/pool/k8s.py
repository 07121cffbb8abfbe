"""Manifests for KubeRay 1.6 and later, rendered from the configuration that a laptop uses.

``springtide k8s render --into k8s/base`` writes the files that are committed there (preset ``gpu``). What differs between
clusters and is no key of the configuration (registry, node pools, storage class) belongs into a kustomize overlay.
"""

import json
import math
from importlib.metadata import version
from typing import Any, Final

import yaml

from cluster import __version__
from cluster.config import Config, parse
from cluster.pool import graph
from cluster.pool.local import SERVING_ENVIRONMENT
from cluster.store.objects import Store

NAME = "springtide"
LABELS = {"app.kubernetes.io/part-of": NAME}
STORE, HOME = "/springtide/store", "/springtide/home"
CONFIG_FOLDER, CONFIG_FILE = "/etc/springtide", "springtide.yaml"
DASHBOARD_PORT, GCS_PORT = 8265, 6379
"""What KubeRay looks for on the head; `Config.pool` is for a pool that Springtide starts itself."""

POD_ENVIRONMENT = {
    **SERVING_ENVIRONMENT,
    "SPRINGTIDE_CONFIG": f"{CONFIG_FOLDER}/{CONFIG_FILE}",
    "RAY_SERVE_HAPROXY_BINARY_PATH": "/home/ray/springtide/cluster/pool/haproxy.py",  # where the Dockerfile puts it
}

HEAD = {"cpu": "4", "memory": "16Gi"}
CPUS_PER_SLOT = 4
"""At least; more where training is given more threads."""
GIB_PER_SLOT = {"gpu": 32, "slot": 8}
STORE_SIZE = "500Gi"
LOCKED: Final = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
UNPRIVILEGED: Final = {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
CURRENT = "CURRENT_CLUSTER"

Document = dict[str, Any]

NOTES = {
    "rayservice.yaml": """\
# The pool: one Ray cluster that serves and trains. The gateway answers at the service springtide-serve-svc.
# Token authentication is on: the operator makes a random token, keeps it in a Secret and hands it to every pod.
# Probes are KubeRay's own. Service links are off because SPRINGTIDE_SERVE_SVC_… would be read as configuration.
""",
    "rayjob.yaml": f"""\
# Fine-tune on the pool that serves, and publish the result into live traffic. Run it with:
#   cluster=$(kubectl get rayservice {NAME} -o jsonpath='{{.status.activeServiceStatus.rayClusterName}}')
#   sed "s/{CURRENT}/$cluster/" k8s/base/rayjob.yaml | kubectl create -f -
# KubeRay names a RayService's cluster {NAME}-<random>, anew at every upgrade of the cluster, and a RayJob takes a cluster by name
# only; so the name is filled in when the job is created. A cluster of the job's own would need GPUs of its own, and could not
# reach the control actor that publishes. HTTPMode: the operator submits the job, so no further pod has to reach the dashboard.
# --data takes a path in the image or on the store's volume, or any URL that the pods can read.
""",
    "seed.yaml": """\
# A first model to serve: this grows the seedling, once, on a small CPU cluster of its own that goes away afterwards. The pool's
# head waits until the store has a model; where it has one of yours already, leave this file out.
""",
    "store.yaml": """\
# The store is a folder that all pods share, so the volume must be ReadWriteMany (NFS, EFS, Filestore, CephFS, …).
# An object store needs no volume: springtide k8s render --set store=s3://bucket/path leaves this file out.
""",
    "networkpolicy.yaml": """\
# From outside only the gateway's port can be reached, and by the KubeRay operator the dashboard. Ray, HAProxy's statistics, the
# replicas and the engines speak among themselves. Kubelet's probes are not subject to policies.
""",
    "kustomization.yaml": f"""\
# kubectl apply -k k8s/base. An overlay names your registry: images: [{{name: {NAME}, newName: registry.example.com/{NAME}}}]
# rayjob.yaml is not listed: a job is an event, not a state, and applying a state twice must not train twice.
""",
}


def render(config: Config) -> dict[str, str]:
    """File name → YAML text. What is listed in ``kustomization.yaml`` serves; ``rayjob.yaml`` is for each fine-tuning run."""
    config = in_pods(config)
    state = {
        "config.yaml": _config_map(config),
        **({"store.yaml": _volume_claim()} if _on_volume(config) else {}),
        "seed.yaml": _seed_job(config),
        "rayservice.yaml": _ray_service(config),
        "networkpolicy.yaml": _network_policy(config),
    }
    documents = {**state, "rayjob.yaml": _ray_job(config), "kustomization.yaml": _kustomization(list(state))}
    return {name: NOTES.get(name, "") + _text(document) for name, document in documents.items()}


def in_pods(config: Config) -> Config:
    """The same configuration as the pods see it: their own home, and the gateway on all interfaces.

    A ``file://`` store becomes the shared volume, because inside a pod it would be a folder of that pod alone.
    """
    values = config.dump()
    values["home"] = HOME
    values["gateway"]["host"] = "0.0.0.0"  # noqa: S104 (the network policy says who may connect)
    if _on_volume(config):
        values["store"] = f"file://{STORE}"
    return parse(values)


def _on_volume(config: Config) -> bool:
    return Store(config.store).local_root is not None


# documents


def _config_map(config: Config) -> Document:
    return _document("v1", "ConfigMap", "springtide-config", data={CONFIG_FILE: _text(config.dump())})


def _volume_claim() -> Document:
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": STORE_SIZE}}}
    return _document("v1", "PersistentVolumeClaim", "springtide-store", spec=spec)


def _ray_service(config: Config) -> Document:
    cluster = {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"version": "v2", "securityContext": LOCKED},
        "headGroupSpec": _head(config),
        "workerGroupSpecs": [_workers(config)],
    }
    spec = {"serveConfigV2": _text(graph.schema(config)), "rayClusterConfig": cluster}
    return _document("ray.io/v1", "RayService", NAME, spec=spec)


def _ray_job(config: Config) -> Document:
    model = config.default_model
    spec = {
        "clusterSelector": {"ray.io/cluster": CURRENT},
        "submissionMode": "HTTPMode",
        "entrypoint": f"python -m jobs.finetune --data jobs/seedling/tide.jsonl --base {model} --name {model} --epochs 30 --publish",
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"generateName": "finetune-"}, "spec": spec}


def _seed_job(config: Config) -> Document:
    """Pretraining on one pod, with a slot that is no GPU."""
    pod = _pod(config, "ray-head", HEAD)
    pod["spec"]["containers"][0]["env"] += _variables(
        {"SPRINGTIDE_POOL__ACCELERATOR": "slot", "SPRINGTIDE_TRAINING__WORKERS": "1"}
    )
    cluster = {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        "headGroupSpec": {"rayStartParams": _slot_parameter(config.training.slots_per_worker), "template": pod},
    }
    spec = {
        "submissionMode": "HTTPMode",
        "entrypoint": f"python -m jobs.pretrain --name {config.default_model}",
        "shutdownAfterJobFinishes": True,
        "rayClusterSpec": cluster,
    }
    return _document("ray.io/v1", "RayJob", "springtide-seed", spec=spec)


def _network_policy(config: Config) -> Document:
    operator = {
        "namespaceSelector": {},
        "podSelector": {"matchLabels": {"app.kubernetes.io/component": "kuberay-operator"}},
    }
    ingress = [
        {"from": [{"podSelector": {"matchLabels": LABELS}}]},
        {"from": [operator], "ports": [{"protocol": "TCP", "port": DASHBOARD_PORT}]},
        {"ports": [{"protocol": "TCP", "port": config.gateway.port}]},
    ]
    spec = {"podSelector": {"matchLabels": LABELS}, "policyTypes": ["Ingress"], "ingress": ingress}
    return _document("networking.k8s.io/v1", "NetworkPolicy", NAME, spec=spec)


def _kustomization(resources: list[str]) -> Document:
    return {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": resources}


def _document(api: str, kind: str, name: str, **body: Any) -> Document:
    return {"apiVersion": api, "kind": kind, "metadata": {"name": name, "labels": LABELS}, **body}


# pods


def _head(config: Config) -> Document:
    """No task runs here: the head must survive whatever the jobs do. Gateways and control may, as they ask for no resources."""
    pod = _pod(config, "ray-head", HEAD)
    pod["spec"]["initContainers"] = [
        _wait_for_models([fleet.model for fleet in config.fleets.values()], pod["spec"]["containers"][0])
    ]
    ports = {"gcs-server": GCS_PORT, "dashboard": DASHBOARD_PORT, "serve": config.gateway.port}
    pod["spec"]["containers"][0]["ports"] = _ports(ports)
    pod["spec"]["automountServiceAccountToken"] = True  # the autoscaler beside it asks for pods
    return {"rayStartParams": {"num-cpus": "0"}, "template": pod}


def _wait_for_models(models: list[str], container: Document) -> Document:
    """Serve gives a replica up after three failed starts and KubeRay does not retry, so the head waits for the models to serve."""
    check = f"sys.exit(any(Registry(Store(load().store)).alias(name) is None for name in {json.dumps(models)}))"
    imports = "import sys; from cluster.config import load; from cluster.store.registry import Registry; from cluster.store.objects import Store"
    resources = {"cpu": "500m", "memory": "1Gi"}
    return {
        **container,
        "name": "wait-for-model",
        "command": ["bash", "-c", f"until python -c '{imports}; {check}'; do sleep 5; done"],
        "resources": {"requests": resources, "limits": resources},
    }


def _workers(config: Config) -> Document:
    """One group of equal pods, each large enough for a replica; at most as many as one budget needs, where what one of serving and training
    has at its most leaves the other its least."""
    fleets, training, gpu = config.fleets.values(), config.training, config.pool.accelerator == "gpu"
    slots = max(training.slots_per_worker, *(fleet.tensor_parallel_size for fleet in fleets))
    least = sum(fleet.min_replicas * fleet.tensor_parallel_size for fleet in fleets)
    serving = [least, sum(fleet.max_replicas * fleet.tensor_parallel_size for fleet in fleets)]
    learning = [workers * training.slots_per_worker for workers in (training.min_workers, training.workers)]
    most_slots = max(serving[1] + learning[0], serving[0] + learning[1])
    cpus = slots * max(CPUS_PER_SLOT, training.threads_per_worker)
    resources = {"cpu": str(cpus), "memory": f"{slots * GIB_PER_SLOT[config.pool.accelerator]}Gi"}
    if gpu:
        resources["nvidia.com/gpu"] = str(slots)
    pod = _pod(config, "ray-worker", resources)
    pod["spec"]["containers"][0]["ports"] = _ports({"serve": config.gateway.port})
    pod["spec"]["terminationGracePeriodSeconds"] = math.ceil(max(fleet.drain_timeout_s for fleet in fleets)) + 30
    return {
        "groupName": "slots",
        "minReplicas": math.ceil(least / slots),
        "maxReplicas": math.ceil(most_slots / slots),
        "rayStartParams": {} if gpu else _slot_parameter(slots),
        "template": pod,
    }


def _slot_parameter(slots: int) -> dict[str, str]:
    return {"resources": json.dumps(json.dumps({"slot": slots}))}  # quoted twice: KubeRay pastes it into a shell line


def _pod(config: Config, name: str, resources: dict[str, str]) -> Document:
    """A pod template that the "restricted" security standard admits. Limits equal requests, because Ray counts by limits."""
    mounts, volumes = _volumes(config)
    container: Document = {
        "name": name,
        "image": f"{NAME}:{__version__}" + ("-cpu" if config.pool.accelerator == "slot" else ""),
        "env": _variables(POD_ENVIRONMENT),
        "resources": {"requests": resources, "limits": resources},
        "securityContext": LOCKED,
        "volumeMounts": mounts,
    }
    if not _on_volume(config):  # AWS_ACCESS_KEY_ID and the like, where the pods' own identity does not open the bucket
        container["envFrom"] = [{"secretRef": {"name": "springtide-store", "optional": True}}]
    spec = {
        "enableServiceLinks": False,
        "automountServiceAccountToken": False,
        "securityContext": UNPRIVILEGED,
        "containers": [container],
        "volumes": volumes,
    }
    return {"metadata": {"labels": LABELS}, "spec": spec}


def _volumes(config: Config) -> tuple[list[Document], list[Document]]:
    """Mounts and volumes: the configuration, the home with its cache of weights, and the store where it is a folder."""
    mounts: list[Document] = [
        {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
        {"name": "home", "mountPath": HOME},
    ]
    volumes: list[Document] = [
        {"name": "config", "configMap": {"name": "springtide-config"}},
        {"name": "home", "emptyDir": {}},
    ]
    if _on_volume(config):
        mounts.append({"name": "store", "mountPath": STORE})
        volumes.append({"name": "store", "persistentVolumeClaim": {"claimName": "springtide-store"}})
    return mounts, volumes


def _variables(values: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in values.items()]


def _ports(numbers: dict[str, int]) -> list[dict[str, str | int]]:
    """By KubeRay's names: its probes and services look for ``serve`` and ``dashboard``."""
    return [{"name": name, "containerPort": number} for name, number in numbers.items()]


# text


class _Dumper(yaml.SafeDumper):
    """Readable YAML: text of several lines as a block, no anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return yaml.ScalarNode("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _block)


def _text(document: Document) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
