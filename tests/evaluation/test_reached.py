"""What an evaluation found, in a sentence; and rows whose figures mean little."""

from rrhf.evaluation.reached import reached, signs_of_nothing


def row(name, place, rewards, ends=0.5, **metrics):
    mean = sum(rewards) / len(rewards)
    return {
        "name": name,
        "config": {"model_name_or_path": place},
        "made_with": {"num_prompts": len(rewards), "decoding": {"max_new_tokens": 16}},
        "metrics": {
            "reward": {"mean": mean, "low": mean - 1, "high": mean + 1},
            "without_eos": {"mean": ends},
            **{name: {"mean": value, "low": None, "high": None} for name, value in metrics.items()},
        },
        "per_prompt": {"reward": {"values": {str(i): r for i, r in enumerate(rewards)}}},
    }


BEFORE = row("sft", "m1", [0.0, 1.0], kl=0.0, ppl_human=9.0)
AFTER = row("rrhf", "m2", [1.0, 3.0], kl=0.25, win_reward=0.75, ppl_human=8.0)


def test_the_policy_is_told_next_to_its_baseline():
    assert reached([BEFORE, row("sft greedy", "m1", [0, 1]), AFTER, row("x", "m2", [0, 1])]) == (
        "rrhf against sft, 2 prompts: reward 2.00 [1.00, 3.00] (before: 0.50 [-0.50, 1.50]), "
        "wins by reward 0.75, KL 0.25"
    )


def test_without_a_baseline_it_is_told_alone():
    assert reached([AFTER]).startswith("rrhf, 2 prompts: reward 2.00 [1.00, 3.00], wins by")
    alone = {**AFTER, "made_with": {**AFTER["made_with"], "num_prompts": 1}}
    assert reached([alone]).startswith("rrhf, 1 prompt: reward")
    bare = AFTER | {"metrics": {}, "per_prompt": {}}
    assert reached([bare]) == "rrhf, 2 prompts: no scorer, gold or reference to measure by"
    assert signs_of_nothing([bare]) == []


def test_rows_that_cannot_show_anything_are_named_with_what_helps():
    assert signs_of_nothing([BEFORE, AFTER]) == []
    (endless,) = signs_of_nothing([row("a", "m", [0, 1], ends=1.0)])
    assert endless.startswith("a: no response ends: all were cut at --max_new_tokens 16")
    (tied,) = signs_of_nothing([row("a", "m", [2.0, 2.0])])
    assert tied.startswith("a: all rewards are equal (2)") and "--scorer" in tied
    assert signs_of_nothing([row("a", "m", [2.0])]) == []  # one prompt is not a tie
    given = row("data", "m", [0, 1], ends=1.0) | {"made_with": {"decoding": {"kind": "written"}}}
    assert signs_of_nothing([given]) == []
