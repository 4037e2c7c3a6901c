"""A site on the papers of `tests.papers.web.scene`."""

from __future__ import annotations

import re

import pytest
from starlette.testclient import TestClient
from tests.papers.web.scene import Scripted, make_site

from danlu.papers.web.app import create_app


@pytest.fixture
def engine():
    return Scripted()


@pytest.fixture
def site(tmp_path, engine):
    return make_site(tmp_path, engine)


@pytest.fixture
def client(site):
    with TestClient(create_app(site), follow_redirects=False) as opened:
        yield opened
    site.close()


@pytest.fixture
def token(client):
    return re.search(r'name="csrf-token" content="([^"]+)"', client.get("/help").text).group(1)
