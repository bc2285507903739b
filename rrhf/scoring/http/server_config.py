"""The settings of `rrhf serve-reward`."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import ClassVar

from rrhf.errors import UserError
from rrhf.ranges import COUNT
from rrhf.scoring.config import RewardModelOptions


@dataclass
class ServeRewardConfig(RewardModelOptions):
    """Answer requests for scores over HTTP, with a reward model or any other scorer; clients are
    --scorer http://... and OpenRLHF."""

    scorer: str = field(
        kw_only=True,
        metadata={
            "names": "scorer",
            "positional": True,
            "aliases": ["reward_model_name_or_path", "reward_model"],
        },
    )
    """What scores; the forms are those of `rrhf score --scorer`."""

    host: str = "127.0.0.1"
    """Address to listen at. Any address that other machines reach needs --token_env."""

    port: int = 8000
    """Port to listen at; 0 = a free one."""

    token_env: str = ""
    """Environment variable with a token, which every request must have (Authorization: Bearer)."""

    max_request_megabytes: int = 16
    """Larger requests are refused."""

    RANGES: ClassVar = {"port": "[0, 65535]", "max_request_megabytes": COUNT}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.is_own and not self.token_env:
            raise UserError(
                f"--host {self.host}: other machines could reach it; name an environment variable "
                "with a token that requests must have: --token_env NAME"
            )

    @property
    def is_own(self) -> bool:
        """Whether only this machine can reach the address."""
        try:
            return self.host == "localhost" or ip_address(self.host).is_loopback
        except ValueError:
            return False
