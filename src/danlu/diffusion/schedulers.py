"""AMED-Solver and AMED-Plugin as a scheduler that pipelines of diffusers run unchanged.

Source: Scientific Spaces archive 9881; arXiv:2312.00094.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from danlu.diffusion.amed import time_of_ratio
from danlu.diffusion.amed_steps import Base, check_order
from danlu.diffusion.amed_table import AMEDTable, Coefficients, Lookup, check_ratios
from danlu.diffusion.grids import SPACINGS, Spacing, check_grid
from danlu.diffusion.host_walk import HostWalk, repeated
from danlu.diffusion.hosts import KNOWN, Host, load_scheduler, process_from_scheduler
from danlu.diffusion.processes import RectifiedFlow
from danlu.diffusion.trained_steps import TrainedSteps, shown, table_of

try:
    from diffusers import ConfigMixin, SchedulerMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.schedulers.scheduling_utils import SchedulerOutput
except ImportError as error:
    raise ImportError('AMEDScheduler needs diffusers: pip install "danlu[diffusion]"') from error

if TYPE_CHECKING:
    from danlu.diffusion.attachment import Attachment

Untrained = Literal["refuse", "midpoint"]


class AMEDScheduler(TrainedSteps, SchedulerMixin, ConfigMixin):
    """Sampling in few network calls, each interval through a learned middle time.

    ``pipe.scheduler = AMEDScheduler.from_config(pipe.scheduler.config)`` takes process and prediction over from any
    scheduler that `process_from_scheduler` reads. The coefficients of every number of steps it was trained for are part
    of ``scheduler_config.json``. ``num_inference_steps`` counts intervals; each costs two network calls, and so two
    entries of ``timesteps``, less one for the first interval with ``afs``.

    The state is kept in float64 (float32 on mps) whatever the type of the samples. It differs from the source in that
    samples stay in the coordinates of the process, ``alpha (x / alpha)``, with the alpha of the time that the network
    is told, so that a pipeline may hand them to its network as they are.

    Args:
        num_train_timesteps: length of the table of betas.
        beta_start: first beta.
        beta_end: last beta.
        beta_schedule: ``linear``, ``scaled_linear`` or ``squaredcos_cap_v2``.
        trained_betas: the table itself, instead of the four above.
        prediction_type: ``epsilon``, ``sample`` or ``v_prediction``.
        rescale_betas_zero_snr: move the table so that no data is left at its end.
        host_class: the scheduler of diffusers whose meaning the arguments above have. For one with other arguments
            (flows, EDM) use ``from_config`` with its config.
        base: solver whose steps are refined; see `AMEDStepper`.
        base_order: order of ``ipndm`` (1 to 4) and ``dpm++`` (1 to 3).
        schedule: spacing of the times; see `time_grid`.
        schedule_rho: order of the spacing.
        ratio_max: noise ratio (sigma / alpha) to start from; the process's largest unless given.
        ratio_min: noise ratio to end at, above 0; the process's smallest unless given.
        afs: take the first direction analytically, which saves a call. It needs a pipeline that calls
            ``scale_model_input`` (those for latents do).
        untrained: what to do for a number of steps without coefficients: ``refuse`` it, or take the ``midpoint`` of
            every interval (r = 1/2, which is DPM-Solver-2 for the base ``amed``).
        coefficients: by number of steps (as text), a mapping with ``r``, ``c``, ``a``, ``times`` and ``ratios``;
            `store` and `train` write it.

    Raises:
        ValueError: an unknown base, schedule or choice, or coefficients that do not fit together.

    Source: Scientific Spaces archive 9881; arXiv:2312.00094.
    """

    order = 2
    _compatibles = list(KNOWN)  # whose other arguments are kept in the config

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        prediction_type: str = "epsilon",
        rescale_betas_zero_snr: bool = False,
        host_class: str = "DDIMScheduler",
        base: Base = "ipndm",
        base_order: int | None = None,
        schedule: Spacing = "logsnr",
        schedule_rho: float | None = None,
        ratio_max: float | None = None,
        ratio_min: float | None = None,
        afs: bool = False,
        untrained: Untrained = "refuse",
        coefficients: dict[str, dict[str, list[float]]] | None = None,
    ) -> None:
        check_order(base, base_order)
        for name, value, known in (("schedule", schedule, SPACINGS), ("untrained", untrained, get_args(Untrained))):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        for name, ratio in (("ratio_max", ratio_max), ("ratio_min", ratio_min)):
            if ratio is not None and not 0 < ratio < float("inf"):
                raise ValueError(f"{name} must be above 0 and finite, got {ratio}: the last step ends with noise left")
        for steps, entry in (coefficients or {}).items():
            table_of(entry, steps)
        self.num_inference_steps: int | None = None
        #: Network calls since `set_timesteps`.
        self.calls = 0
        self.timesteps = torch.empty(0)
        #: The predictor at work, see `attach`.
        self.attachment: Attachment | None = None
        self._table: AMEDTable | None = None
        self._begin_index: int | None = None
        self._index: int | None = None
        self._walk: HostWalk | None = None

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler with the process and prediction of another one's config; own configs come back as they were.

        Args:
            config: of any scheduler that `process_from_scheduler` reads, or that scheduler itself.
            return_unused_kwargs: also return the arguments that no one took.
            **kwargs: arguments of this class, or of the config's own, that replace what the config says.

        Raises:
            ValueError: a scheduler that cannot be read; its name is said.
        """
        if isinstance(config, SchedulerMixin):
            config = {**config.config, "_class_name": type(config).__name__}
        ours = set(inspect.signature(cls.__init__).parameters) - {"self"}
        if isinstance(config, Mapping) and config.get("_class_name") != cls.__name__ and not ours <= set(config):
            replaced = {key: kwargs.pop(key) for key in set(kwargs) & set(config)}
            host = load_scheduler({**config, **replaced})
            # A config leaves out what its own class takes by default, and our defaults may be others.
            config = {key: value for key, value in host.config.items() if not key.startswith("_")}
            config |= {"_class_name": cls.__name__, "host_class": type(host).__name__}
        made = super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)
        scheduler = made[0] if return_unused_kwargs else made
        if scheduler.config.get("thresholding"):
            raise ValueError(
                "thresholding of the predicted data is not supported: pass thresholding=False to do without"
            )
        scheduler.host  # refuses what cannot be read  # noqa: B018
        return made

    @cached_property
    def host(self) -> Host:  # type: ignore[override]
        """The process, and how the network is spoken to."""
        return process_from_scheduler({**self.config, "_class_name": self.config.host_class})

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise that pipelines start from: sigma at the first time."""
        return self.host.init_noise_sigma if self._table is None else float(self.host.process.sigma(self._first))

    @property
    def step_index(self) -> int | None:
        """Index of the next network call; None before the first."""
        return self._index

    @property
    def begin_index(self) -> int | None:
        """Index of the first network call, if a pipeline has set one."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at a later network call (pipelines that begin from an image do)."""
        self._begin_index = begin_index

    @property
    def evaluations(self) -> int:
        """Network calls of a whole run. With guidance, each is on a batch of twice the size."""
        return len(self.timesteps)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Choose the intervals. Afterwards ``timesteps`` has one entry for each network call.

        Args:
            num_inference_steps: intervals, at least 1.
            device: of ``timesteps``.
            timesteps: ends of the intervals (intervals + 1,) as the network is told them, descending, instead.
            sigmas: ends of the intervals as noise ratios sigma / alpha (for flows: as their time), instead.

        Raises:
            ValueError: not exactly one of the three; steps below 1; ends that do not descend, or that reach a time
                without noise; no coefficients for these intervals while ``untrained`` is ``refuse``.
        """
        if sum(value is not None for value in (num_inference_steps, timesteps, sigmas)) != 1:
            raise ValueError("give exactly one of num_inference_steps, timesteps and sigmas")
        process = self.host.process
        if num_inference_steps is not None:
            times = self.grid(num_inference_steps)
        elif timesteps is not None:
            times = check_grid(self.host.time(torch.as_tensor(timesteps, dtype=torch.float64)), process)
        else:
            ends = torch.as_tensor(sigmas, dtype=torch.float64)
            flow = isinstance(process, RectifiedFlow)
            times = check_grid(ends, process) if flow else process.time_of(-check_ratios(ends).log())
        ratios = check_ratios(process.noise_ratio(times))
        self._table = self.table_for(times, ratios)
        self._ratios, self._first = ratios, times[0]
        self.num_inference_steps = len(self._table)
        told = self.host.timestep(time_of_ratio(process, self._table.told(ratios, self.config.afs)))
        self._nominal: list[float] = told.tolist()
        self.timesteps = told.to(device=device, dtype=torch.float32)
        self._begin_index = self._index = self._walk = None
        self.calls = 0

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """What the network is given for a sample: the sample, unless it is preconditioned or ``afs`` comes first.

        Args:
            sample: (batch, ...), or several copies of the batch for guidance.
            timestep: entry of ``timesteps``.
        """
        return self._arrived(timestep)[0].input(sample)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: Any = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Use one network call.

        Args:
            model_output: of the network (batch, ...).
            timestep: the entry of ``timesteps`` that the network was told.
            sample: (batch, ...), what the last step returned.
            eta: must be 0; some pipelines pass it.
            use_clipped_model_output: must be false; some pipelines pass it.
            generator: not used: nothing is drawn.
            return_dict: return a ``SchedulerOutput`` and not a tuple.

        Returns:
            The next sample, in the type of ``sample``.

        Raises:
            ValueError: a timestep that is not the next one, a call after the last, an output that is not finite, or a
                pipeline that skipped ``scale_model_input`` where it is needed.
        """
        if eta != 0 or use_clipped_model_output:
            raise ValueError(f"eta must be 0 and nothing clipped: AMED follows an ODE, got eta={eta}")
        walk, index = self._arrived(timestep)
        if walk.misses_scaling:
            who, other = ("its kind of network", "") if self.host.scales_input else ("afs", ", or afs=False")
            raise ValueError(
                f"this pipeline does not call scale_model_input, which {who} needs: use another pipeline{other}"
            )
        if not bool(torch.isfinite(model_output).all()):
            raise ValueError(
                f"the network's output is not finite at call {index + 1} of {self.evaluations}, timestep "
                f"{self._nominal[index]:g}"
            )
        moved = walk.advance(model_output, sample)
        self.calls += 1
        self._index = index + 1
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noised samples at timesteps of the network, in the type of the samples."""
        times = self.host.time(timesteps.to(original_samples.device))
        return self.host.process.add_noise(original_samples, noise, times).to(original_samples.dtype)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def follow(self, attachment: Attachment | None) -> None:
        """Take coefficients from a predictor, or from the config again. `attach` calls it."""
        self.attachment = attachment
        self._walk = self._index = self._table = None

    def times_to_tell(self, timestep: float | Tensor, rows: int) -> Tensor | None:
        """Timesteps of each of the rows that a network is about to be called for.

        Returns:
            (rows,), or None where the timestep is not the one of the call that comes, or the samples share it.
        """
        if self._walk is None or self._index is None or self._index >= self.evaluations:
            return None
        times = self.host.timestep(self._walk.told)
        one = timestep.flatten()[:1].item() if isinstance(timestep, Tensor) else timestep
        if times.dim() == 0 or rows % len(times) or not _near(one, self._nominal[self._index]):
            return None
        return repeated(times, rows)

    def _arrived(self, timestep: float | Tensor | None) -> tuple[HostWalk, int]:
        """The run and the index of a network call at this timestep, once it is known to be the next one."""
        if self._table is None:
            raise ValueError("call set_timesteps first")
        if self._index is not None and self._index >= self.evaluations:
            raise ValueError(f"the run is over after {self.evaluations} network calls: call set_timesteps again")
        if isinstance(timestep, Tensor) and timestep.numel() > 1:
            if self._walk is None or timestep.shape != self._walk.told.shape:
                raise ValueError(
                    f"timestep must be one time for the whole batch, got {tuple(timestep.shape)}: times of each sample "
                    "are for attached predictors (danlu.diffusion.attach)"
                )
            timestep = None
        if self._walk is None or self._index is None:
            self._index = self._begin_index if self._begin_index is not None else self._index_of(timestep)
            self._walk = self._walk_from(self._index)
        elif timestep is not None and not _near(float(timestep), self._nominal[self._index]):
            raise ValueError(
                f"timestep {float(timestep):g} is not the next one, {self._nominal[self._index]:g} (call "
                f"{self._index + 1} of {self.evaluations}): every network call must be followed by one step"
            )
        return self._walk, self._index

    def _index_of(self, timestep: float | Tensor | None) -> int:
        if timestep is None:
            return 0
        value = float(timestep)
        nearest = min(range(self.evaluations), key=lambda index: abs(self._nominal[index] - value))
        if not _near(value, self._nominal[nearest]):
            raise ValueError(f"timestep must be one of timesteps {shown(self.timesteps)}, got {value:g}")
        return nearest

    def _walk_from(self, index: int) -> HostWalk:
        config, table = self.config, self._table
        afs = bool(config.afs) and index == 0
        slot = index + int(config.afs)
        if slot % 2 and not afs:
            raise ValueError(
                f"a run cannot start at network call {index + 1}, inside an interval: start at the beginning of one"
                + (" (with afs=False, pipelines that begin from an image do)" if config.afs else "")
            )
        first = slot // 2
        assert table is not None
        lookup: Lookup = table if self.attachment is None else self.attachment.lookup

        def shifted(interval: int, z: Tensor, epsilon: Tensor | None) -> Coefficients:
            return lookup(interval + first, z, epsilon)

        return HostWalk(self.host, self._ratios[first:], shifted, config.base, config.base_order, afs)


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-5 * max(1.0, abs(one))
