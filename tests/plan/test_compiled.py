"""That compiling is said, once, and only where it happens."""

from numba import njit

from pipemoe.plan.compiled import on_first_compilation


def test_the_first_compilation_is_said():
    said = []

    @njit
    def one_more(n):
        return n + 1

    with on_first_compilation(lambda: said.append("compiling")):
        assert not said
        one_more(1)
        one_more(1.0)
    assert said == ["compiling"]
    with on_first_compilation(lambda: said.append("again")):
        one_more(2)
    assert said == ["compiling"]
