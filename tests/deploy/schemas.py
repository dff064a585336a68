"""What we use of the custom resources, as JSON Schema: a field that is not here is a mistake.

Written by hand from the documentation of KEDA, the Prometheus operator, JobSet and Gateway API.
Their own schemas allow more; a manifest that uses more adds it here, after a look at what they
allow.
"""

from collections.abc import Iterator
from typing import Any

from jsonschema_rs import Draft202012Validator

from tests.deploy.manifests import Document

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string", "minLength": 1}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_DURATION: Schema = {"type": "string", "pattern": r"^(\d+(ms|[smhd]))+$"}
_LABELS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}


def _object(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": sorted(required),
        "additionalProperties": False,
    }


def _list(item: Schema) -> Schema:
    return {"type": "array", "items": item, "minItems": 1}


def _resource(version: str, kind: str, spec: Schema) -> Schema:
    metadata = _object(
        {"name": {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}},
        {"namespace": _TEXT, "labels": _LABELS, "annotations": _LABELS},
    )
    fixed = {"apiVersion": {"const": version}, "kind": {"const": kind}}
    return _object(fixed | {"metadata": metadata, "spec": spec})


_SCALING_RULES = _object(
    {
        "stabilizationWindowSeconds": {"type": "integer", "minimum": 0, "maximum": 3600},
        "policies": _list(
            _object(
                {
                    "type": {"enum": ["Pods", "Percent"]},
                    "value": {"type": "integer", "minimum": 1},
                    "periodSeconds": {"type": "integer", "minimum": 1, "maximum": 1800},
                }
            )
        ),
    },
    {"selectPolicy": {"enum": ["Max", "Min", "Disabled"]}},
)

SCALED_OBJECT = _resource(
    "keda.sh/v1alpha1",
    "ScaledObject",
    _object(
        {
            "scaleTargetRef": _object({"name": _TEXT}, {"apiVersion": _TEXT, "kind": _TEXT}),
            # Of Prometheus alone. KEDA's metadata are texts; a number is refused by the API server.
            "triggers": _list(
                _object(
                    {
                        "type": {"const": "prometheus"},
                        "metricType": {"enum": ["AverageValue", "Value"]},
                        "metadata": _object(
                            {
                                "serverAddress": {"type": "string", "pattern": "^https?://"},
                                "query": _TEXT,
                                "threshold": {"type": "string", "pattern": r"^\d+(\.\d+)?$"},
                                # The default, "true", shrinks the fleet when Prometheus is lost.
                                "ignoreNullValues": {"const": "false"},
                            }
                        ),
                    }
                )
            ),
            "minReplicaCount": {"type": "integer", "minimum": 1},
            "maxReplicaCount": {"type": "integer", "minimum": 1},
        },
        {
            "pollingInterval": _COUNT,
            "fallback": _object(
                {
                    "failureThreshold": _COUNT,
                    "replicas": _COUNT,
                    "behavior": {
                        "enum": [
                            "static",
                            "currentReplicas",
                            "currentReplicasIfHigher",
                            "currentReplicasIfLower",
                        ]
                    },
                }
            ),
            "advanced": _object(
                {
                    "horizontalPodAutoscalerConfig": _object(
                        {
                            "behavior": _object(
                                {"scaleUp": _SCALING_RULES, "scaleDown": _SCALING_RULES}
                            )
                        }
                    )
                }
            ),
        },
    ),
)

SERVICE_MONITOR = _resource(
    "monitoring.coreos.com/v1",
    "ServiceMonitor",
    _object(
        {
            "selector": _object({"matchLabels": _LABELS}),
            "endpoints": _list(
                _object(
                    {"port": _TEXT, "interval": _DURATION},
                    {"path": {"type": "string", "pattern": "^/"}, "scrapeTimeout": _DURATION},
                )
            ),
        },
        {"jobLabel": _TEXT},
    ),
)

PROMETHEUS_RULE = _resource(
    "monitoring.coreos.com/v1",
    "PrometheusRule",
    _object(
        {
            "groups": _list(
                _object(
                    {
                        "name": _TEXT,
                        "rules": _list(
                            {
                                "oneOf": [
                                    _object({"record": _TEXT, "expr": _TEXT}, {"labels": _LABELS}),
                                    _object(
                                        {"alert": _TEXT, "expr": _TEXT},
                                        {
                                            "for": _DURATION,
                                            "keep_firing_for": _DURATION,
                                            "labels": _LABELS,
                                            "annotations": _LABELS,
                                        },
                                    ),
                                ]
                            }
                        ),
                    },
                    {"interval": _DURATION},
                )
            )
        }
    ),
)

JOB_SET = _resource(
    "jobset.x-k8s.io/v1alpha2",
    "JobSet",
    _object(
        {
            "replicatedJobs": _list(
                _object(
                    {
                        "name": _TEXT,
                        "replicas": {"type": "integer", "minimum": 1},
                        # The spec is checked as that of a Job: `manifests.plain_jobs`.
                        "template": _object({"spec": {"type": "object"}}),
                    }
                )
            )
        },
        {
            "ttlSecondsAfterFinished": _COUNT,
            "failurePolicy": _object(
                {"maxRestarts": _COUNT},
                {
                    "rules": _list(
                        _object(
                            {
                                "name": _TEXT,
                                "action": {
                                    "enum": [
                                        "FailJobSet",
                                        "RestartJobSet",
                                        "RestartJobSetAndIgnoreMaxRestarts",
                                    ]
                                },
                            },
                            {
                                "onJobFailureReasons": _list(
                                    {
                                        "enum": [
                                            "BackoffLimitExceeded",
                                            "DeadlineExceeded",
                                            "FailedIndexes",
                                            "MaxFailedIndexesExceeded",
                                            "PodFailurePolicy",
                                        ]
                                    }
                                )
                            },
                        )
                    )
                },
            ),
        },
    ),
)

HTTP_ROUTE = _resource(
    "gateway.networking.k8s.io/v1",
    "HTTPRoute",
    _object(
        {
            "parentRefs": _list(
                _object({"name": _TEXT, "sectionName": _TEXT}, {"namespace": _TEXT})
            ),
            "hostnames": _list(_TEXT),
            "rules": _list(
                _object(
                    {
                        "backendRefs": _list(_object({"name": _TEXT, "port": _COUNT})),
                        # Durations of Gateway API (GEP-2257) are a subset of those above.
                        "timeouts": _object({"request": _DURATION}),
                    }
                )
            ),
        }
    ),
)

CUSTOM = {
    schema["properties"]["kind"]["const"]: schema
    for schema in (SCALED_OBJECT, SERVICE_MONITOR, PROMETHEUS_RULE, JOB_SET, HTTP_ROUTE)
}


def violations(item: Document) -> Iterator[str]:
    """What the schema of a custom resource says against it."""
    for error in Draft202012Validator(CUSTOM[item["kind"]]).iter_errors(item):
        yield f"{'/'.join(map(str, error.instance_path))}: {error.message}"
    spec = item.get("spec", {})
    if item["kind"] == "ScaledObject" and (
        spec.get("minReplicaCount", 0) > spec.get("maxReplicaCount", 100)
    ):
        yield "spec: more replicas at least than at most"
