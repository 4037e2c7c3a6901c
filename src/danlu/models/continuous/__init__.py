"""Autoregression over continuous tokens: patches without a codebook, by a diffusion head on a causal decoder."""

from danlu.models.continuous.config import ContinuousConfig
from danlu.models.continuous.head import DiffusionHead
from danlu.models.continuous.joint import JointNoiseDecoder
from danlu.models.continuous.mask import JointLayout, joint_noise_mask
from danlu.models.continuous.model import ContinuousCausalLM, ContinuousOutput
from danlu.models.continuous.patches import patch_order, patchify, token_statistics, unpatchify

__all__ = [
    "ContinuousCausalLM",
    "ContinuousConfig",
    "ContinuousOutput",
    "DiffusionHead",
    "JointLayout",
    "JointNoiseDecoder",
    "joint_noise_mask",
    "patch_order",
    "patchify",
    "token_statistics",
    "unpatchify",
]
