"""From a recipe's tables to objects: tokenizer, model, optimiser, schedule, loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from danlu.files import replacing_folder
from danlu.hosts.loading import load_causal_lm, register_own_models
from danlu.hosts.parameters import Kind, classify_parameters
from danlu.training.tables import AdamW, Lion, LowRank, Muon, Recipe, Tiger
from danlu.training.texts import source_files


def build_model(recipe: Recipe, folder: Path) -> tuple[nn.Module, Any]:
    """The model that is trained and its tokenizer.

    Args:
        recipe: what to build.
        folder: where a tokenizer that is trained first is kept.

    Raises:
        ValueError: what cannot be loaded, built or combined, with the key of the recipe.
    """
    wanted = recipe.model
    if wanted.path is not None:
        model, tokenizer = load_causal_lm(wanted.path, device="cpu", dtype=wanted.dtype, argument="model.path")
        if recipe.tokenizer.path is not None:
            tokenizer = _tokenizer(recipe, folder)
    else:
        tokenizer = _tokenizer(recipe, folder)
        model = _new_model(recipe, tokenizer)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"tokenizer has {len(tokenizer)} ids, more than the model's {model.config.vocab_size}")
    if wanted.grow is not None:
        from danlu.tuning.growth.grow import grow

        model = grow(model, **wanted.grow.model_dump(), seed=recipe.seed)
    if wanted.extend is not None:
        from danlu.context.extend import extend
        from danlu.context.stacks import parse_methods

        extend(model, *parse_methods(wanted.extend))
    if wanted.ladder is not None:
        from danlu.tuning.ladder.model import LadderConfig, LadderModel

        options = wanted.ladder.model_dump(exclude={"cache"})
        return LadderModel(model, LadderConfig(**options, seed=recipe.seed)), tokenizer
    if wanted.lora is not None:
        return _with_lora(model, recipe), tokenizer
    return model, tokenizer


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser over the model's trainable parameters."""
    wanted = recipe.optimizer
    if isinstance(wanted, Tiger):
        from danlu.optim.groups import tiger_param_groups
        from danlu.optim.tiger import Tiger as TigerOptimizer

        return TigerOptimizer(
            tiger_param_groups(model),
            lr=wanted.learning_rate,
            beta=wanted.beta,
            weight_decay=wanted.weight_decay,
            seed=recipe.seed,
        )
    if isinstance(wanted, LowRank):
        from danlu.optim.low_rank import LowRankOptimizer

        return LowRankOptimizer(
            model,
            rank=wanted.rank,
            alpha=wanted.alpha,
            scheme=wanted.scheme,
            base_kwargs={"lr": wanted.learning_rate, "weight_decay": wanted.weight_decay},
            fold_in_backward=wanted.fold,
            seed=recipe.seed,
        )
    if isinstance(wanted, Muon):
        from danlu.training.muon import MuonAdamW

        return MuonAdamW(model, lr=wanted.learning_rate, weight_decay=wanted.weight_decay, betas=wanted.betas)
    groups = _decayed(model, wanted.weight_decay)
    if isinstance(wanted, Lion):
        from danlu.optim.lion import Lion as LionOptimizer

        return LionOptimizer(groups, lr=wanted.learning_rate, betas=wanted.betas)
    assert isinstance(wanted, AdamW)
    return torch.optim.AdamW(groups, lr=wanted.learning_rate, betas=wanted.betas, fused=True)


def build_schedule(recipe: Recipe, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate over the steps."""
    wanted, steps = recipe.schedule, recipe.training.steps
    if wanted.kind == "piecewise":
        from danlu.optim.schedule import piecewise_linear

        assert wanted.knots is not None
        return torch.optim.lr_scheduler.LambdaLR(optimizer, piecewise_linear(wanted.knots))
    from transformers import get_scheduler

    kind = "constant_with_warmup" if wanted.kind == "constant" else wanted.kind
    extra = {"num_decay_steps": wanted.decay, "decay_type": "linear"} if wanted.decay is not None else None
    return get_scheduler(kind, optimizer, wanted.warmup, steps, scheduler_specific_kwargs=extra)


def attach_loss(recipe: Recipe, model: nn.Module) -> None:
    """Give the model the recipe's loss, where that is not its own cross entropy."""
    if recipe.loss.name == "emo":
        from danlu.losses.emo import EMOLoss

        EMOLoss(model, mode=recipe.loss.mode).attach(model)


def _tokenizer(recipe: Recipe, folder: Path) -> Any:
    from transformers import AutoTokenizer

    wanted, kept = recipe.tokenizer, folder / "tokenizer"
    if wanted.train is None:
        name = str(wanted.path)
        if name == "danlu-nano":
            from danlu.assets import nano_path

            name = str(nano_path())
        try:
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"tokenizer.path must hold a tokenizer, got {name}: {error}") from error
    if not kept.is_dir():
        from danlu.tokens.bytepiece import BytePiece

        if recipe.data.train.dataset is not None:
            raise ValueError("tokenizer.train reads files: for a data set train one first, with danlu tokenizer train")
        trained = BytePiece.train(
            source_files(recipe.data.train), vocab_size=wanted.train.vocab_size, refine=wanted.train.refine
        )
        with replacing_folder(kept) as part:
            trained.to_transformers().save_pretrained(part)
    return AutoTokenizer.from_pretrained(kept)


def _new_model(recipe: Recipe, tokenizer: Any) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    register_own_models()
    fields = dict(recipe.model.config or {})
    kind = fields.pop("model_type")
    fields.setdefault("vocab_size", len(tokenizer))
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        config = AutoConfig.for_model(kind, **ids, **fields)
        unknown = [key for key in fields if key not in type(config)(**ids).to_dict()]
        if unknown:
            raise ValueError(f"{kind} has no key {unknown[0]!r}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, recipe.model.dtype))
            if recipe.model.deepnorm is not None:
                from danlu.models.deepnorm import apply_deepnorm

                apply_deepnorm(model, **recipe.model.deepnorm.model_dump(), seed=recipe.seed)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"model.config does not describe a causal language model: {error}") from error
    return model


def _with_lora(model: nn.Module, recipe: Recipe) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("model.lora needs the package peft: pip install peft") from error
    wanted = recipe.model.lora
    assert wanted is not None
    targets = wanted.target_modules if isinstance(wanted.target_modules, str) else list(wanted.target_modules)
    config = LoraConfig(
        r=wanted.rank,
        lora_alpha=wanted.alpha,
        lora_dropout=wanted.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return get_peft_model(model, config)


def _decayed(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: gains, biases and vectors are not decayed."""
    kinds = classify_parameters(model)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    large = (Kind.MATRIX, Kind.EMBEDDING)
    return [
        {"params": [p for name, p in trained if kinds[name] in large], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if kinds[name] not in large], "weight_decay": 0.0},
    ]
