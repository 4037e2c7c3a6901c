"""Encoding and sampling speed of BytePiece against other tokenizers, one thread each, on the same Python source.

The vocabulary is trained on the standard library and handed to every peer that can take it: SentencePiece and the
tokenizers library get an export, the published bytepiece package the published format. tiktoken gets a byte-level BPE
of the same size from the same text. Peers that are not installed are left out: pip install 'danlu[bench]'; the
published package needs a build of its own.

    python benchmarks/tokenizer.py [--megabytes 2] [--repeats 7] [--vocab-size 40000 | --model published.model]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from danlu import BytePiece
from danlu.context.text import held_out_files, training_files
from danlu.tokens.export import to_sentencepiece, to_tokenizers

ALPHA = 0.1
OURS = "danlu"
#: Encodes a text as a whole, and encodes its lines; each returns the number of tokens.
Encode = tuple[Callable[[str], int], Callable[[list[str]], int] | None]


def texts(megabytes: float) -> list[str]:
    """Lines of library modules that are not trained on, repeated in order where they do not suffice."""
    lines = [line for path in held_out_files() for line in path.read_text(encoding="utf-8").splitlines(keepends=True)]
    found, size = [], 0
    while size < megabytes * 1e6:
        for line in lines:
            found.append(line)
            size += len(line.encode())
            if size >= megabytes * 1e6:
                break
    return found


def encoders(tokenizer: BytePiece, folder: Path, corpus: list[str]) -> dict[str, Encode]:
    """Every tokenizer that is installed, by name."""

    def total(rows) -> int:
        return sum(map(len, rows))

    found: dict[str, Encode] = {
        OURS: (
            lambda text: len(tokenizer.encode(text)),
            lambda lines: total(tokenizer.encode_batch(lines, threads=1)),
        ),
        "danlu, ids as an array": (lambda text: tokenizer.encode_array(text).size, None),
    }
    for alpha in (ALPHA, 1.0):
        found[f"danlu, alpha {alpha:g}"] = (
            lambda text, alpha=alpha: len(tokenizer.encode(text, alpha=alpha, seed=0)),
            lambda lines, alpha=alpha: total(tokenizer.encode_batch(lines, alpha=alpha, seed=0, threads=1)),
        )
    try:
        import bytepiece

        published = bytepiece.Tokenizer(str(tokenizer.save(folder / "published.model")))
        for name, alpha in (("bytepiece 0.6.3", -1), (f"bytepiece 0.6.3, alpha {ALPHA:g}", ALPHA)):
            found[name] = (
                lambda text, alpha=alpha: len(published.encode(text, alpha=alpha)),
                lambda lines, alpha=alpha: sum(len(published.encode(line, alpha=alpha)) for line in lines),
            )
    except ImportError:
        print("left out: bytepiece", file=sys.stderr)
    try:
        import sentencepiece

        to_sentencepiece(tokenizer, folder / "sentencepiece.model")
        piece = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.model"))
        sampling = {"enable_sampling": True, "alpha": ALPHA, "nbest_size": -1}
        found["SentencePiece, same vocabulary"] = (
            lambda text: len(piece.encode(text)),
            lambda lines: total(piece.encode(lines, num_threads=1)),
        )
        # The whole text at once takes it minutes.
        found[f"SentencePiece, alpha {ALPHA:g}"] = (
            lambda text: total(piece.encode(text.splitlines(keepends=True), num_threads=1, **sampling)),
            lambda lines: total(piece.encode(lines, num_threads=1, **sampling)),
        )
    except ImportError:
        print("left out: sentencepiece", file=sys.stderr)
    unigram = to_tokenizers(tokenizer)
    found["tokenizers Unigram, same vocabulary"] = (
        lambda text: len(unigram.encode(text, add_special_tokens=False).ids),
        lambda lines: sum(len(row.ids) for row in unigram.encode_batch_fast(lines, add_special_tokens=False)),
    )
    try:
        byte_pair = tiktoken_of(corpus, tokenizer.vocab_size)
        found["tiktoken, BPE of the same size"] = (
            lambda text: len(byte_pair.encode_ordinary(text)),
            lambda lines: total(byte_pair.encode_ordinary_batch(lines, num_threads=1)),
        )
    except ImportError:
        print("left out: tiktoken", file=sys.stderr)
    return found


def tiktoken_of(corpus: list[str], vocab_size: int):
    """A tiktoken encoding with GPT-2's splitting, its merges trained by the tokenizers library."""
    import tiktoken
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in plain}
    letters |= {chr(256 + k): byte for k, byte in enumerate(b for b in range(256) if b not in plain)}
    ranks = {bytes(letters[c] for c in token): rank for token, rank in trained.get_vocab().items()}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    return tiktoken.Encoding("bench", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def table(found: dict[str, Encode], lines: list[str], repeats: int) -> list[str]:
    text = "".join(lines)
    size = len(text.encode())
    runs = {(name, form): encode for name, both in found.items() for form, encode in enumerate(both) if encode}
    inputs = (text, lines)
    counts = {key: encode(inputs[key[1]]) for key, encode in runs.items()}
    times: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    for _ in range(repeats):
        for key, encode in runs.items():
            start = time.process_time()
            encode(inputs[key[1]])
            times[key].append(time.process_time() - start)
    rows = [
        "| tokenizer | bytes per token | text whole, MB/s | danlu is faster by | as lines, MB/s | danlu is faster by |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in found:
        cells = [name, f"{size / counts[name, 0]:.2f}"]
        for form in (0, 1):
            if (name, form) not in times:
                cells += ["", ""]
                continue
            ratios = (b / a for a, b in zip(times[OURS, form], times[name, form], strict=True))
            speed = size / statistics.median(times[name, form]) / 1e6
            cells += [f"{speed:.2f}", f"{statistics.median(ratios):.2f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def lengths(tokenizer: BytePiece, lines: list[str], repeats: int) -> list[str]:
    """Speed on one line of growing length."""
    joined = "".join(lines).replace("\n", " ").encode()
    rows = ["| bytes of the line | MB/s | with alpha 0.1 |", "| ---: | ---: | ---: |"]
    for size in (10**3, 10**4, 10**5, 10**6, 10**7):
        data = (joined * (size // len(joined) + 1))[:size]
        copies = max(1, 10**6 // size)
        cells = []
        for alpha in (None, ALPHA):
            spent = []
            for _ in range(repeats):
                start = time.process_time()
                for _ in range(copies):
                    tokenizer.encode_array(data, alpha=alpha, seed=0)
                spent.append((time.process_time() - start) / copies)
            cells.append(f"{size / statistics.median(spent) / 1e6:.1f}")
        rows.append(f"| {size} | {cells[0]} | {cells[1]} |")
    return rows


_START = """
import sys, time
begin = time.perf_counter()
from danlu import BytePiece
imported = time.perf_counter()
tokenizer = BytePiece.from_file(sys.argv[1])
loaded = time.perf_counter()
tokenizer.encode("the first text")
print(imported - begin, loaded - imported, time.perf_counter() - loaded)
"""


def starts(path: Path, repeats: int) -> list[str]:
    """Seconds until the first ids in a new process: with compiled loops on disk, and without any."""

    def run(**environment: str) -> list[float]:
        command = [sys.executable, "-c", _START, str(path)]
        answer = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
        return [float(word) for word in answer.stdout.split()]

    run()
    warm = [statistics.median(column) for column in zip(*(run() for _ in range(repeats)), strict=True)]
    with tempfile.TemporaryDirectory() as empty:
        cold = run(NUMBA_CACHE_DIR=empty)
    return [
        "| | import | from_file | first encode |",
        "| --- | ---: | ---: | ---: |",
        *(f"| {name} | {a:.3f} | {b:.3f} | {c:.3f} |" for name, (a, b, c) in (("warm", warm), ("cold", cold))),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--vocab-size", type=int, default=40_000)
    parser.add_argument("--model", type=Path, default=None, help="a vocabulary to use instead of training one")
    options = parser.parse_args()
    corpus = [path.read_text(encoding="utf-8", errors="replace") for path in training_files()]
    if options.model is None:
        tokenizer = BytePiece.train(corpus, options.vocab_size)
    else:
        tokenizer = BytePiece.from_file(options.model)
    lines = texts(options.megabytes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = encoders(tokenizer, folder, corpus)
        path = tokenizer.save(folder / "tokenizer.safetensors")
        report = [
            "# Encoding speed",
            "",
            f"{options.megabytes:g} MB of Python source, {len(lines)} lines, vocabulary of {tokenizer.vocab_size}; "
            f"one thread each, processor time, medians of {options.repeats} interleaved repeats, ids as lists unless",
            "said otherwise.",
            "",
            *table(found, lines, options.repeats),
            "",
            "## One long line",
            "",
            *lengths(tokenizer, lines, options.repeats),
            "",
            "## The first text of a process, seconds",
            "",
            *starts(path, options.repeats),
        ]
    text = "\n".join(report) + "\n"
    print(text)
    if all(getattr(options, name) == parser.get_default(name) for name in vars(options)):
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
