"""The settings of `rrhf score`, and the settings of local reward models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from rrhf.data.columns import DataOptions
from rrhf.errors import UserError
from rrhf.files import is_same_file, require_unpacked_output
from rrhf.models.forward.names import Layout
from rrhf.ranges import COUNT, INDEX, POSITIVE, SHARE, Ranged


@dataclass(kw_only=True)
class RemoteScorerOptions:
    """Where scorers on other machines may be."""

    scorer_hosts: tuple[str, ...] = ()
    """Hosts, other than this machine, that prompts and responses may be sent to for their scores
    (--scorer https://..., judge:...), such as scores.example.org."""


@dataclass
class RewardModelOptions(RemoteScorerOptions, Ranged):
    """How reward models in this process are loaded and run; your own scorer may use these settings
    too."""

    reward_format: Literal["standard", "trlx"] = "standard"
    """Layout of the reward model: standard (transformers' sequence classification) or trlx (keys
    transformer.* and v_head.weight, such as Dahoas/gptj-rm-static)."""

    reward_base: str | None = field(default=None, metadata={"names": "place"})
    """With trlx: folder with the base model's config.json and tokenizer, if the reward model's
    folder does not hold them."""

    score_at: Literal["last_token", "first_eos"] = "last_token"
    """The token whose score counts in a standard reward model; in trlx it is always the first
    EOS."""

    normalize: bool = True
    """Normalise scores with the reward model's own normaliser, if it has one."""

    reward_chat_format: Literal["auto", "raw", "hh", "alpaca", "chat_template"] = "auto"
    """How conversations become text for the reward model; auto = as in its training."""

    max_length: int = 0
    """Maximum number of tokens in prompt and response together; 0 = the model's window (trlx:
    1024)."""

    max_batch_tokens: int = 16384
    """Maximum number of tokens in a forward pass, padding included; lower it if memory runs out."""

    layout: Layout = "auto"
    """How a batch passes a model that scores responses: shared_prefix = each prompt once; auto =
    the fastest layout that supports the model."""

    bf16: bool = False
    """Load the reward model in bfloat16: half the memory, scores differ in the third digit."""

    attn_implementation: str = "sdpa"
    """Attention of the reward model: sdpa, eager or flash_attention_2."""

    trust_remote_code: bool = False
    """Run Python code from the model's folder; only if you trust its author."""

    trlx_double_blank: bool = False
    """With trlx: put a blank before a response even if it begins with one, as RRHF's script
    does."""

    RANGES: ClassVar = {"max_length": INDEX, "max_batch_tokens": COUNT}


@dataclass
class ScoreConfig(RewardModelOptions, DataOptions):
    """Score the responses in a file and write them to a candidate file with their scores."""

    input_file: str = field(
        kw_only=True, metadata={"names": "data", "positional": True, "aliases": ["data_path"]}
    )
    """The candidates: a candidate file, or other data with responses (pairs, HH)."""

    output_file: str = field(kw_only=True, metadata={"names": "output file", "positional": True})
    """The candidate file to write (.jsonl). Its manifest is written next to it, last."""

    scorer: str = field(
        kw_only=True,
        metadata={"names": "scorer", "aliases": ["reward_model_name_or_path", "reward_model"]},
    )
    """What scores: folder, run folder or hub name of a reward model; function:module:name, a Python
    function; package.module:name, a class of your own derived from rrhf.scoring.scorer.Scorer;
    gold:WORLD, a world's true preference; http://HOST:PORT/PATH, a server such as
    `rrhf serve-reward`; judge:PRESET#model=NAME, a language model; or several as one: mean:A,B,
    minimum:A,B, mean_minus_deviation:A,B or sum:0.7*A,0.3*B."""

    only_missing: bool = False
    """Keep existing scores and score only the other candidates."""

    max_unscored_fraction: float = 0.01
    """Stop if the scorer fails on more than this share of the candidates. Candidates that exceed
    a reward model's window are not failures: they get no score and are counted separately."""

    prompts_per_chunk: int = 64
    """Number of prompts that are scored together; a killed command loses the scores of at most this
    many prompts."""

    wait_seconds: float = 3600.0
    """With several processes: stop waiting for the other processes if none has written a row for
    this many seconds."""

    RANGES: ClassVar = {
        "max_unscored_fraction": SHARE,
        "prompts_per_chunk": COUNT,
        "wait_seconds": POSITIVE,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require_unpacked_output(self.output_file)
        if is_same_file(self.output_file, self.input_file):
            raise UserError(
                f"output_file {self.output_file}: is also the input file; choose another"
            )
