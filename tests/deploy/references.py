"""Checks of what manifests say about each other, which no schema sees.

Each returns sentences about what is wrong, and nothing where all is well.
"""

import re
import tomllib
from collections.abc import Iterator, Sequence

from tests.deploy.manifests import Document, Pod, of_kind, pods
from tests.support import ROOT

# Made by the operator; everything else that is referred to must be rendered.
OPERATORS_SECRETS = {"api-keys", "redis-password", "registry", "vit-refinery-tls"}
_VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
# By digest, or what `make images` makes of this version, which a site renames and pins.
_PINNED = re.compile(
    rf"[^@\s]+@sha256:[0-9a-f]{{64}}|vit-refinery-(service|trainer):{re.escape(_VERSION)}"
)


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


def wrong_namespaces(items: Sequence[Document]) -> Iterator[str]:
    """All is in one namespace, which is there, and the autoscaler asks for that one."""
    names = [_name(item) for item in of_kind(items, "Namespace")]
    if len(names) != 1:
        yield f"there are {len(names)} namespaces"
        return
    for item in items:
        namespace = item["metadata"].get("namespace")
        if item["kind"] != "Namespace" and namespace != names[0]:
            yield f"{item['kind']}/{_name(item)} lands in namespace {namespace}"
    for item in of_kind(items, "ScaledObject"):
        for trigger in item["spec"]["triggers"]:
            asked = set(re.findall(r'namespace\s*=~?\s*"([^"]*)"', trigger["metadata"]["query"]))
            if asked != {names[0]}:
                yield f"ScaledObject/{_name(item)} asks for namespaces {sorted(asked)}"


def duplicates(items: Sequence[Document]) -> Iterator[str]:
    names = [f"{item['kind']}/{item['metadata']['name']}" for item in items]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"{name} is there twice"


def unpinned_images(items: Sequence[Document]) -> Iterator[str]:
    for pod in pods(items):
        images = [container["image"] for container in pod.containers]
        images += [volume["image"]["reference"] for volume in _volumes(pod) if "image" in volume]
        for image in images:
            if not _PINNED.fullmatch(image):
                yield f"{pod.name}: image {image} has no digest"


def wrong_mounts(items: Sequence[Document]) -> Iterator[str]:
    for pod in pods(items):
        volumes = [volume["name"] for volume in _volumes(pod)]
        mounts = [mount for one in pod.containers for mount in one.get("volumeMounts", [])]
        for mount in mounts:
            if mount["name"] not in volumes:
                yield f"{pod.name}: mount {mount['mountPath']} of no volume {mount['name']}"
            elif _is_read_only(pod, mount["name"]) and not mount.get("readOnly"):
                yield f"{pod.name}: {mount['mountPath']} is read-only and its mount does not say so"
        for volume in set(volumes) - {mount["name"] for mount in mounts}:
            yield f"{pod.name}: volume {volume} is not mounted"
        for one in pod.containers:
            paths = [mount["mountPath"] for mount in one.get("volumeMounts", [])]
            if len(set(paths)) < len(paths):
                yield f"{pod.name}: two mounts at one path"


def missing_references(items: Sequence[Document]) -> Iterator[str]:
    there = {
        kind: {item["metadata"]["name"] for item in of_kind(items, kind)}
        for kind in ("ConfigMap", "Secret", "PersistentVolumeClaim", "ServiceAccount")
    }
    there["Secret"] |= OPERATORS_SECRETS
    for pod in pods(items):
        for kind, name in _references(pod):
            if name not in there[kind]:
                yield f"{pod.name}: there is no {kind} {name}"


def wrong_selectors(items: Sequence[Document]) -> Iterator[str]:
    every = list(pods(items))
    for item in items:
        name = f"{item['kind']}/{item['metadata']['name']}"
        spec = item.get("spec") or {}
        if item["kind"] == "Deployment":
            labels = spec["template"]["metadata"]["labels"]
            if not selects(spec["selector"]["matchLabels"], labels):
                yield f"{name} does not select its own pods"
            for term in _own_terms(spec["template"]["spec"]):
                if not selects(term["matchLabels"], labels):
                    yield f"{name} is spread by labels that its pods do not have"
        elif item["kind"] in ("Service", "PodDisruptionBudget"):
            selector = spec["selector"]
            selector = selector if item["kind"] == "Service" else selector["matchLabels"]
            if not any(selects(selector, pod.labels) for pod in every):
                yield f"{name} selects no pod"
        elif item["kind"] == "ScaledObject":
            target = spec["scaleTargetRef"]
            found = [d for d in of_kind(items, target["kind"]) if _name(d) == target["name"]]
            if not found:
                yield f"{name} scales {target['kind']}/{target['name']}, which is not there"
            for one in found:
                if "replicas" in one["spec"]:
                    yield f"{target['kind']}/{target['name']} has replicas and is scaled as well"


def wrong_ports(items: Sequence[Document]) -> Iterator[str]:
    every = list(pods(items))
    for pod in every:
        for container in pod.containers:
            yield from _container_ports(pod, container)
    for service in of_kind(items, "Service"):
        targets = [pod for pod in every if selects(service["spec"]["selector"], pod.labels)]
        for port in service["spec"]["ports"]:
            if not all(port["targetPort"] in _ports(pod) for pod in targets):
                yield f"Service/{_name(service)}: no pod has the port {port['targetPort']}"
    for monitor in of_kind(items, "ServiceMonitor"):
        selector = monitor["spec"]["selector"]["matchLabels"]
        services = [
            service
            for service in of_kind(items, "Service")
            if selects(selector, service["metadata"]["labels"])
        ]
        if len(services) != 1:
            yield f"ServiceMonitor/{_name(monitor)} selects {len(services)} Services"
        for service in services:
            names = {port["name"] for port in service["spec"]["ports"]}
            for endpoint in monitor["spec"]["endpoints"]:
                if endpoint["port"] not in names:
                    yield f"ServiceMonitor/{_name(monitor)}: no port is called {endpoint['port']}"
            label = monitor["spec"].get("jobLabel")
            if label and label not in service["metadata"]["labels"]:
                yield f"ServiceMonitor/{_name(monitor)}: the Service has no label {label}"


def wrong_policies(items: Sequence[Document]) -> Iterator[str]:
    """NetworkPolicies select pods, name ports that listen, and deny what they do not mention."""
    every = list(pods(items))
    policies = of_kind(items, "NetworkPolicy")
    denies = [
        policy["spec"]["podSelector"] == {}
        and set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
        and not policy["spec"].get("ingress")
        and not policy["spec"].get("egress")
        for policy in policies
    ]
    if not any(denies):
        yield "no NetworkPolicy denies what no other allows"
    for policy in policies:
        name, spec = f"NetworkPolicy/{_name(policy)}", policy["spec"]
        selected = _selected(every, spec["podSelector"])
        if spec["podSelector"] and not selected:
            yield f"{name} selects no pod"
        for way in ("ingress", "egress"):
            if way in spec and way.capitalize() not in spec["policyTypes"]:
                yield f"{name} has rules for {way} and not the type"
        for rule in spec.get("ingress", []):
            if not rule.get("from"):
                yield f"{name} lets in everybody"
            yield from _peers(name, every, rule.get("from", []))
            yield from _policy_ports(name, selected, rule)
        for rule in spec.get("egress", []):
            if not rule.get("to"):
                yield f"{name} lets out to everybody"
            yield from _peers(name, every, rule.get("to", []))
            for peer in rule.get("to", []):
                if "podSelector" in peer and "namespaceSelector" not in peer:
                    yield from _policy_ports(name, _selected(every, peer["podSelector"]), rule)


def wrong_routes(items: Sequence[Document]) -> Iterator[str]:
    """What leads in from outside leads to a Service, and ends TLS."""
    ports = {
        (_name(service), port[key])
        for service in of_kind(items, "Service")
        for port in service["spec"]["ports"]
        for key in ("name", "port")
    }
    for route in of_kind(items, "Ingress", "HTTPRoute"):
        name, spec = f"{route['kind']}/{_name(route)}", route["spec"]
        if route["kind"] == "HTTPRoute":
            services = [one for rule in spec["rules"] for one in rule["backendRefs"]]
            backends = [(one["name"], one["port"]) for one in services]
            if not all(parent.get("sectionName") for parent in spec["parentRefs"]):
                yield f"{name} may be on a listener without TLS"
        else:
            paths = [path for rule in spec["rules"] for path in rule["http"]["paths"]]
            services = [path["backend"]["service"] for path in paths]
            backends = [(one["name"], next(iter(one["port"].values()))) for one in services]
            hosts = {host for entry in spec.get("tls", []) for host in entry["hosts"]}
            if {rule["host"] for rule in spec["rules"]} != hosts:
                yield f"{name} has a host without TLS"
            for entry in spec.get("tls", []):
                if entry["secretName"] not in OPERATORS_SECRETS:
                    yield f"{name}: there is no Secret {entry['secretName']}"
        for backend in backends:
            if backend not in ports:
                yield f"{name} leads to {backend}, which is not there"
            elif backend[1] in ("metrics", 9090):
                yield f"{name} shows metrics"


CHECKS = (
    wrong_namespaces,
    duplicates,
    unpinned_images,
    wrong_mounts,
    missing_references,
    wrong_selectors,
    wrong_ports,
    wrong_policies,
    wrong_routes,
)


def findings(items: Sequence[Document]) -> list[str]:
    return [finding for check in CHECKS for finding in check(items)]


def _name(item: Document) -> str:
    return str(item["metadata"]["name"])


def _volumes(pod: Pod) -> list[Document]:
    return list(pod.spec.get("volumes", []))


def _is_read_only(pod: Pod, name: str) -> bool:
    (volume,) = (one for one in _volumes(pod) if one["name"] == name)
    claim = volume.get("persistentVolumeClaim", {})
    return bool(claim.get("readOnly") or volume.keys() & {"secret", "configMap", "image"})


def _references(pod: Pod) -> Iterator[tuple[str, str]]:
    if "serviceAccountName" in pod.spec:
        yield "ServiceAccount", pod.spec["serviceAccountName"]
    for secret in pod.spec.get("imagePullSecrets", []):
        yield "Secret", secret["name"]
    for volume in _volumes(pod):
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"]
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"]
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
    for container in pod.containers:
        sources = container.get("envFrom", [])
        sources += [entry.get("valueFrom", {}) for entry in container.get("env", [])]
        for source in sources:
            for key, value in source.items():
                if key in ("configMapRef", "configMapKeyRef"):
                    yield "ConfigMap", value["name"]
                elif key in ("secretRef", "secretKeyRef"):
                    yield "Secret", value["name"]


def _own_terms(spec: Document) -> Iterator[Document]:
    for constraint in spec.get("topologySpreadConstraints", []):
        yield constraint["labelSelector"]
    terms = spec.get("affinity", {}).get("podAntiAffinity", {})
    for term in terms.get("preferredDuringSchedulingIgnoredDuringExecution", []):
        yield term["podAffinityTerm"]["labelSelector"]


def _ports(pod: Pod) -> set[str | int]:
    """Names and numbers of what listens."""
    found: set[str | int] = set()
    for container in pod.containers:
        for port in container.get("ports", []):
            found |= {port["containerPort"], port["name"]}
    return found


def _container_ports(pod: Pod, container: Document) -> Iterator[str]:
    for port in container.get("ports", []):
        if not 0 < port["containerPort"] < 65536:
            yield f"{pod.name}: {port['containerPort']} is no port"
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container.get(name, {})
        for how in ("httpGet", "tcpSocket"):
            if how in probe and probe[how]["port"] not in _ports(pod):
                yield f"{pod.name}: {name} asks port {probe[how]['port']}, which is not there"


def _selected(every: Sequence[Pod], selector: Document) -> list[Pod]:
    return [pod for pod in every if selects(selector.get("matchLabels", {}), pod.labels)]


def _peers(name: str, every: Sequence[Pod], peers: Sequence[Document]) -> Iterator[str]:
    for peer in peers:
        if not peer.keys() & {"podSelector", "namespaceSelector", "ipBlock"}:
            yield f"{name} has an empty peer"
        local = "podSelector" in peer and "namespaceSelector" not in peer
        if local and not _selected(every, peer["podSelector"]):
            yield f"{name} has a peer that selects no pod"


def _policy_ports(name: str, targets: Sequence[Pod], rule: Document) -> Iterator[str]:
    for port in rule.get("ports", []):
        if not any(port["port"] in _ports(pod) for pod in targets):
            yield f"{name}: nobody listens on port {port['port']}"
