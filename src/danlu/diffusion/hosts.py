"""Reading a process out of a scheduler of diffusers.

A host's model is told a *timestep* (an index of its table, a thousandth of a flow's time, a quarter of the logarithm of
the noise), is given a scaled sample, and returns a prediction, all of which depend on the scheduler it was trained for.
A `Host` holds the three together.

Source: Scientific Spaces archive 9209; arXiv:2206.00364 (preconditioning).
"""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from danlu.diffusion.discrete import DiscreteProcess
from danlu.diffusion.host import Host
from danlu.diffusion.process import as_time
from danlu.diffusion.processes import EDM, Cosine, RectifiedFlow
from danlu.diffusion.targets import Prediction

__all__ = ["KNOWN", "Host", "load_scheduler", "process_from_scheduler"]

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

#: Share of the data that sampling starts with where a process has none at its end: its noise ratio must be finite.
LEAST_ALPHA = 2.0**-12

_TABLES = (
    "DDIMScheduler DDIMInverseScheduler DDIMParallelScheduler DDPMScheduler DDPMParallelScheduler PNDMScheduler "
    "LMSDiscreteScheduler EulerDiscreteScheduler EulerAncestralDiscreteScheduler HeunDiscreteScheduler "
    "KDPM2DiscreteScheduler KDPM2AncestralDiscreteScheduler DPMSolverMultistepScheduler "
    "DPMSolverMultistepInverseScheduler DPMSolverSinglestepScheduler DPMSolverSDEScheduler DEISMultistepScheduler "
    "UniPCMultistepScheduler SASolverScheduler RePaintScheduler UnCLIPScheduler CogVideoXDDIMScheduler "
    "CogVideoXDPMScheduler"
).split()
_EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler")
_FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
_OWN = ("ScoreSdeVeScheduler", "IPNDMScheduler")
#: Schedulers that `process_from_scheduler` reads.
KNOWN = (*_TABLES, *_EDM, *_FLOWS, *_OWN)
_DISTILLED = "its models are distilled to jump to the data, so that they do not follow the ODE"
_CODES = "its models work on discrete codes, without a Gaussian process"
_REFUSED = {
    "LCMScheduler": _DISTILLED,
    "TCDScheduler": _DISTILLED,
    "SCMScheduler": _DISTILLED,
    "CMStochasticIterativeScheduler": _DISTILLED,
    "ConsistencyDecoderScheduler": _DISTILLED,
    "FlowMatchLCMScheduler": _DISTILLED,
    "VQDiffusionScheduler": _CODES,
    "AmusedScheduler": _CODES,
    "DDPMWuerstchenScheduler": "its noise is cut off at both ends, so that a noise ratio has no single time",
}
_PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "epsilon",
    "sample": "sample",
    "v_prediction": "v",
    "flow_prediction": "velocity",
}


def process_from_scheduler(scheduler: SchedulerMixin | Mapping[str, Any] | str | os.PathLike[str]) -> Host:
    """Read the process, the prediction and the timesteps that a scheduler of diffusers stands for.

    Samples are in the coordinates ``x = alpha x_0 + sigma eps`` of the process. For tables of betas that is the
    variance preserving ``x`` of DDIM, also where the scheduler itself (Euler's, Heun's) works with ``x / alpha``.

    Args:
        scheduler: a scheduler, its config, or the path of a ``scheduler_config.json`` or of its folder.

    Returns:
        A `Host`: ``.process``, ``.prediction``, ``.timestep(t)`` and its inverse ``.time(timestep)``,
        ``.denoiser(model)``.

    Raises:
        ValueError: a scheduler that has no Gaussian process, or one that is not known; its name is said.
        ImportError: diffusers is missing.
    """
    scheduler = load_scheduler(scheduler)
    host = getattr(scheduler, "host", None)
    if isinstance(host, Host):
        return host
    name, known = _known_name(scheduler)
    config = scheduler.config
    if known == "flow":
        if config.get("invert_sigmas"):
            raise ValueError(
                f"{name} with invert_sigmas=True counts its time from noise to data, which is not understood"
            )
        return _flow("velocity", config)
    if known == "edm":
        if config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"{name} with prediction_type {config.prediction_type!r} is not understood: "
                "epsilon and v_prediction are"
            )
        arc = name == "CosineDPMSolverMultistepScheduler"
        sign = 1 if config.prediction_type == "epsilon" else -1
        return _edm(config.sigma_min, config.sigma_max, config.sigma_data, sign, "arc" if arc else "log")
    if name == "ScoreSdeVeScheduler":
        return Host(EDM(config.sigma_min, config.sigma_max), "score")
    if name == "IPNDMScheduler":
        if config.get("trained_betas") is not None:
            raise ValueError("IPNDMScheduler with trained_betas is not understood: its own sine schedule is")
        start = 2 / math.pi * math.acos(LEAST_ALPHA)
        return Host(Cosine(), "v", start=start, end=1 / config.num_train_timesteps)
    return _table(name, scheduler)


def load_scheduler(source: SchedulerMixin | Mapping[str, Any] | str | os.PathLike[str]) -> SchedulerMixin:
    """A scheduler from its config or file, by the class that the config names.

    Args:
        source: a scheduler (returned as it is), its config, or the path of a ``scheduler_config.json`` or of its
            folder.

    Raises:
        ValueError: the config names no class, or one that diffusers does not have.
        ImportError: diffusers is missing.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ImportError('schedulers of diffusers need it: pip install "danlu[diffusion]"') from error
    if isinstance(source, diffusers.SchedulerMixin):
        return source
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        path = path / diffusers.SchedulerMixin.config_name if path.is_dir() else path
        source = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(source, Mapping):
        raise ValueError(
            f"scheduler must be a scheduler of diffusers, its config or a path, got {type(source).__name__}"
        )
    name = source.get("_class_name") or _class_with(set(source))
    if name == "AMEDScheduler":
        from danlu.diffusion.schedulers import AMEDScheduler

        return AMEDScheduler.from_config(dict(source))
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if kind is None or not isinstance(kind, type) or not issubclass(kind, diffusers.SchedulerMixin):
        raise ValueError(f"the config's _class_name must be a scheduler of diffusers, got {name!r}")
    # What a config lists as left at its default is left out by from_config, for another class to have its own.
    known = set(inspect.signature(kind).parameters)
    return kind(**{key: value for key, value in source.items() if key in known})


def _class_with(keys: set[str]) -> str | None:
    """The scheduler with exactly these arguments: diffusers leaves its name out of a config that was never saved."""
    import diffusers

    keys = {key for key in keys if not key.startswith("_")}
    for name in (*KNOWN, *_REFUSED):
        kind = getattr(diffusers, name, None)
        if kind is not None and set(inspect.signature(kind).parameters) - {"kwargs"} == keys:
            return name
    return None


def _known_name(scheduler: Any) -> tuple[str, str]:
    """Name and family of the nearest class of a scheduler that is understood."""
    for kind in type(scheduler).__mro__:
        name = kind.__name__
        if name in _REFUSED:
            raise ValueError(f"{name} is not supported: {_REFUSED[name]}")
        for family, names in (("table", _TABLES), ("edm", _EDM), ("flow", _FLOWS), ("own", _OWN)):
            if name in names:
                return name, family
    raise ValueError(f"{type(scheduler).__name__} is not understood: known are {', '.join(KNOWN)}")


def _table(name: str, scheduler: Any) -> Host:
    config = scheduler.config
    kind = config.get("prediction_type", "epsilon")
    if kind not in _PREDICTIONS:
        raise ValueError(f"{name} with prediction_type {kind!r} is not understood: {', '.join(_PREDICTIONS)} are")
    prediction = _PREDICTIONS[kind]
    if config.get("use_flow_sigmas"):
        return _flow(prediction, config)
    if prediction == "velocity":
        raise ValueError(f"{name} with prediction_type 'flow_prediction' needs use_flow_sigmas=True")
    if config.get("timestep_type") == "continuous":
        if prediction != "v":
            raise ValueError(
                f"{name} with timestep_type 'continuous' is understood with 'v_prediction' only, got {kind!r}"
            )
        ratios = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
        low, high = (config.get(f"sigma_{end}") for end in ("min", "max"))
        return _edm(
            float(ratios.min()) if low is None else low, float(ratios.max()) if high is None else high, 1.0, -1, "log"
        )
    process = DiscreteProcess.from_betas(scheduler.betas)
    shares = as_time(scheduler.alphas_cumprod)
    # A scheduler may shift its products after taking them (CogVideoX's): then they are the truth and not the betas.
    whole = process.alpha(torch.arange(len(shares))) ** 2
    if not torch.allclose(whole[:-1], shares[:-1], rtol=1e-3, atol=0):
        process = DiscreteProcess.from_alphas_cumprod(shares)
    return Host(process, prediction, learned_variance=config.get("variance_type") in ("learned", "learned_range"))


def _flow(prediction: Prediction, config: Any) -> Host:
    steps = config.num_train_timesteps
    return Host(RectifiedFlow(), prediction, "scaled", float(steps), start=1 - LEAST_ALPHA, end=1 / steps)


def _edm(low: float, high: float, data: float, sign: int, timesteps: Literal["log", "arc"]) -> Host:
    return Host(EDM(low, high), "sample", timesteps, sigma_data=data, sign=sign)
