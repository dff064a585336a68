"""Markdown of model cards as HTML."""

import pytest

from tests.trainer.report.page_parts import Page
from trainer.report.markdown import to_html


def test_the_usual_parts_of_a_card_become_html():
    card = """---
license: mit
---
# Title

A *short* **bold** text
with `code <b>` and [a link](https://example.org/a?b=1&c=2).

| name | value |
|---|---:|
| loss | 6.77 |
| `a \\| b` | 5.10 ± 0.2 |

- one
  goes on
- two

1. first

    python -m trainer
        indented

```sh
echo "<done>"
```
"""
    assert to_html(card).split("\n") == [
        "<h3>Title</h3>",
        "<p>A <em>short</em> <strong>bold</strong> text with <code>code &lt;b&gt;</code> and "
        '<a href="https://example.org/a?b=1&amp;c=2" rel="noopener noreferrer">a link</a>.</p>',
        '<div class="scroll" tabindex="0"><table><thead><tr><th>name</th><th class="number">value'
        "</th></tr></thead><tbody><tr><td>loss</td>"
        '<td class="number">6.77</td></tr><tr><td><code>a | b</code></td>'
        '<td class="number">5.10 ± 0.2</td></tr></tbody></table></div>',
        "<ul><li>one goes on</li><li>two</li></ul>",
        "<ol><li>first</li></ol>",
        "<pre><code>python -m trainer",
        "    indented</code></pre>",
        "<pre><code>echo &quot;&lt;done&gt;&quot;</code></pre>",
    ]


def test_a_head_without_words_is_left_out():
    assert "<thead>" not in to_html("| | |\n|---|---|\n| seed | 0 |\n")


def test_headings_start_where_they_are_asked_to_and_end_at_six():
    assert to_html("# a\n\n###### b", first_level=2) == "<h2>a</h2>\n<h6>b</h6>"


@pytest.mark.parametrize(
    "card",
    [
        "<script>alert(1)</script>",
        "# <img src=x onerror=alert(1)>",
        "[x](javascript:alert(1))",
        "[x](JaVaScRiPt:alert(1))",
        "[x](data:text/html;base64,PHNjcmlwdD4=)",
        '[x](https://a/" onmouseover="alert(1))',
        "[<img src=x onerror=alert(1)>](https://a/)",
        "![x](https://tracker.example/pixel.png)",
        "`<svg onload=alert(1)>`",
        "| <b onclick=alert(1)>a |\n|---|\n| <iframe src=//a> |",
        "```\n</code></pre><script>alert(1)</script>\n```",
        "**<i>** *<b>* \x000\x00 \x0099\x00",
        "<!-- a --> <!-- open <script>alert(1)</script>",
        "a | b\n---\nc",
        "|\n|-\n|",
        "    ",
        "```",
        "- ",
        "[a](https://x/`b`) `c](https://y)`",
    ],
)
def test_nothing_hostile_gets_through(card):
    page = Page(to_html(card))

    assert page.open == []
    assert page.handlers == []
    assert page.sources == []
    assert not {"script", "img", "svg", "iframe", "b", "i"} & set(page.tags)
    assert all(link.startswith("https://") for link in page.links)


@pytest.mark.parametrize("text", ["*" * 5000, "`" * 5000, "[" * 5000, "|" * 5000, "a_*b" * 2000])
def test_long_runs_of_marks_are_read_in_no_time(text):
    assert to_html(text)
