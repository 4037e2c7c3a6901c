"""Files that ship with danlu: the bundled model."""

from __future__ import annotations

from pathlib import Path


def nano_path() -> Path:
    """Folder of danlu-nano, the bundled model: a checkpoint for ``AutoModelForCausalLM`` and ``AutoTokenizer``.

    Returns:
        A folder with ``config.json``, ``model.safetensors`` and the tokenizer's files.

    Raises:
        FileNotFoundError: the installation lacks the model.
    """
    folder = Path(__file__).parent / "nano"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"no model.safetensors in {folder}: the installation is incomplete, reinstall danlu")
    return folder
