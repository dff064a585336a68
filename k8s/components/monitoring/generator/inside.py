"""Panels about what happens inside: queue, batches, cache, engines, process, versions."""

from k8s.components.monitoring.generator.panels import (
    Panel,
    Query,
    graph,
    heatmap,
    table,
)
from k8s.components.monitoring.generator.queries import (
    JOB,
    ORANGE,
    QUANTILES,
    RED,
    now,
    quantile,
    quantiles,
    rate,
    share,
    total,
)

_HIT = 'result="hit"'
_USED = 'state="used"'


def queue() -> list[Panel]:
    seconds = (
        f"sum by (instance) ({now('refinery_admitted_tokens')}) / "
        f"(sum by (instance) ({now('refinery_tokens_per_second')}) > 0)"
    )
    return [
        graph(
            "Wait for an engine",
            "Time of images in the queue. A line is where the alert is.",
            *quantiles("refinery_stage_seconds", 'stage="queue"'),
            unit="s",
            colours=QUANTILES,
            limits=((1.6, ORANGE),),
        ),
        graph(
            "Admitted tokens and their bound",
            "Work that is decoded, waits or is encoded. At the bound, 429.",
            Query(f"sum({now('refinery_admitted_tokens')})", "admitted"),
            Query(f"sum({now('refinery_admission_limit_tokens')})", "bound"),
            colours={"bound": RED},
        ),
        graph(
            "Seconds of work waiting",
            "Admitted tokens by the measured rate: what the autoscaler follows.",
            Query(seconds, "{{instance}}"),
            unit="s",
        ),
        graph(
            "Images in the queue",
            "Images that wait for an engine.",
            Query(f"sum by (instance) ({now('refinery_queue_images')})", "{{instance}}"),
        ),
        graph(
            "Refused and waiting tokens",
            "Tokens a second of requests that got 429, and those in the queue.",
            Query(total("refinery_rejected_tokens_total"), "refused a second"),
            Query(f"sum({now('refinery_queue_tokens')})", "in the queue"),
            colours={"refused.*": ORANGE},
        ),
        graph(
            "In flight and decoding",
            "Requests being worked on, and work in the decoding threads.",
            Query(f"sum({now('refinery_requests_in_flight')})", "requests in flight"),
            Query(f"sum({now('refinery_decode_pool_depth')})", "decoding, queued or running"),
        ),
    ]


def batches() -> list[Panel]:
    padding = share(
        total("refinery_padding_tokens_total"),
        f"({total('refinery_batch_tokens_sum')} + {total('refinery_padding_tokens_total')})",
    )
    return [
        heatmap(
            "Batches by images",
            "How many batches had how many images.",
            f"sum by (le) (increase({now('refinery_batch_images_bucket')}[$__rate_interval]))",
            unit="short",
        ),
        heatmap(
            "Batches by tokens",
            "How many batches had how many tokens; --batch-tokens is the bound.",
            f"sum by (le) (increase({now('refinery_batch_tokens_bucket')}[$__rate_interval]))",
            unit="short",
        ),
        graph(
            "Images in a batch",
            "Mean within the interval. Many sizes at once make small batches.",
            Query(
                f"{total('refinery_batch_images_sum', 'instance')} / "
                f"({total('refinery_batch_images_count', 'instance')} > 0)",
                "{{instance}}",
            ),
        ),
        graph(
            "Batches",
            "Batches a second.",
            Query(total("refinery_batch_images_count", "instance"), "{{instance}}"),
            unit="ops",
        ),
        graph(
            "Padding",
            "Share of tokens computed in vain to fill up recorded batches (CUDA graphs).",
            Query(padding, "padding"),
            unit="percentunit",
            most=1,
        ),
        graph(
            "Batches tried again",
            "Batches that failed and were tried again image by image.",
            Query(total("refinery_batch_retries_total", "instance"), "{{instance}}"),
            unit="ops",
        ),
    ]


def cache() -> list[Panel]:
    lookups = "refinery_cache_lookups_total"
    hits = f"{total(lookups, 'tier', _HIT)} / ({total(lookups, 'tier')} > 0)"
    return [
        graph(
            "Hit ratio by tier",
            "Redis is asked for what memory lacks, so its ratio is of the rest.",
            Query(hits, "{{tier}}"),
            unit="percentunit",
            most=1,
        ),
        graph(
            "Found in any tier",
            "Share of all keys, within the last hour; of all instances.",
            Query(f"job:refinery_cache_found:ratio_rate1h{{{JOB}}}", "found {{namespace}}"),
            Query(
                f"job:refinery_cache_found:ratio_rate1h{{{JOB}}} offset 1d",
                "a day before {{namespace}}",
            ),
            unit="percentunit",
            most=1,
        ),
        graph(
            "Look-ups by result",
            "Keys asked for; skipped ones were not, since Redis does not answer or is busy.",
            Query(total(lookups, "tier, result"), "{{tier}} {{result}}"),
            unit="ops",
            colours={".* error": RED, ".* skipped": ORANGE},
        ),
        graph(
            "Look-up time",
            "Of all keys of a request.",
            Query(quantile(0.5, "refinery_cache_lookup_seconds", "tier"), "{{tier}} p50"),
            Query(quantile(0.99, "refinery_cache_lookup_seconds", "tier"), "{{tier}} p99"),
            unit="s",
            colours={"redis p99": RED},
        ),
        graph(
            "Errors of Redis",
            "By kind; each is answered as a miss. corrupt: another program's values.",
            Query(total("refinery_cache_errors_total", "kind"), "{{kind}}"),
            unit="ops",
            colours={"corrupt": RED},
        ),
        graph(
            "Breaker open",
            "1 while an instance leaves Redis alone because it failed.",
            Query(now("refinery_cache_breaker_open"), "{{instance}}"),
            most=1,
        ),
        graph(
            "Kept in memory",
            "Bytes of the cache in memory; --cache-bytes is the bound.",
            Query(f"sum by (instance) ({now('refinery_cache_bytes')})", "{{instance}}"),
            unit="bytes",
        ),
        graph(
            "Entries in memory",
            "Values of the cache in memory.",
            Query(f"sum by (instance) ({now('refinery_cache_entries')})", "{{instance}}"),
        ),
        graph(
            "Writes given up",
            "By reason. too_large: raise --cache-max-value-bytes if they matter.",
            Query(total("refinery_cache_dropped_writes_total", "reason"), "{{reason}}"),
            unit="ops",
            colours={"queue_full|refused|error": RED},
        ),
        graph(
            "Traffic with Redis",
            "Bytes of values from and to Redis.",
            Query(total("refinery_cache_read_bytes_total"), "read"),
            Query(total("refinery_cache_written_bytes_total"), "written"),
            unit="Bps",
            width=12,
        ),
        graph(
            "Waiting to be written to Redis",
            "The newest is given up beyond 64 MiB.",
            Query(f"sum by (instance) ({now('refinery_cache_write_queue_bytes')})", "{{instance}}"),
            unit="bytes",
            width=12,
        ),
    ]


def engines() -> list[Panel]:
    busy = (
        f"{total('refinery_engine_busy_seconds_total', 'instance, device')} / "
        f"sum by (instance, device) ({now('refinery_engines')})"
    )
    return [
        graph(
            "Busy engines",
            "Share of the time that engines spend on batches. Near 1, more load only waits.",
            Query(busy, "{{instance}} {{device}}"),
            unit="percentunit",
            most=1,
            limits=((0.8, ORANGE),),
        ),
        graph(
            "Tokens a second",
            "Handed to engines, and the rate at which they could, as measured over the last "
            "batches.",
            Query(total("refinery_batch_tokens_sum"), "handed out"),
            Query(f"sum({now('refinery_tokens_per_second')})", "measured rate"),
        ),
        graph(
            "Device memory",
            "Share of a CUDA device's memory that is taken, by whomever.",
            Query(
                f"sum by (instance, device) ({now('refinery_device_memory_bytes', _USED)}) / "
                f"sum by (instance, device) ({now('refinery_device_memory_bytes')})",
                "{{instance}} {{device}}",
            ),
            unit="percentunit",
            most=1,
            limits=((0.95, RED),),
        ),
        graph(
            "Out of memory",
            "Batches that did not fit the device's memory, in the interval.",
            Query(
                f"sum by (instance) "
                f"(increase({now('refinery_out_of_memory_total')}[$__rate_interval]))",
                "{{instance}}",
            ),
        ),
        graph(
            "Late compiles",
            "Kernels compiled after the warm-up, while a request waited, in the interval.",
            Query(
                f"sum by (instance) "
                f"(increase({now('refinery_late_compiles_total')}[$__rate_interval]))",
                "{{instance}}",
            ),
        ),
        graph(
            "Engines",
            "Forwards that may run at a time.",
            Query(
                f"sum by (instance, device) ({now('refinery_engines')})", "{{instance}} {{device}}"
            ),
        ),
    ]


def process() -> list[Panel]:
    return [
        graph(
            "Memory",
            "Resident memory of the process.",
            Query(now("refinery_process_resident_memory_bytes"), "{{instance}}"),
            unit="bytes",
        ),
        graph(
            "Address space",
            "Virtual memory; CUDA reserves far more than it takes.",
            Query(now("refinery_process_virtual_memory_bytes"), "{{instance}}"),
            unit="bytes",
        ),
        graph(
            "CPU",
            "Cores that the process keeps busy.",
            Query(rate("refinery_process_cpu_seconds_total"), "{{instance}}"),
        ),
        graph(
            "File descriptors",
            "Share of those that the process may have open; each connection is one.",
            Query(
                f"{now('refinery_process_open_fds')} / {now('refinery_process_max_fds')}",
                "{{instance}}",
            ),
            unit="percentunit",
            most=1,
            limits=((0.8, RED),),
        ),
        graph(
            "Up for",
            "Since the process started; a fall is a restart.",
            Query(f"time() - {now('refinery_process_start_time_seconds')}", "{{instance}}"),
            unit="s",
        ),
        graph(
            "Ready by instance",
            "1 while it takes requests.",
            Query(now("refinery_ready"), "{{instance}}"),
            most=1,
        ),
    ]


def versions() -> list[Panel]:
    build = "version, python, torch, cuda"
    return [
        table(
            "Builds",
            "What runs; more than one row for long is a rollout that did not end.",
            f"count by ({build}) ({now('refinery_build_info')})",
        ),
        table(
            "Models",
            "What is served; a model with several digests gives features that depend on the "
            "instance.",
            f"count by (model, digest, backbone, precision) ({now('refinery_model_info')})",
        ),
        graph(
            "Instances by build",
            "How a rollout goes.",
            Query(
                f"count by (version, torch, cuda) ({now('refinery_build_info')})",
                "{{version}} torch {{torch}} cuda {{cuda}}",
            ),
            stacked=True,
            width=12,
        ),
        graph(
            "Instances by model and digest",
            "How a change of weights goes.",
            Query(
                f"count by (model, digest) ({now('refinery_model_info')})", "{{model}} {{digest}}"
            ),
            stacked=True,
            width=12,
        ),
    ]
