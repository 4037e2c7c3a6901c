"""``danlu ask``: one answer from many files, together longer than the model's context."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from danlu.context.documents import Document
    from danlu.context.naive_bayes.result import NaiveBayesResult, Source, TokenTrace

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_ENDS = ".!?。！？"


@app.command()
def ask(
    model: Annotated[str, typer.Argument(help="Model folder or hub name; danlu-nano is the bundled one.")],
    files: Annotated[list[str], typer.Argument(help="Text, Markdown, HTML or PDF; - is standard input.")],
    question: Annotated[str, typer.Option("--question", "-q", help="What to ask about the files.")],
    prefix: Annotated[str, typer.Option("--prefix", help="Instructions in front, the system message of a chat.")] = "",
    template: Annotated[
        str | None, typer.Option("--template", help="Prompt with {context} and {question}. Default: the model's chat.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the answer. Default: 256, or a quarter of the model's context.")
    ] = None,  # fmt: skip
    beta: Annotated[float, typer.Option(help="How close to stay to the files, >= -1.")] = 0.25,
    eta: Annotated[float, typer.Option(help="Nats by which another part must be surer to take over.")] = 0.1,
    nucleus: Annotated[float, typer.Option(help="Mass that each part's prediction is cut to.")] = 0.95,
    pooling: Annotated[str, typer.Option(help="min_entropy, mean or max.")] = "min_entropy",
    refusal: Annotated[
        list[str] | None,
        typer.Option("--refusal", help="Beginning of an answer that says nothing; drops the parts that give it."),
    ] = None,
    keep: Annotated[int | None, typer.Option(help="Parts that may answer: those that suit the question best.")] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens that the model reads at once, answer included. Default: its own limit.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Extend the model first, such as rerope+logn; needs --context.")
    ] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the best.")] = False,
    temperature: Annotated[float, typer.Option(help="Of --sample.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of --sample.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON when finished instead of streaming.")] = False,
) -> None:
    """Answer a question from files that together exceed the model's context.

    Long files are cut at paragraphs. Every part is read beside the others, and each token comes from the part that is
    surest of it; each sentence is marked with its file and the characters of that part. The model must fit one part.
    Example: danlu ask ./my-model chapter1.md chapter2.html report.pdf -q "What was decided?"
    """
    from danlu.context.documents import read_document
    from danlu.context.naive_bayes.combine import Settings

    if not question.strip():
        raise ValueError("--question is empty: pass what to ask")
    if methods is not None and context is None:
        raise ValueError("--methods lets the model read any length: say with --context how many tokens a part may have")
    if sample and not temperature > 0:
        raise ValueError(f"--temperature must be above 0, got {temperature} (leave out --sample for the best token)")
    Settings(beta, eta, nucleus, pooling)
    if len(set(files)) < len(files):
        raise ValueError(f"a file is named twice: {', '.join(files)}")
    try:
        documents = [read_document(name) for name in files]
    except ImportError as error:  # what is missing is the user's to install
        raise ValueError(str(error)) from error

    from danlu.context.extend import extend
    from danlu.context.naive_bayes.contexts import NaiveBayesContexts
    from danlu.context.naive_bayes.select import Selection
    from danlu.hosts.loading import load_causal_lm

    host, tokenizer = load_causal_lm(model, device=device, dtype=dtype, argument="MODEL")
    if methods is not None:
        extend(host, methods)
    selection = Selection(refusals=tuple(refusal or ()), keep=keep) if refusal or keep is not None else None
    reader = NaiveBayesContexts(
        host, tokenizer, beta=beta, eta=eta, top_p=nucleus, pooling=pooling, prefix=prefix, template=template,
        selection=selection, max_length=context,
    )  # fmt: skip
    options: dict[str, Any] = {"do_sample": sample, "max_new_tokens": max_new_tokens, "seed": seed}
    if sample:
        options["temperature"] = temperature
    prepared = reader.prepare(
        [document.text for document in documents], split=True, room=reader.room_for(question, max_new_tokens)
    )
    parts = [_Place(documents[source.context], source) for source in prepared.sources]
    marked = Marked(
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        None if json_output else lambda text: typer.echo(text, nl=False),
        [place.mark for place in parts],
    )
    result = prepared.answer(question, on_token=marked.add, release=True, **options)
    marked.close()
    if json_output:
        typer.echo(json.dumps(_as_json(question, result, marked, parts), ensure_ascii=False, indent=2))
        return
    typer.echo("")
    for line in _notes(result, parts):
        typer.echo(f"Note: {line}", err=True)


@dataclass(frozen=True)
class _Place:
    """Where a part comes from."""

    document: Document
    source: Source

    @property
    def mark(self) -> str:
        """``file:start-end``, with the page of a PDF."""
        page = self.document.page(self.source.start)
        return f"{self.document.name}{'' if page is None else f' p.{page}'}:{self.source.start}-{self.source.end}"

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON."""
        page = self.document.page(self.source.start)
        place = {"file": self.document.name, "start": self.source.start, "end": self.source.end}
        return place if page is None else {**place, "page": page}


class Marked:
    """An answer as it arrives, with a mark behind each sentence.

    Args:
        decode: token ids to text.
        write: where text goes; None for nowhere.
        marks: of each source.
    """

    def __init__(self, decode: Callable[[list[int]], str], write: Callable[[str], Any] | None, marks: Sequence[str]):
        self._decode = decode
        self._write = write or (lambda text: None)
        self._marks = marks
        self._ids: list[int] = []
        self._shown = 0
        self._votes: Counter[int] = Counter()
        self._sentence = ""
        #: Finished sentences and the source that most of their characters came from.
        self.sentences: list[tuple[str, int]] = []

    def add(self, entry: TokenTrace) -> None:
        """Take the next token."""
        self._ids.append(entry.token)
        text = self._decode(self._ids)
        if text.endswith("\ufffd"):  # half of a character
            return
        new, self._shown = text[self._shown :], len(text)
        for letter in new:
            # a point inside a number or a name ends nothing, so the letter behind it decides
            if letter == "\n" or (letter.isspace() and self._sentence.rstrip("\"')\u201d\u2019")[-1:] in tuple(_ENDS)):
                self._end()
            if letter.strip() or self._sentence:
                self._sentence += letter
                self._votes[entry.source] += 1
            self._write(letter)

    def close(self) -> None:
        """Mark what is left."""
        self._end()

    def _end(self) -> None:
        if self._sentence.strip():
            # the first of equals, in the order of the text
            source = self._votes.most_common(1)[0][0]
            self.sentences.append((self._sentence.strip(), source))
            self._write(f" [{self._marks[source]}]")
        self._sentence = ""
        self._votes.clear()


def _as_json(question: str, result: NaiveBayesResult, marked: Marked, parts: Sequence[_Place]) -> dict[str, Any]:
    return {
        "question": question,
        "answer": result.text,
        "refused": result.refused,
        "sentences": [{"text": text, **parts[source].to_dict()} for text, source in marked.sentences],
        "parts": [place.to_dict() for place in parts],
        "dropped": [{**parts[entry.source].to_dict(), "reason": entry.reason} for entry in result.dropped],
        "tokens": [
            {"token": entry.token, "part": entry.source, "probability": entry.probability, "prior": entry.prior}
            for entry in result.trace
        ],
    }


def _notes(result: NaiveBayesResult, parts: Sequence[_Place]) -> list[str]:
    notes = [f"left out {parts[entry.source].mark}: {entry.reason}" for entry in result.dropped]
    if result.refused:
        notes.append("every part refuses to answer")
    return notes
