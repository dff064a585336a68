"""PromQL of the panels: what is selected, rates, shares and quantiles."""

from k8s.components.monitoring.generator.panels import Query

JOB = 'job="vit-refinery", namespace=~"$namespace"'
HERE = f'{JOB}, instance=~"$instance"'
FEATURES = 'route="/features"'
SLOW_SECONDS = 2.5  # of the objective in rules.yaml
GREEN, YELLOW, ORANGE, RED, BLUE = "green", "yellow", "orange", "red", "blue"
QUANTILES = {"p50": GREEN, "p95": YELLOW, "p99": RED}


def now(metric: str, labels: str = "") -> str:
    return f"{metric}{{{HERE}{', ' * bool(labels)}{labels}}}"


def rate(metric: str, labels: str = "") -> str:
    return f"rate({now(metric, labels)}[$__rate_interval])"


def total(metric: str, by: str = "", labels: str = "") -> str:
    """Sum of rates, by labels or of everything."""
    return f"sum{f' by ({by})' * bool(by)} ({rate(metric, labels)})"


def share(part: str, whole: str) -> str:
    """None, not 0/0, where there is nothing to have a share of."""
    return f"{part} / ({whole} > 0)"


def quantile(q: float, histogram: str, by: str = "", labels: str = "") -> str:
    kept = f"{by}, le" if by else "le"
    return f"histogram_quantile({q}, {total(f'{histogram}_bucket', kept, labels)})"


def quantiles(histogram: str, labels: str = "") -> list[Query]:
    return [
        Query(quantile(q, histogram, labels=labels), f"p{round(q * 100)}")
        for q in (0.5, 0.95, 0.99)
    ]


def budget_left(bad: str, every: str, budget: float) -> str:
    used = share(
        f"sum_over_time(job:refinery_{bad}:rate5m{{{JOB}}}[30d])",
        f"sum_over_time(job:refinery_{every}:rate5m{{{JOB}}}[30d])",
    )
    return f"1 - ({used}) / {budget}"


def burn(bad: str, budget: float) -> list[Query]:
    return [
        Query(
            f"job:refinery_{bad}:ratio_rate{window}{{{JOB}}} / {budget}",
            f"{name} {{{{namespace}}}}",
        )
        for window, name in (("5m", "5 min"), ("1h", "1 h"), ("6h", "6 h"), ("3d", "3 d"))
    ]
