"""A program of pix2code's web language as the page that it describes.

The language (Beltramelli, 2017, arXiv:1705.07962): a header of buttons, above rows of cards. The
programs say nothing about words, so the words here are stand-ins that mean nothing. Templates and
style are our own; measures are those of the screens that pix2code's data set shows, at 1200 x 690.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.markup import Html, join, page, tag

WIDTH, HEIGHT = 1200, 690
"""pixels of the screens in the data set, which the page is made for"""

_CARDS = ("single", "double", "quadruple")
_HEADER_BUTTONS = ("btn-active", "btn-inactive")
_CONTENT = ("big-title", "small-title", "text", "btn-green", "btn-orange", "btn-red")
_INSIDE = {"": ("header", "row"), "row": _CARDS, "header": _HEADER_BUTTONS}
_INSIDE |= dict.fromkeys(_CARDS, _CONTENT)
_KNOWN = {name for names in _INSIDE.values() for name in names}

_MENU = ("Start", "Our work", "People", "News", "Contact")
_TITLES = ("Harbour", "Orchard", "Lantern", "Meadow", "Compass", "Granite")
_TEXTS = (
    "a few quiet words stand here in place of others",
    "nothing of this was on the screen, only its place",
    "every card has a line, and a line has its words",
)
_BUTTONS = ("Read more", "Open it", "Show me", "Take a look")

STYLE = """
*{box-sizing:border-box}
body{margin:0;background:#fff;color:#333;font:14px/20px "Helvetica Neue",Helvetica,Arial,
"Liberation Sans",sans-serif}
.page{max-width:1200px;margin:0 auto;padding:20px 15px}
.header{display:flex;flex-wrap:wrap;gap:12px;margin:0 15px 20px}
.header span{padding:10px 15px;border-radius:4px;background:#333;color:#337ab7}
.header .active{background:#337ab7;color:#fff}
.row{display:flex;flex-wrap:wrap;justify-content:space-between;row-gap:20px;margin-bottom:20px}
.card{padding:20px;border-radius:6px;background:#f5f5f5}
.single{width:100%}.double{width:49%}.quadruple{width:24%}
h2,h3{margin:10px 0;font-weight:500;line-height:1.1}h2{font-size:30px}h3{font-size:18px}
p{margin:0 0 10px}
.btn{display:inline-block;padding:6px 12px;border:1px solid;border-radius:4px;color:#fff;
text-shadow:0 -1px 0 rgba(0,0,0,.2)}
.green{background:linear-gradient(#5cb85c,#419641);border-color:#3e8f3e}
.orange{background:linear-gradient(#f0ad4e,#eb9316);border-color:#e38d13}
.red{background:linear-gradient(#d9534f,#c12e2a);border-color:#b92c28}
hr{margin:0 15px 20px;border:0;border-top:1px solid #bbb}
footer{text-align:center}
@media(max-width:600px){.double,.quadruple{width:100%}}
@media print{*{print-color-adjust:exact}}
"""


class WebError(ValueError):
    """What a text lacks of being a program: the token, and its line and column."""


@dataclass(frozen=True)
class Block:
    """`name { ... }`, or a name alone. The outermost has the name ""."""

    name: str
    parts: tuple["Block", ...] = ()


class _Token(NamedTuple):
    text: str
    place: str


class _Opened(NamedTuple):
    """A block that is being read; the outermost has no token."""

    token: _Token | None
    parts: list[Block]

    @property
    def name(self) -> str:
        return self.token.text if self.token else ""


def parse(code: str) -> Block:
    """The program's tree.

    Raises:
        WebError: it is none.
    """
    opened: list[_Opened] = [_Opened(None, [])]
    name: _Token | None = None  # of a block whose brace comes next
    separated = True  # whether another leaf may come
    for token in _tokens(code):
        inside, parts = opened[-1].name, opened[-1].parts
        if name is not None:
            if token.text != "{":
                raise WebError(f"{token.place}: {token.text!r} where '{{' of {name.text!r} belongs")
            opened.append(_Opened(name, []))
            name, separated = None, True
        elif token.text in (",", "}"):
            follows_leaf = bool(parts) and parts[-1].name not in _INSIDE
            if token.text == "}" and len(opened) == 1:
                raise WebError(f"{token.place}: '}}' closes nothing")
            if not parts or (separated if follows_leaf else token.text == ","):
                raise WebError(f"{token.place}: {token.text!r} where {_one_of(inside)} belongs")
            if token.text == "}":
                opened.pop()
                opened[-1].parts.append(Block(inside, tuple(parts)))
            separated = True
        elif token.text not in _INSIDE[inside]:
            known = token.text in _KNOWN or token.text == "{"
            what = f"misplaced {token.text!r}" if known else f"unknown token {token.text!r}"
            where = f"in {inside!r}" if inside else "outside of all blocks"
            raise WebError(f"{token.place}: {what}; {where} {_one_of(inside)} belongs")
        elif not separated:
            raise WebError(f"{token.place}: {token.text!r} without ',' before it")
        elif token.text in _INSIDE:
            name = token
        else:
            parts.append(Block(token.text))
            separated = False
    unclosed = name or opened[-1].token
    if unclosed is not None:
        raise WebError(f"{unclosed.place}: {unclosed.text!r} is never closed")
    if not opened[0].parts:
        raise WebError("empty, a program has a header or a row")
    return Block("", tuple(opened[0].parts))


def render(code: str, title: str = "") -> str:
    """The page of a program, whole: one file, without scripts, that needs nothing else.

    Raises:
        WebError: `code` is no program.
    """
    return page(title or "Screen", STYLE, tag("body", _Page().draw(parse(code))))


def _tokens(code: str) -> Iterator[_Token]:
    for number, line in enumerate(re.split(r"\r\n|\n|\r", code), 1):
        for match in re.finditer(r"[{},]|[^\s{},]+", line):
            yield _Token(match.group(), f"line {number}, column {match.start() + 1}")


def _one_of(inside: str) -> str:
    return " or ".join(_INSIDE[inside])


class _Page:
    """Draws blocks; its stand-ins go on from one to the next."""

    def __init__(self) -> None:
        self._menu, self._titles, self._texts, self._buttons = map(
            itertools.cycle, (_MENU, _TITLES, _TEXTS, _BUTTONS)
        )

    def draw(self, block: Block) -> Html:
        inner = join(map(self.draw, block.parts))
        name = block.name
        match name:
            case "":
                footer = tag("footer", "Drawn by pixloom from a program")
                return tag("div", inner, tag("hr"), footer, class_="page")
            case "header":
                return tag("nav", inner, class_="header")
            case "row":
                return tag("div", inner, class_="row")
            case "single" | "double" | "quadruple":
                return tag("section", inner, class_=f"card {name}")
            case "btn-active" | "btn-inactive":
                return tag("span", next(self._menu), class_=name.removeprefix("btn-"))
            case "big-title" | "small-title":
                return tag("h2" if name == "big-title" else "h3", next(self._titles))
            case "text":
                return tag("p", next(self._texts))
            case _:
                colour = name.removeprefix("btn-")
                return tag("span", next(self._buttons), class_=f"btn {colour}")
