"""Write the files of this folder that are made from others.

    python -m k8s.components.monitoring.generator

dashboards/vit-refinery.json comes from `service.py`: sixty panels of Grafana's JSON written by
hand would drift apart. prometheusrule.yaml has the groups of rules.yaml and kubernetes-rules.yaml,
since Prometheus reads plain files and its operator an object. A test refuses what is out of date.
"""

import json
from pathlib import Path

from k8s.components.monitoring.generator.service import service_dashboard

FOLDER = Path(__file__).parents[1]
RULE_FILES = ("rules.yaml", "kubernetes-rules.yaml")
_OBJECT = """\
# Made of rules.yaml and kubernetes-rules.yaml: change those, and then
#   python -m k8s.components.monitoring.generator
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: vit-refinery
  labels:
    app.kubernetes.io/name: vit-refinery
    app.kubernetes.io/component: service
    app.kubernetes.io/part-of: vit-refinery
spec:
  groups:
"""


def prometheus_rule(folder: Path = FOLDER) -> str:
    """The object that the Prometheus operator reads, as YAML; comments come with their groups."""
    lines = []
    for name in RULE_FILES:
        _, groups = (folder / name).read_text().split("\ngroups:\n")
        lines += [f"  {line}".rstrip() for line in groups.splitlines()]
    return _OBJECT + "\n".join(lines) + "\n"


def made_files(folder: Path = FOLDER) -> dict[Path, str]:
    """What each of the files should hold."""
    dashboard = json.dumps(service_dashboard(), indent=2, ensure_ascii=False) + "\n"
    return {
        folder / "dashboards" / "vit-refinery.json": dashboard,
        folder / "prometheusrule.yaml": prometheus_rule(folder),
    }


if __name__ == "__main__":
    for path, text in made_files().items():
        path.write_text(text)
