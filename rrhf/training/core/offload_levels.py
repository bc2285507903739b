"""Names what can be moved off the GPU while it is not needed; `.offload` does the moving."""

from __future__ import annotations

from collections.abc import Collection

from rrhf.errors import UserError

LEVELS = ("freeze_model", "optimizer", "train_model")


def parse_levels(words: Collection[str]) -> frozenset[str]:
    """Parse names of levels, in any order and in one string or several; "none" = no level.

    Raises:
        UserError: a word is not a level.
    """
    asked = [word for text in words for word in text.replace(",", " ").split()]
    for word in asked:
        if word not in (*LEVELS, "none"):
            raise UserError(
                f"--offload_level {word}: choose any of {', '.join(LEVELS)}, in one string with "
                "spaces between them, or none"
            )
    if "none" in asked and len(asked) > 1:
        raise UserError(f"--offload_level {' '.join(asked)}: none cannot be combined with a level")
    return frozenset(asked) - {"none"}
