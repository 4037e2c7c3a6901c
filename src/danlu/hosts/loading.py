"""Loading a host model and its tokenizer, with errors that say what to do."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from danlu.assets import nano_path

#: Modules that tell the host's Auto classes about our own model types; named, since they lie on a higher floor.
_OWN_MODELS = ("danlu.models.decoder.heads", "danlu.models.roformer_v2.heads")


def register_own_models() -> None:
    """Let the host's Auto classes know the model types ``danlu`` and ``roformer_v2``; twice does no harm."""
    for name in _OWN_MODELS:
        importlib.import_module(name)


def load_causal_lm(name: str, *, device: str = "auto", dtype: str = "auto", argument: str = "model") -> tuple[Any, Any]:
    """A causal language model and its tokenizer from a folder or a hub name.

    Args:
        name: folder with a ``config.json``, or a hub name; ``danlu-nano`` is the bundled model.
        device: ``auto`` (a GPU when there is one), or what ``torch.device`` takes.
        dtype: ``auto`` (float32 on a CPU, the checkpoint's elsewhere), ``float32``, ``bfloat16`` or ``float16``.
        argument: what the caller's user knows ``name`` as, for errors.

    Returns:
        Model in evaluation mode, and tokenizer.

    Raises:
        ValueError: no such model, a damaged checkpoint, or an unknown device or dtype.
    """
    return _load(name, "AutoModelForCausalLM", device, dtype, argument)


def load_language_model(
    name: str, *, device: str = "auto", dtype: str = "auto", argument: str = "model"
) -> tuple[Any, Any]:
    """Like :func:`load_causal_lm`, but of the class that the checkpoint names: BERT's masked models, classifiers, ...

    Raises:
        ValueError: as there.
    """
    from transformers import AutoConfig

    register_own_models()
    kinds: list[str] = []
    if name != "danlu-nano":
        try:
            kinds = AutoConfig.from_pretrained(name).architectures or []
        except (OSError, ValueError, KeyError):
            pass  # the loading below says what is wrong
    return _load(name, kinds[0] if kinds else "AutoModelForCausalLM", device, dtype, argument)


def load_next_sentence_model(
    name: str, *, device: str = "auto", dtype: str = "auto", argument: str = "model"
) -> tuple[Any, Any]:
    """Like :func:`load_causal_lm`, but a BERT with its next-sentence head, which must be in the checkpoint.

    Raises:
        ValueError: as there, or the head or the pooler is missing and would be random.
    """
    needed = r"\bpooler\.|seq_relationship\."
    return _load(name, "AutoModelForNextSentencePrediction", device, dtype, argument, needed)


def _load(name: str, kind: str, device: str, dtype: str, argument: str, needed: str | None = None) -> tuple[Any, Any]:
    """Load; ``needed`` is a regular expression of parameters that must not be missing."""
    import torch
    import transformers
    from safetensors import SafetensorError
    from transformers.utils import logging as host_logging

    register_own_models()
    if name == "danlu-nano":
        name = str(nano_path())
    place = find_device(device)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype != "auto" and dtype not in dtypes:
        raise ValueError(f"--dtype must be auto, {', '.join(dtypes)}, got {dtype!r}")
    wanted = dtypes.get(dtype, torch.float32 if place.type == "cpu" else "auto")
    folder = Path(name)
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"{argument} must be a folder with a config.json or a hub name, got {name}")
    if not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"{argument} {name} does not exist")
    host_logging.set_verbosity_error()
    host_logging.disable_progress_bar()
    what = "causal language model" if kind == "AutoModelForCausalLM" else kind
    owners = (transformers, *map(importlib.import_module, _OWN_MODELS))
    kinds = [getattr(owner, kind) for owner in owners if hasattr(owner, kind)]
    if not kinds:
        raise ValueError(f"{argument} {name} is a {kind}, which transformers does not have")
    try:
        model, report = kinds[0].from_pretrained(name, dtype=wanted, output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except SafetensorError as error:
        raise ValueError(f"the checkpoint in {name} is truncated or damaged ({error}): fetch it again") from error
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"cannot load a {what} and its tokenizer from {name}: {first}") from error
    if missing := sorted(key for key in report["missing_keys"] if needed and re.search(needed, key)):
        raise ValueError(
            f"the checkpoint in {name} has no trained {', '.join(missing)}: transformers would fill in random numbers"
        )
    return model.to(place).eval(), tokenizer


def find_device(name: str) -> Any:
    """The device of ``--device``: ``auto`` is a CUDA GPU where there is one.

    Raises:
        ValueError: no such device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be auto, cpu, cuda, cuda:1, ..., got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this machine has no CUDA GPU that torch can use")
    return device
