"""The longest runs of this folder begin with its first test: those that follow mostly wait, and leave them a core."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest

from tests.end_to_end.families import begun
from tests.end_to_end.live import Launched


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Launched]]:
    """The runs of test_families.py, going on."""
    with begun(tmp_path_factory.mktemp("families")) as runs:
        yield runs


@pytest.fixture(scope="session", autouse=True)
def begun_early(request: pytest.FixtureRequest) -> None:
    """Only if a test of this session wants them."""
    if any("families" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("families")
