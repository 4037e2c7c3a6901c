"""Small documents in the forms that venues publish."""

from __future__ import annotations

import json

ACL = rb"""<?xml version='1.0' encoding='UTF-8'?>
<collection id="2024.acl">
  <volume id="long" ingest-date="2024-08-01" type="proceedings">
    <meta><booktitle>Proceedings</booktitle><year>2024</year><venue>acl</venue></meta>
    <frontmatter><url hash="x">2024.acl-long.0</url><bibkey>acl-2024</bibkey></frontmatter>
    <paper id="1">
      <title><fixed-case>BERT</fixed-case> is <i>not <b>about <tex-math>n^2</tex-math></b></i>:
        <tex-math>O(n)</tex-math> it is</title>
      <author><first>Ann</first><last>L\'opez</last><affiliation>X</affiliation></author>
      <author><last>Mononym</last></author>
      <abstract>We show <tex-math>$x$</tex-math> &amp; more.</abstract>
      <url hash="abc">2024.acl-long.1</url><bibkey>lopez-2024-bert</bibkey><doi>10.18653/v1/2024.acl-long.1</doi>
    </paper>
    <paper id="2"><title>No address</title><author><first>Bo</first><last>Chen</last></author></paper>
    <paper id="3"><title>Bad</title><url>2024 acl</url></paper>
  </volume>
</collection>"""

V2 = {
    "id": "_rnJxelIZ-",
    "license": "CC BY 4.0",
    "content": {
        "title": {"value": "Deep things"},
        "authors": {"value": ["Ann Lee", "Bo Chen"]},
        "abstract": {"value": "We go deep."},
        "keywords": {"value": ["depth", "things"]},
        "venue": {"value": "ICLR 2024 oral"},
        "venueid": {"value": "ICLR.cc/2024/Conference"},
        "pdf": {"value": "/pdf/abc.pdf"},
    },
}
V1 = {
    "id": "B1xsqj09Fm",
    "content": {
        "title": "Old things",
        "authors": ["Carl Dee"],
        "abstract": None,
        "venue": "NeurIPS 2021 Poster",
        "venueid": "NeurIPS.cc/2021/Conference",
    },
}


def note(base=V2, **content):
    """A note of OpenReview with some of its content changed."""
    return {**base, "content": {**base["content"], **content}}


def dump(*notes):
    """A dump as one saves it from the interface."""
    return json.dumps({"notes": notes, "count": len(notes)}).encode()


PMLR = rb"""@InProceedings{pmlr-v202-aamand23a,
  title = \t {Data Structures for {H}ilbert's $\ell_{2}$ Distance},
  author = {Aamand, Anders and Andoni, Alexandr and {The Team, Inc.} and Erd{\H{o}}s, Jr., Paul and others},
  booktitle = \t {Proceedings of the 40th International Conference on Machine Learning},
  pages = {1--24}, year = {2023}, editor = {Krause, Andreas}, volume = {202},
  series = {Proceedings of Machine Learning Research}, month = {23--29 Jul}, publisher = {PMLR},
  pdf = {https://proceedings.mlr.press/v202/aamand23a/aamand23a.pdf},
  url = {https://proceedings.mlr.press/v202/aamand23a.html},
  abstract = {Let {\'e} be.}
}
@inproceedings{van-den-berg23a, title = "Second " # {paper}, year = 2023, volume = 202, author = "Ann Lee"}
""".replace(rb"\t", b"\t")

CSV = b"""\xef\xbb\xbfID,Title,Abstract,Authors,DOI,Group,Year,Venue
a1,First paper,"Long, text
over lines",Ann Lee; Bo Chen,https://doi.org/10.1/X,Oral,2024,Small Conf
2401.00001@arXiv,Known paper,,,,,,
,No identifier,,,,,,
a/2,Bad identifier,,,,,,
a3,,,,,,,
a4,Bad year,,,,,20x4,Small Conf
"""

JSONL = b"""{"id": "a1", "title": "First paper", "authors": ["Ann Lee", "Bo Chen"], "year": 2024, "venue": "Small Conf"}
not json
[1]
{"id": "a2", "title": "Second", "authors": "Ann Lee; Bo Chen", "year": Infinity, "venue": "X"}

{"id": "a3", "title": "Third \\ud800", "authors": "Ann Lee; Bo Chen"}
"""
