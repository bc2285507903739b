"""The settings of `rrhf evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from rrhf.data.columns import DataOptions
from rrhf.errors import UserError
from rrhf.evaluation.measure import CONFIDENCE, MAX_UNSCORED_FRACTION, RESAMPLES
from rrhf.evaluation.metrics import METRICS
from rrhf.generation.build import ENGINES, EngineSpec, require_used
from rrhf.generation.params import FilterOptions, SamplingParams, check_params
from rrhf.ranges import COUNT, INDEX, SEED, SHARE
from rrhf.scoring.config import RewardModelOptions
from rrhf.worlds import WORLDS


@dataclass(kw_only=True)
class EvaluateConfig(FilterOptions, RewardModelOptions, DataOptions):
    """Measure a policy, or existing responses, on held-out prompts; the results are rows that
    `rrhf compare` puts into a table."""

    output_dir: str = field(metadata={"names": "output folder"})
    """Folder for the rows: NAME.json and NAME.samples.jsonl."""

    prompts: str = field(metadata={"names": "data"})
    """Held-out prompts: a file, a registered name, a dataset or package.module:name, as
    name[:proportion[:path]]. Human responses that come with them serve as references and pairs."""

    model_name_or_path: str = field(default="", metadata={"names": "engine's model"})
    """The policy to measure: a model folder, a run folder, or a hub name."""

    engine: str = field(default="local", metadata={"registry": ENGINES})
    """What generates the policy's responses: local = the model in this process; vllm = a vLLM
    server that is running; openai_server = any server of OpenAI's API; package.module:name = your
    own engine. A baseline's responses are always generated with local."""

    engine_settings: Any = field(default=None, metadata={"settings_of": "engine"})

    metrics: tuple[str, ...] = field(default=(), metadata={"registry": METRICS})
    """Metrics to measure, separated by commas; empty = all whose inputs are given."""

    responses: str = field(default="", metadata={"names": "responses"})
    """Responses to measure instead of a policy: a candidate file, or the word dataset for the
    responses that come with the prompts."""

    response_source: str = ""
    """With responses: measure only responses from this source, such as human:chosen; empty =
    all."""

    name: str = ""
    """Name of the row; empty = derived from the folder's name."""

    scorer: str = field(
        default="",
        metadata={"names": "scorer", "aliases": ["reward_model_name_or_path", "reward_model"]},
    )
    """What scores the responses: a reward model's folder or run, function:module:name, gold:WORLD,
    package.module:name of your own Scorer, judge:PRESET#model=NAME, http://HOST:PORT/PATH, or
    several as one (mean:A,B); empty = no reward is measured."""

    gold: str = "auto"
    """The world whose true preference is measured: its name, or package.module:name of your own
    world; auto = the world that the prompts come from, if any; none = no world."""

    reference_model_name_or_path: str = field(default="", metadata={"names": "model"})
    """The reference policy for ppl_reference and KL, usually the SFT model; empty = neither is
    measured."""

    baseline: str = field(default="", metadata={"names": "model or file"})
    """What the responses are compared with in win rates: a policy's folder or a candidate file. The
    baseline is measured too, once for each output_dir, so that `rrhf compare` can show gains."""

    decoding: Literal["both", "greedy", "sample"] = "both"
    """How a policy answers: by sampling, greedily, or both. Each gets its own row; a greedy row has
    "greedy" in its name."""

    best_of_n: int = 1
    """If above 1: of every best_of_n samples, only the sample with the highest score is measured
    (sampled decoding only)."""

    num_prompts: int = 0
    """Use only this many prompts, the same prompts for every policy; 0 = all."""

    samples_per_prompt: int = 1
    """Number of sampled responses to each prompt; a prompt's value is their mean."""

    max_new_tokens: int = 128
    """Maximum number of tokens in a response, EOS included."""

    max_prompt_tokens: int = 0
    """Longer prompts lose their oldest turns; 0 = the model's window is the limit."""

    temperature: float = 1.0
    """Divides the logits of sampled decoding."""

    stop_strings: tuple[str, ...] = ()
    """Further strings that end a response and are removed from it. A chat format adds its own."""

    seed: int = 1
    """Seed of all sampling."""

    chat_format: Literal["auto", "raw", "hh", "alpaca", "chat_template"] = "auto"
    """How conversations become text for policy and reference; auto = by the tokenizer's chat
    template, else as hh."""

    human_responses: str = field(default="", metadata={"names": "data"})
    """Data for ppl_human; empty = the human responses that come with the prompts."""

    pairs: str = field(default="", metadata={"names": "data"})
    """Data for p_i accuracy; empty = the chosen and rejected responses
    that come with the prompts."""

    num_human_responses: int = 500
    """Number of rows to use of human_responses and of pairs, if they are given; 0 = all."""

    ppl_model_name_or_path: str = field(default="", metadata={"names": "model"})
    """The model of ppl_paper, such as openai-community/gpt2-medium; empty = no ppl_paper."""

    ppl_max_tokens: int = 0
    """How many tokens of a text ppl_paper reads; 0 = all. The RRHF paper's script probably read
    19."""

    confidence: float = CONFIDENCE
    """Confidence level of the intervals."""

    bootstrap_resamples: int = RESAMPLES
    """How often the prompts are resampled for an interval."""

    max_unscored_fraction: float = MAX_UNSCORED_FRACTION
    """Stop if the scorer fails on more than this share of the responses. Responses that exceed a
    reward model's window are not failures: they are left out and counted."""

    per_device_eval_batch_size: int = 32
    """Number of responses that are generated at the same time."""

    split: str | None = None
    """Split of a named dataset."""

    bf16: bool = False
    """Weights of all models in bfloat16: half the memory, numbers differ in the third digit."""

    attn_implementation: str = "sdpa"
    """Attention of all models: sdpa, eager or flash_attention_2."""

    trust_remote_code: bool = False
    """Run Python code from the models' folders; only if you trust their authors."""

    RANGES: ClassVar = {
        "best_of_n": COUNT,
        "samples_per_prompt": COUNT,
        "num_prompts": INDEX,
        "num_human_responses": INDEX,
        "max_prompt_tokens": INDEX,
        "ppl_max_tokens": INDEX,
        "bootstrap_resamples": COUNT,
        "per_device_eval_batch_size": COUNT,
        "max_unscored_fraction": SHARE,
        "confidence": "(0, 1)",
        "seed": SEED,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stop_strings = tuple(self.stop_strings)
        self.metrics = tuple(name for one in self.metrics for name in one.split(",") if name)
        for name in self.metrics:
            METRICS[name]  # raises an error if there is no such metric
        settings = self.engine_spec.settings
        if self.engine_settings is None and settings is not None:
            self.engine_settings = settings()
        require_used(self, "max_prompt_tokens")
        if bool(self.model_name_or_path) == bool(self.responses):
            raise UserError(
                "use either --model_name_or_path to measure a policy, or --responses to measure "
                "existing responses"
            )
        if self.gold not in ("auto", "none"):
            WORLDS[self.gold]  # raises an error if there is no such world
        if self.best_of_n > 1 and (not self.scorer or self.responses):
            raise UserError(
                f"best_of_n {self.best_of_n}: needs a policy and a scorer that chooses; add "
                "--model_name_or_path and --scorer"
            )
        if self.best_of_n > 1 and self.decoding == "greedy":
            raise UserError(
                f"best_of_n {self.best_of_n}: greedy decoding has only one answer; use another "
                "decoding, or leave best_of_n out"
            )
        check_params(self.params(greedy=False))

    @property
    def engine_spec(self) -> EngineSpec:
        """The registry's entry of the engine that generates the policy's responses."""
        return ENGINES[self.engine]

    @property
    def measured(self) -> str:
        """The policy or the responses to measure."""
        return self.model_name_or_path or self.responses

    @property
    def decodings(self) -> tuple[bool, ...]:
        """For each row of a policy, whether its responses are decoded greedily."""
        return {"greedy": (True,), "sample": (False,), "both": (False, True)}[self.decoding]

    def params(self, greedy: bool) -> SamplingParams:
        """Return the engine's settings for the greedy or the sampled row."""
        params = SamplingParams.of(self, num_return_sequences=self.samples_per_prompt)
        return params.greedy() if greedy else params
