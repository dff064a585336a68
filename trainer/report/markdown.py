"""Markdown of a model card as HTML: a small subset, and nothing that could do harm.

Front matter and comments are left out; headings, paragraphs, lists, tables, code, emphasis and
links to the web become HTML. Everything else is text: no HTML passes through.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from html import escape

_FENCE = re.compile(r"(`{3,}|~{3,})")
_HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*\s*$")
_ITEM = re.compile(r"\s{0,3}(?:[-*+]|(\d{1,9})[.)])\s+(.*)")
_RULE = re.compile(r"\s*\|?\s*:?-{1,}:?\s*(\|\s*:?-{1,}:?\s*)*\|?\s*$")
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---[ \t]*(?:\n|\Z)", re.DOTALL)
_CODE_SPAN = re.compile(r"(`+)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(\s*([^()\s]+)[^()]*\)")
_STRONG = re.compile(r"\*\*(?=\S)(.+?)(?<=\S)\*\*", re.DOTALL)
_EMPHASIS = re.compile(r"(?<![\w*])\*(?=[^\s*])(.+?)(?<=[^\s*])\*(?![\w*])", re.DOTALL)
_HELD = re.compile("\x00(\\d+)\x00")
_NUMBER = re.compile(r"[-+±]?\d[\d.,]*( ?%)?( ?[(±\[].*)?$")


def to_html(text: str, *, first_level: int = 3) -> str:
    """Markdown as HTML; its largest headings become `<h{first_level}>`."""
    text = text.replace("\r\n", "\n").replace("\x00", "")
    text = _COMMENT.sub("", _FRONT_MATTER.sub("", text))
    return "\n".join(_blocks(text.expandtabs(4).split("\n"), first_level))


def _blocks(lines: list[str], first_level: int) -> Iterator[str]:
    place = 0
    while place < len(lines):
        line = lines[place]
        if not line.strip():
            place += 1
        elif fence := _FENCE.match(line.lstrip()):
            place, body = _until(lines, place + 1, _is_fence(fence[1]))
            place += 1
            yield _code(body)
        elif line.startswith("    "):
            place, body = _until(
                lines, place, lambda one: bool(one.strip()) and not one.startswith("    ")
            )
            yield _code([one[4:] for one in body])
        elif heading := _HEADING.match(line):
            level = min(6, first_level + len(heading[1]) - 1)
            yield f"<h{level}>{_inline(heading[2])}</h{level}>"
            place += 1
        elif "|" in line and place + 1 < len(lines) and _is_rule(lines[place + 1]):
            place, body = _until(lines, place, lambda one: "|" not in one)
            yield _table(body)
        elif first := _ITEM.match(line):
            place, body = _until(lines, place, lambda one: not one.strip())
            yield _list(body, is_numbered=first[1] is not None)
        else:
            place, body = _until(lines, place + 1, _ends_paragraph)
            yield f"<p>{_inline(' '.join([line, *body]))}</p>"


def _until(lines: list[str], place: int, is_end: Callable[[str], bool]) -> tuple[int, list[str]]:
    start = place
    while place < len(lines) and not is_end(lines[place]):
        place += 1
    return place, lines[start:place]


def _is_fence(mark: str) -> Callable[[str], bool]:
    return lambda line: line.strip() == mark


def _ends_paragraph(line: str) -> bool:
    starts = _HEADING.match(line) or _FENCE.match(line.lstrip()) or _ITEM.match(line)
    return not line.strip() or bool(starts)


def _is_rule(line: str) -> bool:
    return "-" in line and "|" in line and _RULE.match(line) is not None


def _code(body: list[str]) -> str:
    return f"<pre><code>{escape(chr(10).join(body).strip(chr(10)))}</code></pre>"


def _list(body: list[str], *, is_numbered: bool) -> str:
    items: list[str] = []
    for line in body:
        item = _ITEM.match(line)
        if item:
            items.append(item[2])
        else:
            items[-1] += " " + line.strip()
    kind = "ol" if is_numbered else "ul"
    return f"<{kind}>{''.join(f'<li>{_inline(item)}</li>' for item in items)}</{kind}>"


def _table(body: list[str]) -> str:
    head, _, *rows = [_cells(line) for line in body]
    rows = [(row + [""] * len(head))[: len(head)] for row in rows]
    is_number = [
        any(column) and all(_NUMBER.match(text) or not text for text in column)
        for column in zip(*rows, strict=True)
    ] or [False] * len(head)
    parts = []
    if any(head):
        parts.append(f"<thead>{_row(head, 'th', is_number)}</thead>")
    parts.append(f"<tbody>{''.join(_row(row, 'td', is_number) for row in rows)}</tbody>")
    return f'<div class="scroll" tabindex="0"><table>{"".join(parts)}</table></div>'


def _cells(line: str) -> list[str]:
    inner = line.strip().removeprefix("|")
    inner = inner[:-1] if inner.endswith("|") and not inner.endswith("\\|") else inner
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", inner)]


def _row(cells: list[str], tag: str, is_number: Sequence[bool]) -> str:
    parts = []
    for text, right in zip(cells, is_number, strict=True):
        kind = ' class="number"' if right else ""
        parts.append(f"<{tag}{kind}>{_inline(text)}</{tag}>")
    return f"<tr>{''.join(parts)}</tr>"


def _inline(text: str) -> str:
    """Finished pieces are held back while the rest is escaped and read on."""
    held: list[str] = []

    def hold(piece: str) -> str:
        held.append(piece)
        return f"\x00{len(held) - 1}\x00"

    def link(found: re.Match[str]) -> str:
        is_picture, label, target = found[1] == "!", found[2], found[3]
        if is_picture:
            return label
        if not re.match(r"https?://", target, re.IGNORECASE):
            return f"{label} ({target})" if label != target else label
        start = f'<a href="{escape(target)}" rel="noopener noreferrer">'
        return hold(start) + label + hold("</a>")

    text = _CODE_SPAN.sub(lambda found: hold(f"<code>{escape(found[2].strip())}</code>"), text)
    text = escape(_LINK.sub(link, text), quote=False)
    text = _STRONG.sub(r"<strong>\1</strong>", text)
    text = _EMPHASIS.sub(r"<em>\1</em>", text)
    return _HELD.sub(lambda found: held[int(found[1])], text)
