"""The part of the page that shows images: what each backbone makes of each of them."""

from collections.abc import Mapping
from html import escape

from torch import Tensor

from trainer.report import explorer, pictures
from trainer.report.measure import Measured, Shown, View

COLORS = {"FP": "#e69f00", "GP": "#0072b2", "AH": "#cc79a7"}
"""Of Okabe and Ito's palette: told apart with every kind of colour vision."""
_KINDS = {
    "FP": ("Fixed patterns (FP)", "fixed-pattern"),
    "GP": ("Global proxies (GP)", "global-proxy"),
    "AH": ("Attention hijackees (AH)", "attention-hijackee"),
}


def gallery(measured: Measured) -> str:
    """All images, each with its maps, and what the maps mean."""
    count = explorer.num_directions(measured)
    articles = "".join(
        _article(one, place, measured, count) for place, one in enumerate(measured.shown, 1)
    )
    return f"{_introduction(measured)}{_shares(measured)}{articles}"


def _introduction(measured: Measured) -> str:
    fixed, proxy = measured.thresholds
    mask = ", ".join(map(str, measured.channels))
    texts = [
        '<p class="js-only"><b>Click a patch</b> of a photograph or of a cosine map: the cosine '
        "maps follow. With the keyboard: focus a photograph, arrow keys move (with Shift by "
        "five).</p>",
        '<p class="note"><b>Principal components</b>: the first three as red, green and blue, raw '
        "and refined in one basis, so equal colours mean equal features"
        + (
            "; the frame around the refined map is the register border, which is stripped before "
            "features are served"
            if any(
                view.registers_RC is not None for o in measured.shown for view in o.views.values()
            )
            else ""
        )
        + ". <b>Cosine</b>: of the chosen patch with every patch. <b>Token norm</b>: before the "
        "final norm, one scale for both. <b>FP</b>: tokens that resemble "
        f"a token of an unrelated image encoded alone (cosine above {fixed:.3g}). <b>GP</b>: that "
        f"resemble a token of unrelated content beside the image (above {proxy:.3g})."
        + (
            " <b>AH</b>: that get less attention from the image's tokens than is usual in it."
            if measured.has_attention
            else ""
        )
        + (
            " Refined tokens are compared with the raw backbone's patterns: what counts is what "
            "they still carry of them."
            if len(measured.subjects) > 1
            else ""
        )
        + (f" Channels at zero before every cosine: {mask}." if mask else "")
        + "</p>",
    ]
    return "".join(texts)


def _shares(measured: Measured) -> str:
    """Mean shares of the shown images."""
    head = ["FP", "GP", "FP or GP", *(["AH"] if measured.has_attention else []), "none of them"]
    lines = []
    for name, shares in measured.shares().items():
        values = [
            sum(100 * v for v in column) / len(shares) for column in zip(*shares, strict=True)
        ]
        fixed, proxy, both, hijacked, clean = values
        shown = [fixed, proxy, both, *([hijacked] if measured.has_attention else []), clean]
        cells = "".join(f'<td class="number">{value:.1f}</td>' for value in shown)
        lines.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    titles = "".join(f'<th class="number">{title}</th>' for title in head)
    return (
        '<div class="scroll" tabindex="0"><table><thead><tr>'
        f"<th>tokens of these images, %</th>{titles}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
        f'<p class="note">Of the {len(measured.shown)} shown here only, at their sizes below. The '
        "verdict counts a recorded result of spurious tokens instead, where there is one: its "
        "images and their size are others, and so are its numbers.</p>"
    )


def _article(one: Shown, place: int, measured: Measured, num_directions: int) -> str:
    rows, columns = one.grid
    height, width = one.image_3HW.shape[-2:]
    default = (rows // 2, columns // 2)
    threshold = measured.thresholds.fixed_pattern
    features = {
        title: explorer.quantise(view.unit_NC, num_directions) for title, view in one.views.items()
    }
    large = [
        _photo(one, default),
        _pair("Principal components", _principal(one)),
        _pair(
            "Cosine with the chosen patch",
            _cosines(one, features, default, threshold),
            _bar("0 or less", "1"),
        ),
    ]
    small = [_norms(one), *_kinds(one, measured)]
    single = " single" if len(one.views) == 1 else ""
    return (
        f'<article class="image" id="image-{place}" data-threshold="{threshold:.6g}">'
        f'<h3>{escape(one.name)}<span class="soft">{width} × {height} px, '
        f"{columns} × {rows} patches</span></h3>"
        f'<div class="views large{single}">{"".join(large)}</div>'
        f'<div class="views small">{"".join(small)}</div>'
        f'<script type="application/json" class="features">'
        f"{explorer.to_json(one.grid, features, default)}</script></article>"
    )


def _photo(one: Shown, default: tuple[int, int]) -> str:
    rows, columns = one.grid
    name = escape(one.name)
    return (
        f'<figure class="photo"><h4>Photograph</h4><div class="stage">'
        f'<img src="{pictures.photograph(one.image_3HW)}" alt="Photograph {name}" '
        f'width="{one.image_3HW.shape[2]}" height="{one.image_3HW.shape[1]}">'
        f"{_cursor(one.grid, default)}</div>"
        f'<figcaption class="readout" aria-live="polite">patch in row {default[0] + 1} of {rows}, '
        f"column {default[1] + 1} of {columns}</figcaption></figure>"
    )


def _cursor(grid: tuple[int, int], place: tuple[int, int]) -> str:
    (rows, columns), (row, column) = grid, place
    return (
        f'<span class="cursor" style="left:{100 * column / columns:.4f}%;'
        f"top:{100 * row / rows:.4f}%;width:{100 / columns:.4f}%;height:{100 / rows:.4f}%"
        '"></span>'
    )


def _principal(one: Shown) -> str:
    figures = []
    for title, uri in pictures.principal_maps(one).items():
        width = one.views[title].width
        note = f", register border of {width}" if width else ""
        alt = f"First three principal components of the tokens as colours, {title}{note}"
        figures.append(_figure(uri, alt, f"<b>{escape(title)}</b>{note}", kind=""))
    return "".join(figures)


def _cosines(
    one: Shown,
    features: Mapping[str, explorer.Quantised],
    default: tuple[int, int],
    threshold: float,
) -> str:
    """As the page's script draws them, so that nothing jumps when it starts."""
    place = default[0] * one.grid[1] + default[1]
    figures = []
    for title, quantised in features.items():
        cosines_N = quantised.cosines(place)
        uri = pictures.scalar_map(cosines_N, one.grid, 0, 1)
        above = 100 * float((cosines_N > threshold).float().mean())
        alt = (
            f"Cosine of the patch in row {default[0] + 1}, column {default[1] + 1} with every "
            f"patch, {title}"
        )
        figures.append(
            f'<figure data-view="{escape(title)}"><div class="stage"><img class="map" src="{uri}" '
            f'alt="{escape(alt)}" width="{one.grid[1]}" height="{one.grid[0]}">'
            f"{_cursor(one.grid, default)}</div><figcaption><b>{escape(title)}</b>, "
            f'<span class="above">{above:.1f} %</span> above\N{NO-BREAK SPACE}{threshold:.3g}'
            "</figcaption></figure>"
        )
    return "".join(figures)


def _norms(one: Shown) -> str:
    """One scale for both, so that outliers of one backbone are seen beside the other."""
    low = min(float(view.norms_N.min()) for view in one.views.values())
    high = max(float(view.norms_N.max()) for view in one.views.values())
    figures = []
    for title, view in one.views.items():
        ratio = float(view.norms_N.max() / view.norms_N.median().clamp(min=1e-12))
        uri = pictures.scalar_map(view.norms_N, one.grid, low, high)
        caption = f"<b>{escape(title)}</b> {ratio:.2f}×"
        figures.append(_figure(uri, f"Norms of the tokens, {title}", caption, grid=one.grid))
    return _pair("Token norm, max / median", "".join(figures), _bar(f"{low:.3g}", f"{high:.3g}"))


def _kinds(one: Shown, measured: Measured) -> list[str]:
    found = []
    for kind, (heading, name) in _KINDS.items():
        if kind == "AH" and not measured.has_attention:
            continue
        figures = []
        for title, view in one.views.items():
            marked_N = _mask(view, kind, measured)
            share = 100 * float(marked_N.float().mean())
            uri = pictures.marked(one.image_3HW, marked_N, one.grid, COLORS[kind])
            alt = f"Where {name} tokens are, {title}: {share:.1f} % of the image's tokens"
            figures.append(
                _figure(uri, alt, f"<b>{escape(title)}</b> {share:.1f}\N{NO-BREAK SPACE}%", kind="")
            )
        swatch = f'<span class="swatch" style="background:{COLORS[kind]}"></span>'
        found.append(_pair(f"{swatch}{heading}", "".join(figures)))
    return found


def _mask(view: View, kind: str, measured: Measured) -> Tensor:
    if kind == "FP":
        return view.scores.fixed_pattern > measured.thresholds.fixed_pattern
    if kind == "GP":
        return view.scores.global_proxy > measured.thresholds.global_proxy
    return view.scores.is_hijacked


def _pair(heading: str, figures: str, legend: str = "") -> str:
    return f'<div class="pair"><h4>{heading}</h4><div class="two">{figures}</div>{legend}</div>'


def _figure(
    uri: str, alt: str, caption: str, *, kind: str = "map", grid: tuple[int, int] | None = None
) -> str:
    named = f' class="{kind}"' if kind else ""
    size = f' width="{grid[1]}" height="{grid[0]}"' if grid else ""
    return (
        f'<figure><img{named} src="{uri}" alt="{escape(alt)}"{size}>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _bar(low: str, high: str) -> str:
    return (
        f'<div class="scale"><span>{low}</span>'
        f'<i style="background:{pictures.scale_gradient()}"></i><span>{high}</span></div>'
    )
