"""Stores to test on: SQLite, and a real PostgreSQL that is started for the session where one is installed."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from pathlib import Path

import pytest
import sqlalchemy as sa

from danlu.papers.store import Store


def _program(name: str) -> str | None:
    found = shutil.which(name)
    if found:
        return found
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    return str(versions[-1]) if versions else None


@pytest.fixture(scope="session")
def postgresql_url(tmp_path_factory):
    """Address of a PostgreSQL cluster of this session alone, reached by a socket in a temporary folder."""
    initdb, pg_ctl = _program("initdb"), _program("pg_ctl")
    if initdb is None or pg_ctl is None:
        pytest.skip("PostgreSQL is not installed")
    # A socket's path has at most 107 characters, so the folder is not one of pytest's.
    folder = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    prefix: list[str] = []
    if os.getuid() == 0:
        # The server refuses to run as root.
        try:
            owner = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL has no user of its own here, and does not run as root")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        prefix = ["runuser", "-u", "postgres", "--"]
    data = folder / "data"
    subprocess.run(
        [*prefix, initdb, "-D", data, "-U", "postgres", "-A", "trust", "--no-sync"],
        check=True,
        capture_output=True,
        cwd="/",
    )
    options = f"-c listen_addresses='' -c fsync=off -c full_page_writes=off -k {folder}"
    subprocess.run(
        [*prefix, pg_ctl, "-D", data, "-w", "-o", options, "-l", folder / "log", "start"],
        check=True,
        capture_output=True,
        cwd="/",
    )
    yield f"postgresql://postgres@/postgres?host={folder}"
    subprocess.run([*prefix, pg_ctl, "-D", data, "-m", "immediate", "stop"], check=False, capture_output=True, cwd="/")
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request, tmp_path):
    """An empty store, on each database in turn."""
    if request.param == "sqlite":
        opened = Store(f"sqlite:///{tmp_path / 'papers.db'}")
    else:
        url = request.getfixturevalue("postgresql_url")
        engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP SCHEMA public CASCADE")
            connection.exec_driver_sql("CREATE SCHEMA public")
        engine.dispose()
        opened = Store(url)
    yield opened
    opened.close()
