"""The journal of paid answers, used by several processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from rrhf.errors import UserError
from rrhf.stages.journal import JournalFile


@pytest.mark.parametrize("is_begun", [False, True])
def test_what_another_process_wrote_since_it_was_read_is_not_overlooked(
    is_begun: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "o.answers.jsonl"
    one, other = JournalFile(path), JournalFile(path)
    if is_begun:
        one.append({"request": 0})
        one.close()
    assert len(list(other.rows())) == is_begun
    one.append({"request": 1})
    with pytest.raises(UserError, match="another process is writing"):
        other.append({"request": 1})
    one.close()
    with pytest.raises(UserError, match="has written it in the meantime"):
        other.append({"request": 1})
    other.remove()
    assert path.exists() and "is left there" in caplog.text
    one.append({"request": 2})
    one.remove()
    assert not path.exists()
    one.append({"request": 3})  # begins anew
    one.close()
    assert [row["request"] for row in JournalFile(path).rows()] == [3]
