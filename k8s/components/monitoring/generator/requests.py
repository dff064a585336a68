"""Panels about what clients see: objectives, traffic, errors, latency."""

from k8s.components.monitoring.generator.panels import (
    Panel,
    Query,
    graph,
    heatmap,
    stat,
)
from k8s.components.monitoring.generator.queries import (
    BLUE,
    FEATURES,
    GREEN,
    ORANGE,
    QUANTILES,
    RED,
    SLOW_SECONDS,
    YELLOW,
    budget_left,
    burn,
    now,
    quantile,
    quantiles,
    share,
    total,
)


def overview() -> list[Panel]:
    budget_steps = ((None, RED), (0.0, ORANGE), (0.25, GREEN))
    burn_limits = ((1, YELLOW), (6, ORANGE), (14.4, RED))
    burn_text = "1 uses up the budget of 30 days in 30 days; alerts are at 1, 3, 6 and 14.4."
    refused = share(
        total("refinery_requests_total", labels='route="/features", status="429"'),
        total("refinery_requests_total", labels=FEATURES),
    )
    return [
        stat(
            "Ready",
            "Instances that take requests.",
            Query(f"sum({now('refinery_ready')})", "ready"),
            steps=((None, RED), (1, GREEN)),
            width=3,
        ),
        stat(
            "Not ready",
            "Instances that are scraped and take no requests: starting, draining or failed.",
            Query(f"count({now('refinery_ready')}) - sum({now('refinery_ready')})", "not ready"),
            steps=((None, GREEN), (1, ORANGE)),
            width=3,
        ),
        stat(
            "Requests",
            "Requests for features, of any status.",
            Query(total("refinery_requests_total", labels=FEATURES), "requests"),
            unit="reqps",
            width=3,
        ),
        stat(
            "p99",
            "Ninety-nine of a hundred requests took no longer, headers to end of answer.",
            # Without requests it is no number, and no number is less than 0: then there is none.
            Query(f"{quantile(0.99, 'refinery_request_seconds')} >= 0", "p99"),
            unit="s",
            steps=((None, GREEN), (1, YELLOW), (SLOW_SECONDS, RED)),
            width=3,
        ),
        stat(
            "Refused",
            "Requests that got 429, of all for features.",
            Query(
                f"{refused} or {total('refinery_requests_total', labels=FEATURES)} * 0", "refused"
            ),
            unit="percentunit",
            decimals=1,
            steps=((None, GREEN), (0.05, ORANGE), (0.25, RED)),
            width=4,
        ),
        stat(
            "Error budget left",
            "Of the 0.1 % of requests that may fail within 30 days; as far back as Prometheus "
            "keeps data.",
            Query(budget_left("features_failed", "features", 0.001), "{{namespace}}"),
            unit="percentunit",
            decimals=0,
            steps=budget_steps,
        ),
        stat(
            "Latency budget left",
            "Of the 1 % of requests that may take longer than 2.5 s within 30 days.",
            Query(budget_left("requests_slow", "requests_timed", 0.01), "{{namespace}}"),
            unit="percentunit",
            decimals=0,
            steps=budget_steps,
        ),
        graph(
            "Error budget burn",
            f"Share of failed requests, in multiples of the 0.1 % that the objective allows. "
            f"{burn_text}",
            *burn("features_failed", 0.001),
            limits=burn_limits,
            width=12,
        ),
        graph(
            "Latency budget burn",
            f"Share of requests over 2.5 s, in multiples of the 1 % that the objective allows. "
            f"{burn_text}",
            *burn("requests_slow", 0.01),
            limits=burn_limits,
            width=12,
        ),
    ]


def traffic() -> list[Panel]:
    statuses = {"2..": GREEN, "304": BLUE, "4..": YELLOW, "429": ORANGE, "5..": RED}
    return [
        graph(
            "Requests by status",
            "Requests for features; 499 is a client that hung up, 429 one that should come back "
            "later.",
            Query(total("refinery_requests_total", "status", FEATURES), "{{status}}"),
            unit="reqps",
            colours=statuses,
            stacked=True,
        ),
        graph(
            "Errors by code",
            "Error answers, and errors of single images of a request, by what went wrong.",
            Query(total("refinery_errors_total", "code"), "{{code}}"),
            unit="ops",
            colours={"internal|encoding_failed": RED, "overloaded": ORANGE},
        ),
        graph(
            "Requests by route",
            "All requests, probes and scrapes too; `other` has no route.",
            Query(total("refinery_requests_total", "route"), "{{route}}"),
            unit="reqps",
        ),
        graph(
            "Images",
            "Encoded; joined the computation of an identical one; left the queue because their "
            "request ended.",
            Query(total("refinery_images_total"), "encoded"),
            Query(total("refinery_coalesced_images_total"), "joined"),
            Query(total("refinery_cancelled_images_total"), "cancelled"),
            Query(total("refinery_boxes_total"), "boxes"),
            unit="ops",
        ),
        graph(
            "Answers not sent",
            "Clients that hung up, and answers that the client had already (304).",
            Query(total("refinery_abandoned_requests_total"), "hung up"),
            Query(total("refinery_not_modified_total"), "not modified"),
            unit="reqps",
            colours={"hung up": ORANGE},
        ),
        graph(
            "Bodies received",
            "Bytes of request bodies.",
            Query(total("refinery_received_bytes_total", "instance"), "{{instance}}"),
            unit="Bps",
        ),
    ]


def latency() -> list[Panel]:
    mean = (
        f"{total('refinery_stage_seconds_sum', 'stage')} / "
        f"({total('refinery_stage_seconds_count', 'stage')} > 0)"
    )
    return [
        graph(
            "Whole request",
            "Headers to end of answer, of every request for features: refused and failed ones too, "
            "and the "
            "time that a slow client takes to read. The line is the objective for p99.",
            *quantiles("refinery_request_seconds"),
            unit="s",
            colours=QUANTILES,
            limits=((SLOW_SECONDS, RED),),
        ),
        heatmap(
            "Requests by duration",
            "How many requests took how long.",
            f"sum by (le) (increase({now('refinery_request_seconds_bucket')}[$__rate_interval]))",
            unit="s",
        ),
        graph(
            "Slow requests",
            "Share of requests that took longer than 2.5 s; the objective allows 1 %.",
            Query(
                "1 - "
                + share(
                    total("refinery_request_seconds_bucket", labels='le="2.5"'),
                    total("refinery_request_seconds_count"),
                ),
                "slow",
            ),
            unit="percentunit",
            colours={"slow": RED},
            limits=((0.01, RED),),
        ),
        graph(
            "p99 by stage",
            "The slowest hundredth of each stage; frames are not among them.",
            Query(quantile(0.99, "refinery_stage_seconds", "stage"), "{{stage}}"),
            unit="s",
        ),
        graph(
            "p95 by stage",
            "The slowest twentieth of each stage.",
            Query(quantile(0.95, "refinery_stage_seconds", "stage"), "{{stage}}"),
            unit="s",
        ),
        graph(
            "p50 by stage",
            "The median of each stage.",
            Query(quantile(0.5, "refinery_stage_seconds", "stage"), "{{stage}}"),
            unit="s",
        ),
        graph(
            "Where the time goes",
            "Mean time of a request that passes through the stage, within the interval.",
            Query(mean, "{{stage}}"),
            unit="s",
            stacked=True,
            width=12,
        ),
        graph(
            "p99 by instance",
            "One that is slower than the others has a slower device, or more work.",
            Query(quantile(0.99, "refinery_request_seconds", "instance"), "{{instance}}"),
            unit="s",
            limits=((SLOW_SECONDS, RED),),
            width=12,
        ),
    ]
