"""audit.html: the findings of an audit as one page that needs nothing else."""

import json
from pathlib import Path
from typing import Any

from moi_jax.common.atomic_files import atomic_write_text
from moi_jax.reports.page import page_template


def write_page(path: Path, signed: dict[str, Any]) -> None:
    """Writes the page of an audit.json; the same content gives the same bytes."""
    template = page_template(
        Path(__file__).with_name("audit.html.jinja"),
        pretty=lambda value: json.dumps(value, indent=1, ensure_ascii=False),
    )
    atomic_write_text(path, template.render(audit=signed))
