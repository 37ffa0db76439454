"""Which lines of a log say why its process ended."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from prl.supervise.excerpt import excerpt


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["(it wrote nothing)"]),
        ("\n".join(map(str, range(20))), [str(n) for n in range(12, 20)]),
        (
            'noise\nTraceback (most recent call last):\n  File "a.py", line 1, in f\n    f()\n'
            '  File "b.py", line 2, in g\n    g()\nValueError: no',
            ['File "b.py", line 2, in g', "ValueError: no"],
        ),
        (
            "  + Exception Group Traceback (most recent call last):\n"
            '  |   File "a.py", line 1, in <module>\n'
            "  | ExceptionGroup: unhandled errors in a TaskGroup (1 sub-exception)\n"
            "  +-+---------------- 1 ----------------\n"
            "    | Traceback (most recent call last):\n"
            '    |   File "b.py", line 3, in g\n'
            "    |     raise ValueError(1)\n"
            "    | ValueError: 1\n"
            "    +------------------------------------\n",
            ['File "b.py", line 3, in g', "ValueError: 1"],
        ),
    ],
)
def test_an_excerpt_says_why(tmp_path: Path, text: str, expected: list[str]) -> None:
    path = tmp_path / "x.log"
    path.write_text(text)
    assert excerpt(path).splitlines() == [f"    {line}" for line in expected]


def test_an_excerpt_reads_the_end_of_a_long_log(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_bytes(b"\xff" * 100_000 + os.linesep.encode() + b"the end\n")
    assert excerpt(path).splitlines()[-1] == "    the end"
