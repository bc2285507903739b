"""The settings of `rrhf generate`; a field's docstring is its help text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from rrhf.data.columns import DataOptions
from rrhf.data.mixing import require_not_read
from rrhf.data.prompt_text import prompt_text
from rrhf.errors import UserError
from rrhf.files import require_unpacked_output
from rrhf.generation.build import ENGINES, EngineSpec, require_used
from rrhf.generation.params import FilterOptions, SamplingParams, check_params
from rrhf.ranges import COUNT, INDEX, POSITIVE, SEED


@dataclass(kw_only=True)
class SamplingOptions(FilterOptions):
    """How responses are sampled, for how many prompts, and which responses are kept."""

    num_return_sequences: int = 4
    """Number of responses to each prompt."""
    max_new_tokens: int = 128
    """Maximum number of tokens in a response, EOS included."""
    min_new_tokens: int = 1
    """A response may not end before it has this many tokens."""
    do_sample: bool = True
    """Sample tokens; false = greedy decoding, or beam search if num_beams is above 1."""
    temperature: float = 1.0
    """Divides the logits, in sampling and in beam search."""
    num_beams: int = 1
    """Number of beams; 1 = no beam search. RRHF's paper uses 4."""
    num_beam_groups: int = 1
    """Number of groups in diverse beam search; 1 = plain beam search. RRHF's paper uses 4."""
    diversity_penalty: float = 0.0
    """Subtracted from a token's score for each beam of an earlier group that chose the same token
    at the same step."""
    stop_strings: tuple[str, ...] = ()
    """Further strings that end a response and are removed from it. A chat format adds its own."""
    max_prompt_tokens: int = 256
    """Longer prompts lose their oldest turns; a prompt whose last turn does not fit is left out and
    counted."""
    per_device_prompt_batch_size: int = 8
    """Number of prompts that one device answers at the same time."""
    num_prompts: int = 0
    """Use only the first num_prompts prompts; 0 = all."""
    add_dataset_responses: bool = True
    """Append the responses that come with the prompts (human:chosen, human:rejected) to the
    samples."""
    keep_candidates: bool = False
    """Keep all responses that come with the prompts, such as those of another teacher, in front of
    the new ones."""
    deduplicate: bool = False
    """Of responses to a prompt that differ only in white space, keep one. Duplicates are counted
    either way."""

    RANGES: ClassVar = {
        "max_prompt_tokens": COUNT,
        "per_device_prompt_batch_size": COUNT,
        "num_prompts": INDEX,
    }


@dataclass
class GenerateConfig(SamplingOptions, DataOptions):
    """Sample responses to prompts with a policy and write a candidate file."""

    model_name_or_path: str = field(metadata={"names": "engine's model"})
    """The policy: a model folder, a run folder, or a hub name; with a server, the model's name
    there."""
    prompts: str = field(metadata={"names": "prompts"})
    """The prompts: a file, a registered name, a dataset or your own function (package.module:name),
    as name[:proportion[:path]], several separated by commas. Or one prompt as text: several words,
    or text:WORD."""
    output_file: str = field(metadata={"names": "output file"})
    """The candidate file to write (.jsonl). Its manifest is written next to it, last."""
    length_penalty: float = 1.0
    """Beam search ranks finished beams by score / length ** length_penalty."""
    seed: int = 0
    """Seed of all random numbers."""
    round: int = 0
    """Number of the sampling round: with the same seed, each round samples different responses."""
    chat_format: Literal["auto", "raw", "hh", "alpaca", "chat_template"] = "auto"
    """How conversations become text; auto = the tokenizer's chat template, or hh if the tokenizer
    has none."""
    split: str | None = None
    """Split of a named dataset."""
    policy: str = ""
    """Name of the policy in the sources of its responses; empty = derived from its folder's
    name."""
    engine: str = field(default="local", metadata={"registry": ENGINES})
    """What writes the responses: local = the model in this process; vllm = a vLLM server that is
    running; openai_server = any server of OpenAI's API; package.module:name = your own engine."""
    engine_settings: Any = field(default=None, metadata={"settings_of": "engine"})
    bf16: bool = False
    """Load the weights in bfloat16."""
    attn_implementation: str = "sdpa"
    """Attention kernel: sdpa, eager or flash_attention_2."""
    trust_remote_code: bool = False
    """Run Python code from the model's folder; only if you trust its author."""
    wait_seconds: float = 3600.0
    """With several processes: stop waiting for the other processes if none has written a row for
    this many seconds."""

    RANGES: ClassVar = {"seed": SEED, "round": INDEX, "wait_seconds": POSITIVE}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stop_strings = tuple(self.stop_strings)
        check_params(self.sampling_params())
        settings = self.engine_spec.settings
        if self.engine_settings is None and settings is not None:
            self.engine_settings = settings()
        require_used(self)
        if self.keep_candidates and not self.add_dataset_responses:
            raise UserError(
                "--add_dataset_responses False: --keep_candidates keeps all responses that come "
                "with the prompts; leave one of the two out"
            )
        require_unpacked_output(self.output_file)
        if prompt_text(self.prompts) is None:
            require_not_read(self.output_file, self.prompts)

    def sampling_params(self) -> SamplingParams:
        """Return these settings as the parameters of an engine."""
        return SamplingParams.of(self)

    @property
    def engine_spec(self) -> EngineSpec:
        """The registry's entry of the engine that generates the responses."""
        return ENGINES[self.engine]

    @property
    def source(self) -> str:
        """The source that is recorded with a sampled response."""
        spec = self.engine_spec
        if spec.author != "policy":  # a model's name on a server, not a folder
            return f"{spec.author}:{self.policy or self.model_name_or_path}"
        folder = Path(self.model_name_or_path)
        name = folder.parent.name if folder.name == "policy" else folder.name
        return f"{spec.author}:{self.policy or name or folder.name}"
