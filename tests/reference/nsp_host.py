"""A tiny BERT with a next-sentence head and a written vocabulary, shared by the tests of zero-shot classification."""

from __future__ import annotations

from typing import Any

import torch
import transformers

WORDS = [f"w{i}" for i in range(60)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CHINESE = list("这是一则新闻款类软件篇论文次买的东西个词指上中好差很国苹果")


def tokenizer() -> Any:
    vocabulary = [*SPECIAL, *WORDS, *CHINESE, *"abcdefghijklmnopqrstuvwxyz/.,", *(f"##{i}" for i in range(10))]
    made = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)})
    made.model_max_length = 64
    return made


def bert(kind: str = "BertForNextSentencePrediction", **changes: Any) -> Any:
    family = kind.split("For")[0]
    sizes = {
        "vocab_size": 160, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**sizes | changes)).eval()


def texts(count: int, longest: int = 12, seed: int = 0) -> list[str]:
    """Sentences of random words and lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(60, (n,), generator=generator).tolist()) for n in lengths]
