"""The report page: one HTML file with its plots inside, that opens anywhere and fetches nothing."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danlu.context import figures
from danlu.context.memory import readable
from danlu.context.report import LengthReport
from danlu.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(report: LengthReport, folder: str | Path, *, usage: Sequence[str] = ()) -> dict[str, Path]:
    """Write ``report.json``, ``report.html`` and ``report.png``; all is rendered before a file is touched.

    Args:
        report: what to show.
        folder: made if missing.
        usage: lines of Python that put the best method to use, shown on the page.

    Returns:
        The paths by kind: ``json``, ``html``, ``png``.
    """
    folder = Path(folder)
    page, picture = render(report, usage=usage), as_png(report.figure())
    contents: dict[str, str | bytes] = {"json": report.to_json() + "\n", "html": page, "png": picture}
    return {kind: write_whole(folder / f"report.{kind}", content) for kind, content in contents.items()}


def render(report: LengthReport, *, usage: Sequence[str] = ()) -> str:
    """The page as text. Labels, names and notes are escaped; only our own plots are inserted as markup."""
    from markupsafe import Markup

    plots = [("Loss by length", figures.single(report, figures.draw_loss))]
    if report.needles:
        plots.append(("Needle tokens right, by length", figures.single(report, figures.draw_needles)))
        plots.append(("Needle tokens right, by depth and length", figures.depth_maps(report)))
    plots.append(("Prefill speed", figures.single(report, figures.draw_speed)))
    if all(row.peak_bytes is not None for row in report.measurements):
        plots.append(("Peak memory", figures.single(report, figures.draw_memory)))
    return fill(
        Path(__file__).parent / "templates" / "report.html",
        report=report,
        best=report.best(),
        verdict=report.verdict(),
        usage=usage,
        plots=[(title, Markup(as_svg(figure, title))) for title, figure in plots],
        readable=readable,
    )


def fill(template: Path, **values: Any) -> str:
    """A page from its template: values are escaped unless they are ``Markup``, and a missing one is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(template.parent), autoescape=True, undefined=StrictUndefined)
    return environment.get_template(template.name).render(**values)


def as_svg(figure: Figure, title: str) -> str:
    """The figure as inline SVG with an accessible name, without prologue and metadata."""
    import matplotlib

    buffer = io.StringIO()
    # A fixed salt per plot: the same report gives the same page, and ids do not clash between plots of one page.
    with matplotlib.rc_context({"svg.hashsalt": title, "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{title}" ', svg, count=1)


def as_png(figure: Figure) -> bytes:
    """The figure as PNG at 150 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
