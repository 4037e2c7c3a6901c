"""``danlu classify``: labels for texts or pairs, from a BERT that was never trained on them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from danlu.cli.streams import check_writable, progress_bar, reading, writing

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

#: Lines that are classified together; results are written after each such block.
_BLOCK = 256


@app.command()
def classify(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a BERT with a next-sentence head.")],
    file: Annotated[
        str, typer.Argument(help="One text a line, or .jsonl with text (--pairs: first, second); - is stdin.")
    ],
    labels: Annotated[
        str, typer.Option("--labels", "-l", help="With commas: sports,politics; or name=words for the template.")
    ],
    template: Annotated[
        str | None, typer.Option("--template", help="Label sentence with {} where the label goes, or a known name.")
    ] = None,
    position: Annotated[
        str | None, typer.Option("--position", help="Where the label sentence goes: prefix or suffix.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Subtract what each label scores beside neutral texts.")
    ] = False,
    multi_label: Annotated[
        bool, typer.Option("--multi-label", help="A probability of its own for each label.")
    ] = False,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Lines are two sentences and a tab; labels from least to most close.")
    ] = False,
    shares: Annotated[
        str | None, typer.Option("--shares", help="Of the labels of pairs, such as 0.3,0.7. Default: equal.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File instead of standard output.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a batch. Default: suits the device.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a pair. Default: what the model allows.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Say first how well the head knows real next sentences.")
    ] = False,
) -> None:
    """Classify without training: does this label sentence belong next to this text?

    Prints label, probability and text with tabs between. With --pairs: label, score and both sentences; there the
    scores of all pairs are sorted and cut by the shares, so that a label depends on the other pairs too.
    Example: danlu classify bert-base-uncased texts.txt --labels sports,politics --template news-en
    """
    if out is not None:
        check_writable(out)
    if pairs and (template or position or calibrate or multi_label):
        raise ValueError("--pairs compares two sentences of yours: leave out --template, --position, --calibrate and "
                         "--multi-label")  # fmt: skip
    if shares and not pairs:
        raise ValueError("--shares are of the labels of pairs: add --pairs, or leave it out")
    named = _labels(labels)

    from danlu.zero_shot import NSPClassifier, SamplesContrast
    from danlu.zero_shot.templates import find_template, label_sentences

    chosen = find_template(template or "{}", position)  # type: ignore[arg-type]
    label_sentences(named, chosen, 1 if multi_label else 2)
    contrast = SamplesContrast(_shares(shares, len(named))) if pairs else None
    with ExitStack() as stack:
        source, name = stack.enter_context(reading(file))
        rows = _rows(source, name, ("first", "second") if pairs else ("text",))
        limits: dict[str, Any] = {"batch_tokens": batch_tokens, "max_length": max_length, "progress": False}
        classifier = NSPClassifier.from_pretrained(model, device=device, dtype=dtype, **limits)
        if self_test:
            typer.echo(f"{model}: {classifier.self_test()}", err=True)
        size = 0 if file == "-" else Path(file).stat().st_size
        bar = stack.enter_context(progress_bar()) if out is not None else lambda *_: None
        sink = stack.enter_context(writing(out))
        if contrast is not None:
            lines = _paired(classifier, contrast, list(named), rows, size, bar)
        else:
            options: dict[str, Any] = {"template": chosen.text, "position": chosen.position}
            options |= {"calibrate": calibrate, "multi_label": multi_label}
            lines = _labelled(classifier, named, rows, size, bar, options)
        for result in lines:
            shown = json.dumps(result, ensure_ascii=False) if json_output else _plain(result)
            sink.write(shown.encode() + b"\n")
        sink.flush()


def _labelled(
    classifier: Any, labels: dict[str, str], rows: Iterator[tuple[int, list[str]]], size: int, bar: Any, options: Any
) -> Iterator[dict[str, Any]]:
    while block := list(islice(rows, _BLOCK)):
        yield from classifier([texts[0] for _, texts in block], labels, **options)
        bar(block[-1][0], size, "")


def _paired(
    classifier: Any, contrast: Any, labels: list[str], rows: Iterator[tuple[int, list[str]]], size: int, bar: Any
) -> Iterator[dict[str, Any]]:
    kept: list[list[str]] = []
    scores: list[float] = []
    while block := list(islice(rows, _BLOCK)):
        both = [texts for _, texts in block]
        scores += classifier.score_pairs([one[0] for one in both], [one[1] for one in both]).tolist()
        kept += both
        bar(block[-1][0], size, "")
    contrast.fit(scores)  # refuses sets that are too small for their labels
    for (first, second), score, label in zip(kept, scores, contrast.segment(scores).tolist(), strict=True):
        yield {"first": first, "second": second, "score": score, "label": labels[label]}


def _plain(result: dict[str, Any]) -> str:
    if "label" in result:
        return f"{result['label']}\t{result['score']:.4f}\t{result['first']}\t{result['second']}"
    # a text from JSON may hold tabs and line feeds, which would break the line
    text = " ".join(result["sequence"].split())
    return f"{result['labels'][0]}\t{result['scores'][0]:.4f}\t{text}"


def _rows(source: BinaryIO, name: str, fields: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """Bytes read so far and the texts of each line."""
    read = 0
    for number, line in enumerate(source, 1):
        read += len(line)
        where = f"line {number} of {name}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not UTF-8 text: pass a text file") from error
        if name.endswith(".jsonl"):
            texts = _from_json(text, where, fields)
        else:
            texts = text.split("\t") if len(fields) == 2 else [text]
        if len(texts) != len(fields):
            raise ValueError(f"{where} must be two sentences with a tab between them, got {len(texts) - 1} tabs")
        if not all(one.strip() for one in texts):
            raise ValueError(f"{where} has an empty {fields[[not one.strip() for one in texts].index(True)]}")
        yield read, texts
    if not read:
        raise ValueError(f"{name} is empty: pass one text a line")


def _from_json(text: str, where: str, fields: tuple[str, ...]) -> list[str]:
    try:
        entry = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error})") from error
    for field in fields:
        if not isinstance(entry, dict) or not isinstance(entry.get(field), str):
            raise ValueError(f"{where} must be an object with a string {field!r}")
    return [entry[field] for field in fields]


def _labels(text: str) -> dict[str, str]:
    """``a,b`` or ``a=words,b=other words`` as name to words."""
    parts = [part.strip() for part in text.split(",")]
    split = [part.split("=", 1) for part in parts]
    named = {part[0].strip(): part[-1].strip() for part in split}
    if len(named) < len(parts):
        raise ValueError(f"--labels must differ, got {text!r}")
    return named


def _shares(text: str | None, labels: int) -> int | list[float]:
    if text is None:
        return labels
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--shares must be numbers with commas, such as 0.3,0.7, got {text!r}") from error
    if len(shares) != labels:
        raise ValueError(f"--shares must be one for each of {labels} labels, got {len(shares)}")
    return shares
