"""BytePiece as a tokenizer of the host library, which segments with the compiled engine and can sample."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from danlu.files import write_whole
from danlu.tokens import sampling
from danlu.tokens.backend import Backend
from danlu.tokens.bytepiece import BytePiece
from danlu.tokens.export import to_tokenizers, token_names
from danlu.tokens.storage import FILE_NAME, RESERVED


class BytePieceTokenizer(PreTrainedTokenizerFast):
    """The host's tokenizer with BytePiece inside.

    Everything the host offers works: padding, truncation, pairs, offsets, chat templates, added tokens. A saved folder
    is also read by ``AutoTokenizer`` where danlu is not installed, with the same ids, but slower and without sampling.

    Sampling is asked for in a call, ``tokenizer(text, alpha=0.1, seed=0)``, or for all, ``tokenizer.alpha = 0.1``;
    ``alpha=math.inf`` in a call is the best segmentation whatever the attribute. A seed makes a call reproducible: one
    integer, from which each text of the batch gets random numbers of its own, or one integer per text, such as
    ``seed=[epoch << 32 | i for i in indices]``. Without it every call is fresh randomness, in every process.

    It departs from the host in two things. Offsets cover all that became a token: where normal form C joins characters,
    the host's cover the first of them. And the form is Python's, see :func:`danlu.tokens.export.to_tokenizers`.

    Args:
        bytepiece: the tokenizer inside.
        bytepiece_file: or its file; ``from_pretrained`` fills it in.
        alpha: None, or sampling for all calls, see ``BytePiece.encode``. It is not saved.
        options: of the host's tokenizer: ``add_bos_token``, ``add_eos_token`` (both False), ``model_max_length``,
            ``padding_side``, ``chat_template``, ...

    Raises:
        TypeError: ``bytepiece`` is not a :class:`danlu.BytePiece`.
        ValueError: neither it nor a file is there, ``tokenizer.json`` is of another vocabulary, or alpha is negative.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json", "bytepiece_file": FILE_NAME}

    def __init__(
        self,
        bytepiece: BytePiece | None = None,
        *,
        bytepiece_file: str | None = None,
        alpha: float | None = None,
        **options: Any,
    ):
        file = bytepiece_file or options.pop("vocab_file", None)  # the host's name for a single file
        if bytepiece is None and file is None:
            raise ValueError(
                f"bytepiece must be given, or a folder that holds {FILE_NAME}, got neither (folder: "
                f"{options.get('name_or_path', 'none')!r}): BytePiece.save makes that file; AutoTokenizer reads "
                "the folders of other tokenizers"
            )
        bytepiece = BytePiece.from_file(str(file)) if bytepiece is None else bytepiece
        if not isinstance(bytepiece, BytePiece):
            raise TypeError(
                f"bytepiece must be a BytePiece, got {bytepiece!r} of type {type(bytepiece).__name__}: "
                "use BytePiece.from_file or BytePiece.train"
            )
        self.bytepiece = bytepiece
        self.alpha = alpha
        self._names = token_names(bytepiece)
        pad, bos, eos = self._names[: len(RESERVED)]
        options = {"pad_token": pad, "bos_token": bos, "eos_token": eos} | options
        if bytepiece.special_tokens[3:]:
            options.setdefault("extra_special_tokens", list(bytepiece.special_tokens[3:]))
        if options.get("tokenizer_file") is None:
            options.pop("tokenizer_file", None)
            options["tokenizer_object"] = to_tokenizers(bytepiece)
        super().__init__(**options)
        vocabulary = self.get_vocab()
        if any(vocabulary.get(name) != identifier for identifier, name in enumerate(self._names)):
            raise ValueError(
                f"tokenizer.json and {FILE_NAME} must be of one vocabulary, got two in "
                f"{options.get('name_or_path', 'this folder')!r}: save both again with save_pretrained"
            )

    @classmethod
    def convert_to_native_format(cls, **kwargs: Any) -> dict[str, Any]:
        """What ``from_pretrained`` found, unchanged: the host would take the vocabulary out of tokenizer.json here."""
        kwargs.pop("trust_remote_code", None)
        return kwargs

    def _save_pretrained(
        self,
        save_directory: Any,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        saved = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        # A class that every installation of the host has, so that AutoTokenizer reads the folder without danlu.
        config = json.loads(Path(file_names[0]).read_text("utf-8"))
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_whole(file_names[0], json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        name = f"{filename_prefix}-{FILE_NAME}" if filename_prefix else FILE_NAME
        return (*saved, str(self.bytepiece.save(Path(save_directory) / name)))

    def train_new_from_iterator(self, *args: Any, **kwargs: Any) -> Any:
        """Not here: the host would train a unigram model of its own kind.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("train with BytePiece.train(...).to_transformers()")

    @property
    def alpha(self) -> float | None:
        """Inverse temperature of sampling in calls that give none; None is the best segmentation."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float | None) -> None:
        self._alpha = sampling.check_alpha(value)

    def _encode_plus(
        self, *args: Any, alpha: float | None = None, seed: int | Sequence[int] | None = None, **options: Any
    ) -> Any:
        # The host's method does all but segment, for which it calls its back end. It runs here on a copy of this object
        # with another back end, so that alpha and seed concern this call only.
        alpha = self.alpha if alpha is None else sampling.check_alpha(alpha)
        if alpha is not None and options.get("sanitize_control_tokens"):
            raise ValueError(
                f"alpha must be None or infinite together with sanitize_control_tokens=True, got {alpha}: the host "
                "encodes such chats in parts, without a place for alpha and seed"
            )
        view = copy.copy(self)
        view._tokenizer = Backend(self._tokenizer, self.bytepiece, self._names, alpha, seed)
        return super(BytePieceTokenizer, view)._encode_plus(*args, **options)
