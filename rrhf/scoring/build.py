"""Builds the scorer that a name stands for.

The forms of a name are:

- `gold:NAME`: the true preference of a world, by its name or as `gold:package.module:name`;
- `function:module:name`: a Python function;
- `length:WORDS`, `repetition:N`: a rule;
- `http://HOST:PORT/PATH`, `https://...`: a server;
- `judge:PRESET`, `judge:FILE.yaml`: a language model that is asked for its judgement;
- `package.module:name`: the user's own scorer, as a class or as a function that makes the scorer;
- `mean:A,B`, `minimum:A,B`, `mean_minus_deviation:A,B`, `sum:0.7*A,0.3*B`: an ensemble
  (`rrhf.ensemble_names`);
- anything else: the folder or hub name of a reward model.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrhf.ensemble_names import RULES, parse_ensemble, scorer_names
from rrhf.models.reward_folders import config_folder, require_score_head, weight_files
from rrhf.registry import Registry
from rrhf.scoring.config import RewardModelOptions
from rrhf.scoring.own import OwnScorer, require_maker
from rrhf.scoring.scorer import Scorer, ScorerMaker
from rrhf.user_code import is_import_path

if TYPE_CHECKING:
    import torch

SCORERS: Registry[ScorerMaker] = Registry(
    "scorer",
    ScorerMaker,  # type: ignore[type-abstract]
    {
        "gold": "rrhf.scoring.gold:GoldScorer",
        "function": "rrhf.scoring.function:FunctionScorer",
        "length": "rrhf.scoring.rules:LengthScorer",
        "repetition": "rrhf.scoring.rules:RepetitionScorer",
        "http": "rrhf.scoring.http.scorer:HttpScorer",
        "https": "rrhf.scoring.http.scorer:HttpScorer",
        "judge": "rrhf.scoring.judges.scorer:JudgeScorer",
        "openai": "rrhf.scoring.judges.scorer:no_scorer",
    },
)
"""Prefix of a scorer's name -> the class that makes the scorer."""


def build_scorer(
    spec: str,
    options: RewardModelOptions | None = None,
    device: torch.device | str | None = None,
) -> Scorer:
    """Build the scorer that `spec` names.

    Args:
        spec: one of the forms that the module docstring lists.
        options: settings of a local reward model.
        device: where a local reward model runs; by default the first GPU or the CPU.

    Raises:
        UserError: the name is unknown, or the scorer reports a mistake.
    """
    options = options or RewardModelOptions()
    if ensemble := parse_ensemble(spec):
        from rrhf.scoring.ensemble import EnsembleScorer

        scorers = [build_scorer(member.scorer, options, device) for member in ensemble.members]
        return EnsembleScorer(ensemble, scorers, options.normalize)
    prefix, target = made_by(spec)
    if prefix:
        return _with_prefix(prefix, name=spec, target=target, options=options, device=device)
    if target:
        return OwnScorer(spec, SCORERS[spec], options=options, device=device)
    from rrhf.scoring.reward_model import RewardModelScorer, TrlxScorer

    kind = TrlxScorer if options.reward_format == "trlx" else RewardModelScorer
    return kind(spec, options, device)


def check_scorer(spec: str, options: RewardModelOptions | None = None) -> None:
    """Find mistakes in a scorer's name before any weights are loaded.

    Raises:
        UserError: there is no such world, function or folder, or the folder holds no reward model.
    """
    options = options or RewardModelOptions()
    check_scorer_place(spec, options)
    for name in scorer_names(spec):
        if not is_made(name) and options.reward_format != "trlx":
            from rrhf.models.reward_model import require_reward_model

            require_reward_model(name, options.trust_remote_code)


def check_scorer_place(spec: str, options: RewardModelOptions) -> None:
    """Do the part of `check_scorer` that needs neither torch nor a network.

    Raises:
        UserError: as in `check_scorer`.
    """
    if ensemble := parse_ensemble(spec):
        for member in ensemble.members:
            check_scorer_place(member.scorer, options)
        return
    prefix, target = made_by(spec)
    if prefix:
        _with_prefix(prefix, name=spec, target=target, options=options, device=None)
    elif target:
        require_maker(spec, SCORERS[spec])
    elif options.reward_format == "trlx":
        weight_files(spec)
        config_folder(spec, options.reward_base)
    else:
        require_score_head(spec)


def probe_scorer(spec: str, options: RewardModelOptions) -> None:
    """Check that the servers that a scorer asks are there; call it after `check_scorer_place`.

    Raises:
        UserError: a server cannot be reached, or does not answer as it should.
    """
    for name in scorer_names(spec):
        prefix, target = made_by(name)
        if prefix:
            _with_prefix(prefix, name=name, target=target, options=options, device=None).probe()


def _with_prefix(prefix: str, **offered: Any) -> Scorer:
    """Make a scorer with those of the offered arguments that its maker has."""
    maker = SCORERS[prefix]
    parameters = inspect.signature(maker).parameters
    return maker(**{name: value for name, value in offered.items() if name in parameters})


def is_made(spec: str) -> bool:
    """Whether the scorer is made by code, rather than loaded from a folder."""
    return bool(made_by(spec)[1])


def made_by(spec: str) -> tuple[str, str]:
    """Split the name of a scorer that code makes into its prefix and its target.

    The prefix is "" for a user's own scorer. Both are "" if `spec` names a reward model. The prefix
    of an ensemble is its rule.
    """
    prefix, _, rest = spec.partition(":")
    if rest and (prefix in SCORERS or prefix in RULES):
        return prefix, rest
    return "", spec if is_import_path(spec) and not Path(spec).exists() else ""


def users_target(spec: str) -> str | None:
    """Return the import path of the user's code in a scorer's name; None if it has no such path."""
    target = made_by(spec)[1]
    return target if is_import_path(target) else None
