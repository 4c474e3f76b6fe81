"""HTML and Markdown pages from the templates that lie in a room's `templates/`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jinja2


@functools.cache
def page_environment(*rooms: str, autoescape: bool = True) -> jinja2.Environment:
    """Finds the templates of rooms such as "judges", the first that has one of that name.

    Everything that a template is given is escaped for HTML unless `autoescape` is False, and a name
    that it is not given is an error. The same rooms get the same environment every time, since to
    compile a template takes longer than to fill it in.
    """
    import jinja2

    return jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader(f"prefopt.{room}", "templates") for room in rooms]
        ),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
