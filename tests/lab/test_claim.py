import json

import pytest
import torch

from danlu.lab.claim import (
    DOES_NOT_HOLD,
    HOLDS,
    HOLDS_IN_PART,
    Check,
    Evidence,
    Plot,
    Record,
    Table,
    environment,
    verdict,
)


def checks(*met):
    return tuple(Check(f"check {i}", value) for i, value in enumerate(met))


def record(*met, name="a-claim", **words):
    evidence = Evidence(
        summary=words.pop("summary", "1.00 against 0.25"),
        checks=checks(*met),
        tables=(Table("losses", ("method", "loss"), (("plain", 4.25), ("rerope", 2.5), ("broken", float("nan")))),),
        plots=(Plot("losses", "length", "loss", (1, 2, 4), {"plain": (1.0, 2.0, None)}, log_x=True),),
        notes=("a departure",),
    )
    fields = {"title": "A title", "source": "archive 1", "statement": "It works.", "measurement": "We look."} | words
    return Record(name=name, seeds=(0, 1), evidence=evidence, environment=environment(1.25), **fields)


@pytest.mark.parametrize(
    ("met", "expected"),
    [
        ((True,), HOLDS),
        ((False,), DOES_NOT_HOLD),
        ((True, True), HOLDS),
        ((True, False), HOLDS_IN_PART),
        ((False, True, False), HOLDS_IN_PART),
        ((False, False), DOES_NOT_HOLD),
    ],
)
def test_verdict_counts_the_checks_that_are_met(met, expected):
    assert verdict(checks(*met)) == expected
    assert Evidence("", checks(*met)).verdict == expected


def test_no_verdict_without_a_criterion():
    with pytest.raises(ValueError, match="at least one check"):
        verdict(())
    with pytest.raises(ValueError, match="at least one check"):
        Evidence("found nothing", ())


def test_a_record_survives_json():
    written = record(True, False)
    assert Record.from_json(written.to_json()) == written


def test_json_holds_verdict_environment_and_no_nan():
    document = json.loads(record(True).to_json())
    assert document["verdict"] == HOLDS
    assert document["evidence"]["tables"][0]["rows"][2] == ["broken", None]
    assert set(document["environment"]) >= {"date", "seconds", "threads", "torch", "transformers"}


def test_tensor_numbers_become_plain_ones():
    check = Check("tensor", torch.tensor(3.0) > 2)
    table = Table("t", ("a",), ((torch.tensor(1.5),),))
    assert check.met is True
    assert table.rows == ((1.5,),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=99), "format must be 1, got 99"),
        (lambda d: d.update(verdict=DOES_NOT_HOLD), "verdict must be 'holds'"),
        (lambda d: d.pop("format"), "not a lab record"),
    ],
)
def test_a_record_that_was_tampered_with_is_refused(change, message):
    document = json.loads(record(True).to_json())
    change(document)
    with pytest.raises(ValueError, match=message):
        Record.from_json(json.dumps(document))


def test_tables_and_plots_refuse_ragged_numbers():
    with pytest.raises(ValueError, match="2 cells, got 1"):
        Table("t", ("a", "b"), ((1.0,),))
    with pytest.raises(ValueError, match="3 points, got 2"):
        Plot("p", "x", "y", (1, 2, 3), {"line": (1.0, 2.0)})
