"""Every supported family under every kind of method: equal to the definition, whole, in pieces, padded, and undone."""

from __future__ import annotations

import pytest
import torch
import transformers

from context.families import (
    BY_NAME,
    LENGTH,
    SUPPORTED,
    TRAINED,
    Family,
    in_pieces,
    left_padded,
    right_padded,
    tokens,
)
from danlu.context.extend import active_methods, extended
from danlu.context.methods import (
    NTK,
    DynamicNTK,
    DynamicYaRN,
    LeakyReRoPE,
    LogN,
    Method,
    NTKFixed,
    NTKMixed,
    NTKOld,
    PositionInterpolation,
    ReRoPE,
    Window,
    YaRN,
)
from reference.host import Spec, Wide, reference

# Everything is float64 (see ``Wide``); what remains is the rounding of float64 through a few peaked softmaxes. Measured
# 2e-13 at worst. Strides are powers of two, because the host's rotary module takes positions in float32.
TOLERANCE = 1e-10

COMMON_CASES: dict[str, tuple[tuple[Method, ...], Spec]] = {
    "rerope": ((ReRoPE(window=7),), Spec(window=7)),
    "leaky": ((LeakyReRoPE(window=5, stride=4.0),), Spec(window=5, stride=4.0)),
    "dynamic-ntk": ((DynamicNTK(),), Spec(dynamic="ntk")),
    "ntk-mixed": ((NTKMixed(factor=4),), Spec(rescale="ntk-mixed", factor=4)),
    "yarn": ((YaRN(factor=4),), Spec(rescale="yarn", factor=4)),
    "window": ((Window(window=9),), Spec(band=9)),
    "logn": ((LogN(),), Spec(log_n=TRAINED)),
    "rerope+logn": ((ReRoPE(window=7), LogN()), Spec(window=7, log_n=TRAINED)),
}
MORE_CASES: dict[str, tuple[tuple[Method, ...], Spec]] = {
    "rerope-1": ((ReRoPE(window=1),), Spec(window=1)),
    "rerope-widest": ((ReRoPE(window=TRAINED - 1),), Spec(window=TRAINED - 1)),
    "leaky-stretching": ((LeakyReRoPE(window=5, stride=0.5),), Spec(window=5, stride=0.5)),
    "leaky+logn": ((LeakyReRoPE(window=4, stride=8.0), LogN(clip=False)), Spec(4, 8.0, log_n=TRAINED, clip=False)),
    "window-sinks": ((Window(window=9, sinks=4),), Spec(band=9, sinks=4)),
    "window+logn": ((Window(window=20, sinks=2), LogN()), Spec(band=20, sinks=2, log_n=TRAINED)),
    "logn-given": ((LogN(trained_length=9, clip=False),), Spec(log_n=9, clip=False)),
    "dynamic-yarn": ((DynamicYaRN(),), Spec(dynamic="yarn")),
    "dynamic-growth": ((DynamicNTK(growth=1.3),), Spec(dynamic="ntk", growth=1.3)),
    "dynamic+logn": ((DynamicYaRN(growth=1.5), LogN()), Spec(dynamic="yarn", growth=1.5, log_n=TRAINED)),
    "pi": ((PositionInterpolation(factor=3.5),), Spec(rescale="pi", factor=3.5)),
    "ntk-old": ((NTKOld(factor=3.5),), Spec(rescale="ntk-old", factor=3.5)),
    "ntk": ((NTK(factor=3.5),), Spec(rescale="ntk", factor=3.5)),
    "ntk-fixed": ((NTKFixed(factor=3.5),), Spec(rescale="ntk-fixed", factor=3.5)),
    "ntk+logn": ((NTK(factor=4), LogN()), Spec(rescale="ntk", factor=4, log_n=TRAINED)),
    "ntk+window": ((NTK(factor=2), Window(window=12)), Spec(rescale="ntk", factor=2, band=12)),
    "ntk+rerope": ((NTK(factor=2), ReRoPE(window=7)), Spec(rescale="ntk", factor=2, window=7)),
    "yarn+leaky": ((YaRN(factor=2), LeakyReRoPE(window=5, stride=2.0)), Spec(5, 2.0, rescale="yarn", factor=2)),
}
ALL_CASES = COMMON_CASES | MORE_CASES
THOROUGH = (
    "llama",
    "gemma3",
    "glm",
    "deepseek-v3",
)  # plain; two bases and local layers; interleaved partial; rotated end
PAIRS = [(f, case) for f in SUPPORTED for case in (ALL_CASES if f.name in THOROUGH else COMMON_CASES)]


@pytest.fixture(scope="module")
def models() -> dict[str, transformers.PreTrainedModel]:
    """Models by family name, built once; every test leaves them plain."""
    return {}


@pytest.fixture
def wide():
    """Float64 throughout, no gradients."""
    with Wide(), torch.no_grad():
        yield


def model_of(models: dict, family: Family) -> transformers.PreTrainedModel:
    if family.name not in models:
        models[family.name] = family.build()
    return models[family.name]


@pytest.mark.parametrize(("family", "case"), PAIRS, ids=lambda x: str(x))
def test_logits_equal_the_definition(models, wide, family, case):
    model, ids = model_of(models, family), tokens(2)
    methods, spec = ALL_CASES[case]
    plain = model(ids).logits
    with reference(model, spec, TRAINED, rotates=family.rotates, from_end=family.from_end):
        expected = model(ids).logits
    # the test would see nothing if the method changed nothing at this length
    assert (expected - plain).abs().max() > 0.05
    with extended(model, *methods):
        logits = model(ids).logits
        assert [type(m) for m in active_methods(model)] == [type(m) for m in methods]
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
    assert torch.equal(model(ids).logits, plain), "restore must give the very same bits"


def test_the_reference_with_no_method_is_the_host_itself(models, wide):
    for family in SUPPORTED:
        model, ids = model_of(models, family), tokens()
        plain = model(ids).logits
        with reference(model, Spec(), TRAINED, rotates=family.rotates, from_end=family.from_end):
            torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=1e-12)


PIECES = {
    "token by token": [1] * LENGTH,
    "one chunk, then tokens": [20] + [1] * (LENGTH - 20),
    "chunks below the window": [5] * 11 + [1],
    "chunks around every border": [6, 1, 8, 1, 1, 15, 1, 17, 6],
}


@pytest.mark.parametrize("case", ["rerope", "leaky", "dynamic-ntk", "window", "rerope+logn", "ntk-mixed"])
@pytest.mark.parametrize("family", SUPPORTED, ids=str)
def test_pieces_equal_the_whole(models, wide, family, case):
    model, ids = model_of(models, family), tokens(2)
    thorough = family.name == "llama" or (family.name, case) == ("gemma3", "rerope")
    with extended(model, *ALL_CASES[case][0]):
        whole = model(ids, use_cache=False).logits
        for name, pieces in PIECES.items():
            if name != "chunks around every border" and not thorough:
                continue
            assert sum(pieces) == LENGTH
            torch.testing.assert_close(in_pieces(model, ids, pieces), whole, rtol=0, atol=TOLERANCE, msg=name)


@pytest.mark.parametrize("case", ["window-sinks", "window+logn", "dynamic-yarn", "dynamic-growth", "dynamic+logn"])
def test_pieces_equal_the_whole_for_further_methods(models, wide, case):
    model, ids = model_of(models, BY_NAME["llama"]), tokens(2)
    with extended(model, *ALL_CASES[case][0]):
        whole = model(ids, use_cache=False).logits
        for pieces in PIECES.values():
            torch.testing.assert_close(in_pieces(model, ids, pieces), whole, rtol=0, atol=TOLERANCE)


ROWS = [tokens(1, n, seed=n)[0] for n in (LENGTH, 31, 9, 1)]
PADDED_CASES = ["rerope", "leaky", "dynamic-ntk", "window", "logn", "rerope+logn"]


@pytest.mark.parametrize("case", PADDED_CASES)
@pytest.mark.parametrize("family", SUPPORTED, ids=str)
def test_padded_rows_equal_single_rows(models, wide, family, case):
    model = model_of(models, family)
    with extended(model, *ALL_CASES[case][0]):
        single = [model(row[None]).logits[0] for row in ROWS]
        ids, mask = left_padded(ROWS)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        for given in (positions, None):  # a constant offset of all positions must not matter
            logits = model(ids, attention_mask=mask, position_ids=given).logits
            for i, row in enumerate(ROWS):
                torch.testing.assert_close(logits[i, LENGTH - len(row) :], single[i], rtol=0, atol=TOLERANCE)
        ids, mask = right_padded(ROWS)
        logits = model(ids, attention_mask=mask).logits
        for i, row in enumerate(ROWS):
            torch.testing.assert_close(logits[i, : len(row)], single[i], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", [*PADDED_CASES, "window-sinks", "window+logn", "dynamic+logn"])
@pytest.mark.parametrize("family", [BY_NAME["llama"], BY_NAME["gemma3"], BY_NAME["smollm3"]], ids=str)
def test_padded_pieces_equal_single_rows(models, wide, family, case):
    model = model_of(models, family)
    ids, mask = left_padded(ROWS)
    with extended(model, *ALL_CASES[case][0]):
        single = [model(row[None]).logits[0] for row in ROWS]
        logits = in_pieces(model, ids, [40, 1, 1, 9, 1, 4], mask)
    for i, row in enumerate(ROWS):
        torch.testing.assert_close(logits[i, LENGTH - len(row) :], single[i], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", ["rerope", "leaky", "dynamic-ntk", "window", "window-sinks", "rerope+logn"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "glm"])
def test_any_mask_takes_the_dense_route_to_the_same_logits(models, wide, name, case):
    model, ids = model_of(models, BY_NAME[name]), tokens(2)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    if name == "gemma3":
        mask = {"full_attention": causal, "sliding_attention": causal & ~causal.tril(-8)}
        mask = {k: v.expand(2, 1, -1, -1) for k, v in mask.items()}
    else:
        mask = causal.expand(2, 1, -1, -1)
    additive = (~causal).double().expand(2, 1, -1, -1) * torch.finfo(torch.float64).min
    with extended(model, *ALL_CASES[case][0]):
        whole = model(ids).logits
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, whole, rtol=0, atol=TOLERANCE)
        if name != "gemma3":
            torch.testing.assert_close(model(ids, attention_mask=additive).logits, whole, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", ["rerope", "leaky", "dynamic-ntk", "window-sinks", "logn", "rerope+logn"])
def test_packed_documents_equal_single_documents(models, wide, case):
    model = model_of(models, BY_NAME["llama"])
    first, second = tokens(1, 33, seed=3), tokens(1, 23, seed=4)
    ids = torch.cat([first, second], 1)
    document = torch.tensor([0] * 33 + [1] * 23)
    mask = (torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & (document[:, None] == document))[None, None]
    positions = torch.cat([torch.arange(33), torch.arange(23)])[None]
    with extended(model, *ALL_CASES[case][0]):
        packed = model(ids, attention_mask=mask, position_ids=positions).logits
        # without a mask the host finds the documents by their positions
        found = model(ids, position_ids=positions, use_cache=False).logits
        for logits in (packed, found):
            torch.testing.assert_close(logits[:, :33], model(first).logits, rtol=0, atol=TOLERANCE)
            torch.testing.assert_close(logits[:, 33:], model(second).logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", SUPPORTED, ids=str)
def test_wide_enough_methods_change_nothing(models, wide, family):
    model, ids = model_of(models, family), tokens(2)
    plain = model(ids).logits
    if "wide-window" not in family.name:  # there a longer trained length leaves nothing to extend, which is refused
        for method in (ReRoPE(window=LENGTH), LeakyReRoPE(window=LENGTH, stride=4.0), DynamicNTK(), LogN()):
            with extended(model, method, trained_length=LENGTH + 1):
                torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=TOLERANCE)
    with extended(model, LeakyReRoPE(window=3, stride=1.0), trained_length=12):  # stride 1 is plain for every window
        torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", SUPPORTED, ids=str)
def test_float32_stays_close_to_float64(family):
    """The types that are really used, without widening: only the tolerance differs."""
    model, ids = family.build(torch.float32), tokens(2)
    reference_model = family.build()
    with torch.no_grad():
        for case in ("rerope", "dynamic-ntk"):
            methods, spec = ALL_CASES[case]
            with Wide(), reference(reference_model, spec, TRAINED, rotates=family.rotates, from_end=family.from_end):
                expected = reference_model(ids).logits
            with extended(model, *methods):
                torch.testing.assert_close(model(ids).logits.double(), expected, rtol=0, atol=2e-3)
