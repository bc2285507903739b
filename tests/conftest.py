"""Fixtures for every test: data that may not be there, and small files."""

from __future__ import annotations

from pathlib import Path

import pytest

_SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the repository; the test skips where it is absent."""
    if not _SHARED_DATA.is_dir():
        pytest.skip(f"no data for checks at {_SHARED_DATA}")
    return _SHARED_DATA
