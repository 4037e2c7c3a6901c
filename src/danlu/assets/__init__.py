"""Files that ship with danlu: the bundled model and a small set of images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


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


def digits() -> tuple[Tensor, Tensor]:
    """Handwritten digits of 8 x 8 pixels: 1,797 images of 43 writers, in the order in which scikit-learn has them.

    Returns:
        Images (1797, 8, 8) in float32 from 0 (paper) to 1 (ink) in steps of 1/16, and labels (1797,) int64 in 0..9.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, doi:10.24432/C50P49, CC BY 4.0.
    """
    from safetensors.torch import load_file

    stored = load_file(Path(__file__).parent / "digits" / "digits.safetensors")
    return stored["images"].float() / 16, stored["labels"].long()
