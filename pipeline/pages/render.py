"""Pages from Jinja2 templates: one HTML file each, which holds all it needs and may load nothing.

Whatever a template writes is escaped (see `_environment`), and the page's content security policy, in its head, lets
only the scripts run that `render_page` was given. Text from data, such as a caption, can't become markup or a script.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from importlib import resources

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.pages.numbers import count, duration, number, size

OWN_STYLE = "templates/page.css"


def render_page(
    package: str, template: str, *, styles: Sequence[str] = (), scripts: Sequence[str] = (), **values: object
) -> str:
    """A page from a template that extends `page.html.jinja`.

    Args:
        package: the package whose folder `templates` holds the template.
        styles: style sheets of the package, as paths inside it; they follow the style of all pages.
        scripts: scripts of the package, as paths inside it.
        values: what the template names.

    Raises:
        jinja2.UndefinedError: the template names something that isn't among the values.
    """
    sheets = [_asset("pipeline.pages", OWN_STYLE), *(_asset(package, path) for path in styles)]
    codes = [_asset(package, path) for path in scripts]
    return (
        _environment(package)
        .get_template(template)
        .render(styles=sheets, scripts=codes, policy=content_policy(codes), **values)
    )


def content_policy(scripts: Sequence[str]) -> str:
    """A content security policy: nothing is loaded, and no scripts run but these.

    Styles are allowed inline because a bar's length and a cell's colour are `style` attributes.
    """
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src {allowed or repr('none')}; base-uri 'none'; form-action 'none'"
    )


@functools.cache
def _environment(package: str) -> Environment:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("pipeline.pages")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.do"],
    )
    environment.filters.update(number=number, thousands=count, size=size, duration=duration)
    # `tojson` escapes <, >, & and ', so that JSON can't end the <script> it stands in. JSON knows no NaN.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment


@functools.cache
def _asset(package: str, path: str) -> Markup:
    """A style sheet or a script of ours, as it is to stand inside its element."""
    text = resources.files(package).joinpath(path).read_text(encoding="utf-8")
    if "</" in text or "<!--" in text:
        raise ValueError(f"{path} of {package} would end the element that it stands in")
    return Markup(text)
