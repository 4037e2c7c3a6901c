"""Lines as arXiv's metadata snapshot has them."""

from __future__ import annotations

import json

ENTRY = {
    "id": "0704.0001",
    "submitter": "Pavel Nadolsky",
    "authors": r"C. Bal\'azs, E. L. Berger, P. M. Nadolsky",
    "title": "Calculation of prompt diphoton production cross sections at\n  LHC energies",
    "comments": "37 pages, 15 figures",
    "journal-ref": "Phys.Rev.D76:013009,2007",
    "doi": "10.1103/PhysRevD.76.013009",
    "report-no": "ANL-HEP-PR-07-12",
    "categories": "hep-ph cs.LG 68T07",
    "license": "http://arxiv.org/licenses/nonexclusive-distrib/1.0/",
    "abstract": "  A fully differential calculation\nin $q_T$.\n",
    "versions": [
        {"version": "v1", "created": "Mon, 2 Apr 2007 19:18:42 GMT"},
        {"version": "v2", "created": "Tue, 24 Jul 2007 20:10:27 GMT"},
    ],
    "update_date": "2008-11-26",
    "authors_parsed": [
        [r"Bal\'azs", "C.", ""],
        ["Berger", "E. L.", "Jr."],
        ["Nadolsky", "P. M.", "", "SMU"],
    ],
}


def line(**changes):
    """One line, with some of its values changed."""
    return json.dumps({**ENTRY, **changes}).encode() + b"\n"
