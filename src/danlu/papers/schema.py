"""Tables of the site, in SQLAlchemy Core: the same on SQLite and PostgreSQL.

Times are UTC without zone; dates of lists are the mailing's own. The search index is not here: it is derived, lives in
files of its own and can be built again at any time.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Date,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

#: 64 bits on PostgreSQL; on SQLite the type that makes a column the row's own number.
Key = BigInteger().with_variant(Integer(), "sqlite")


def _paper(primary_key: bool = False) -> Column:
    key = ForeignKey("paper.pk", ondelete="CASCADE")
    return Column("pk", Key, key, nullable=False, primary_key=primary_key)


#: Counters and secrets of the installation: the next key of a paper, the number of the latest change, form secrets.
meta = Table("meta", metadata, Column("key", String(60), primary_key=True), Column("value", Text, nullable=False))

paper = Table(
    "paper",
    metadata,
    Column("pk", Key, primary_key=True, autoincrement=False),
    Column("source", String(40), nullable=False),
    Column("ext_id", String(320), nullable=False),
    Column("version", Integer),
    Column("title", Text, nullable=False, default=""),
    Column("abstract", Text, nullable=False, default=""),
    Column("authors", JSON, nullable=False),
    Column("authors_provisional", Boolean, nullable=False, default=False),
    Column("categories", Text, nullable=False, default=""),
    Column("codes", Text, nullable=False, default=""),
    Column("comment", Text, nullable=False, default=""),
    Column("doi", Text, nullable=False, default=""),
    Column("journal_ref", Text, nullable=False, default=""),
    Column("license", Text, nullable=False, default=""),
    Column("submitted_at", DateTime),
    Column("updated_at", DateTime),
    Column("announced_on", Date),
    Column("withdrawn", Boolean, nullable=False, default=False),
    Column("extra", JSON, nullable=False),
    Column("origins", JSON, nullable=False),
    Column("work", BigInteger),
    Column("changed", Key, nullable=False),
    UniqueConstraint("source", "ext_id"),
    Index(None, "changed"),
    Index(None, "doi"),
    Index(None, "work"),
)
paper_version = Table(
    "paper_version",
    metadata,
    _paper(primary_key=True),
    Column("v", Integer, primary_key=True),
    Column("created_at", DateTime),
)
paper_cat = Table(
    "paper_cat", metadata, Column("cat", String(40), primary_key=True), _paper(primary_key=True), Index(None, "pk")
)
listing = Table(
    "listing",
    metadata,
    Column("announced_on", Date, primary_key=True),
    Column("cat", String(40), primary_key=True),
    _paper(primary_key=True),
    Column("kind", String(10), nullable=False),
    Column("pos", Integer),
    Column("late", Boolean, nullable=False, default=False),
    Column("approximate", Boolean, nullable=False, default=False),
    Column("seq", Key, nullable=False),
    Index(None, "pk"),
)
venue = Table(
    "venue",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(80), nullable=False),
    Column("year", Integer, nullable=False),
    Column("added_at", DateTime, nullable=False),
    UniqueConstraint("name", "year"),
)
venue_paper = Table(
    "venue_paper",
    metadata,
    Column("venue_id", Integer, ForeignKey("venue.id", ondelete="CASCADE"), primary_key=True),
    _paper(primary_key=True),
    Column("grp", String(80), nullable=False, default=""),
    Column("pos", Integer, nullable=False, default=0),
    Index(None, "pk"),
)
#: Two records that seem to be one work; they are linked and never merged.
duplicate = Table(
    "duplicate",
    metadata,
    _paper(primary_key=True),
    Column("other", Key, ForeignKey("paper.pk", ondelete="CASCADE"), primary_key=True),
    Column("reason", String(20), nullable=False),
)
counter = Table(
    "counter",
    metadata,
    _paper(primary_key=True),
    Column("kind", String(10), primary_key=True),
    Column("day", Date, primary_key=True),
    Column("n", Integer, nullable=False),
)
#: Hashes, salted anew each day, of who has been counted today; older days are deleted.
counted = Table(
    "counted",
    metadata,
    Column("day", Date, primary_key=True),
    Column("digest", String(64), primary_key=True),
)
answer = Table(
    "answer",
    metadata,
    Column("id", Key, primary_key=True, autoincrement=True),
    _paper(),
    Column("v", Integer, nullable=False),
    Column("lang", String(10), nullable=False),
    Column("engine_key", String(64), nullable=False),
    Column("q", Integer, nullable=False),
    Column("state", String(10), nullable=False),
    Column("text", Text, nullable=False, default=""),
    Column("sources", JSON, nullable=False),
    Column("created_at", DateTime, nullable=False),
    UniqueConstraint("pk", "v", "lang", "engine_key", "q"),
)
#: Text of a running answer as it grows: one row a chunk, so that any process can serve the stream.
answer_chunk = Table(
    "answer_chunk",
    metadata,
    Column("id", Key, primary_key=True, autoincrement=True),
    Column("job_id", Key, nullable=False),
    Column("q", Integer, nullable=False),
    Column("text", Text, nullable=False),
    Index(None, "job_id", "id"),
)
job = Table(
    "job",
    metadata,
    Column("id", Key, primary_key=True, autoincrement=True),
    Column("kind", String(20), nullable=False),
    Column("key", String(200), nullable=False),
    Column("payload", JSON, nullable=False),
    Column("prio", Integer, nullable=False),
    Column("state", String(10), nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("created_at", DateTime, nullable=False),
    Column("not_before", DateTime),
    Column("lease_until", DateTime),
    Column("worker", String(80)),
    Column("stage", String(20), nullable=False, default=""),
    Column("progress", Float, nullable=False, default=0.0),
    Column("error_kind", String(40), nullable=False, default=""),
    Column("error", Text, nullable=False, default=""),
    Index(
        "uq_job_live_key",
        "key",
        unique=True,
        sqlite_where=text("state in ('queued', 'running')"),
        postgresql_where=text("state in ('queued', 'running')"),
    ),
    Index(None, "kind", "state", "prio"),
)
poll = Table(
    "poll",
    metadata,
    Column("source", String(40), primary_key=True),
    Column("key", String(200), primary_key=True),
    Column("etag", Text, nullable=False, default=""),
    Column("last_modified", Text, nullable=False, default=""),
    Column("last_ok", DateTime),
    Column("last_try", DateTime),
    Column("body_sha", String(64), nullable=False, default=""),
    Column("expected_n", Integer),
    Column("got_n", Integer),
    Column("cursor", Text, nullable=False, default=""),
    Column("error", Text, nullable=False, default=""),
    Column("warning", Text, nullable=False, default=""),
)
#: One row a host: who may send the next request and when, shared by every process.
gate = Table(
    "gate",
    metadata,
    Column("host", String(120), primary_key=True),
    Column("next_start", Float, nullable=False, default=0.0),
    Column("holder", String(80)),
    Column("lease_until", Float, nullable=False, default=0.0),
    Column("failures", Integer, nullable=False, default=0),
    Column("open_until", Float, nullable=False, default=0.0),
)
gate_queue = Table(
    "gate_queue",
    metadata,
    Column("id", Key, primary_key=True, autoincrement=True),
    Column("host", String(120), nullable=False),
    Column("holder", String(80), nullable=False),
    Column("prio", Integer, nullable=False),
    Column("seen", Float, nullable=False),
    Index(None, "host", "prio", "id"),
)
#: What callers have used today, per limit: answers' tokens, for one.
budget = Table(
    "budget",
    metadata,
    Column("day", Date, primary_key=True),
    Column("name", String(80), primary_key=True),
    Column("used", Key, nullable=False),
)
