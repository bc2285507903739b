"""What `rrhf generate` can be asked for; a field's docstring is its help text."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from rrhf.data.columns import ColumnOptions
from rrhf.data.mixing import require_not_read
from rrhf.data.prompt_text import prompt_text
from rrhf.errors import UserError
from rrhf.generation.build import ENGINES, EngineSpec
from rrhf.generation.params import SamplingParams, check_params
from rrhf.ranges import INDEX, POSITIVE, SEED, check_ranges
from rrhf.seals import EditedFiles


@dataclass(kw_only=True)
class SamplingOptions:
    """How responses are drawn, for how many prompts, and what is kept with them."""

    num_return_sequences: int = 4
    """Responses for each prompt."""
    max_new_tokens: int = 128
    """Longest response in tokens, its end included."""
    min_new_tokens: int = 1
    """A response may not end before it has this many tokens."""
    do_sample: bool = True
    """Draw tokens; false = greedy decoding, or beam search with num_beams above 1."""
    temperature: float = 1.0
    """Divides the logits, in sampling and in beam search."""
    top_k: int = 0
    """Draw among the k likeliest tokens only; 0 = off."""
    top_p: float = 1.0
    """Draw among the likeliest tokens with this mass only; 1.0 = off."""
    repetition_penalty: float = 1.0
    """Lowers the logits of tokens that prompt or response hold already; 1.0 = off."""
    num_beams: int = 1
    """Beams of beam search; 1 = none. RRHF's paper uses 4."""
    num_beam_groups: int = 1
    """Groups of diverse beam search; 1 = plain beams. RRHF's paper uses 4."""
    diversity_penalty: float = 0.0
    """What a token costs for each beam of an earlier group that took it at the same step."""
    stop_strings: tuple[str, ...] = ()
    """Further strings before which a response ends; a chat format brings its own."""
    max_prompt_tokens: int = 256
    """Longer prompts lose whole turns on the left; where even the last does not fit, the prompt is
    left out and counted."""
    per_device_prompt_batch_size: int = 8
    """Prompts whose responses are written at the same time."""
    num_prompts: int = 0
    """Only the first so many prompts; 0 = all."""
    add_dataset_responses: bool = True
    """Add the source's own human:chosen and human:rejected after the samples."""
    deduplicate: bool = False
    """Keep one of equal responses to a prompt (equal but for white space); counted either way."""


@dataclass
class GenerateConfig(SamplingOptions, EditedFiles, ColumnOptions):
    """Sample responses to prompts with a policy and write a candidate file."""

    model_name_or_path: str = field(metadata={"names": "engine's model"})
    """The policy: a model folder, a run folder, or a hub name."""
    prompts: str = field(metadata={"names": "prompts"})
    """Where prompts come from: a file, a registered name, a dataset; name[:proportion[:path]],
    several with commas. Or a prompt itself, in several words, or as text:WORD."""
    output_file: str = field(metadata={"names": "output file"})
    """The candidate file to write (.jsonl); its manifest goes next to it, written last."""
    length_penalty: float = 1.0
    """Ended beams are ranked by score / length ** length_penalty."""
    seed: int = 0
    """Base of all randomness."""
    round: int = 0
    """Number of the sampling round: another round draws other responses from the same seed."""
    chat_format: Literal["auto", "raw", "hh", "alpaca", "chat_template"] = "auto"
    """How messages become text: auto, hh, alpaca, chat_template or raw."""
    split: str | None = None
    """Split of a named dataset."""
    policy: str = ""
    """Name of the policy in the sources of its responses; empty = from its folder's name."""
    engine: str = field(default="local", metadata={"registry": ENGINES})
    """Who writes: local = the model in this process; or one of your own."""
    engine_settings: Any = field(default=None, metadata={"settings_of": "engine"})
    bf16: bool = False
    """Weights in bfloat16."""
    attn_implementation: str = "sdpa"
    """Attention kernel: sdpa, eager or flash_attention_2."""
    trust_remote_code: bool = False
    """Run Python code that the model's folder brings."""
    wait_seconds: float = 3600.0
    """With several processes: give the others up when none has written a row for so long."""

    def __post_init__(self) -> None:
        self.stop_strings = tuple(self.stop_strings)
        self.sampling_params()
        check_ranges(self, {"seed": SEED, "round": INDEX, "wait_seconds": POSITIVE})
        for name, least in (
            ("per_device_prompt_batch_size", 1),
            ("max_prompt_tokens", 1),
            ("num_prompts", 0),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least {least}")
        settings = self.engine_spec.settings
        if self.engine_settings is None and settings is not None:
            self.engine_settings = settings()
        if self.output_file.endswith(".gz"):
            raise UserError(
                f"output_file {self.output_file}: is written as it comes, so it cannot be gzip; "
                "drop the .gz of its name"
            )
        if prompt_text(self.prompts) is None:
            require_not_read(self.output_file, self.prompts)

    def sampling_params(self) -> SamplingParams:
        """The settings of an engine.

        Raises:
            UserError: values out of range, or settings that exclude each other.
        """
        names = [item.name for item in fields(SamplingParams)]
        params = SamplingParams(**{name: getattr(self, name) for name in names})
        check_params(params)
        return params

    @property
    def engine_spec(self) -> EngineSpec:
        """Of the engine that writes."""
        return ENGINES[self.engine]

    @property
    def source(self) -> str:
        """What stands as the source of a sampled response."""
        folder = Path(self.model_name_or_path)
        name = folder.parent.name if folder.name == "policy" else folder.name
        return f"policy:{self.policy or name or folder.name}"
