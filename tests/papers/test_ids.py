from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.papers.ids import (
    ArxivId,
    InvalidIdentifier,
    PaperId,
    abs_url,
    find_arxiv_ids,
    parse_arxiv,
    parse_id,
    pdf_url,
)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("2401.06769", "2401.06769"),
        ("2401.6769", "2401.06769"),
        ("1406.02661", "1406.2661"),
        ("0704.0001", "0704.0001"),
        ("1412.9999", "1412.9999"),
        ("1501.00001", "1501.00001"),
        ("arXiv:2401.06769v3", "2401.06769v3"),
        ("ARXIV: 2401.06769", "2401.06769"),
        ("10.48550/arXiv.2401.06769", "2401.06769"),
        ("math.CA/0611800", "math/0611800"),
        ("hep-th/9901001v2", "hep-th/9901001v2"),
        ("math/0703001", "math/0703001"),
        ("hep-th/9107001", "hep-th/9107001"),
    ],
)
def test_identifiers_become_canonical(text, canonical):
    assert str(parse_arxiv(text)) == canonical
    assert str(parse_arxiv(canonical)) == canonical


@pytest.mark.parametrize(
    "text",
    "1412.12345 2413.00001 2400.00001 2401.00000 0703.0001 math/0704001 hep-th/9106001 hep-th/0711001x math/9913001 "
    "math/9912000 nonsense/0101001 2401.06769v0 2401.06769v01 704.1 1501.1 2401.123456 abc 2401-06769".split()
    + ["２４０１.06769", "2401.0676９"]
    + ["", "2401.06769\n2", "v2", "2401.06769 v2", "2" * 500],
)
def test_what_is_no_identifier_is_refused(text):
    with pytest.raises(InvalidIdentifier):
        parse_arxiv(text)


def test_a_trailing_line_end_is_not_part_of_an_identifier_in_the_middle_of_an_address():
    assert parse_arxiv("2401.06769\n") == ArxivId("2401.06769")  # surrounding space is stripped, as pasted text has it
    with pytest.raises(InvalidIdentifier):
        parse_arxiv("2401.06769\nv2")


@given(st.text(max_size=60))
def test_any_text_is_an_identifier_or_refused(text):
    try:
        found = parse_id(text)
    except InvalidIdentifier:
        return
    assert parse_id(str(found)) == found


@given(st.integers(2007, 2090), st.integers(1, 12), st.integers(1, 99_999), st.one_of(st.none(), st.integers(1, 99)))
def test_canonical_form_is_idempotent(year, month, number, version):
    text = f"{year % 100:02}{month:02}.{number:05}" + (f"v{version}" if version else "")
    try:
        first = parse_arxiv(text)
    except InvalidIdentifier:
        assert (year, month) < (2007, 4) or ((year, month) < (2015, 1) and number > 9999)
        return
    assert parse_arxiv(str(first)) == first
    assert len(first.identifier) == (9 if (year, month) < (2015, 1) else 10)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rnJxelIZrq@openreview", PaperId("openreview", "rnJxelIZrq")),
        ("aB_c-9d@OpenReview", PaperId("openreview", "aB_c-9d")),
        ("2024.naacl-long.431@ACL", PaperId("acl", "2024.naacl-long.431")),
        ("x@CVPR2025@CVF", PaperId("cvf", "x", "CVPR2025")),
        ("2401.6769@arXiv", PaperId("arxiv", "2401.06769")),
    ],
)
def test_identifiers_of_venues_carry_their_source(text, expected):
    assert parse_id(text) == expected
    assert parse_id(str(expected)) == expected


@pytest.mark.parametrize("text", ["x@Nowhere", "a b@ACL", "@ACL", "x@", "../../etc@ACL", "<script>@ACL", "a@b@c@ACL"])
def test_wrong_identifiers_of_venues_are_refused(text):
    with pytest.raises(InvalidIdentifier):
        parse_id(text)


def test_identifiers_in_text_need_boundaries_and_are_not_taken_from_other_dois():
    text = (
        "arXiv:2401.06769v2, doi 10.1145/3292500.3330701, hep-th/9901001; https://arxiv.org/pdf/1406.2661v1.pdf "
        "math.CA/0611800 https://doi.org/10.48550/arXiv.2310.11453 again 2401.06769v2 and 12401.06769 or 2401.067691"
    )
    found = [str(each) for each in find_arxiv_ids(text)]
    assert found == ["2401.06769v2", "hep-th/9901001", "1406.2661v1", "math/0611800", "2310.11453"]


def test_addresses_are_built_from_the_identifier():
    assert abs_url(parse_id("2401.06769v2")) == "https://arxiv.org/abs/2401.06769v2"
    assert pdf_url(parse_id("math/0611800")) == "https://arxiv.org/pdf/math/0611800"
    assert pdf_url(parse_id("v202-abc23a@PMLR")) == "https://proceedings.mlr.press/v202/abc23a/abc23a.pdf"
    assert abs_url(parse_id("rnJxelIZrq@OpenReview")) == "https://openreview.net/forum?id=rnJxelIZrq"
    assert pdf_url(parse_id("38818@AAAI")) is None
