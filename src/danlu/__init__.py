"""Thrifty methods for language models: get more out of the model, memory, data or hours you already have.

Importing danlu imports nothing heavy. Each public name is fetched from its module on first use, which keeps the import
and the command line's ``--help`` quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # the same names as in _HOMES, for type checkers and editors; a test compares the two
    from danlu.assets import nano_path as nano_path
    from danlu.attention.hybrid import hwfa_config as hwfa_config
    from danlu.attention.hybrid import suggest_window as suggest_window
    from danlu.attention.key_norm import add_key_norm as add_key_norm
    from danlu.attention.key_norm import key_norm as key_norm
    from danlu.attention.latent.absorb import absorb as absorb
    from danlu.attention.latent.absorb import unabsorb as unabsorb
    from danlu.attention.latent.absorbed import absorbed_attention as absorbed_attention
    from danlu.attention.latent.absorbed import prefers_absorbed as prefers_absorbed
    from danlu.attention.latent.layer import MultiheadLatentAttention as MultiheadLatentAttention
    from danlu.attention.linear.engine import linear_attention as linear_attention
    from danlu.attention.linear.layer import LinearAttention as LinearAttention
    from danlu.attention.masks import make_mask as make_mask
    from danlu.attention.measure import attention_stats as attention_stats
    from danlu.attention.recurrent.block import LRUBlock as LRUBlock
    from danlu.attention.recurrent.block import recurrent_param_groups as recurrent_param_groups
    from danlu.attention.recurrent.lru import LRU as LRU
    from danlu.attention.recurrent.lru import SLRU as SLRU
    from danlu.attention.recurrent.rwkv import RWKV4Mix as RWKV4Mix
    from danlu.attention.rerope import rerope_attention as rerope_attention
    from danlu.attention.scale import LogitScale as LogitScale
    from danlu.attention.scale import effective_tokens as effective_tokens
    from danlu.attention.scale import log_n_factor as log_n_factor
    from danlu.attention.scale import optimal_scale as optimal_scale
    from danlu.attention.scale import softmax_grad_l1 as softmax_grad_l1
    from danlu.attention.streaming.recompute import RecomputeCache as RecomputeCache
    from danlu.attention.streaming.state import SoftmaxState as SoftmaxState
    from danlu.attention.streaming.state import attention_over_parts as attention_over_parts
    from danlu.attention.streaming.state import chunked_attention as chunked_attention
    from danlu.attention.vq.engine import vq_attention as vq_attention
    from danlu.attention.vq.key_compression import compress_keys as compress_keys
    from danlu.attention.vq.layer import VQAttention as VQAttention
    from danlu.attention.window import window_attention as window_attention
    from danlu.context.evaluate import LengthReport as LengthReport
    from danlu.context.evaluate import evaluate_lengths as evaluate_lengths
    from danlu.context.extend import active_methods as active_methods
    from danlu.context.extend import extend as extend
    from danlu.context.extend import extended as extended
    from danlu.context.extend import restore as restore
    from danlu.context.methods import NTK as NTK
    from danlu.context.methods import DynamicNTK as DynamicNTK
    from danlu.context.methods import DynamicYaRN as DynamicYaRN
    from danlu.context.methods import KeyNorm as KeyNorm
    from danlu.context.methods import LeakyReRoPE as LeakyReRoPE
    from danlu.context.methods import LogN as LogN
    from danlu.context.methods import NTKFixed as NTKFixed
    from danlu.context.methods import NTKMixed as NTKMixed
    from danlu.context.methods import NTKOld as NTKOld
    from danlu.context.methods import PositionInterpolation as PositionInterpolation
    from danlu.context.methods import ReRoPE as ReRoPE
    from danlu.context.methods import Window as Window
    from danlu.context.methods import YaRN as YaRN
    from danlu.context.naive_bayes.contexts import NaiveBayesContexts as NaiveBayesContexts
    from danlu.context.naive_bayes.processor import NaiveBayesLogitsProcessor as NaiveBayesLogitsProcessor
    from danlu.context.needle import needle_scores as needle_scores
    from danlu.context.probe.capture import AttentionProbe as AttentionProbe
    from danlu.context.stacks import parse_methods as parse_methods
    from danlu.diffusion.amed import AMED as AMED
    from danlu.diffusion.amed_predictor import AMEDPredictor as AMEDPredictor
    from danlu.diffusion.amed_recipe import AMEDRecipe as AMEDRecipe
    from danlu.diffusion.amed_table import AMEDTable as AMEDTable
    from danlu.diffusion.amed_training import train_amed as train_amed
    from danlu.diffusion.attachment import attach as attach
    from danlu.diffusion.couplings import MinibatchOT as MinibatchOT
    from danlu.diffusion.custom import CustomProcess as CustomProcess
    from danlu.diffusion.discrete import DiscreteProcess as DiscreteProcess
    from danlu.diffusion.flow import flow_matching_loss as flow_matching_loss
    from danlu.diffusion.flow_export import export_flow as export_flow
    from danlu.diffusion.flow_metrics import nfe_curve as nfe_curve
    from danlu.diffusion.flow_metrics import straightness as straightness
    from danlu.diffusion.flow_metrics import transport_cost as transport_cost
    from danlu.diffusion.grids import time_grid as time_grid
    from danlu.diffusion.hosts import process_from_scheduler as process_from_scheduler
    from danlu.diffusion.likelihood import LogLikelihood as LogLikelihood
    from danlu.diffusion.likelihood import bits_per_dim as bits_per_dim
    from danlu.diffusion.likelihood import log_likelihood as log_likelihood
    from danlu.diffusion.losses import csm_loss as csm_loss
    from danlu.diffusion.losses import denoising_loss as denoising_loss
    from danlu.diffusion.losses import irreducible_loss as irreducible_loss
    from danlu.diffusion.losses import score_matching_loss as score_matching_loss
    from danlu.diffusion.mixtures import GaussianMixture as GaussianMixture
    from danlu.diffusion.multistep import IPNDM as IPNDM
    from danlu.diffusion.multistep import HostScheduler as HostScheduler
    from danlu.diffusion.pair_cache import PairCache as PairCache
    from danlu.diffusion.pair_cache import generate_pairs as generate_pairs
    from danlu.diffusion.paths import AffinePath as AffinePath
    from danlu.diffusion.paths import CustomPath as CustomPath
    from danlu.diffusion.paths import LinearPath as LinearPath
    from danlu.diffusion.paths import ProcessPath as ProcessPath
    from danlu.diffusion.paths import TrigonometricPath as TrigonometricPath
    from danlu.diffusion.process import Process as Process
    from danlu.diffusion.processes import EDM as EDM
    from danlu.diffusion.processes import VE as VE
    from danlu.diffusion.processes import VP as VP
    from danlu.diffusion.processes import Cosine as Cosine
    from danlu.diffusion.processes import RectifiedFlow as RectifiedFlow
    from danlu.diffusion.processes import SubVP as SubVP
    from danlu.diffusion.reflow import distill as distill
    from danlu.diffusion.reflow import reflow as reflow
    from danlu.diffusion.schedulers import AMEDScheduler as AMEDScheduler
    from danlu.diffusion.solvers import SampleOutput as SampleOutput
    from danlu.diffusion.solvers import endpoint_error as endpoint_error
    from danlu.diffusion.solvers import sample as sample
    from danlu.diffusion.steps import DDIM as DDIM
    from danlu.diffusion.steps import Euler as Euler
    from danlu.diffusion.steps import EulerMaruyama as EulerMaruyama
    from danlu.diffusion.steps import Heun as Heun
    from danlu.diffusion.steps import Midpoint as Midpoint
    from danlu.diffusion.targets import Denoiser as Denoiser
    from danlu.diffusion.targets import convert as convert
    from danlu.kernels.scan import linear_scan as linear_scan
    from danlu.losses.emo import EMOLoss as EMOLoss
    from danlu.losses.emo_functional import emo_loss as emo_loss
    from danlu.losses.emo_functional import linear_emo_loss as linear_emo_loss
    from danlu.losses.mixing import MixingSchedule as MixingSchedule
    from danlu.models.continuous.config import ContinuousConfig as ContinuousConfig
    from danlu.models.continuous.head import DiffusionHead as DiffusionHead
    from danlu.models.continuous.mask import joint_noise_mask as joint_noise_mask
    from danlu.models.continuous.model import ContinuousCausalLM as ContinuousCausalLM
    from danlu.models.continuous.patches import patchify as patchify
    from danlu.models.continuous.patches import unpatchify as unpatchify
    from danlu.models.decoder.heads import DanluConfig as DanluConfig
    from danlu.models.decoder.heads import DanluForCausalLM as DanluForCausalLM
    from danlu.models.decoder.heads import DanluForMaskedLM as DanluForMaskedLM
    from danlu.models.decoder.heads import DanluForSequenceClassification as DanluForSequenceClassification
    from danlu.models.decoder.heads import DanluModel as DanluModel
    from danlu.models.deepnorm import apply_deepnorm as apply_deepnorm
    from danlu.models.deepnorm import fold_alpha as fold_alpha
    from danlu.models.deepnorm import load_deepnorm as load_deepnorm
    from danlu.models.deepnorm import restore_deepnorm as restore_deepnorm
    from danlu.models.deepnorm import vector_rate_groups as vector_rate_groups
    from danlu.models.increments import check_increments as check_increments
    from danlu.models.residual import DeepNormResidual as DeepNormResidual
    from danlu.models.residual import PostNorm as PostNorm
    from danlu.models.residual import PreNorm as PreNorm
    from danlu.models.residual import deepnorm_constants as deepnorm_constants
    from danlu.models.roformer_v2.heads import RoFormerV2Config as RoFormerV2Config
    from danlu.models.roformer_v2.heads import RoFormerV2ForMaskedLM as RoFormerV2ForMaskedLM
    from danlu.models.roformer_v2.heads import RoFormerV2ForMultipleChoice as RoFormerV2ForMultipleChoice
    from danlu.models.roformer_v2.heads import RoFormerV2ForQuestionAnswering as RoFormerV2ForQuestionAnswering
    from danlu.models.roformer_v2.heads import (
        RoFormerV2ForSequenceClassification as RoFormerV2ForSequenceClassification,
    )
    from danlu.models.roformer_v2.heads import RoFormerV2ForTokenClassification as RoFormerV2ForTokenClassification
    from danlu.models.roformer_v2.heads import RoFormerV2Model as RoFormerV2Model
    from danlu.models.roformer_v2.initialise import roformer_v2_init_ as roformer_v2_init_
    from danlu.models.roformer_v2.training import ResidualWarmupCallback as ResidualWarmupCallback
    from danlu.optim.folding import fold_in_backward as fold_in_backward
    from danlu.optim.folding import fold_in_trainer as fold_in_trainer
    from danlu.optim.gradient_solvers import solve_min_norm as solve_min_norm
    from danlu.optim.gradient_solvers import solve_mixed as solve_mixed
    from danlu.optim.gradient_solvers import solve_primary as solve_primary
    from danlu.optim.groups import tiger_param_groups as tiger_param_groups
    from danlu.optim.lion import Lion as Lion
    from danlu.optim.low_rank import LowRankOptimizer as LowRankOptimizer
    from danlu.optim.multitask import MultiTaskBackward as MultiTaskBackward
    from danlu.optim.multitask_trainer import MultiTaskMixin as MultiTaskMixin
    from danlu.optim.multitask_trainer import MultiTaskTrainer as MultiTaskTrainer
    from danlu.optim.schedule import piecewise_linear as piecewise_linear
    from danlu.optim.tiger import Tiger as Tiger
    from danlu.positions.base_check import check_base as check_base
    from danlu.positions.bound import max_length as max_length
    from danlu.positions.bound import recommended_base as recommended_base
    from danlu.positions.export import export_config as export_config
    from danlu.positions.randomised import RandomPositionCollator as RandomPositionCollator
    from danlu.positions.rotary import Rotary as Rotary
    from danlu.positions.rotary import inverse_frequencies as inverse_frequencies
    from danlu.positions.scaling import rope_inv_freq as rope_inv_freq
    from danlu.tokens.bytepiece import BytePiece as BytePiece
    from danlu.tokens.compare import compare_tokenizers as compare_tokenizers
    from danlu.tokens.export import to_sentencepiece as to_sentencepiece
    from danlu.tokens.export import to_tokenizers as to_tokenizers
    from danlu.tokens.host import BytePieceTokenizer as BytePieceTokenizer
    from danlu.tokens.trainer import BytePieceTrainer as BytePieceTrainer
    from danlu.tokens.vocabulary import Vocabulary as Vocabulary
    from danlu.training.recipe import load_recipe as load_recipe
    from danlu.training.report import TrainingReport as TrainingReport
    from danlu.training.run import run_recipe as run_recipe
    from danlu.tuning.growth.grow import grow as grow
    from danlu.tuning.growth.grow import verify_growth as verify_growth
    from danlu.tuning.growth.state import grow_optimizer as grow_optimizer
    from danlu.tuning.growth.state import symmetry_gap as symmetry_gap
    from danlu.tuning.kv_cache.report import KVCacheReport as KVCacheReport
    from danlu.tuning.kv_cache.report import kv_cache_report as kv_cache_report
    from danlu.tuning.ladder.cache import LadderFeatures as LadderFeatures
    from danlu.tuning.ladder.cache import PadRight as PadRight
    from danlu.tuning.ladder.config import LadderConfig as LadderConfig
    from danlu.tuning.ladder.model import LadderModel as LadderModel
    from danlu.tuning.latent.conversion import ConversionResult as ConversionResult
    from danlu.tuning.latent.conversion import to_mla as to_mla
    from danlu.tuning.latent.norm import freeze_silent as freeze_silent
    from danlu.tuning.latent.report import ConversionReport as ConversionReport
    from danlu.vision.autoencoder import QuantizedAutoencoder as QuantizedAutoencoder
    from danlu.vision.composed import GroupedQuantizer as GroupedQuantizer
    from danlu.vision.composed import ResidualQuantizer as ResidualQuantizer
    from danlu.vision.composed import VQModelQuantizer as VQModelQuantizer
    from danlu.vision.extrapolation import LinearExtrapolator as LinearExtrapolator
    from danlu.vision.fsq import FSQ as FSQ
    from danlu.vision.interpolation import Interpolator1d as Interpolator1d
    from danlu.vision.qb_heat import QBHeatForPreTraining as QBHeatForPreTraining
    from danlu.vision.qb_heat_config import QBHeatConfig as QBHeatConfig
    from danlu.vision.quantizer import build_quantizer as build_quantizer
    from danlu.vision.quarter_block import QuarterBlockMasker as QuarterBlockMasker
    from danlu.vision.second_order import QuadraticExtrapolator as QuadraticExtrapolator
    from danlu.vision.usage import UsageReport as UsageReport
    from danlu.vision.usage import measure_usage as measure_usage
    from danlu.vision.vq import LFQ as LFQ
    from danlu.vision.vq import VectorQuantizer as VectorQuantizer
    from danlu.zero_shot.contrast import SamplesContrast as SamplesContrast
    from danlu.zero_shot.nsp import NSPClassifier as NSPClassifier

#: module -> the public names it defines
_HOMES = {
    "danlu.assets": ("nano_path",),
    "danlu.attention.hybrid": ("hwfa_config", "suggest_window"),
    "danlu.attention.key_norm": ("add_key_norm", "key_norm"),
    "danlu.attention.latent.absorb": ("absorb", "unabsorb"),
    "danlu.attention.latent.absorbed": ("absorbed_attention", "prefers_absorbed"),
    "danlu.attention.latent.layer": ("MultiheadLatentAttention",),
    "danlu.attention.linear.engine": ("linear_attention",),
    "danlu.attention.linear.layer": ("LinearAttention",),
    "danlu.attention.masks": ("make_mask",),
    "danlu.attention.measure": ("attention_stats",),
    "danlu.attention.recurrent.block": ("LRUBlock", "recurrent_param_groups"),
    "danlu.attention.recurrent.lru": ("LRU", "SLRU"),
    "danlu.attention.recurrent.rwkv": ("RWKV4Mix",),
    "danlu.attention.rerope": ("rerope_attention",),
    "danlu.attention.scale": ("LogitScale", "effective_tokens", "log_n_factor", "optimal_scale", "softmax_grad_l1"),
    "danlu.attention.streaming.recompute": ("RecomputeCache",),
    "danlu.attention.streaming.state": ("SoftmaxState", "attention_over_parts", "chunked_attention"),
    "danlu.attention.vq.engine": ("vq_attention",),
    "danlu.attention.vq.key_compression": ("compress_keys",),
    "danlu.attention.vq.layer": ("VQAttention",),
    "danlu.attention.window": ("window_attention",),
    "danlu.context.evaluate": ("LengthReport", "evaluate_lengths"),
    "danlu.context.extend": ("active_methods", "extend", "extended", "restore"),
    "danlu.context.methods": (
        "DynamicNTK",
        "DynamicYaRN",
        "KeyNorm",
        "LeakyReRoPE",
        "LogN",
        "NTK",
        "NTKFixed",
        "NTKMixed",
        "NTKOld",
        "PositionInterpolation",
        "ReRoPE",
        "Window",
        "YaRN",
    ),
    "danlu.context.naive_bayes.contexts": ("NaiveBayesContexts",),
    "danlu.context.naive_bayes.processor": ("NaiveBayesLogitsProcessor",),
    "danlu.context.needle": ("needle_scores",),
    "danlu.context.probe.capture": ("AttentionProbe",),
    "danlu.context.stacks": ("parse_methods",),
    "danlu.diffusion.amed": ("AMED",),
    "danlu.diffusion.amed_predictor": ("AMEDPredictor",),
    "danlu.diffusion.amed_recipe": ("AMEDRecipe",),
    "danlu.diffusion.amed_table": ("AMEDTable",),
    "danlu.diffusion.amed_training": ("train_amed",),
    "danlu.diffusion.attachment": ("attach",),
    "danlu.diffusion.couplings": ("MinibatchOT",),
    "danlu.diffusion.custom": ("CustomProcess",),
    "danlu.diffusion.discrete": ("DiscreteProcess",),
    "danlu.diffusion.flow": ("flow_matching_loss",),
    "danlu.diffusion.flow_export": ("export_flow",),
    "danlu.diffusion.flow_metrics": ("nfe_curve", "straightness", "transport_cost"),
    "danlu.diffusion.grids": ("time_grid",),
    "danlu.diffusion.hosts": ("process_from_scheduler",),
    "danlu.diffusion.likelihood": ("LogLikelihood", "bits_per_dim", "log_likelihood"),
    "danlu.diffusion.losses": ("csm_loss", "denoising_loss", "irreducible_loss", "score_matching_loss"),
    "danlu.diffusion.mixtures": ("GaussianMixture",),
    "danlu.diffusion.multistep": ("HostScheduler", "IPNDM"),
    "danlu.diffusion.pair_cache": ("PairCache", "generate_pairs"),
    "danlu.diffusion.paths": ("AffinePath", "CustomPath", "LinearPath", "ProcessPath", "TrigonometricPath"),
    "danlu.diffusion.process": ("Process",),
    "danlu.diffusion.processes": ("Cosine", "EDM", "RectifiedFlow", "SubVP", "VE", "VP"),
    "danlu.diffusion.reflow": ("distill", "reflow"),
    "danlu.diffusion.schedulers": ("AMEDScheduler",),
    "danlu.diffusion.solvers": ("SampleOutput", "endpoint_error", "sample"),
    "danlu.diffusion.steps": ("DDIM", "Euler", "EulerMaruyama", "Heun", "Midpoint"),
    "danlu.diffusion.targets": ("Denoiser", "convert"),
    "danlu.kernels.scan": ("linear_scan",),
    "danlu.losses.emo": ("EMOLoss",),
    "danlu.losses.emo_functional": ("emo_loss", "linear_emo_loss"),
    "danlu.losses.mixing": ("MixingSchedule",),
    "danlu.models.continuous.config": ("ContinuousConfig",),
    "danlu.models.continuous.head": ("DiffusionHead",),
    "danlu.models.continuous.mask": ("joint_noise_mask",),
    "danlu.models.continuous.model": ("ContinuousCausalLM",),
    "danlu.models.continuous.patches": ("patchify", "unpatchify"),
    "danlu.models.decoder.heads": (
        "DanluConfig",
        "DanluForCausalLM",
        "DanluForMaskedLM",
        "DanluForSequenceClassification",
        "DanluModel",
    ),
    "danlu.models.deepnorm": (
        "apply_deepnorm",
        "fold_alpha",
        "load_deepnorm",
        "restore_deepnorm",
        "vector_rate_groups",
    ),
    "danlu.models.increments": ("check_increments",),
    "danlu.models.residual": ("DeepNormResidual", "PostNorm", "PreNorm", "deepnorm_constants"),
    "danlu.models.roformer_v2.heads": (
        "RoFormerV2Config",
        "RoFormerV2ForMaskedLM",
        "RoFormerV2ForMultipleChoice",
        "RoFormerV2ForQuestionAnswering",
        "RoFormerV2ForSequenceClassification",
        "RoFormerV2ForTokenClassification",
        "RoFormerV2Model",
    ),
    "danlu.models.roformer_v2.initialise": ("roformer_v2_init_",),
    "danlu.models.roformer_v2.training": ("ResidualWarmupCallback",),
    "danlu.optim.folding": ("fold_in_backward", "fold_in_trainer"),
    "danlu.optim.gradient_solvers": ("solve_min_norm", "solve_mixed", "solve_primary"),
    "danlu.optim.groups": ("tiger_param_groups",),
    "danlu.optim.lion": ("Lion",),
    "danlu.optim.low_rank": ("LowRankOptimizer",),
    "danlu.optim.multitask": ("MultiTaskBackward",),
    "danlu.optim.multitask_trainer": ("MultiTaskMixin", "MultiTaskTrainer"),
    "danlu.optim.schedule": ("piecewise_linear",),
    "danlu.optim.tiger": ("Tiger",),
    "danlu.positions.base_check": ("check_base",),
    "danlu.positions.bound": ("max_length", "recommended_base"),
    "danlu.positions.export": ("export_config",),
    "danlu.positions.randomised": ("RandomPositionCollator",),
    "danlu.positions.rotary": ("Rotary", "inverse_frequencies"),
    "danlu.positions.scaling": ("rope_inv_freq",),
    "danlu.tokens.bytepiece": ("BytePiece",),
    "danlu.tokens.compare": ("compare_tokenizers",),
    "danlu.tokens.export": ("to_sentencepiece", "to_tokenizers"),
    "danlu.tokens.host": ("BytePieceTokenizer",),
    "danlu.tokens.trainer": ("BytePieceTrainer",),
    "danlu.tokens.vocabulary": ("Vocabulary",),
    "danlu.training.recipe": ("load_recipe",),
    "danlu.training.report": ("TrainingReport",),
    "danlu.training.run": ("run_recipe",),
    "danlu.tuning.growth.grow": ("grow", "verify_growth"),
    "danlu.tuning.growth.state": ("grow_optimizer", "symmetry_gap"),
    "danlu.tuning.kv_cache.report": ("KVCacheReport", "kv_cache_report"),
    "danlu.tuning.ladder.cache": ("LadderFeatures", "PadRight"),
    "danlu.tuning.ladder.config": ("LadderConfig",),
    "danlu.tuning.ladder.model": ("LadderModel",),
    "danlu.tuning.latent.conversion": ("ConversionResult", "to_mla"),
    "danlu.tuning.latent.norm": ("freeze_silent",),
    "danlu.tuning.latent.report": ("ConversionReport",),
    "danlu.vision.autoencoder": ("QuantizedAutoencoder",),
    "danlu.vision.composed": ("GroupedQuantizer", "ResidualQuantizer", "VQModelQuantizer"),
    "danlu.vision.extrapolation": ("LinearExtrapolator",),
    "danlu.vision.fsq": ("FSQ",),
    "danlu.vision.interpolation": ("Interpolator1d",),
    "danlu.vision.qb_heat": ("QBHeatForPreTraining",),
    "danlu.vision.qb_heat_config": ("QBHeatConfig",),
    "danlu.vision.quantizer": ("build_quantizer",),
    "danlu.vision.quarter_block": ("QuarterBlockMasker",),
    "danlu.vision.second_order": ("QuadraticExtrapolator",),
    "danlu.vision.usage": ("UsageReport", "measure_usage"),
    "danlu.vision.vq": ("LFQ", "VectorQuantizer"),
    "danlu.zero_shot.contrast": ("SamplesContrast",),
    "danlu.zero_shot.nsp": ("NSPClassifier",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    """Fetch a public name from its module on first use, and remember it."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'danlu' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
