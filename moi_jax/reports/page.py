"""What the HTML reports share: their style sheet, colours and templates."""

from collections.abc import Callable
from pathlib import Path

import jinja2

# Okabe and Ito's palette without black and yellow: visible on white and on near-black, and
# distinct for colour-blind readers.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def page_template(path: Path, **filters: Callable[..., object]) -> jinja2.Template:
    """The template of a page at `path`; `{% include "page.css" %}` in it inserts the style sheet.

    Args:
      filters: Jinja filters by name.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([path.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(path.name)
