"""Faults in the loop and in the checkpoints: forgotten, skipped, or done in a wrong order."""

from __future__ import annotations

from .apply import Mutant
from .core import LOOP

THE_LOOP, CHECKPOINT = "rrhf/training/core/loop.py", "rrhf/training/core/checkpoint.py"
CHECKPOINT_FOLDERS = "rrhf/training/core/checkpoint_folders.py"
SEALS, STAGED = "rrhf/sealed_folders.py", "rrhf/staged_folders.py"

WHOLE_RUNS = (
    "test_loop_order.py",
    LOOP + "test_a_run_leaves_policy_metrics_and_a_manifest_written_last",
    LOOP + "test_sigterm_leaves_a_checkpoint_and_the_rest_is_the_same",
    LOOP + "test_one_flipped_byte_is_found_and_the_older_checkpoint_taken",
)
RESUMED = (
    "test_loop_order.py",
    LOOP + "test_sigterm_leaves_a_checkpoint_and_the_rest_is_the_same",
    "test_ppo.py::test_resumed_equals_straight",
)
EVALUATED = (
    "test_loop_order.py",
    "test_best.py::test_the_best_can_be_the_outcome",
    "test_best.py::test_resumed_equals_straight_with_its_best",
    "test_best.py::test_evaluations_that_do_not_get_better_end_a_run",
    "test_best.py::test_ppo_keeps_its_best_policy_and_value",
)
ORDER = ("test_loop_order.py",)
CHECKPOINTS = ("test_checkpointer.py", "test_loop_order.py", "test_checkpoints.py")

LOOP_FAULTS = [
    Mutant(
        "the model trains as it was loaded, in eval mode",
        THE_LOOP,
        "    model.train()\n    optimizer",
        "    optimizer",
        ("test_loop_order.py", *WHOLE_RUNS, "test_sft.py", "test_rank.py"),
    ),
    Mutant(
        "a resumed run does not know that its step is saved",
        THE_LOOP,
        'self.step = self.saved_step = int(state["step"])',
        'self.step = int(state["step"])',
        (*RESUMED, "test_ppo_signals.py"),
    ),
    Mutant(
        "the evaluated step is forgotten on resuming",
        THE_LOOP,
        'self.evaluated_step = int(state["evaluated_step"])',
        "pass",
        (*EVALUATED, "test_ppo_signals.py"),
    ),
    Mutant(
        "the stream's tensors are not loaded",
        THE_LOOP,
        'stream.load_tensors(state["tensors"])',
        "pass",
        RESUMED,
    ),
    Mutant(
        "the learning rate begins anew on resuming",
        THE_LOOP,
        'self.scheduler.load_state_dict(state["scheduler"])',
        "pass",
        RESUMED,
    ),
    Mutant(
        "rows of undone steps stay in the metrics",
        THE_LOOP,
        'truncate_to(int(state.get("metrics_offset", 0)))',
        "sync()",
        (*RESUMED, "test_best.py::test_resumed_equals_straight_with_its_best"),
    ),
    Mutant(
        "a signal ends the run without a checkpoint",
        THE_LOOP,
        "except StoppedBySignal as stopped:\n            self._save(stream)\n",
        "except StoppedBySignal as stopped:\n",
        RESUMED,
    ),
    Mutant(
        "an end by patience at the last planned step counts as early",
        THE_LOOP,
        "stopped_early=self.step != stream.total_steps",
        "stopped_early=self.kept.is_over",
        EVALUATED,
    ),
    Mutant(
        "an evaluation that a signal cut short is not made up for",
        THE_LOOP,
        "if evaluate is not None and self.step and self._is_due(self.config.eval_steps):",
        "if False:",
        (*EVALUATED, "test_ppo_signals.py::test_a_signal_within_a_rollout_is_answered_at_once"),
    ),
    Mutant(
        "the outcome's tokens are those of the last step",
        THE_LOOP,
        "tokens += step_tokens",
        "tokens = step_tokens",
        (*EVALUATED, *WHOLE_RUNS, "test_phases.py"),
    ),
    Mutant(
        "steps are numbered from zero where they fail",
        THE_LOOP,
        "return self.update(batches, self.step + 1)",
        "return self.update(batches, self.step)",
        (LOOP + "test_a_loss_that_is_not_finite_stops_before_the_step",),
    ),
    Mutant(
        "the learning rate is never moved",
        THE_LOOP,
        "                self.scheduler.step()\n",
        "",
        (*WHOLE_RUNS, "test_optim.py", *EVALUATED),
    ),
    Mutant(
        "the stream does not hear of steps",
        THE_LOOP,
        "stream.observe(self.metrics)",
        "pass",
        (
            "test_ppo.py::test_an_update_that_goes_far_ends_its_rollout",
            "test_ppo.py::test_the_average_follows_the_policy",
        ),
    ),
    Mutant(
        "the last step is logged only where it is due",
        THE_LOOP,
        " or self.step == stream.total_steps:",
        ":",
        (*EVALUATED, *WHOLE_RUNS),
    ),
    Mutant(
        "policies on the way are not kept",
        THE_LOOP,
        "self.kept.after_step(self.step)",
        "pass",
        ("test_model_folders.py",),
    ),
    Mutant(
        "a signal is each rank's own affair",
        THE_LOOP,
        "int(self.parallel.max(stop.exit_code))",
        "int(stop.exit_code)",
        ORDER,
    ),
    Mutant(
        "there is no evaluation at the end",
        THE_LOOP,
        "            if evaluate is not None:\n"
        "                self._evaluate(evaluate, tracker, stream)\n"
        "        return tokens",
        "        return tokens",
        EVALUATED,
    ),
    Mutant(
        "a phase counts the tokens of all ranks as its own",
        THE_LOOP,
        "num_tokens // self.parallel.world_size",
        "num_tokens",
        ORDER,
    ),
    Mutant(
        "a step is evaluated as often as it is asked for",
        THE_LOOP,
        "if self.evaluated_step == self.step:",
        "if False:",
        EVALUATED,
    ),
    Mutant(
        "the model stays in eval mode after an evaluation",
        THE_LOOP,
        "        self.model.train()\n        if self.evaluation",
        "        if self.evaluation",
        EVALUATED,
    ),
    Mutant(
        "an evaluation builds a graph",
        THE_LOOP,
        "with torch.no_grad():\n            self.evaluation",
        "with torch.enable_grad():\n            self.evaluation",
        EVALUATED,
    ),
    Mutant(
        "every rank writes the metrics",
        THE_LOOP,
        "if self.parallel.is_main:\n            self.folder.metrics.append(row)",
        "if True:\n            self.folder.metrics.append(row)",
        ORDER,
    ),
    Mutant(
        "a checkpoint forgets the best model",
        THE_LOOP,
        '"best": self.kept.state_dict(),',
        '"best": {},',
        EVALUATED,
    ),
    Mutant(
        "a checkpoint forgets the table of samples",
        THE_LOOP,
        '"samples": {} if self.samples is None else self.samples.state_dict(),',
        '"samples": {},',
        ("test_ppo.py::test_resumed_equals_straight", "test_sample_table.py"),
    ),
    Mutant(
        "a checkpoint has no tensors of the stream",
        THE_LOOP,
        "stream.tensors() if isinstance(stream, LiveStream) else None,",
        "None,",
        RESUMED,
    ),
    Mutant(
        "checkpoints come a step early",
        THE_LOOP,
        "return every > 0 and self.step % every == 0",
        "return every > 0 and (self.step + 1) % every == 0",
        (*WHOLE_RUNS, *EVALUATED),
    ),
    Mutant(
        "an overtaken best is never cleared away",
        THE_LOOP,
        "self.kept.after_checkpoint()",
        "pass",
        ORDER,
    ),
    Mutant(
        "patience at its end does not end the run",
        THE_LOOP,
        "                if self.kept.is_over:\n                    break\n",
        "",
        EVALUATED,
    ),
]

CHECKPOINT_FAULTS = [
    Mutant(
        "every rank writes the first one's random state",
        CHECKPOINT,
        "_save_torch(_random_state(), staged / self._random_file(self._parallel.rank))",
        "_save_torch(_random_state(), staged / self._random_file(0))",
        CHECKPOINTS,
    ),
    Mutant(
        "every rank takes the first one's random state",
        CHECKPOINT,
        "newest / self._random_file(self._parallel.rank)",
        "newest / self._random_file(0)",
        CHECKPOINTS,
    ),
    Mutant(
        "the random state is not taken up",
        CHECKPOINT,
        "_set_random_state(torch.load(random, weights_only=True))",
        "torch.load(random, weights_only=True)",
        CHECKPOINTS,
    ),
    Mutant(
        "the optimiser begins anew",
        CHECKPOINT,
        "self._optimizer.load_state_dict(",
        "dict(",
        CHECKPOINTS,
    ),
    Mutant(
        "a checkpoint may lack weights that are trained",
        CHECKPOINT,
        "if saved != mine.keys():",
        "if saved - mine.keys():",
        CHECKPOINTS,
    ),
    Mutant(
        "the newest checkpoints are the ones deleted",
        CHECKPOINT,
        "complete[: -self._keep]",
        "complete[self._keep :]",
        CHECKPOINTS,
    ),
    Mutant(
        "one checkpoint more is kept than asked for",
        CHECKPOINT,
        "complete[: -self._keep]",
        "complete[: -self._keep - 1]",
        CHECKPOINTS,
    ),
    Mutant(
        "a torn checkpoint counts among those that are kept",
        CHECKPOINT,
        "complete = [path for path in checkpoints_by_step(self.folder) if is_complete(path)]",
        "complete = checkpoints_by_step(self.folder)",
        CHECKPOINTS,
    ),
    Mutant(
        "what was passed over stays for ever",
        CHECKPOINT,
        "self._passed_over = [self.folder / name for name in damaged]",
        "self._passed_over = []",
        CHECKPOINTS,
    ),
    Mutant(
        "one rank alone raises what it could not write",
        CHECKPOINT,
        "if not self._parallel.any(failure is not None):",
        "if failure is None:",
        CHECKPOINTS,
    ),
    Mutant(
        "sharded weights of another engine are loaded",
        CHECKPOINT,
        "!= self._parallel.is_sharded or (was_sharded and mine != its):",
        "!= self._parallel.is_sharded:",
        CHECKPOINTS,
    ),
    Mutant(
        "a step's folder from before is left where the new one should be",
        CHECKPOINT,
        "            if target.exists():",
        "            if target.is_file():",
        CHECKPOINTS,
    ),
    Mutant(
        "older checkpoints are deleted before the newer one is in place",
        CHECKPOINT,
        "            os.replace(staged, target)\n            sync_folder(self.folder)",
        "            self._delete_old()\n            os.replace(staged, target)\n"
        "            sync_folder(self.folder)",
        CHECKPOINTS,
        equivalent="of those that are whole the number to keep stays in any case, and after the "
        "renaming it is counted again",
    ),
    Mutant(
        "the name of a new checkpoint is not synced",
        CHECKPOINT,
        "            sync_folder(self.folder)\n",
        "",
        CHECKPOINTS,
    ),
    Mutant(
        "checkpoints are ordered as words: step 10 before step 8",
        CHECKPOINT_FOLDERS,
        "int(pair[0].group(1))",
        "pair[0].group(1)",
        CHECKPOINTS,
    ),
    Mutant(
        "the oldest checkpoint is taken",
        CHECKPOINT_FOLDERS,
        "for path in reversed(checkpoints_by_step(folder)):",
        "for path in checkpoints_by_step(folder):",
        CHECKPOINTS,
    ),
    Mutant(
        "files in folders of a checkpoint are in no manifest",
        SEALS,
        "yield from [inner] if inner.is_file() else _own_files(path)",
        "yield from [inner] if inner.is_file() else ()",
        CHECKPOINTS,
    ),
    Mutant(
        "files are not synced before they are vouched for",
        SEALS,
        "os.fsync(file.fileno())",
        "pass",
        CHECKPOINTS,
    ),
    Mutant(
        "a manifest without a status is complete",
        SEALS,
        'if manifest.get("status") != COMPLETE:',
        'if manifest.get("status", COMPLETE) != COMPLETE:',
        CHECKPOINTS,
    ),
    Mutant(
        "a file's hash is not compared",
        SEALS,
        'if _sha256(path) != seal["sha256"]:',
        "if False:",
        CHECKPOINTS,
    ),
    Mutant(
        "what a killed deletion left stays for ever",
        STAGED,
        "startswith((STAGED, DOOMED))",
        "startswith((STAGED,))",
        CHECKPOINTS,
    ),
    Mutant(
        "a model folder is deleted before the new one is in place",
        STAGED,
        "os.replace(target, old)",
        "shutil.rmtree(target)",
        CHECKPOINTS,
    ),
]
