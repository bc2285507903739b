"""The report of `paper/real_run.sh`: what was run, what came out, and what it leaves open.

Every figure is read from what the steps left behind; nothing is typed in by hand.
"""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from curves import draw_curves, read_curve
from real_run_online import finished, online_section, row_files
from safetensors import safe_open

from rrhf.data.candidate_files import read_candidate_sets
from rrhf.errors import UserError
from rrhf.evaluation.results import load_row
from rrhf.files import replaced_file
from rrhf.manifests import read_manifest
from rrhf.records import CHOSEN_SOURCE, REJECTED_SOURCE, CandidateSet
from rrhf.report.compare import CompareConfig, compare
from rrhf.report.table import format_number, markdown_lines

COLUMNS = [
    "reward",
    "win_reward",
    "tie_reward",
    "pi_accuracy",
    "kl",
    "ppl_reference",
    "ppl_human",
    "length",
    "distinct_2",
    "without_eos",
]
ROW_FILES = (
    "data_rejected",
    "data_chosen",
    "opponent",
    "base",
    "base_4_samples",
    "base_greedy",
    "base_best_of_4",
    "RRHF",
    "RRHF_4_samples",
    "RRHF_greedy",
)
LIMITS_WITHOUT_PPO = "- PPO is not part of this study.\n"
LIMITS = """\
- One seed of everything: intervals cover held-out prompts, not the luck of training and sampling.
- The reward is that of the small reward model above, which agrees with people only as often as its
  held-out accuracy says. A higher reward is not yet a better answer: no person and no stronger
  judge has read these responses, and no gold preference exists here as it does in the built-in
  world (`rrhf demo`).
- The base is an instruction-tuned model of 135 M parameters; nothing is said about larger ones.
- Responses were cut after 96 tokens and prompts with more than 160 tokens lost their oldest turns;
  many responses of the base do not end within 96 tokens (column "no EOS").
- Sampling, scoring and evaluation ran in bfloat16: the KL of the base to itself, which is zero,
  shows how much of a KL is rounding.
"""


def write_report(out: Path) -> Path:
    """Write `real_run.md` and its picture into the study's folder; returns the page.

    Raises:
        UserError: a step has not been done.
    """
    for need in ("reward/manifest.json", "rrhf/manifest.json", "candidates/train_data.json"):
        if not (out / need).exists():
            raise UserError(f"{out / need} is missing; run paper/real_run.sh to its end first")
    picture = draw_curves(
        {
            "reward model: loss": {"loss": read_curve(out / "reward", "reward_loss")},
            "reward model: accuracy": {"accuracy": read_curve(out / "reward", "accuracy")},
            "RRHF: losses": {
                "rank": read_curve(out / "rrhf", "rank_loss"),
                "SFT on the best": read_curve(out / "rrhf", "sft_loss"),
            },
            "RRHF: ranking accuracy of p_i": {
                "accuracy": read_curve(out / "rrhf", "ranking_accuracy")
            },
        },
        out / "real_run_curves.png",
    )
    comparison = compare(
        CompareConfig(
            rows=[str(out / "rows" / f"{name}.json") for name in (*ROW_FILES, *row_files(out))],
            baseline="base",
            columns=COLUMNS,
            # Given responses have no decoding, greedy another than sampling: that is the point.
            allow_mixed=True,
        )
    )
    model = (out / "steps" / "2-reward.command").read_text().split("--model_name_or_path ")[1]
    page = "\n".join(
        [
            "# RRHF and PPO on a real model and real preferences",
            "",
            f"Made by `bash paper/real_run.sh MODEL PAIRS OUT` on {_machine()}.",
            "",
            "## What was run",
            "",
            _steps(out),
            "",
            "## Reward model",
            "",
            _reward_model(out),
            "",
            "## Candidates",
            "",
            _candidates(out),
            "",
            "## RRHF",
            "",
            _rrhf(out, Path(model.split(" ")[0])),
            "",
            f"![training curves]({picture.name})",
            "",
            "## Evaluation",
            "",
            _evaluation_words(out),
            "",
            comparison.markdown.strip(),
            "",
            *online_section(out),
            "## What this does not show",
            "",
            LIMITS if finished(out) else LIMITS_WITHOUT_PPO + LIMITS,
        ]
    )
    target = out / "real_run.md"
    with replaced_file(target) as file:
        file.write(page.encode())
    return target


def _evaluation_words(out: Path) -> str:
    num_prompts = load_row(out / "rows" / "RRHF.json")["made_with"]["num_prompts"]
    return (
        f"{num_prompts} held-out prompts, one response each unless a row says 4 samples; mean "
        "[95 % bootstrap interval over prompts]. `opponent` is the base once more with another "
        "seed: how far it lies from `base` shows what one sample a prompt can say. Reward is in "
        "deviations of the reward model's scores on its training data; wins are by reward against "
        "`opponent`, ties counting half; `base best of 4` is chosen by the reward model itself."
    )


def _machine() -> str:
    threads = torch.get_num_threads()
    return f"a CPU ({platform.machine()}), {threads} thread(s), torch {torch.__version__}"


def _steps(out: Path) -> str:
    lines = []
    done = (out / "steps").glob("*.seconds")
    for path in sorted(done, key=lambda path: (int(path.stem.partition("-")[0]), path.stem)):
        command = (out / "steps" / f"{path.stem}.command").read_text().strip()
        lines.append([path.stem, path.read_text().strip(), f"`{_shortened(command, out)}`"])
    total = sum(int(seconds) for _, seconds, _ in lines)
    table = markdown_lines(["step", "seconds", "command"], lines)
    return (
        f"{table}\nIn all {total / 60:.0f} minutes. The machine did other work meanwhile, so the "
        "seconds say what order of time to expect, not how fast the program is."
    )


def _shortened(command: str, out: Path) -> str:
    """The command with this study's own folders as the script's arguments name them."""
    words = command.replace(str(out), "OUT").split(" ")
    shown = []
    for word in words:
        if word.endswith(("response_gen.sh", "train.sh")):
            word = word[word.find("data_generation") :] if "data_generation" in word else "train.sh"
        elif word.startswith("/"):
            word = "PAIRS" if "jsonl" in word else "MODEL"
        shown.append(word)
    return " ".join(shown).replace("\\", "")


def _reward_model(out: Path) -> str:
    manifest = read_manifest(out / "reward") or {}
    told = manifest["evaluation"]
    held_out = list(read_candidate_sets(out / "data" / "heldout.jsonl"))
    shorter, low, high, count = shorter_reply_accuracy(held_out)
    used = manifest["data"]["examples"]["prompts_used"]
    lines = [
        [
            "reward model",
            f"{told['accuracy']:.3f} [{told['accuracy_low']:.3f}, {told['accuracy_high']:.3f}]",
            f"{told['pairs']:.0f}",
        ],
        ["the shorter reply is chosen", f"{shorter:.3f} [{low:.3f}, {high:.3f}]", str(count)],
    ]
    table = markdown_lines(["rule", "held-out accuracy", "pairs"], lines)
    return (
        f"Trained on {used} pairs, {manifest['steps']} steps; no prompt of the held-out part "
        f"shares its first human turn with them.\n\n{table}\nHeld-out scores: mean "
        f"{told['score_mean']:.3f}, deviation {told['score_std']:.3f}, mean margin of the chosen "
        f"reply {told['score_margin']:.3f}."
    )


def shorter_reply_accuracy(sets: Sequence[CandidateSet]) -> tuple[float, float, float, int]:
    """How often people chose the shorter reply: accuracy, 95 % interval (Wilson), pairs.

    Replies of equal length count half.
    """
    right, count = 0.0, 0
    for s in sets:
        lengths = {c.source: len(c.response) for c in s.candidates}
        if CHOSEN_SOURCE not in lengths or REJECTED_SOURCE not in lengths:
            continue
        chosen, rejected = lengths[CHOSEN_SOURCE], lengths[REJECTED_SOURCE]
        right += 1.0 if chosen < rejected else 0.5 if chosen == rejected else 0.0
        count += 1
    low, high = wilson_interval(right, count)
    return right / max(count, 1), low, high, count


def wilson_interval(right: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval of Wilson (1927) for a share."""
    if count == 0:
        return 0.0, 1.0
    share = right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return middle - half, middle + half


def _candidates(out: Path) -> str:
    sets = list(read_candidate_sets(out / "candidates" / "train_data.json"))
    by_source: dict[str, list[float]] = {}
    best_by: dict[str, int] = {}
    for s in sets:
        scored = [c for c in s.candidates if c.score is not None]
        for candidate in scored:
            by_source.setdefault(candidate.source, []).append(float(candidate.score or 0.0))
        best = max(scored, key=lambda c: c.score or 0.0)
        best_by[best.source] = best_by.get(best.source, 0) + 1
    lines = [
        [
            source,
            str(len(scores)),
            format_number(sum(scores) / len(scores), 2),
            format_number(torch.tensor(scores).std().item(), 2),
            str(best_by.get(source, 0)),
        ]
        for source, scores in sorted(by_source.items())
    ]
    headings = ["source", "responses", "mean score", "deviation", "best of its prompt"]
    return f"{len(sets)} prompts.\n\n{markdown_lines(headings, lines)}"


def _rrhf(out: Path, start: Path) -> str:
    manifest = read_manifest(out / "rrhf") or {}
    ranking = read_curve(out / "rrhf", "ranking_accuracy")
    tenth = max(len(ranking) // 10, 1)

    def mean(points: Sequence[tuple[float, float]]) -> str:
        return format_number(sum(value for _, value in points) / len(points), 3)

    moved, largest = weights_moved(
        start / "model.safetensors", out / "rrhf" / "policy" / "model.safetensors"
    )
    return (
        f"{manifest['steps']} steps on all weights. Pairs that the policy's own p_i ranks as the "
        f"scores do: {mean(ranking[:tenth])} over the first tenth of the steps, "
        f"{mean(ranking[-tenth:])} over the last. The weights moved by {moved:.2e} of their length "
        f"(L2, all of them); most in `{largest[0]}`, by {largest[1]:.2e} of its own."
    )


def weights_moved(before: Path, after: Path) -> tuple[float, tuple[str, float]]:
    """|w' - w| / |w| over all weights of two safetensors files, and the largest of one tensor."""
    moved = total = 0.0
    largest = ("", 0.0)
    with safe_open(before, "pt") as old, safe_open(after, "pt") as new:
        for name in sorted(set(old.keys()) & set(new.keys())):
            start = old.get_tensor(name).double()
            gone = float((new.get_tensor(name).double() - start).square().sum())
            size = float(start.square().sum())
            moved, total = moved + gone, total + size
            own = math.sqrt(gone / size) if size else 0.0
            largest = max(largest, (name, own), key=lambda pair: pair[1])
    return math.sqrt(moved / total) if total else 0.0, largest


def main(argv: Sequence[str]) -> int:
    """`python paper/real_run_report.py OUT`."""
    if len(argv) != 1:
        raise UserError("usage: python paper/real_run_report.py OUT")
    write_report(Path(argv[0]))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
