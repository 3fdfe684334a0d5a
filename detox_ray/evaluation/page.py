"""One HTML file that opens offline, from a template of this folder."""

from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs


def render_page(template: str, **content: Any) -> str:
    """The page with plotly's own code in it; `content` is escaped unless it is markup."""
    environment = Environment(
        loader=PackageLoader("detox_ray", "evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        **content,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        plotly_js=Markup(get_plotlyjs()),
        markup=Markup,
    )
