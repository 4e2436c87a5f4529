"""HTML that cannot be injected into: text is escaped unless it was built here.

A page is one file that opens without a network and runs nothing: it has its style and its pictures
in it, and forbids the browser anything else. What stands on a page is its maker's subject.
"""

import base64
import html
from collections.abc import Iterable

VOID = frozenset({"hr", "img", "meta"})

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""of every page (Content Security Policy): no script, and nothing from elsewhere"""


class Html(str):
    """Markup that is ready: everything from outside in it is escaped."""

    __slots__ = ()


def tag(name: str, *parts: object, **attributes: object) -> Html:
    """An element. Parts that are not `Html` are shown as text; attributes of None are left out.

    `class_` and `for_` are written without their underscore, `aria_label` with a hyphen; an
    attribute of True has no value.
    """
    head = name
    for key, value in attributes.items():
        spelt = key.rstrip("_").replace("_", "-")
        if value is True:
            head += f" {spelt}"
        elif value is not None and value is not False:
            head += f' {spelt}="{html.escape(str(value))}"'
    if name in VOID:
        return Html(f"<{head}>")
    return Html(f"<{head}>{join(parts)}</{name}>")


def join(parts: Iterable[object], between: str = "") -> Html:
    """The parts one after the other, as `tag` takes them."""
    return Html(
        html.escape(between).join(
            part if isinstance(part, Html) else html.escape(str(part)) for part in parts
        )
    )


def data_url(data: bytes, media_type: str) -> str:
    """A picture's bytes as an address that holds them."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def page(title: str, style: str, body: Html) -> Html:
    """A whole page. `style` is CSS, trusted, and must not hold `</style`."""
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(style)),
    ]
    whole = f'<!DOCTYPE html>\n<html lang="en"><head>{join(head)}</head>\n{body}</html>\n'
    # A name that is not UTF-8 has its bytes in it, as characters that no file of text takes.
    return Html(whole.encode("utf-8", "backslashreplace").decode())
