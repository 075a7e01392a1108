"""Pages: one HTML file each that needs no other, no network and no server."""

import secrets
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from runtime.files import write_atomically

TEMPLATES = Path(__file__).with_name("templates")


def read_source(name: str) -> Markup:
    """Return a style sheet or script of `templates` as it is, to stand within a page."""
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))  # ours, no text of a user's


def write_page(path: Path, template: str, **values: Any) -> None:
    """Render a template that extends base.html.j2 and write it atomically; all values are escaped.

    The page may load nothing and run no script but its own, which carry its nonce: a script that a file
    name smuggles in would not run even where an escape is forgotten. Data for scripts goes through `tojson`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"source": read_source, "nonce": secrets.token_urlsafe(12)}
    stream = environment.get_template(template).stream(**values)
    write_atomically(path, lambda target: stream.dump(str(target), encoding="utf-8"))
