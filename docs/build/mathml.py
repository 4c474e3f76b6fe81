"""A hook of MkDocs: equations become MathML while the site is built.

Browsers show MathML by themselves, so the site needs no script and no network for its equations.
`pymdownx.arithmatex` marks what stands between dollars; `latex2mathml` translates it. What TeX
knows of spacing is added to what it gives.
"""

import html
import re

from latex2mathml.converter import convert

_MARKED = re.compile(
    r'<(span|div) class="arithmatex">\s*(?:\\\((.*?)\\\)|\\\[(.*?)\\\])\s*</\1>', re.DOTALL
)
_FUNCTION = re.compile(r"<mi>(log|ln|exp|tanh|logit|clip)</mi>(<mo[^>]*>&#x00028;)?")
_SIGN = re.compile(
    r"(<mrow>|<mo[^>]*>&#x000(?:28|3D|2C|5B|7B);</mo>|<mspace[^>]*/>)<mo>&#x02212;</mo>"
)


def on_page_content(content: str, **_: object) -> str:
    """A page's HTML with every marked equation translated; a wrong one fails the build."""
    return _MARKED.sub(_translated, content)


def _translated(found: re.Match[str]) -> str:
    tag, inline, block = found.groups()
    latex = html.unescape(inline if block is None else block).strip()
    math = convert(latex, display="inline" if block is None else "block")
    # Room around the names of functions, but for a parenthesis; none after the sign of a number;
    # and what a maximum is over stands below it.
    math = _FUNCTION.sub(
        lambda m: (
            f'<mo form="prefix" lspace="0.167em" rspace="{"0" if m[2] else "0.167em"}">{m[1]}</mo>'
            f"{m[2] or ''}"
        ),
        math,
    )
    math = math.replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")  # \\sim, is distributed as
    math = _SIGN.sub(r'\1<mo form="prefix">&#x02212;</mo>', math)
    if block is not None:
        math = re.sub(r"<msub>(<mo>max</mo>.*?)</msub>", r"<munder>\1</munder>", math)
    # What screen readers without MathML, and copying, fall back to.
    math = math.replace("<math ", f'<math alttext="{html.escape(latex)}" ', 1)
    return f'<{tag} class="equation">{math}</{tag}>'
