"""What the page of the real run says of online methods, from settings alone."""

from __future__ import annotations

import sys
import types

import pytest
from real_run_online import _models

from rrhf.training.online.methods import OnlineMethod


@pytest.mark.parametrize(
    ("method", "share_trunk", "models"),
    [("ppo", False, 4), ("ppo", True, 3), ("rloo", None, 3), ("own_method:LEARNS_VALUES", None, 4)],
)
def test_a_critic_is_counted_for_every_method_that_has_one(
    method: str, share_trunk: bool | None, models: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = types.ModuleType("own_method")
    own.__dict__["LEARNS_VALUES"] = OnlineMethod(print, has_critic=True)
    monkeypatch.setitem(sys.modules, "own_method", own)
    told = _models({"method": method, "use_lora": False, "share_trunk": share_trunk})
    assert told.startswith(f"{models} (policy, reference") and ("critic" in told) is (models == 4)
