"""The written form of methods, what stacks allow, and what is refused before a model is touched."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.context.methods import (
    NTK,
    DynamicNTK,
    DynamicYaRN,
    KeyNorm,
    LeakyReRoPE,
    LogN,
    NTKFixed,
    NTKMixed,
    NTKOld,
    PositionInterpolation,
    ReRoPE,
    Window,
    YaRN,
)
from danlu.context.stacks import METHODS, check_stack, default_stacks, parse_methods, resolve_stack, stack_label

factors = st.none() | st.floats(1, 1e6) | st.integers(1, 1000)
windows = st.none() | st.integers(1, 10**6)
positive = st.floats(1e-6, 1e6)
plain_frequencies = st.sampled_from([PositionInterpolation, NTKOld, NTK, NTKFixed])
frequencies = st.one_of(
    st.builds(lambda cls, factor: cls(factor=factor), plain_frequencies, factors),
    st.builds(NTKMixed, factor=factors, power=st.floats(1e-3, 1)),
    st.builds(YaRN, factor=factors, turns=st.floats(1.001, 1e4)),
)
fixed_patterns = st.one_of(
    st.builds(ReRoPE, window=windows),
    st.builds(LeakyReRoPE, window=windows, stride=positive),
    st.builds(Window, window=windows, sinks=st.integers(0, 100)),
)
dynamic_patterns = st.one_of(
    st.builds(DynamicNTK, growth=st.floats(1.01, 100)),
    st.builds(DynamicYaRN, growth=st.floats(1.01, 100), turns=st.floats(1.001, 1e4)),
)
scales = st.builds(LogN, trained_length=st.none() | st.integers(2, 10**6), clip=st.booleans())
methods = st.one_of(frequencies, fixed_patterns, dynamic_patterns, scales, st.just(KeyNorm()))
stacks = st.one_of(
    st.tuples(frequencies, fixed_patterns, scales),
    st.tuples(dynamic_patterns, scales, st.just(KeyNorm())),
    st.tuples(methods),
    st.just(()),
)


@given(stacks)
def test_what_is_printed_parses_back(stack):
    assert parse_methods("+".join(map(str, stack)) or "plain") == stack


def test_written_forms():
    assert parse_methods("rerope:window=64+logn") == (ReRoPE(window=64), LogN())
    assert parse_methods(" leaky:window=8:stride=4 + ntk:factor=2.5 ") == (LeakyReRoPE(8, 4), NTK(2.5))
    assert parse_methods("logn:clip=false") == (LogN(clip=False),)
    assert parse_methods("plain") == ()
    assert str(ReRoPE()) == "rerope"
    assert str(YaRN(factor=8.0)) == "yarn:factor=8.0"
    assert set(METHODS) == {cls.name for cls in METHODS.values()}
    assert ReRoPE(window=64).label == "ReRoPE (window=64)"
    assert stack_label(parse_methods("rerope:window=64+logn")) == "ReRoPE (window=64) + log n"
    assert stack_label(()) == "plain"


def test_infinite_stride_is_rerope_itself():
    assert math.isinf(ReRoPE(window=4).stride)
    with pytest.raises(ValueError, match="stride must be finite"):
        LeakyReRoPE(window=4, stride=math.inf)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rerop", r"unknown method 'rerop'; did you mean 'rerope'\?"),
        ("ntk_mixed", r"unknown method 'ntk_mixed'; did you mean 'ntk-mixed'\?"),
        ("dynamicntk", r"did you mean 'dynamic-ntk'\?"),
        ("zzz", "unknown method 'zzz'; known: pi, ntk-old"),
        ("", "unknown method ''"),
        ("rerope+", "unknown method ''"),
        ("rerope:windw=4", r"unknown option 'windw' of rerope; did you mean 'window'\?"),
        ("key-norm:gain=1", "unknown option 'gain' of key-norm; known: none"),
        ("rerope:window=abc", "rerope:window must be a number, true or false, got 'abc'"),
        ("rerope:window=", "rerope:window must be a number"),
        ("rerope:window", "rerope:window must be a number"),
        ("rerope:window=0", "window must be at least 1, got 0"),
        ("window:sinks=-1", "sinks must be at least 0, got -1"),
        ("pi:factor=0.5", "factor must be finite and at least 1, got 0.5"),
        ("pi:factor=nan", "factor must be finite"),
        ("yarn:factor=inf", "factor must be finite"),
        ("yarn:turns=1", "turns must be finite and above 1"),
        ("leaky:stride=0", "stride must be finite and above 0"),
        ("leaky:stride=-2", "stride must be finite and above 0"),
        ("ntk-mixed:power=0", "power must be finite and above 0"),
        ("ntk-mixed:power=1.5", r"power must be in \(0, 1\], got 1.5"),
        ("dynamic-ntk:growth=1", "growth must be finite and at least 1.01"),
        ("logn:trained_length=1", "trained_length must be at least 2, got 1"),
        ("rerope+window", "rerope and window both set the pattern: keep one of them"),
        ("ntk:factor=2+yarn:factor=2", "both set the frequencies"),
        ("logn+logn", "both set the query scale"),
        ("dynamic-ntk+pi:factor=2", "dynamic-ntk and pi:factor=2 both set the frequencies"),
        ("pi:factor=2+dynamic-yarn", "both set the frequencies"),
        ("dynamic-ntk+rerope", "both set the pattern"),
    ],
)
def test_bad_text_is_one_clear_sentence(text, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        parse_methods(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: ReRoPE(window=4.0), "window must be a whole number, got 4.0"),
        (lambda: ReRoPE(window=True), "window must be a whole number, got True"),
        (lambda: ReRoPE(window="4"), "window must be a whole number, got '4'"),
        (lambda: PositionInterpolation(factor="2"), "factor must be a number, got '2'"),
        (lambda: PositionInterpolation(factor=True), "factor must be a number, got True"),
        (lambda: check_stack([ReRoPE]), "methods must be danlu methods such as"),
        (lambda: check_stack(["rerope"]), "methods must be danlu methods such as"),
        (lambda: parse_methods("logn:clip=2"), "clip must be True or False, got 2"),
        (lambda: parse_methods("rerope:window=2.5"), "window must be a whole number, got 2.5"),
    ],
)
def test_wrong_types_are_type_errors(build, sentence):
    with pytest.raises(TypeError, match=sentence):
        build()


def test_options_left_out_come_from_the_model():
    assert ReRoPE().resolve(256) == ReRoPE(window=128)
    assert LeakyReRoPE().resolve(256) == LeakyReRoPE(window=64)
    assert Window().resolve(256) == Window(window=256)
    assert LogN().resolve(256) == LogN(trained_length=256)
    assert NTK().resolve(256, 4096) == NTK(factor=16.0)
    assert NTK().resolve(256, 100) == NTK(factor=1.0)
    assert ReRoPE(window=255).resolve(256) == ReRoPE(window=255)
    for method in (DynamicNTK(), KeyNorm(), NTK(factor=3), Window(window=999), LogN(trained_length=9)):
        assert method.resolve(256) == method
    assert ReRoPE().resolve(2) == ReRoPE(window=1)
    assert resolve_stack(parse_methods("rerope+logn"), 64) == (ReRoPE(window=32), LogN(trained_length=64))


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (
            ReRoPE(window=256),
            "window must be in 1..255 for a model trained on 256 tokens, got 256; 64 to 128 work best",
        ),
        (LeakyReRoPE(window=300), "window must be in 1..255"),
        (NTK(), r"NTK needs factor, .* for texts of 2048 tokens write NTK\(factor=8\)"),
        (YaRN(), "YaRN needs factor"),
    ],
)
def test_methods_that_do_not_fit_the_model_are_refused(method, sentence):
    with pytest.raises(ValueError, match=sentence):
        method.resolve(256)


def test_a_model_trained_on_one_token_has_no_window_to_give():
    with pytest.raises(ValueError, match="window must be"):
        ReRoPE().resolve(1)


def test_methods_are_frozen_values():
    assert len({ReRoPE(window=4), ReRoPE(window=4), LeakyReRoPE(window=4)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        ReRoPE(window=4).window = 5


def test_the_standard_table_has_the_baselines():
    table = default_stacks()
    assert table["plain"] == ()
    assert table["window"] == (Window(),)
    for stack in table.values():
        check_stack(stack)
        resolve_stack(stack, 256, 4096)
