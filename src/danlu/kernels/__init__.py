"""Floor 0: tensors in, tensors out; no models, no files."""

from danlu.kernels.flash import attend, choose_route, merge
from danlu.kernels.regions import Part

__all__ = ["Part", "attend", "choose_route", "merge"]
