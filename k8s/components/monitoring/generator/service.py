"""The dashboard of the service: its rows from above, and its variables."""

from typing import Any

from k8s.components.monitoring.generator import inside, requests
from k8s.components.monitoring.generator.panels import (
    dashboard,
    datasource_variable,
    label_variable,
)
from k8s.components.monitoring.generator.queries import JOB


def service_dashboard() -> dict[str, Any]:
    """The dashboard as Grafana's JSON."""
    return dashboard(
        uid="vit-refinery",
        title="vit-refinery service",
        description="Requests, latency, queue, batches, cache and engines of the feature service.",
        variables=[
            datasource_variable(),
            label_variable("namespace", "Namespace", 'refinery_ready{job="vit-refinery"}'),
            label_variable("instance", "Instance", f"refinery_ready{{{JOB}}}"),
        ],
        rows=[
            ("Overview and objectives (objectives: of all instances)", requests.overview()),
            ("Traffic and errors", requests.traffic()),
            ("Latency", requests.latency()),
            ("Queue and admission", inside.queue()),
            ("Batches", inside.batches()),
            ("Cache", inside.cache()),
            ("Engines", inside.engines()),
            ("Process", inside.process()),
            ("Versions", inside.versions()),
        ],
    )
