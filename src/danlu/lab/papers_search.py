"""A claim on the site's search: ten keywords find related texts, and the keywords of what was read rank the rest."""

from __future__ import annotations

import ast
import inspect
import random
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

from danlu.lab.claim import Check, Context, Evidence, Plot, Table
from danlu.lab.runner import claim
from danlu.papers.ids import PaperId
from danlu.papers.lists import papers
from danlu.papers.records import PaperRecord
from danlu.papers.rows import Paper
from danlu.papers.search import Index, Query, open_index
from danlu.papers.search.query import Term
from danlu.papers.store import Store
from danlu.papers.tokens import words

#: A docstring is a text from this length on; a module is a topic from this many texts on.
LENGTH, TEXTS = 120, 6
NEAREST, DRAWS, INTERESTS, READ, CLOUD, FIRST = 5, 40, 3, 10, 20, 25
COUNTS = (1, 3, 5, 10, 20)
#: Programs and their parts, and modules that hold the texts of others again.
_LEFT_OUT = {"idlelib", "lib2to3", "test", "turtledemo", "__phello__", "antigravity", "this"}


@claim(
    name="papers-related",
    title="Ten keywords find related papers nearly as well as the whole text",
    source="archives 9920, 9978",
    statement="A search for any of a paper's ten keywords finds related papers, without dates, citations or a model; "
    "the summed keywords of what a reader has opened rank a day's list by his preference.",
    measurement="Docstrings of the Python standard library as papers (first line: title), their module as the topic: "
    "precision of the 5 nearest by FTS5 for ten keywords, title, whole text and chance; and for 40 readers of 10 texts "
    "of 3 modules, the area under the curve of the rest, ranked by the 20 heaviest words of the cloud.",
    budget=60,
)
def papers_related(context: Context) -> Evidence:
    """Related texts and preference on docstrings."""
    seed = context.seeds[0]
    texts = standard_library()
    with tempfile.TemporaryDirectory() as folder:
        index, read = indexed(texts, Path(folder))
        topics = [topic for topic, _, _ in texts]

        def heaviest(count: int) -> Callable[[Paper], Query]:
            return lambda paper: any_of([keyword.term for keyword in index.keywords(paper, count)])

        ways = {f"{count} keywords": heaviest(count) for count in COUNTS}
        ways["title"] = lambda paper: any_of(words(paper.title))
        ways["whole text"] = lambda paper: any_of(words(f"{paper.title} {paper.abstract}"))
        found = {
            name: precision(index, read, topics, way)
            for name, way in context.track(ways.items(), description="related", total=len(ways))
        }
        areas, lifts = preference(index, read, topics, seed)
        index.close()
    sizes = Counter(topics)
    found["random"] = sum(n * (n - 1) for n in sizes.values()) / (len(topics) * (len(topics) - 1))
    keywords, title, whole = found["10 keywords"], found["title"], found["whole text"]
    area, lift = sum(areas) / len(areas), sum(lifts) / len(lifts)
    shown = [name for name in found if not name.endswith("keywords")]
    checks = (
        Check("precision of ten keywords at least .60", keywords >= 0.60, f"{keywords:.3f}"),
        Check("at least .9 of the whole text's", keywords >= 0.9 * whole, f"{keywords / whole:.3f}"),
        Check("above the title's", keywords > title, f"{keywords:.3f} against {title:.3f}"),
        Check("preference: mean area at least .75", area >= 0.75, f"{area:.3f}"),
    )
    return Evidence(
        summary=f"Of the 5 nearest of {len(texts):,} texts, ten keywords find {keywords:.3f} in the same module, the "
        f"title {title:.3f}, the whole text {whole:.3f}, chance {found['random']:.3f}; preference has an area of "
        f"{area:.2f} and {lift:.0f} times as many hits among the first {FIRST} as chance.",
        checks=checks,
        tables=(
            Table("Precision of the 5 nearest", ("query", "same module"), tuple((k, v) for k, v in found.items())),
            Table(
                f"Preference, {DRAWS} readers",
                ("mean area", "lowest", "highest", f"lift of the first {FIRST}"),
                ((area, min(areas), max(areas), lift),),
            ),
        ),
        plots=(
            Plot(
                "Related texts: same module among the 5 nearest",
                "keywords in the query",
                "precision",
                COUNTS,
                {
                    "keywords": tuple(found[f"{count} keywords"] for count in COUNTS),
                    **{name: (found[name],) * len(COUNTS) for name in shown},
                },
                log_x=True,
            ),
        ),
        notes=(
            f"{len(texts):,} docstrings of at least {LENGTH} characters in {len(sizes)} modules with at least {TEXTS}; "
            "the texts are those of the running Python, read as source and not imported.",
            "A module is a coarse topic, and its docstrings repeat phrases, so that the numbers are those of this "
            "collection and not of papers.",
        ),
    )


@cache
def standard_library() -> tuple[tuple[str, str, str], ...]:
    """Module, first line and rest of each docstring of the standard library that is long enough."""
    root = Path(sysconfig.get_path("stdlib"))
    found: list[tuple[str, str, str]] = []
    seen: set[str] = set()
    for name in sorted(sys.stdlib_module_names - _LEFT_OUT):
        folder, file = root / name, root / f"{name}.py"
        files = sorted(folder.rglob("*.py")) if folder.is_dir() else [file] if file.is_file() else []
        for path in files:
            if "test" in path.parts or "tests" in path.parts or "site-packages" in path.parts:
                continue
            for text in _docstrings(path):
                if len(text) >= LENGTH and text not in seen:
                    seen.add(text)
                    first, _, rest = text.partition("\n")
                    found.append((name.lstrip("_").removeprefix("py"), first.strip(), rest.strip()))
    sizes = Counter(topic for topic, _, _ in found)
    return tuple(each for each in found if sizes[each[0]] >= TEXTS)


def _docstrings(path: Path) -> Iterator[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield inspect.cleandoc(text)


def indexed(texts: Sequence[tuple[str, str, str]], folder: Path) -> tuple[Index, list[Paper]]:
    """The texts as papers in an index; the papers in the order of the texts."""
    store = Store()
    store.upsert(
        PaperRecord(PaperId("docstring", str(n)), "generic", title=title, abstract=rest)
        for n, (_, title, rest) in enumerate(texts)
    )
    index = open_index(folder)
    index.update(store)
    read = papers(store, list(range(1, len(texts) + 1)))
    return index, sorted(read, key=lambda paper: int(paper.paper.ext_id))


def any_of(terms: Sequence[str]) -> Query:
    """A query of any of these words, of which there may be more than a reader may type."""
    return Query(should=tuple(Term((term,)) for term in dict.fromkeys(terms)))


def precision(
    index: Index, read: Sequence[Paper], topics: Sequence[str], query: Callable[[Paper], Query], count: int = NEAREST
) -> float:
    """Share of the nearest texts that have the topic of the one asked for; places that stay empty are misses."""
    topic = {paper.pk: name for paper, name in zip(read, topics, strict=True)}
    hits = 0
    for paper in read:
        asked = query(paper)
        keys = index.search(asked, count + 1).keys if not asked.empty else ()
        near = [key for key in keys if key != paper.pk][:count]
        hits += sum(topic[key] == topic[paper.pk] for key in near)
    return hits / (count * len(read))


def preference(
    index: Index, read: Sequence[Paper], topics: Sequence[str], seed: int, draws: int = DRAWS
) -> tuple[list[float], list[float]]:
    """For each reader the area under the curve of what he has not read, and the lift of its first places."""
    draw = random.Random(seed)
    modules = sorted(set(topics))
    by_key = {paper.pk: (paper, topic) for paper, topic in zip(read, topics, strict=True)}
    areas, lifts = [], []
    for _ in range(draws):
        liked = set(draw.sample(modules, INTERESTS))
        own = [key for key, (_, topic) in by_key.items() if topic in liked]
        opened = set(draw.sample(own, READ))
        cloud: dict[str, float] = {}
        for key in sorted(opened):
            for term, weight in index.keywords(by_key[key][0]):
                cloud[term] = cloud.get(term, 0.0) + weight
        heaviest = sorted(cloud, key=lambda term: (-cloud[term], term))[:CLOUD]
        rest = [key for key in by_key if key not in opened]
        draw.shuffle(rest)
        order = [by_key[key][1] in liked for key in index.rank(heaviest, rest)]
        areas.append(area_under(order))
        lifts.append(sum(order[:FIRST]) / len(order[:FIRST]) / (sum(order) / len(order)))
    return areas, lifts


def area_under(order: Sequence[bool]) -> float:
    """Share of the pairs of a wanted and an unwanted place in which the wanted one is ahead."""
    wanted = ahead = 0
    for is_wanted in order:
        if is_wanted:
            wanted += 1
        else:
            ahead += wanted
    return ahead / (wanted * (len(order) - wanted))
