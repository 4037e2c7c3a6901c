from __future__ import annotations

from pathlib import Path

import pytest

from danlu.papers.settings import load_settings


def test_the_defaults_need_nothing():
    settings = load_settings(environment={})
    assert settings.engine.kind == "extractive" and settings.follow == "" and settings.host == "127.0.0.1"
    assert settings.database_url.startswith("sqlite:///") and settings.database_url.endswith("papers.db")


def test_overrides_win_over_the_environment_and_that_over_the_file(tmp_path):
    file = tmp_path / "site.toml"
    file.write_text(
        'port = 1\nhost = "::1"\nsearch = "tantivy"\n[engine]\nkind = "endpoint"\nurl = "http://x/v1"\nmodel = "m"\n'
    )
    environment = {
        "DANLU_PAPERS_PORT": "2",
        "DANLU_PAPERS_ENGINE__MODEL": "n",
        "DANLU_PAPERS_LANGUAGES": "zh, en",
        "OTHER": "x",
    }
    settings = load_settings(file, environment, port=3, host=None)
    assert (settings.port, settings.host, settings.search) == (3, "::1", "tantivy")
    assert settings.engine.model == "n" and settings.languages == ("zh", "en")


def test_secrets_are_not_printed():
    settings = load_settings(environment={"DANLU_PAPERS_ADMIN_TOKEN": "hunter2"})
    assert "hunter2" not in repr(settings) and settings.admin_token.get_secret_value() == "hunter2"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prot": 1}, "unknown setting 'prot': did you mean 'port'"),
        ({"engine": {"modle": "x"}}, "unknown setting 'engine.modle': did you mean 'model'"),
        ({"port": 70000}, "port: .*65535"),
        ({"follow": "cs.XX", "contact": "a@b"}, "expected a category"),
        ({"follow": "cs.AI"}, "contact must be given"),
        ({"engine": {"kind": "endpoint"}}, "engine.url must be given"),
        ({"languages": []}, "languages"),
    ],
)
def test_wrong_settings_say_what_is_wrong(given, message):
    with pytest.raises(ValueError, match=message):
        load_settings(environment={}, **given)


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot read settings from .*none.toml"):
        load_settings(tmp_path / "none.toml", {})
    (tmp_path / "bad.toml").write_text("port =")
    with pytest.raises(ValueError, match="bad.toml"):
        load_settings(tmp_path / "bad.toml", {})


def test_an_expression_to_follow_becomes_canonical():
    assert load_settings(environment={}, follow="cs.LG,cs.AI", contact="me@example.org").follow == "cs.AI+cs.LG"
    assert load_settings(environment={}, data=Path("x")).database_url == "sqlite:///x/papers.db"
