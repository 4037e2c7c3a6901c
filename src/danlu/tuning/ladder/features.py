"""The part of a ladder that runs its backbone ahead of training: states in memory or on disk, in place of inputs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danlu.hosts.architecture import Stack, find_blocks
from danlu.tuning.ladder import cache as ladder_cache
from danlu.tuning.ladder import side as ladder_side

# entries of a host configuration that do not change its states
_SILENT = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")


class FeatureMethods:
    """Methods of ``LadderModel`` that compute and open features."""

    backbone: Any
    config: Any
    layers: tuple[int, ...]
    merge: Any

    @property
    def _stack(self) -> Stack:
        # found anew each time: the user may have put other modules into the backbone
        return find_blocks(self.backbone)

    def precompute(
        self,
        dataset: Sequence[Mapping[str, Any]],
        folder: str | Path,
        *,
        dtype: str = "bfloat16",
        batch_size: int = 8,
        shard_tokens: int = 1 << 16,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> ladder_cache.LadderFeatures:
        """Run the backbone once over a data set and keep what the side reads; go on where an earlier call was stopped.

        Valid for fixed inputs only: no augmentation. Examples are padded on the right within a batch, and only their
        own tokens are kept, ``links * d`` numbers each.

        Args:
            dataset: examples with ``input_ids`` (and ``attention_mask``, ``token_type_ids``, ``position_ids``).
            folder: where the files go; made if missing.
            dtype: ``"bfloat16"``, ``"float16"``, ``"float32"`` or ``"float64"``.
            batch_size: examples that the backbone sees at a time.
            shard_tokens: tokens in one file.
            progress: called with (done, total, what), counting examples.

        Returns:
            The data set with a column ``features``, as :meth:`features` gives it.

        Raises:
            ValueError: the folder belongs to other data, layers, dtype or backbone; states that the dtype cannot hold.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        folder = Path(folder)
        plan = self._plan(dataset, dtype, shard_tokens)
        ladder_cache.write_shards(plan, folder, lambda part: self._examples(dataset, part), batch_size, progress)
        return ladder_cache.LadderFeatures(dataset, folder, ladder_cache.read_plan(folder))

    def features(self, dataset: Sequence[Mapping[str, Any]], folder: str | Path) -> ladder_cache.LadderFeatures:
        """Open what :meth:`precompute` wrote, for a ``DataLoader`` or the host's Trainer with ``PadRight``.

        Raises:
            FileNotFoundError: there is nothing.
            ValueError: it belongs to another backbone, other layers or other data, or is not finished.
        """
        folder = Path(folder)
        found = ladder_cache.read_plan(folder)
        ladder_cache.check_identity(found, self._plan(dataset, found.dtype, 1).identity, folder)
        return ladder_cache.LadderFeatures(dataset, folder, found)

    def _plan(self, dataset: Sequence[Mapping[str, Any]], dtype: str, shard_tokens: int) -> ladder_cache.Plan:
        shape = {key: value for key, value in self.config.to_dict().items() if key not in _SILENT}
        what = json.dumps([self.layers, self.merge is not None, shape], sort_keys=True, default=str)
        links = len(self.layers) + 1 + (self.merge is not None)
        return ladder_cache.make_plan(
            dataset, self._stack.base, what, links, self.config.hidden_size, dtype, shard_tokens
        )

    @torch.no_grad()
    def states(self, **inputs: Any) -> Tensor:
        """What the side reads of a batch, as ``features``: for data small enough to keep in memory.

        Args:
            inputs: of the backbone's base model.

        Returns:
            Of shape (batch, links, length, d), the embeddings, each linked layer's output, and the last state with
            ``merge_last``.
        """
        self.backbone.eval()
        taken: list[Tensor] = []
        last = ladder_side.run_backbone(
            self._stack, self.layers, {**inputs, "use_cache": False}, lambda _, state: taken.append(state),
            to_end=self.merge is not None,
        )  # fmt: skip
        return torch.stack([*taken, *([] if last is None else [last])], 1)

    def _examples(self, dataset: Sequence[Mapping[str, Any]], part: list[int]) -> list[Tensor]:
        """States of some examples, each (links, length, d)."""
        examples = [{name: dataset[i][name] for name in ladder_cache.INPUTS if name in dataset[i]} for i in part]
        batch = ladder_cache.PadRight()(examples)
        states = self.states(**{name: value.to(self.backbone.device) for name, value in batch.items()})
        return [row[:, : len(example["input_ids"])] for row, example in zip(states, examples, strict=True)]
