"""Hard caps on requests, tokens and cost, checked before a request is sent.

A request reserves the most that it can cost; its reply replaces the reservation by what the server
reports. A request whose outcome is unknown (a timeout, a cut body, a kill) keeps its reservation,
because the server may bill it. So the caps hold at every moment, and over all runs of a command.
"""

from __future__ import annotations

from dataclasses import dataclass

from rrhf.endpoints.settings import EndpointSettings
from rrhf.errors import UserError


@dataclass
class Spent:
    """Requests sent, and tokens of prompts and responses."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def add(self, other: Spent, sign: int = 1) -> None:
        self.requests += sign * other.requests
        self.input_tokens += sign * other.input_tokens
        self.output_tokens += sign * other.output_tokens


class Budget:
    """What was spent and what is reserved, against the caps.

    Attributes:
        spent: what finished requests cost, and what unknown ones may have cost.
        reserved: the most that requests in flight can cost.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        self._settings = settings
        self.spent, self.reserved = Spent(), Spent()

    def exceeded_by(self, request: Spent) -> str:
        """Return the cap that a further request could exceed, in words; "" if it fits."""
        after = Spent()
        for one in (self.spent, self.reserved, request):
            after.add(one)
        settings = self._settings
        tokens = after.input_tokens + after.output_tokens
        cost = settings.cost(after.input_tokens, after.output_tokens)
        if settings.max_requests and after.requests > settings.max_requests:
            return f"--max_requests {settings.max_requests}"
        if settings.max_total_tokens and tokens > settings.max_total_tokens:
            return f"--max_total_tokens {settings.max_total_tokens}"
        if settings.max_cost and cost > settings.max_cost:
            return f"--max_cost {settings.max_cost:g}"
        return ""

    def reserve(self, request: Spent) -> None:
        """Reserve the most that a request can cost."""
        self.reserved.add(request)

    def settle(self, request: Spent, cost: Spent) -> None:
        """Replace a reservation by what the request cost."""
        self.reserved.add(request, -1)
        self.spent.add(cost)

    def stop(self, cap: str, what_stands: str) -> UserError:
        """Return the error that ends a run at a cap."""
        return UserError(
            f"{cap}: the next request could pass it ({self.describe()}); {what_stands}; raise the "
            "limit, and the same command continues"
        )

    def describe(self) -> str:
        """Describe in words what was spent."""
        spent = self.spent
        words = (
            f"{spent.requests:,} requests, {spent.input_tokens:,} tokens of prompts and "
            f"{spent.output_tokens:,} of responses"
        )
        cost = self._settings.cost(spent.input_tokens, spent.output_tokens)
        return f"{words}, cost {cost:.4f}" if cost else words

    def as_dict(self) -> dict[str, float]:
        """Return what was spent, for manifests."""
        spent = self.spent
        cost = self._settings.cost(spent.input_tokens, spent.output_tokens)
        return {
            "requests": spent.requests,
            "input_tokens": spent.input_tokens,
            "output_tokens": spent.output_tokens,
            **({"cost": round(cost, 6)} if cost else {}),
        }
