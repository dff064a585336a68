"""The doctor's report as one HTML page that loads nothing."""

import statistics
from html import escape
from string import Template

from trainer.config import Recipe
from trainer.doctor import charts, pictures
from trainer.doctor.measure import zscores
from trainer.doctor.report import Report

_FP, _GP, _REG = "#3b6fb6", "#d9822b", "#7a5bbd"
_FILTERS = {
    "fixed_pattern": "fixed pattern (FP)",
    "global_proxy": "global proxy (GP)",
    "register_guided": "register-guided",
    "attention_hijack": "attention hijack (AH), of what the others keep",
    "clean": "all enabled filters together",
}

_PAGE = Template("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>doctor: $backbone</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2939; margin: 0; background: #f5f6f8; }
main { max-width: 1100px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 0 0 8px; }
section { background: #fff; border: 1px solid #e4e7ec; border-radius: 8px; padding: 18px 20px;
  margin: 18px 0; }
p { margin: 8px 0; max-width: 78ch; }
table { border-collapse: collapse; margin: 10px 0; }
th, td { text-align: left; padding: 4px 18px 4px 0; border-bottom: 1px solid #eaecf0; }
th { font-weight: 600; color: #475467; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.bad { color: #b42318; font-weight: 600; }
tr.off td { color: #98a2b3; }
tr.sum td { font-weight: 600; }
tr.best td { background: #eaf6ef; }
pre { background: #101828; color: #f2f4f7; padding: 12px 14px; border-radius: 6px;
  overflow-x: auto; font-size: 13px; }
.chart { width: 100%; max-width: 820px; font: 12px system-ui, sans-serif; display: block; }
.faint { color: #667085; }
.advice { border-left: 4px solid #3b6fb6; padding: 2px 0 2px 12px; }
.change { border-left-color: #2e9e5b; }
.row { display: grid; grid-template-columns: repeat(7, 1fr); gap: 8px; margin: 0 0 14px; }
figure { margin: 0; }
figure img { width: 100%; border-radius: 4px; display: block; }
figcaption { font-size: 12px; color: #475467; line-height: 1.3; margin-top: 3px; }
</style>
<main>
<h1>$backbone</h1>
<p class="faint">$facts</p>
<section>
<h2>Suggested</h2>
$flags
$summary
<p class="faint">A share is of the crop tokens of $num_crops crops. Below 5 % a filter leaves too
little to learn from, above 95 % it does next to nothing.</p>
</section>
<section>
<h2>Fixed patterns and global proxies</h2>
$fp_gp_chart
$fp_gp_advice
<p class="faint">The best cosine of each crop token with a token of the reference image alone (FP)
and of the strip of it beside the crop (GP). Neither shows what the crop shows, so a token with a
high score says something else than what is at its place. The suggested threshold is the valley
between two humps of the higher of both scores where that keeps 40 to 80 %; else the value that
keeps 60 %.</p>
</section>
<section>
<h2>Registers as detectors</h2>
$register_chart
$register_advice
</section>
<section>
<h2>Attention hijackees</h2>
$layers_chart
$layers_advice
<p class="faint">How much attention a token receives from the crop's tokens, over the block's mean:
the box holds 80 % of the tokens, the whisker 98 %, the line is the median. Long upper whiskers mean
that a few tokens draw what the others should get. The suggested blocks are as many as the recipe's,
where the most attended 2 % of tokens have the largest part; the first and the last sixth of the
blocks are left out.</p>
$layers_table
</section>
<section>
<h2>Channels that swamp every cosine</h2>
$channels
</section>
<section>
<h2>Width of the register border at inference</h2>
$widths
</section>
<section>
<h2>What each filter takes</h2>
<p class="faint">The first crop of some images. Red tokens are rejected$pictures_note. Colours of
the tokens: their first three principal components.</p>
$pictures
</section>
<p class="faint">Written by python -m trainer doctor.</p>
</main>
</html>
""")


def write_page(report: Report) -> str:
    """The page as text."""
    scores, recipe, advice = report.scores, report.recipe, report.advice
    section = recipe.filters.fp_gp
    suggested = report.suggested
    new = suggested.filters.fp_gp
    fixed, proxy = scores.fixed_pattern_QN, scores.global_proxy_QN
    label = "best cosine"
    if "zscore" in (section.criterion, new.criterion):
        fixed, proxy = zscores(fixed), zscores(proxy)
        label = "best cosine, in standard deviations over the crop's mean"
    marks = []
    if section.criterion == new.criterion or new.criterion == "cosine":
        marks.append(charts.Mark(section.threshold, "recipe"))
    if (new.criterion, new.threshold) != (section.criterion, section.threshold):
        marks.append(charts.Mark(new.threshold, "suggested", is_dashed=True))
    guided, new_guided = recipe.filters.register_guided, suggested.filters.register_guided
    guided_marks = [charts.Mark(guided.threshold, "recipe")]
    if new_guided.threshold != guided.threshold:
        guided_marks.append(charts.Mark(new_guided.threshold, "suggested", is_dashed=True))
    depth = len(scores.layer_inflow_LQN)
    current = recipe.filters.attention_hijack.layer_range(depth)
    better = suggested.filters.attention_hijack.layer_range(depth)
    return _PAGE.substitute(
        backbone=escape(report.name),
        facts=escape(report.facts),
        flags=_flags(report),
        summary=_summary(report),
        num_crops=len(fixed),
        fp_gp_chart=charts.histogram(
            [
                charts.Series("reference image (FP)", fixed, _FP),
                charts.Series("strip (GP)", proxy, _GP),
            ],
            marks,
            label,
        ),
        fp_gp_advice=_advice(advice["fp_gp"].text, bool(advice["fp_gp"].settings)),
        register_chart=charts.histogram(
            [charts.Series("best cosine with a register", scores.register_QN, _REG)],
            guided_marks,
            "best cosine",
        ),
        register_advice=_advice(
            advice["register_guided"].text, bool(advice["register_guided"].settings)
        ),
        layers_chart=charts.layers(
            scores.layer_inflow_LQN, current, better if better != current else None
        ),
        layers_advice=_advice(advice["layers"].text, bool(advice["layers"].settings)),
        layers_table=_layers(report, current, better),
        channels=_channels(report),
        widths=_widths(report),
        pictures_note=", by the suggested values" if report.flags else "",
        pictures=_pictures(report),
    )


def _flags(report: Report) -> str:
    if not report.flags:
        return "<p>Nothing to change: the recipe's values fit this backbone and these images.</p>"
    lines = " \\\n    ".join(f"--set {setting}" for setting in report.flags)
    return f"<p>Add to the run's command:</p><pre>{escape(lines)}</pre>"


def _summary(report: Report) -> str:
    has_new = report.suggested_shares is not None
    head = '<th class="number">with the suggestions</th>' if has_new else ""
    lines = [f'<tr><th>kept by</th><th class="number">the recipe</th>{head}</tr>']
    off = _filters_off(report.recipe)
    for name, title in _FILTERS.items():
        is_off = name in off
        cells = [_share(report.shares[name])]
        if report.suggested_shares is not None:
            cells.append(_share(report.suggested_shares[name]))
        kind = "off" if is_off else "sum" if name == "clean" else ""
        note = " (off in the recipe)" if is_off else ""
        lines.append(f'<tr class="{kind}"><td>{title}{note}</td>{"".join(cells)}</tr>')
    return f"<table>{''.join(lines)}</table>"


def _filters_off(recipe: Recipe) -> set[str]:
    filters = recipe.filters
    enabled = {
        "fixed_pattern": filters.fp_gp.enabled,
        "global_proxy": filters.fp_gp.enabled,
        "register_guided": filters.register_guided.enabled,
        "attention_hijack": filters.attention_hijack.enabled,
    }
    return {name for name, is_enabled in enabled.items() if not is_enabled}


def _share(share: float) -> str:
    kind = "number bad" if not 0.05 <= share <= 0.95 else "number"
    return f'<td class="{kind}">{100 * share:.1f} %</td>'


def _layers(report: Report, current: range, better: range) -> str:
    threshold = report.recipe.filters.attention_hijack.threshold
    lines = [
        '<tr><th>blocks</th><th class="number">attention of the top 2 % (median block)</th>'
        f'<th class="number">kept at {threshold:g} by each block alone</th></tr>'
    ]
    inflow_LX = report.scores.layer_inflow_LQN.flatten(1)
    floor_L1 = inflow_LX.mean(1, True) + threshold * inflow_LX.std(1, keepdim=True)
    kept_L = (inflow_LX > floor_L1).float().mean(1)
    spans = {"recipe": current, "suggested": better} if better != current else {"recipe": current}
    for name, span in spans.items():
        part = slice(span.start, span.stop)
        lines.append(
            f"<tr><td>{span.start} to {span.stop - 1} ({name})</td>"
            f'<td class="number">{100 * statistics.median(report.tails[part]):.1f} %</td>'
            f'<td class="number">{100 * float(kept_L[part].mean()):.1f} %</td></tr>'
        )
    return f"<table>{''.join(lines)}</table>"


def _channels(report: Report) -> str:
    found = report.channels
    if found is None:
        return "<p>Not searched: it needs two images and channels.max_channels above 0.</p>"
    before = f"Tokens of different images have a mean cosine of {found.cosines[0]:.3f}"
    if not found.channels:
        return f"<p>{before}. No channel is worth masking ({found.stop_reason}).</p>"
    lines = ['<tr><th>channel masked</th><th class="number">cosine after</th></tr>']
    for channel, cosine in zip(found.channels, found.cosines[1:], strict=True):
        lines.append(f'<tr><td>{channel}</td><td class="number">{cosine:.3f}</td></tr>')
    return f"<p>{before} without a mask. A run masks:</p><table>{''.join(lines)}</table>"


def _widths(report: Report) -> str:
    lines = [
        '<tr><th class="number">width</th><th class="number">spurious tokens</th>'
        '<th class="number">cosine with the default</th>'
        '<th class="number">tokens computed</th></tr>'
    ]
    for result in report.widths:
        kind = "best" if result.width == report.best_width else ""
        default = " (default)" if result.width == report.default_width else ""
        lines.append(
            f'<tr class="{kind}"><td class="number">{result.width}{default}</td>'
            f'<td class="number">{100 * result.fp_gp:.1f} %</td>'
            f'<td class="number">{result.cosine:.3f}</td>'
            f'<td class="number">{result.cost:.2f}x</td></tr>'
        )
    by = " by the suggested values" if report.flags else ""
    note = (
        '<p class="faint">Tokens that still resemble what is spurious in the features without '
        f"border: fixed patterns or global proxies{by}, over {report.num_width_images} images.</p>"
    )
    advice = _advice(report.advice["width"].text, False)
    return f"<table>{''.join(lines)}</table>{advice}{note}"


def _pictures(report: Report) -> str:
    found = []
    off = _filters_off(report.suggested)
    for row in pictures.rows(report.shown, report.masks, report.grid, off=off):
        cells = "".join(
            f'<figure><img src="{uri}" alt=""><figcaption>{escape(caption)}</figcaption></figure>'
            for caption, uri in row
        )
        found.append(f'<div class="row">{cells}</div>')
    return "".join(found)


def _advice(text: str, is_change: bool) -> str:
    return f'<p class="advice{" change" if is_change else ""}">{escape(text)}</p>'
