"""Train danlu-nano, the small Llama that ships in ``src/danlu/assets/nano``.

The text is the standard library of the running Python, tests included, less the modules of
``danlu.context.text.HELD_OUT`` and their tests, which stay unseen for evaluation. Run it from the repository root:

    .venv/bin/python scripts/train_nano.py --out build/nano

It resumes from the last checkpoint in ``--out``. The schedule is warm-up, constant, linear decay; resuming with fewer
``--steps`` starts the decay earlier.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from danlu.context.text import held_out_text, training_files

END = "<|endoftext|>"
LENGTH = 256


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the hidden matrices, AdamW for embeddings and norms, behind one optimiser face."""

    def __init__(self, model: torch.nn.Module, lr: float, weight_decay: float):
        matrices, rest = [], []
        for name, parameter in model.named_parameters():
            (matrices if parameter.ndim == 2 and "embed" not in name else rest).append(parameter)
        self.parts = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        # The schedule edits our groups, so the parts must read the same dictionaries.
        for part in self.parts:
            part.param_groups = [g for g in self.param_groups if g["params"][0] in set(part.param_groups[0]["params"])]

    def step(self, closure=None):  # noqa: D102
        for part in self.parts:
            part.step()
        return None if closure is None else closure()

    def state_dict(self):  # noqa: D102
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state):  # noqa: D102
        for i, part in enumerate(self.parts):
            part.load_state_dict(state[str(i)])
        self.param_groups = [group for part in self.parts for group in part.param_groups]


class Windows(Dataset):
    """Windows of ``LENGTH`` tokens at random places of one long stream; item i is the same in every run."""

    def __init__(self, stream: torch.Tensor, count: int, seed: int):
        self.stream, self.count, self.seed = stream, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = random.Random(self.seed * 1_000_003 + index).randrange(len(self.stream) - LENGTH)
        ids = self.stream[start : start + LENGTH].long()
        return {"input_ids": ids, "labels": ids}


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: lossless on any text, so loss per byte is well defined."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def build_model(vocab_size: int, end: int) -> LlamaForCausalLM:
    """A 4 M parameter Llama: small enough for 8 MB of bfloat16, grouped-query like its big relatives."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return LlamaForCausalLM(config)


class Report(TrainerCallback):
    """Held-out loss at the trained length, every few hundred steps."""

    def __init__(self, ids: torch.Tensor, every: int):
        self.rows, self.every = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)[::64], every

    def on_step_end(self, args, state, control, model=None, **kwargs):  # noqa: D102
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        model.eval()
        with torch.no_grad():
            loss = model(input_ids=self.rows, labels=self.rows).loss.item()
        model.train()
        print(f"step {state.global_step}: held-out loss {loss:.4f}", flush=True)


def main() -> None:
    """Train, then write the weights in bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/nano"))
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--decay", type=int, default=600, help="steps of linear decay at the end")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    options.out.mkdir(parents=True, exist_ok=True)
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in training_files()]
    tokenizer = train_tokenizer(texts, options.vocab)
    tokenizer.model_max_length = LENGTH
    encoded = tokenizer.backend_tokenizer.encode_batch([text + END for text in texts])
    stream = torch.cat([torch.tensor(e.ids, dtype=torch.int16) for e in encoded])
    held_out = torch.tensor(tokenizer(held_out_text(), verbose=False)["input_ids"])
    print(f"{len(texts)} files, {sum(map(len, texts)) / 1e6:.1f} MB, {len(stream) / 1e6:.2f} M tokens", flush=True)

    model = build_model(len(tokenizer), tokenizer.eos_token_id)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters", flush=True)
    arguments = TrainingArguments(
        output_dir=str(options.out / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.lr,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": options.decay, "decay_type": "linear", "min_lr_ratio": 0.02},
        warmup_steps=100,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        torch_compile=True,
        logging_steps=25,
        save_steps=200,
        save_total_limit=2,
        report_to=[],
        seed=options.seed,
        dataloader_num_workers=0,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Windows(stream, options.steps * options.batch, options.seed),
        optimizers=(MuonAdamW(model, options.lr, 0.1), None),
        callbacks=[Report(held_out, 200)],
    )
    trainer.train(resume_from_checkpoint=any((options.out / "checkpoints").glob("checkpoint-*")))
    model.config.use_cache = True  # the Trainer turns it off
    model.to(torch.bfloat16).save_pretrained(options.out / "model")
    tokenizer.save_pretrained(options.out / "model")


if __name__ == "__main__":
    main()
