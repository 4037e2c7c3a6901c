"""The tables of a recipe: what they hold, in which ranges, and what contradicts what."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]

#: Settings that may change between a run and its resumption, because no loss depends on them.
FREE = (("training", "keep"), ("training", "workers"))


class Table(BaseModel):
    """One table of a recipe: unknown keys are errors, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(Table):
    """Where text comes from: files, or a data set of the host's hub.

    Args:
        files: paths, folders or patterns, relative to the recipe, or ``python-stdlib`` (the standard library of the
            running Python), ``python-docstrings`` (English prose from it and from installed packages), each also with
            ``-held-out`` for what the name alone leaves out. ``.jsonl``, ``.csv`` and ``.parquet`` files hold one
            document per row, other files are one document each.
        dataset: folder or hub name for ``datasets.load_dataset``.
        subset: its configuration name.
        split: its split.
        field: the column or JSON key that holds the text.
        glob: which files of a folder.
    """

    files: tuple[str, ...] = ()
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    field: str = "text"
    glob: str = "**/*.txt"

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if bool(self.files) == (self.dataset is not None):
            raise ValueError("must name files or a dataset, one of the two")
        return self


def _source(value: Any) -> Any:
    """A bare string or a list of strings stands for files."""
    return {"files": [value]} if isinstance(value, str) else {"files": value} if isinstance(value, list) else value


Text = Annotated[Source, BeforeValidator(_source)]


class Grow(Table):
    """Sizes of the larger model that training starts from; see ``danlu.grow``."""

    hidden_size: Positive | None = None
    intermediate_size: Positive | None = None
    num_attention_heads: Positive | None = None
    num_key_value_heads: Positive | None = None
    head_dim: Positive | None = None
    num_hidden_layers: Positive | None = None
    symmetry: Literal["antisymmetric", "none"] = "antisymmetric"
    noise: float = 1.0


class DeepNorm(Table):
    """Residual scaling and initial gains of a model that is trained from scratch; see ``danlu.apply_deepnorm``."""

    optimizer: Literal["paper", "sgd", "adam", "lamb"] = "paper"
    norm: Literal["post", "pre"] = "post"


class Ladder(Table):
    """A side network over the frozen model; see ``danlu.LadderConfig``.

    With ``cache`` the frozen model runs once over the training text, and its features are read from the disk.
    """

    reduction: Positive = 8
    layers: str | tuple[int, ...] = "all"
    gate: Literal["sigmoid", "constant", "none"] = "sigmoid"
    mix: Literal["before", "after"] = "before"
    init: Literal["magnitude", "random"] = "magnitude"
    links: Literal["random", "select"] = "random"
    min_head_dim: Positive = 1
    cache: bool = True


class Lora(Table):
    """A PEFT LoRA adapter on the frozen model."""

    rank: Positive = 8
    alpha: Rate = 16.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"


class Model(Table):
    """A trained model to start from, or a configuration to start anew; then what is done to it.

    Args:
        path: folder or hub name; ``danlu-nano`` is the bundled model.
        config: ``model_type`` and the fields of the host's configuration of that type, for random initial weights. The
            vocabulary size follows from the tokenizer.
        extend: position methods while training, such as ``leaky:window=16:stride=0.0625``.
        dtype: of the weights.
    """

    path: str | None = None
    config: dict[str, Any] | None = None
    grow: Grow | None = None
    deepnorm: DeepNorm | None = None
    ladder: Ladder | None = None
    lora: Lora | None = None
    extend: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.path is None) == (self.config is None):
            raise ValueError("must have path (a trained model) or config (a new one), one of the two")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config must name its model_type, such as 'llama'")
        if self.deepnorm is not None and self.path is not None:
            raise ValueError("deepnorm draws new weights and would erase those of path: use it with config")
        if self.ladder is not None and self.lora is not None:
            raise ValueError("ladder and lora are two ways to adapt one model: keep one")
        if self.config is not None and (self.ladder or self.lora or self.grow):
            raise ValueError("ladder, lora and grow start from a trained model: use them with path")
        return self


class BytePieceTraining(Table):
    """A tokenizer that is trained on the training text first; see ``danlu.BytePiece.train``."""

    vocab_size: Positive = 8000
    refine: int = Field(default=4, ge=0)


class Tokenizer(Table):
    """The tokenizer: by default that of the model."""

    path: str | None = None
    train: BytePieceTraining | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.path is not None and self.train is not None:
            raise ValueError("must have path or train, not both")
        return self


class Positions(Table):
    """Randomised positions; see ``danlu.RandomPositionCollator``."""

    kind: Literal["subset", "equal_mean"]
    max_length: Positive | None = None


class Data(Table):
    """Text for training and for validation, and how it is cut.

    Args:
        train: what is trained on.
        validation: what is evaluated on.
        held_out: without ``validation``, this share of the tokens, from the end, is evaluated on instead.
        length: tokens per row.
        packing: ``stream`` cuts rows from all documents joined by end tokens; ``documents`` does the same, and keeps
            attention inside each document; ``none`` gives each document a row, cut or padded.
        positions: randomised positions in training.
        streaming: tokenize while training and keep nothing on the disk, for data sets that are too large for it; read
            in order, shuffled within a buffer.
        limit: read so many documents only.
    """

    train: Text
    validation: Text | None = None
    held_out: float = Field(default=0.02, ge=0, lt=1)
    length: int = Field(ge=2)
    packing: Literal["stream", "documents", "none"] = "stream"
    positions: Positions | None = None
    streaming: bool = False
    limit: Positive | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.positions is not None and self.packing == "documents":
            raise ValueError("positions are already used by packing = 'documents': keep one of the two")
        if self.streaming and self.packing == "none":
            raise ValueError("streaming packs rows: use packing = 'stream' or 'documents' with it")
        return self


class Task(Table):
    """A task beside that of ``data``, which is the primary one."""

    name: str
    train: Text
    validation: Text | None = None


class AdamW(Table):
    """AdamW; gains and biases are not decayed."""

    name: Literal["adamw"]
    learning_rate: Rate = 1e-3
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)


class Muon(Table):
    """Muon for the hidden matrices, AdamW for embeddings, head and vectors."""

    name: Literal["muon"]
    learning_rate: Rate = 4e-3
    weight_decay: float = Field(default=0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)


class Lion(Table):
    """Lion; see ``danlu.Lion``."""

    name: Literal["lion"]
    learning_rate: Rate = 1e-4
    weight_decay: float = Field(default=0.1, ge=0)
    betas: tuple[float, float] = (0.95, 0.98)


class Tiger(Table):
    """Tiger; ``fold`` updates its momentum inside the backward pass and keeps no gradient. See ``danlu.Tiger``."""

    name: Literal["tiger"]
    learning_rate: Rate = 1e-3
    weight_decay: float = Field(default=0.01, ge=0)
    beta: float = Field(default=0.965, ge=0, lt=1)
    fold: bool = False


class LowRank(Table):
    """LoRA as an optimiser on the full matrices; see ``danlu.LowRankOptimizer``."""

    name: Literal["low_rank"]
    learning_rate: Rate = 1e-3
    weight_decay: float = Field(default=0.0, ge=0)
    rank: Positive = 8
    alpha: Rate = 16.0
    scheme: Literal["lora", "lora_symmetric", "additive", "random"] = "lora"
    fold: bool = False


Optimizer = Annotated[AdamW | Muon | Lion | Tiger | LowRank, Field(discriminator="name")]


class Schedule(Table):
    """Learning rate over the steps, as a share of ``learning_rate``.

    Args:
        kind: after the warm-up. ``piecewise`` is linear between ``knots``.
        warmup: steps of linear rise from 0.
        decay: for ``warmup_stable_decay``, steps of linear fall at the end.
        knots: step (as text, the keys of a TOML table) to share.
    """

    kind: Literal["constant", "linear", "cosine", "warmup_stable_decay", "piecewise"] = "cosine"
    warmup: int = Field(default=0, ge=0)
    decay: Positive | None = None
    knots: dict[int, float] | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.kind == "piecewise") != (self.knots is not None):
            raise ValueError("knots and kind = 'piecewise' go together")
        if self.kind == "piecewise" and self.warmup:
            raise ValueError("warmup is one of the knots of kind = 'piecewise': leave it out")
        if (self.kind == "warmup_stable_decay") != (self.decay is not None):
            raise ValueError("decay and kind = 'warmup_stable_decay' go together")
        return self


class Loss(Table):
    """Cross entropy, or EMO mixed with it; see ``danlu.EMOLoss``."""

    name: Literal["cross_entropy", "emo"] = "cross_entropy"
    mode: Literal["mix1", "mix2"] = "mix1"


class MultiTask(Table):
    """How the gradients of ``tasks`` are combined; see ``danlu.MultiTaskBackward``."""

    method: Literal["primary_auxiliary", "min_norm", "grad_norm", "geo_mean", "sum"] = "primary_auxiliary"


class Training(Table):
    """Steps, batches, and what is written when.

    Args:
        steps: updates of the weights.
        batch: rows per update, over all processes and all ``accumulation`` parts.
        accumulation: parts of a batch that are computed one after another.
        max_grad_norm: clip gradients to this norm; 0 does not clip.
        precision: of the arithmetic; weights keep the model's type.
        log_every: steps between points of the curves.
        evaluate_every: steps between validations; at the end there is always one.
        evaluate_rows: rows of one validation, at most.
        save_every: steps between checkpoints, a multiple of ``log_every``; at the end there is always one.
        keep: newest checkpoints that stay on the disk.
        gradient_checkpointing: compute activations twice instead of keeping them.
        compile: compile the model.
        workers: processes that prepare data.
    """

    steps: Positive
    batch: Positive
    accumulation: Positive = 1
    max_grad_norm: float = Field(default=1.0, ge=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    log_every: Positive = 10
    evaluate_every: Positive = 200
    evaluate_rows: Positive = 64
    save_every: Positive = 200
    keep: Positive = 2
    gradient_checkpointing: bool = False
    compile: bool = False
    workers: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.batch % self.accumulation:
            raise ValueError(f"batch must be a multiple of accumulation={self.accumulation}, got {self.batch}")
        if self.save_every % self.log_every:
            raise ValueError(
                f"save_every must be a multiple of log_every={self.log_every}, so that a resumed curve has the same "
                f"points, got {self.save_every}"
            )
        return self


class Recipe(Table):
    """One training run, whole."""

    name: str = "run"
    seed: int = Field(default=0, ge=0)
    model: Model
    tokenizer: Tokenizer = Tokenizer()
    data: Data
    tasks: tuple[Task, ...] = ()
    multitask: MultiTask = MultiTask()
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    loss: Loss = Loss()
    training: Training

    @model_validator(mode="after")
    def _agree(self) -> Self:
        fold = getattr(self.optimizer, "fold", False)
        if fold and self.training.max_grad_norm:
            raise ValueError(
                "optimizer.fold frees each gradient before their common norm is known: set training.max_grad_norm = 0"
            )
        if self.model.config is not None and self.tokenizer == Tokenizer():
            raise ValueError("tokenizer must be given for a new model: path or train")
        if self.tokenizer.train is not None and self.model.path is not None:
            raise ValueError("tokenizer.train makes new ids, which a trained model does not know: use model.config")
        if self.model.ladder is not None and self.model.ladder.cache and (self.data.streaming or self.data.positions):
            raise ValueError(
                "model.ladder.cache keeps features of fixed rows: set it to false, or leave out what varies"
            )
        if self.model.lora and isinstance(self.optimizer, LowRank):
            raise ValueError("model.lora and optimizer.name = 'low_rank' are two forms of one method: keep one")
        if self.loss.name == "emo" and self.model.ladder is not None:
            raise ValueError(
                "loss.name = 'emo' needs the model's own head, which a ladder reads by itself: leave one out"
            )
        if self.tasks:
            if len({"main", *(task.name for task in self.tasks)}) <= len(self.tasks):
                raise ValueError("tasks must have different names, and none may be 'main', which is data.train")
            if fold:
                raise ValueError("optimizer.fold frees gradients that tasks have yet to be combined from: leave it out")
            if self.loss.name != "cross_entropy":
                raise ValueError("tasks use cross entropy: leave loss out")
            if self.model.ladder is not None:
                raise ValueError("tasks share the model's own parameters: leave model.ladder out")
            if self.data.streaming:
                raise ValueError("tasks need data that is on the disk: leave data.streaming out")
        return self

    def fingerprint(self) -> dict[str, Any]:
        """Everything that a loss depends on, as plain values."""
        values = self.model_dump(mode="json")
        for table, key in FREE:
            del values[table][key]
        return values
