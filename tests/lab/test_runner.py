import json

import pytest

from danlu.lab import Check, Claim, Evidence, Plot, Table, UnknownClaim, claim, claims, find, run, runner
from danlu.lab.claim import VERDICTS


@pytest.fixture
def synthetic(monkeypatch):
    """A claim that takes no time, registered for one test."""
    claims()
    monkeypatch.setattr(runner, "_CLAIMS", dict(runner._CLAIMS))
    calls = []

    @claim(
        name="synthetic-claim",
        title="<b>Synthetic</b>",
        source="archive 0",
        statement="Numbers grow.",
        measurement="Counted.",
        seeds=(3, 4),
    )
    def synthetic(context):
        calls.append(context)
        values = list(context.track(range(3), description="counting", total=3))
        return Evidence(
            summary="0 to 2",
            checks=(Check("grows", values[-1] > values[0]), Check("falls", False)),
            tables=(Table("counted", ("step", "value"), tuple(enumerate(values))),),
            plots=(Plot("counted", "step", "value", values, {"value": values}),),
        )

    synthetic_calls = calls
    return synthetic, synthetic_calls


def test_every_claim_is_complete():
    known = claims()
    for name in (
        "rope-explodes", "ntk-order", "yarn", "base-bound", "rerope-longer-lower", "log-n", "leaky-inverse",
        "randomised-positions", "hwfa", "key-norm", "attention-scale",
    ):  # fmt: skip
        assert isinstance(known[name], Claim)
    for name, made in known.items():
        assert name == made.name == name.lower()
        assert all(getattr(made, field) for field in ("title", "source", "statement", "measurement", "seeds"))
        assert 0 < made.budget <= 300


def test_an_unknown_claim_names_the_nearest():
    with pytest.raises(UnknownClaim, match="no claim is named 'reropes-longer'; the nearest is 'rerope-longer-lower'"):
        find("reropes-longer")


def test_a_name_is_given_once(synthetic):
    with pytest.raises(ValueError, match="name must be new, got 'synthetic-claim'"):
        claim(name="synthetic-claim", title="x", source="x", statement="x", measurement="x")(lambda context: None)


def test_run_writes_record_figure_and_results(synthetic, tmp_path):
    made, calls = synthetic
    record = run(made, directory=tmp_path)
    assert record.verdict == "holds in part"
    assert calls[0].seeds == (3, 4)
    assert json.loads((tmp_path / "synthetic-claim.json").read_text())["verdict"] == "holds in part"
    assert (tmp_path / "figures" / "synthetic-claim.png").read_bytes().startswith(b"\x89PNG")
    (entry,) = json.loads((tmp_path / "results.json").read_text())["claims"]
    assert (entry["name"], entry["verdict"], entry["summary"]) == ("synthetic-claim", "holds in part", "0 to 2")


def test_a_finished_claim_is_not_run_again_unless_forced(synthetic, tmp_path):
    made, calls = synthetic
    first = run(made, directory=tmp_path)
    assert run(made, directory=tmp_path) == first
    assert len(calls) == 1
    run(made, directory=tmp_path, force=True, seeds=(7,))
    assert [context.seeds for context in calls] == [(3, 4), (7,)]


def test_a_damaged_record_is_named_and_force_replaces_it(synthetic, tmp_path):
    made, calls = synthetic
    path = tmp_path / "synthetic-claim.json"
    path.write_text('{"format": 1, "na')
    with pytest.raises(ValueError, match="synthetic-claim.json cannot be read.*--force"):
        run(made, directory=tmp_path)
    assert not calls
    run(made, directory=tmp_path, force=True)
    assert json.loads(path.read_text())["format"] == 1


def test_a_claim_that_fails_leaves_nothing(monkeypatch, tmp_path):
    claims()
    monkeypatch.setattr(runner, "_CLAIMS", dict(runner._CLAIMS))

    @claim(name="broken-claim", title="x", source="x", statement="x", measurement="x")
    def broken(context):
        raise RuntimeError("no numbers")

    with pytest.raises(RuntimeError, match="no numbers"):
        run(broken, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_base_bound_runs_for_real(tmp_path, monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr("danlu.lab.positions._ARTICLE_BASES", {1024: 4.3e3})
    record = run(find("base-bound"), directory=tmp_path)
    assert record.verdict == VERDICTS[0]
    found = dict((row[0], row[1]) for row in record.evidence.tables[0].rows)
    assert found[1024] == pytest.approx(4293.8, rel=1e-3)
