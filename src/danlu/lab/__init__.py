"""The lab: every method's headline claim as an experiment that runs here and says whether it holds.

danlu lab list
danlu lab run rerope-longer-lower
danlu lab report
"""

from danlu.lab.claim import Check, Claim, Context, Evidence, Plot, Record, Table, verdict
from danlu.lab.runner import UnknownClaim, claim, claims, find, finished, run

__all__ = [
    "Check",
    "Claim",
    "Context",
    "Evidence",
    "Plot",
    "Record",
    "Table",
    "UnknownClaim",
    "claim",
    "claims",
    "find",
    "finished",
    "run",
    "verdict",
]
