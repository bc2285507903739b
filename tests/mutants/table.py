"""All planted faults, in the order in which they are run."""

from __future__ import annotations

from .core import MEASURE_FAULTS, PARALLEL_FAULTS, UPDATE_FAULTS
from .endpoints import ENDPOINT_FAULTS
from .experience import EXPERIENCE_FAULTS
from .experience_stream import STREAM_FAULTS
from .hooks import HOOK_FAULTS
from .judges import JUDGE_FAULTS
from .kept_reference import KEPT_REFERENCE_FAULTS
from .losses import LOSS_FAULTS
from .parts import PART_FAULTS
from .reports import REPORT_FAULTS
from .rewards import REWARD_FAULTS
from .rollouts import ROLLOUT_FAULTS
from .runs import CHECKPOINT_FAULTS, LOOP_FAULTS
from .settings import SETTING_FAULTS
from .studies import STUDY_FAULTS
from .terms import MODEL_FAULTS, TERM_FAULTS
from .vllm import VLLM_FAULTS
from .worlds import WORLD_FAULTS

MUTANTS = [
    *UPDATE_FAULTS,
    *MEASURE_FAULTS,
    *HOOK_FAULTS,
    *PART_FAULTS,
    *TERM_FAULTS,
    *LOSS_FAULTS,
    *EXPERIENCE_FAULTS,
    *ROLLOUT_FAULTS,
    *STREAM_FAULTS,
    *MODEL_FAULTS,
    *LOOP_FAULTS,
    *CHECKPOINT_FAULTS,
    *PARALLEL_FAULTS,
    *REPORT_FAULTS,
    *SETTING_FAULTS,
    *WORLD_FAULTS,
    *STUDY_FAULTS,
    *KEPT_REFERENCE_FAULTS,
    *REWARD_FAULTS,
    *JUDGE_FAULTS,
    *ENDPOINT_FAULTS,
    *VLLM_FAULTS,
]
