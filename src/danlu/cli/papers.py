"""``danlu papers``: a site for skimming every new paper, its workers, and what fills it."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from danlu.cli.streams import progress_phases

if TYPE_CHECKING:
    from danlu.papers.settings import Settings
    from danlu.papers.web.state import Site

app = typer.Typer(
    help="A site for skimming every new paper: serve it, fill it, ask about papers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[Path | None, typer.Option("--config", "-c", help="Settings in TOML.")]
Data = Annotated[Path | None, typer.Option("--data", help="Folder of the database and the index.")]
Database = Annotated[str | None, typer.Option("--database", help="postgresql://... or sqlite:///FILE.")]
_PACKAGES = (
    "fastapi",
    "uvicorn",
    "sqlalchemy",
    "alembic",
    "httpx2",
    "stamina",
    "defusedxml",
    "pypdf",
    "nh3",
    "markdown_it",
)


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: this machine alone.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 is any that is free.")] = None,
    follow: Annotated[
        str | None,
        typer.Option(help="Subjects to keep up to date from the network, such as cs.AI+cs.LG; needs --contact."),
    ] = None,
    contact: Annotated[str | None, typer.Option(help="E-mail that requests to sources carry.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, max=1, help="0: no jobs in this process; danlu papers worker does them.")
    ] = None,
    search: Annotated[str | None, typer.Option(help="fts5, or tantivy for millions of papers.")] = None,
    config: Config = None,
    data: Data = None,
    database: Database = None,
) -> None:
    """Serve the site; without options, from bundled sample data and without network.

    Example: danlu papers serve --follow cs.CL+cs.LG --contact you@example.org
    """
    settings = _settings(
        config, data, database, host=host, port=port, follow=follow, contact=contact, workers=workers, search=search
    )
    from danlu.papers.serving import listen, until_stopped
    from danlu.papers.serving import serve as run

    with until_stopped(), listen(settings.host, settings.port) as listening, _site(settings) as site:
        shown = f"[{settings.host}]" if ":" in settings.host else settings.host
        port = listening.getsockname()[1]
        typer.echo(f"http://{shown}:{port}  (data in {settings.data}; Ctrl-C stops)", err=True)
        run(site, listening)


@app.command()
def worker(config: Config = None, data: Data = None, database: Database = None) -> None:
    """Work for a site that other processes serve: polls, answers, the search index."""
    settings = _settings(config, data, database)
    from danlu.papers.serving import run_worker, until_stopped

    with until_stopped(), _site(settings) as site:
        asyncio.run(run_worker(site))


@app.command()
def poll(
    subjects: Annotated[
        str | None, typer.Argument(help="Subjects such as cs.AI+cs.LG. Default: those of the settings.")
    ] = None,
    contact: Annotated[str | None, typer.Option(help="E-mail that requests to sources carry.")] = None,
    archive: Annotated[
        bool, typer.Option("--archive", help="Also take every change from the archive's OAI-PMH.")
    ] = False,
    config: Config = None,
    data: Data = None,
    database: Database = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Bring the lists of some subjects up to date once, and the search index with them."""
    settings = _settings(config, data, database, follow=subjects, contact=contact)
    if not settings.follow:
        raise ValueError("poll needs subjects such as cs.AI+cs.LG, as an argument or as follow in the settings")
    from danlu.papers.serving import poll_once

    with _site(settings) as site:
        report = asyncio.run(poll_once(site, archive))
        site.index.update(site.store)
    found = {
        "day": report.day.isoformat() if report.day else None,
        "added": report.written.added,
        "changed": report.written.changed,
        "late": report.late,
        "warnings": report.warnings,
        "errors": report.errors,
    }
    if json_output:
        typer.echo(json.dumps(found, indent=1))
    else:
        typer.echo(
            f"{found['day'] or 'no mailing'}: {found['added']} new, {found['changed']} changed, {found['late']} late"
        )
        for line in [*report.warnings, *(f"{name}: {text}" for name, text in report.errors.items())]:
            typer.echo(line, err=True)
    if report.errors:
        raise typer.Exit(1)


@app.command(name="import")
def import_(
    file: Annotated[
        Path, typer.Argument(help="arXiv's metadata snapshot, ACL XML, OpenReview JSON, BibTeX, CSV or JSON lines.")
    ],
    format: Annotated[
        str | None,
        typer.Option(help="snapshot, acl, openreview, pmlr, bibtex, csv or jsonl. Default: by name and content."),
    ] = None,
    venue: Annotated[str, typer.Option(help="Name of the venue, where the file does not say it.")] = "",
    year: Annotated[int | None, typer.Option(help="Year of the venue, likewise.")] = None,
    index: Annotated[
        bool, typer.Option("--index/--no-index", help="Bring the search index up to date afterwards.")
    ] = True,
    config: Config = None,
    data: Data = None,
    database: Database = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Fill the site from a file; an interrupted import goes on where it was, a repeated one changes nothing."""
    settings = _settings(config, data, database)
    from danlu.papers.sources.importing import import_file

    with _site(settings) as site:
        with _progress(f"importing {file.name}") as show:
            report = import_file(site.store, file, format, venue, year, show)  # type: ignore[arg-type]
        if index:
            with _progress("indexing") as show:
                site.index.update(site.store, show)
    written = report.written
    found = {
        "added": written.added,
        "changed": written.changed,
        "unchanged": written.unchanged,
        "bad": report.bad,
        "reasons": report.reasons,
    }
    if json_output:
        typer.echo(json.dumps(found, indent=1))
        return
    typer.echo(
        f"{written.added} new, {written.changed} changed, {written.unchanged} as they were, {report.bad} unreadable"
    )
    for reason in report.reasons:
        typer.echo(f"  {reason}", err=True)


@app.command(name="add-venue")
def add_venue(
    name: Annotated[str, typer.Argument(help="Name and year, such as ICML.2024.")],
    file: Annotated[Path, typer.Argument(help="Its papers, in any format of danlu papers import.")],
    format: Annotated[str | None, typer.Option(help="As for danlu papers import.")] = None,
    config: Config = None,
    data: Data = None,
    database: Database = None,
) -> None:
    """Add the papers of a venue from a file, under the name and year given.

    Example: danlu papers add-venue ICML.2024 v235.bib --format pmlr
    """
    venue, dot, year = name.rpartition(".")
    if not dot or not venue or not (year.isascii() and year.isdigit() and len(year) == 4):
        raise ValueError(f"name must be a name and a year such as ICML.2024, got {name!r}")
    import_(file, format, venue, int(year), True, config, data, database, False)


@app.command()
def reindex(config: Config = None, data: Data = None, database: Database = None) -> None:
    """Build the search index again from the database, and swap it in at the end."""
    settings = _settings(config, data, database)
    with _site(settings) as site, _progress("indexing") as show:
        count = site.index.rebuild(site.store, show)
    typer.echo(f"{count} papers indexed")


@app.command()
def ask(
    paper: Annotated[str, typer.Argument(help="A PDF or text file, or an identifier such as 2401.06769.")],
    lang: Annotated[str, typer.Option(help="Language of the questions: en or zh.")] = "en",
    question: Annotated[
        list[int] | None, typer.Option("--question", "-q", help="Number 1 to 6; may be repeated.")
    ] = None,
    contact: Annotated[
        str | None, typer.Option(help="E-mail that requests to sources carry; needed for identifiers.")
    ] = None,
    config: Config = None,
    data: Data = None,
    database: Database = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Answer the six questions about one paper, by the engine of the settings: by default quotes from the paper.

    Example: danlu papers ask paper.pdf
    """
    settings = _settings(config, data, database, contact=contact)
    from danlu.papers.answer.questions import questions

    asked = questions(lang)
    if question:
        wrong = [number for number in question if not 1 <= number <= len(asked)]
        if wrong:
            raise ValueError(f"--question must be in 1..{len(asked)}, got {wrong[0]}")
        asked = tuple(each for each in asked if each.number in question)
    from danlu.papers.asking import answers_about

    found = asyncio.run(answers_about(settings, paper, asked, None if json_output else _print_piece))
    if json_output:
        typer.echo(json.dumps(found, ensure_ascii=False, indent=1))
    else:
        for note in found["notes"]:
            typer.echo(f"note: {note}", err=True)


@app.command()
def doctor(config: Config = None, data: Data = None, database: Database = None) -> None:
    """Say what works and what does not: packages, database, index, disk, sources' last polls, queue."""
    settings = _settings(config, data, database)
    from danlu.papers.doctor import examine

    failed = False
    for finding in examine(settings):
        failed = failed or finding.state == "bad"
        typer.echo(f"{finding.state:>4}  {finding.about}: {finding.text}")
    if failed:
        raise typer.Exit(1)


def _print_piece(number: int, heading: str, text: str) -> None:
    """Text as it comes, each question under its heading."""
    if heading:
        sys.stdout.write(f"\n## {number}. {heading}\n\n")
    sys.stdout.write(text)
    sys.stdout.flush()


def _settings(config: Path | None, data: Path | None, database: str | None, **given: Any) -> Settings:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'danlu papers needs {", ".join(missing)}: pip install "danlu[papers]"')
    from danlu.papers.settings import load_settings

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    return load_settings(config, data=data, database=database, **given)


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal for work that counts done and total."""
    with progress_phases() as phase:
        show = phase(name)
        yield lambda done, total: show(done, total, name)


@contextmanager
def _site(settings: Settings) -> Iterator[Site]:
    from danlu.papers.web.state import open_site

    site = open_site(settings)
    try:
        yield site
    finally:
        site.close()
