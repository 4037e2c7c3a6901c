import logging
from pathlib import Path
from types import SimpleNamespace

from danlu.kernels.compiling import announce


def _loop(folder, signatures=()):
    def square(x):
        return x * x

    return SimpleNamespace(py_func=square, signatures=list(signatures), stats=SimpleNamespace(cache_path=str(folder)))


def test_only_a_loop_that_has_to_be_compiled_is_announced(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "danlu.kernels")
    loop = _loop(tmp_path)
    announce(loop)
    assert [record.message for record in caplog.records] == [
        f"compiling square for this machine, some seconds, once; it is kept in {tmp_path}"
    ]
    caplog.clear()
    announce(_loop(tmp_path, ["int64"]))  # loaded already
    (tmp_path / f"test_compiling.square-{loop.py_func.__code__.co_firstlineno}.py311.nbi").touch()
    announce(loop)  # kept by an earlier process
    assert caplog.records == []


def test_names_of_kept_loops_are_those_that_numba_gives():
    from danlu.kernels.viterbi import empty_ring

    empty_ring(3)
    function = empty_ring.py_func
    folder, line = empty_ring.stats.cache_path, function.__code__.co_firstlineno

    assert list(Path(folder).glob(f"viterbi.empty_ring-{line}.*.nbi"))
