"""Training time and memory of BytePiece against SentencePiece's BPE and the published trainer, each in its own process.

The text is Python source: the packages of the running environment, in the order of their paths, up to the size asked
for. Where they do not suffice, copies follow in which every identifier has one more letter. Times are of the whole
process less the start of Python and its imports; memory is the largest resident set of the process. The published
trainer is measured on one megabyte, because it takes some ten seconds for each.

    python benchmarks/tokenizer_training.py [--megabytes 20 200] [--vocab-size 16000] [--repeats 3]
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_BEGIN = "import sys, time, resource\npath, size = sys.argv[1], int(sys.argv[2])\n"
_END = """
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("RESULT", time.perf_counter() - begin, time.process_time() - used, peak * 1024)
"""
_DANLU = """
from pathlib import Path
from danlu import BytePieceTrainer
BytePieceTrainer(259, workers=1).train(["abc"] * 9)  # loads the compiled loops
begin, used = time.perf_counter(), time.process_time()
BytePieceTrainer(size, workers={workers}, refine={refine}).train_files([path])
"""
_SENTENCEPIECE = """
import io, sentencepiece
begin, used = time.perf_counter(), time.process_time()
sentencepiece.SentencePieceTrainer.train(
    input=path, model_writer=io.BytesIO(), model_type="bpe", vocab_size=size, normalization_rule_name="identity",
    remove_extra_whitespaces=False, add_dummy_prefix=False, byte_fallback=True, character_coverage=0.9995,
    max_sentence_length=1 << 20, num_threads={workers}, minloglevel=2, {options}
)
"""
_CROSSING = (
    "split_by_whitespace=False, split_by_unicode_script=False, split_by_number=False, "
    "allow_whitespace_only_pieces=True, max_sentencepiece_length=36"
)
_PUBLISHED = """
import bytepiece
begin, used = time.perf_counter(), time.process_time()
trainer = bytepiece.Trainer(max_vocab_size=size, min_count=2)
trainer.train([open(path, encoding="utf-8").read()], workers=1)
"""


def source(size: int) -> Iterator[bytes]:
    """About so many bytes of Python source."""
    packages = Path(next(path for path in sys.path if path.endswith("site-packages")))
    extra = ""
    while True:
        for path in sorted(packages.rglob("*.py")):
            content = path.read_bytes().replace(b"\r", b"").replace(b"\0", b"")
            try:
                text = content.decode()
            except UnicodeDecodeError:
                continue
            if extra:
                text = re.sub(r"\b([A-Za-z_]\w{3,})\b", rf"\1{extra}", text)
            yield text.encode()
            size -= len(content)
            if size <= 0:
                return
        extra += "x"


def measured(code: str, path: Path, size: int) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and peak bytes of a process."""
    answer = subprocess.run(
        [sys.executable, "-c", _BEGIN + code + _END, str(path), str(size)], capture_output=True, text=True
    )
    line = next((line for line in answer.stdout.splitlines() if line.startswith("RESULT")), None)
    if line is None:
        raise RuntimeError(answer.stderr[-2000:])
    wall, used, peak = map(float, line.split()[1:])
    return wall, used, peak


def rows(runs: dict[str, str], path: Path, size: int, repeats: int) -> list[str]:
    """One row per trainer, medians of interleaved runs."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, code in runs.items():
            found[name].append(measured(code, path, size))
    text = path.stat().st_size
    first = next(iter(runs))
    lines = []
    for name, results in found.items():
        wall, used, peak = (statistics.median(column) for column in zip(*results, strict=True))
        ratio = statistics.median(b[0] / a[0] for a, b in zip(found[first], results, strict=True))
        lines.append(
            f"| {text / 1e6:.0f} MB | {name} | {wall:.1f} | {used:.1f} | {peak / 1e6:.0f} | {peak / text:.1f} "
            f"| {ratio:.2f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="*", default=[20, 200])
    parser.add_argument("--vocab-size", type=int, default=16000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    runs = {
        "danlu, 2 threads": _DANLU.format(workers=2, refine=0),
        "danlu, 1 thread": _DANLU.format(workers=1, refine=0),
        "danlu, 2 threads, refined": _DANLU.format(workers=2, refine=4),
        "SentencePiece BPE, 2 threads": _SENTENCEPIECE.format(workers=2, options=""),
        "SentencePiece BPE across white space": _SENTENCEPIECE.format(workers=2, options=_CROSSING),
    }
    published = {"danlu, 1 thread": runs["danlu, 1 thread"], "bytepiece 0.6.3, 1 process": _PUBLISHED}
    lines = [
        "# Training a tokenizer",
        "",
        f"Python source, {options.vocab_size} ids, medians of {options.repeats} interleaved runs (one at 200 MB).",
        "Peak is the whole process, about 0.15 GB of which is Python with numba and numpy.",
        "",
        "| text | trainer | wall, s | processor, s | peak, MB | peak per byte of text | wall over danlu's |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in (1, *options.megabytes):
            path = Path(folder) / f"{megabytes}.txt"
            with path.open("wb") as file:
                for content in source(megabytes * 10**6):
                    file.write(content)
            size = 8000 if megabytes == 1 else options.vocab_size
            some = published if megabytes == 1 else runs
            for line in rows(some, path, size, options.repeats if megabytes < 100 else 1):
                lines.append(line)
                print(line, flush=True)
    text = "\n".join(lines) + "\n"
    if all(getattr(options, name) == parser.get_default(name) for name in vars(options)):
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
