"""Codebook use over a data set and over processes."""

import json
import math

import pytest
import torch

from danlu.vision.fsq import FSQ
from danlu.vision.usage import CodebookUsage, UsageReport, measure_usage
from danlu.vision.vq import VectorQuantizer
from reference.quantize_ranks import count_on_a_rank, indices


def test_counts_of_batches_are_the_counts_of_the_whole():
    drawn = indices(1000, 50).square() % 61
    usage = CodebookUsage([61])
    for batch in drawn.split(77):
        usage.update(batch.view(-1, 1))
    (use,) = usage.report().codebooks
    counts = drawn.bincount(minlength=61)
    p = counts[counts > 0].double() / 1000
    assert use.tokens == 1000 and use.used == int((counts > 0).sum()) and use.dead == 61 - use.used
    assert use.share == use.used / 61 == use.attainable_share
    assert use.perplexity == pytest.approx(math.exp(float(-(p * p.log()).sum())))
    assert list(use.counts) == sorted(counts[counts > 0].tolist(), reverse=True)
    codes, how_often = usage.codes()
    assert torch.equal(codes, counts.nonzero()[:, 0]) and torch.equal(how_often, counts[counts > 0])


def test_even_use_has_the_perplexity_of_its_codes():
    usage = CodebookUsage([16])
    usage.update(torch.arange(16).repeat(5))
    (use,) = usage.report().codebooks
    assert use.perplexity == pytest.approx(16) and use.share == 1 and use.dead == 0
    collapsed = CodebookUsage([16])
    collapsed.update(torch.full((9,), 3))
    (use,) = collapsed.report().codebooks
    assert use.perplexity == pytest.approx(1) and use.used == 1
    assert use.share == 1 / 16 and use.attainable_share == 1 / 9


def test_a_batch_shows_less_than_the_data_set():
    quantizer = VectorQuantizer(64, 3)
    data = torch.randn(2000, 3, generator=torch.Generator().manual_seed(1))
    whole = measure_usage(quantizer, list(data.split(50))).codebooks[0]
    single = measure_usage(quantizer, [data[:50]]).codebooks[0]
    assert whole.used == len(quantizer.encode(data).unique()) > single.used
    assert measure_usage(quantizer, iter(data.split(300))).codebooks[0] == whole


def test_enormous_codebooks_are_counted_by_what_occurs():
    quantizer = FSQ([16] * 9, num_codebooks=2)
    usage = CodebookUsage(quantizer)
    z = torch.randn(300, 18, generator=torch.Generator().manual_seed(0))
    usage.update(quantizer.encode(z))
    usage.update(quantizer.encode(z[:100]))
    first, second = usage.report().codebooks
    assert first.size == second.size == 2**36 and first.tokens == 400 and first.used == second.used == 300
    assert first.attainable_share == 300 / 400 and max(first.counts) == 2


def test_report_as_text_json_and_figure(tmp_path):
    usage = CodebookUsage([8, 5])
    empty = usage.report()
    assert math.isnan(empty.codebooks[0].perplexity) and '"perplexity": null' in empty.to_json()
    usage.update(torch.tensor([[0, 1], [0, 2], [7, 1]]))
    report = usage.report()
    assert isinstance(report, UsageReport)
    document = json.loads(report.to_json())
    assert document["codebooks"][0]["used"] == 2 and document["codebooks"][0]["share"] == 0.25
    assert document["codebooks"][1]["counts"] == [2, 1]
    assert len(str(report).splitlines()) == 3 and "25.0%" in str(report)
    figure = report.figure()
    assert [line.get_xydata()[:, 1].tolist() for line in figure.axes[0].lines[::2]] == [[2, 1], [2, 1]]
    figure.savefig(tmp_path / "use.png")


def test_bad_input():
    usage = CodebookUsage([8, 5])
    with pytest.raises(ValueError, match="last axis of 2"):
        usage.update(torch.zeros(4, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"indices must be in 0\.\.4, got 1 to 5"):
        usage.update(torch.tensor([[0, 1], [0, 5]]))
    assert usage.report().codebooks[0].tokens == 0  # nothing of a bad batch is kept
    with pytest.raises(ValueError, match=r"got -1 to 0"):
        CodebookUsage([8]).update(torch.tensor([0, -1]))
    with pytest.raises(TypeError, match="indices must be integers, got torch.float32"):
        usage.update(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="codebook_sizes must be numbers >= 1"):
        CodebookUsage([])


@pytest.mark.slow
def test_every_process_reports_the_use_of_all_and_holds_one_codebook(tmp_path):
    torch.multiprocessing.spawn(count_on_a_rank, (2, str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one[0] == two[0]
    for name in one[1]:
        assert torch.equal(one[1][name], two[1][name])
    whole = CodebookUsage([50, 7])
    for count, seed in ((30, 0), (9, 1), (20, 2)):
        whole.update(torch.stack((indices(count, 50, seed), indices(count, 7, seed)), 1))
    assert one[0] == whole.report().to_json()
