"""Alembic's environment: the connection comes from the program, never from a file."""

from __future__ import annotations

from alembic import context

from danlu.papers.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    transactional_ddl=False,
)
context.run_migrations()
