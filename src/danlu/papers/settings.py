"""Settings of the site: typed, strict, from a TOML file, the environment and the command line, the last one winning."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from danlu.papers.categories import parse_expression

#: Environment variables that set a field: ``DANLU_PAPERS_PORT``, ``DANLU_PAPERS_ENGINE__MODEL``.
PREFIX = "DANLU_PAPERS_"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class EngineSettings(_Strict):
    """Who answers the questions about a paper."""

    kind: Literal["extractive", "endpoint", "local", "none"] = Field(
        "extractive",
        description="extractive quotes the paper; endpoint asks a server that speaks the OpenAI protocol; local runs a "
        "causal language model here, with many short contexts; none hides the button",
    )
    model: str = Field("", description="name at the endpoint, or folder or hub name of the local model")
    url: str = Field("", description="base address of the endpoint, such as http://localhost:8080/v1")
    key: SecretStr = Field(SecretStr(""), description="key of the endpoint")
    context: int = Field(32_768, ge=512, description="tokens that the model reads at once")
    concurrency: int = Field(2, ge=1, le=64, description="answers in work at the same time")
    tokens_per_day: int = Field(
        0, ge=0, description="tokens that the endpoint may read and write in a day; 0: no limit"
    )
    parameters: dict[str, float | int | str | bool] = Field(
        default_factory=dict, description="sent with every request to the endpoint, such as temperature"
    )

    @model_validator(mode="after")
    def _complete(self) -> EngineSettings:
        needed = {"endpoint": ("url", "model"), "local": ("model",)}.get(self.kind, ())
        for name in needed:
            if not getattr(self, name):
                raise ValueError(f"engine.{name} must be given for engine.kind = {self.kind!r}")
        return self


class LimitSettings(_Strict):
    """What one reader may ask for; a network of addresses may do four times as much."""

    asks_per_hour: int = Field(30, ge=1, description="answers to start")
    searches_per_minute: int = Field(60, ge=1, description="searches and related-paper queries")
    fetches_per_hour: int = Field(60, ge=1, description="papers fetched on demand because they were not stored")
    counts_per_minute: int = Field(240, ge=1, description="openings to count")


class Settings(_Strict):
    """Everything that a site can be told. The defaults serve the bundled sample on this machine, without network."""

    data: Path = Field(
        default_factory=lambda: (
            Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "danlu" / "papers"
        ),
        description="folder of the database, the search index and temporary files",
    )
    database: str = Field("", description="postgresql://... or sqlite:///FILE; by default papers.db in the data folder")
    search: Literal["fts5", "tantivy"] = Field("fts5", description="search engine; tantivy for millions of papers")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65_535, description="port to listen on; 0: any that is free")
    public_url: str = Field(
        "", description="address under which readers reach the site, for feeds; else that of the request"
    )
    follow: str = Field("", description="subject expression to keep up to date, such as cs.AI+cs.LG; empty: no polling")
    contact: str = Field("", description="e-mail or address that requests to sources carry; needed for polling")
    languages: tuple[Literal["en", "zh"], ...] = Field(
        ("en",), min_length=1, description="languages of answers, the first by default"
    )
    engine: EngineSettings = Field(default_factory=lambda: EngineSettings.model_validate({}))
    limits: LimitSettings = Field(default_factory=lambda: LimitSettings.model_validate({}))
    admin_token: SecretStr = Field(SecretStr(""), description="who sends it gets the first place in the queue")
    trusted_proxies: tuple[str, ...] = Field((), description="addresses whose X-Forwarded-For is believed")
    workers: int = Field(1, ge=0, le=1, description="1: serve does the jobs too; 0: danlu papers worker does them")
    sample: bool = Field(True, description="fill an empty database with the bundled sample")
    chat_url: str = Field(
        "",
        description="a general chat that a card links to, with {prompt} where the question goes, such as "
        "https://chat.example.org/?q={prompt}; empty: no link",
    )
    translate_url: str = Field(
        "",
        description="where readers may send a title and abstract for translation, with {text} where they go; "
        "empty: nowhere",
    )

    @field_validator("follow")
    @classmethod
    def _readable(cls, value: str) -> str:
        return str(parse_expression(value)) if value else value

    @model_validator(mode="after")
    def _reachable(self) -> Settings:
        if self.follow and not self.contact:
            raise ValueError("contact must be given with follow: sources want to know whom to write to about requests")
        return self

    @property
    def database_url(self) -> str:
        """Address of the database."""
        return self.database or f"sqlite:///{self.data / 'papers.db'}"


def load_settings(file: Path | None = None, environment: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
    """Read settings.

    Args:
        file: TOML with the names of `Settings`; tables ``[engine]`` and ``[limits]``.
        environment: variables named ``DANLU_PAPERS_`` and the field; those of the process unless given. Fields of a
            table follow two underscores; lists are separated by commas.
        **overrides: fields set by the caller; None leaves a field alone.

    Returns:
        The settings: overrides before environment before file before defaults.

    Raises:
        ValueError: an unknown name (with the nearest known one) or a value out of range, with the place it came from.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"cannot read settings from {file}: {error}") from error
    for variable, text in sorted((os.environ if environment is None else environment).items()):
        if variable.startswith(PREFIX):
            _place(values, variable.removeprefix(PREFIX).lower().split("__"), text)
    for name, value in overrides.items():
        if value is not None:
            _place(values, name.split("__"), value)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise ValueError("; ".join(_explain(each) for each in error.errors())) from None


def _place(values: dict[str, Any], path: list[str], value: Any) -> None:
    if isinstance(value, str) and path[-1] in ("languages", "trusted_proxies"):
        value = [part.strip() for part in value.split(",") if part.strip()]
    for name in path[:-1]:
        values = values.setdefault(name, {})
    values[path[-1]] = value


def _explain(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        tables: dict[str, type[BaseModel]] = {"engine": EngineSettings, "limits": LimitSettings}
        table = tables.get(str(error["loc"][0]), Settings)
        known = get_close_matches(str(error["loc"][-1]), table.model_fields, 1, 0.5)
        return f"unknown setting {place!r}" + (f": did you mean {known[0]!r}?" if known else "")
    return f"{place}: {error['msg']}" if place else str(error["msg"])
