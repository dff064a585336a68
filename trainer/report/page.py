"""The report as one HTML page that loads nothing."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from backbone.artifact import Manifest
from trainer.ablate.table import Table
from trainer.report import markdown, tables
from trainer.report.ablation import ablation
from trainer.report.curves import curves
from trainer.report.gallery import gallery
from trainer.report.inputs import Given
from trainer.report.measure import Measured
from trainer.report.verdict import Finding, find, leading, summary

_HERE = Path(__file__).parent
_OUTCOMES = {
    "better": "\N{BLACK UP-POINTING TRIANGLE} better",
    "worse": "\N{BLACK DOWN-POINTING TRIANGLE} worse",
    "unclear": "\N{ALMOST EQUAL TO} no clear difference",
    "unknown": "no interval",
}

_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'sha256-$script_hash'">
<meta name="generator" content="vit-refinery">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<main>
<header>
<h1>$title</h1>
<p class="soft">$facts</p>
<nav aria-label="Sections">$links</nav>
</header>
$sections
<footer>
<p>Written on $date by</p>
<pre><code>$command</code></pre>
</footer>
</main>
<script>$script</script>
</body>
</html>
""")


@dataclass(frozen=True)
class Content:
    """All that the page shows.

    Attributes:
        specs: Where each backbone is from, by its title.
        digests: Of the weights, by the same titles.
        facts: One line about the refined backbone.
        records: Of the training run, one per step; empty without one.
        card: Markdown; empty without one.
    """

    title: str
    facts: str
    specs: Mapping[str, str]
    digests: Mapping[str, str]
    measured: Measured
    results: Sequence[Given]
    ablation: Table | None
    records: Sequence[Mapping[str, float]]
    card: str
    manifest: Manifest | None
    versions: Mapping[str, str]
    command: str
    date: str


def write_page(content: Content) -> str:
    """The page as text."""
    parts = {
        "verdict": ("Verdict", _verdict(content)),
        "images": ("Images", gallery(content.measured)),
        "measured": ("Measured", "".join(tables.result(one) for one in content.results)),
        "ablation": ("Ablation", ablation(content.ablation) if content.ablation else ""),
        "training": ("Training", curves(content.records)),
        "card": ("Model card", markdown.to_html(content.card)),
        "facts": ("Facts", _facts(content)),
    }
    shown = {key: part for key, part in parts.items() if part[1]}
    script = "\n" + (_HERE / "explorer.js").read_text(encoding="utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    return _PAGE.substitute(
        title=escape(content.title),
        facts=escape(content.facts),
        links="".join(f'<a href="#{key}">{title}</a>' for key, (title, _) in shown.items()),
        sections="\n".join(
            f'<section id="{key}"><h2>{title}</h2>{body}</section>'
            for key, (title, body) in shown.items()
        ),
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(digest).decode(),
        date=escape(content.date),
        command=escape(content.command),
    )


def counted(content: Content) -> list[Finding]:
    """The findings of all scores; results of other weights decide nothing."""
    return find(content.measured, [one.result for one in content.results if not one.warnings])


def _verdict(content: Content) -> str:
    doubted = [one for one in content.results if one.warnings]
    warnings = ""
    if doubted:
        names = ", ".join(f"{one.result.dataset} ({one.source})" for one in doubted)
        warnings = (
            f'<p class="warning">Not counted here, because they are of other weights: '
            f"{escape(names)}. What differs stands beside them.</p>"
        )
    findings = counted(content)
    if not leading(findings):
        only = escape(", ".join(content.specs))
        return f'{warnings}<p class="verdict">Nothing to compare: this page shows {only} alone.</p>'
    tiles = "".join(_tile(one) for one in leading(findings))
    headline, *rest = map(escape, summary(findings))
    lines = "".join(f"<p>{line}</p>" for line in rest)
    return (
        f'{warnings}<p class="verdict">{headline}</p>{lines}'
        f'<div class="tiles">{tiles}</div>'
        '<p class="note">Intervals are of 95 %, of the difference between refined and raw on the '
        "same images or seeds. One that holds zero counts as no clear difference. Seeds vary the "
        "probe, not the training run.</p>"
    )


def _tile(one: Finding) -> str:
    sign = tables.unit_sign(one.unit)
    unit = f" {escape(sign)}" if sign else ""
    raw, refined = tables.number(one.raw, one.unit), tables.number(one.refined, one.unit)
    names = [escape(name) for name in one.names]
    change = one.difference
    moved = tables.number(change.mean, one.unit, signed=True)
    ends = ""
    if change.count > 1:
        low, high = (tables.number(end, one.unit, signed=True) for end in (change.low, change.high))
        ends = f" <small>({low} to {high})</small>"
    return (
        f'<div class="tile"><h3>{escape(one.title)}</h3><dl>'
        f"<div><dt>{names[0]}</dt><dd>{raw}<small>{unit}</small></dd></div>"
        f"<div><dt>{names[1]}</dt><dd>{refined}<small>{unit}</small></dd></div></dl>"
        f'<p class="moved"><b>{moved}</b>{ends}</p>'
        f"<p>{escape(one.source)}; {one.better} is better</p>"
        f'<span class="outcome {one.outcome}">{_OUTCOMES[one.outcome]}</span></div>'
    )


def _facts(content: Content) -> str:
    facts = []
    for title, spec in content.specs.items():
        facts.append((title, spec))
        facts.append((f"digest of {title}", content.digests[title]))
    manifest = content.manifest
    if manifest is not None:
        facts += _manifest_facts(manifest)
    facts.append(
        ("versions, this report", ", ".join(f"{k} {v}" for k, v in content.versions.items()))
    )
    recipe = ""
    if manifest is not None and manifest.recipe:
        text = "\n".join(_recipe_lines(manifest.recipe))
        recipe = (
            "<details><summary>The whole recipe</summary>"
            f"<pre><code>{escape(text)}</code></pre></details>"
        )
    return tables.facts_table(facts) + recipe


def _manifest_facts(manifest: Manifest) -> list[tuple[str, str]]:
    border, data = manifest.border, manifest.data
    height, width = manifest.native_size
    facts = [
        ("architecture", f"{manifest.backbone}, patches of {manifest.patch_size} px"),
        ("refined at", f"{width} × {height} px"),
        ("pixels", f"mean {_listed(manifest.mean)}; std {_listed(manifest.std)}"),
        (
            "register border",
            f"{border.fill}, one patch of width per {border.r_reg} image patches, "
            f"seed {border.seed}",
        ),
        ("channels masked in training", ", ".join(map(str, manifest.channel_mask)) or "none"),
        ("recipe", str(manifest.recipe.get("name", ""))),
        ("training images", ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in data.items())),
    ]
    if manifest.origin is not None:
        origin = manifest.origin
        facts.append(("refined from", f"{origin.source} ({origin.layout}), {origin.digest[:12]}"))
    values = ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in manifest.metrics.items())
    facts.append(("at the end of training", values))
    facts.append(
        ("versions, training", ", ".join(f"{k} {v}" for k, v in manifest.versions.items()))
    )
    return facts


def _recipe_lines(recipe: Mapping[str, object], prefix: str = "") -> list[str]:
    lines = []
    for name, value in recipe.items():
        if isinstance(value, Mapping):
            lines += _recipe_lines(value, f"{prefix}{name}.")
        else:
            lines.append(f"{prefix}{name} = {value}")
    return lines


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
