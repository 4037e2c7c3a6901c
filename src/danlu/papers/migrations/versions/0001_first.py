"""The first tables."""

from __future__ import annotations

from alembic import op

from danlu.papers.schema import meta, metadata

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Apply."""
    metadata.create_all(op.get_bind())
    op.bulk_insert(meta, [{"key": "next_pk", "value": "1"}, {"key": "change", "value": "0"}])


def downgrade() -> None:
    """Undo."""
    metadata.drop_all(op.get_bind())
