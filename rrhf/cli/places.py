"""Checks the paths and names in a command's settings before anything slow is loaded.

The `names` entry of a field's metadata says what the field's value is:

    model          a model folder, a run folder or a hub name
    engine's model a `model` if the engine loads one, otherwise any name
    scorer         a reward model, `gold:...`, `function:...`, or an ensemble such as `mean:A,B`
    data           a file, a registered name, or `package.module:name` of the user's own code, each
                   as `name[:proportion[:path]]`; several are separated by commas
    prompts        as `data`, or the text of a prompt
    responses      a candidate file, or the word `dataset`
    model or file  an existing file, otherwise a model
    row            a result of `rrhf evaluate`, or a folder of results
    run            the folder that a training writes
    output file    a file to write
    output folder  a folder to write
    output         a folder to write if the configuration has parts, otherwise a file
    place          any other path

Nothing here imports torch. Values that only transformers or a network can check (a hub name, a
config of an unknown kind) pass here and are checked later.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rrhf.cli.flags import parse_config
from rrhf.cli.terminal import is_first_process
from rrhf.data.columns import ColumnOptions, parse_columns
from rrhf.data.compressed_files import require_plain_input
from rrhf.ensemble_names import scorer_names
from rrhf.errors import UserError
from rrhf.manifests import COMPLETE, read_manifest
from rrhf.model_paths import accept_edited_models, check_model_path
from rrhf.os_errors import explained_os_errors, require_plain_output

if TYPE_CHECKING:
    from rrhf.scoring.config import RewardModelOptions

T = TypeVar("T")

_READ = ("model", "engine's model", "scorer", "responses", "model or file", "row", "place")


def read_settings(
    config_class: type[T],
    argv: Sequence[str],
    prog: str,
    fixed: Mapping[str, Any] | None = None,
) -> T:
    """Parse a command line into settings, and check every path in them.

    Args: as in `parse_config`.

    Raises:
        UserError: a mistake in a flag or in a path.
        SystemExit: after `--help`.
    """
    config = parse_config(config_class, argv, prog, fixed)
    check_places(config)
    return config


def check_places(config: Any, made_later: Sequence[str] = ()) -> None:
    """Check every path and name in a configuration.

    If a finished run is resumed, nothing will be trained, so its inputs are not checked.

    Args:
        config: the settings of any command.
        made_later: fields whose files an earlier stage of the same command will write.

    Raises:
        UserError: a path is missing, is of the wrong kind, or cannot be written.
    """
    for item in fields(config):
        is_required = item.default is MISSING and item.default_factory is MISSING
        if "names" in item.metadata and is_required and not getattr(config, item.name):
            raise UserError(f"--{item.name}: is empty; give a path or a name")
    found = [
        (kind, one)
        for item in fields(config)
        if (kind := item.metadata.get("names"))
        and (value := getattr(config, item.name))
        and item.name not in made_later
        for one in (value if isinstance(value, (list, tuple)) else [value])
    ]
    for kind, one in found:
        _require_name(one)
        for path in scorer_names(one) if kind == "scorer" else [one]:
            if kind in _READ:
                _require_reachable(path)
    accept_edited_models(config)
    resumes = getattr(config, "resume_from_checkpoint", False)
    if resumes and any(kind == "run" and _is_finished(path) for kind, path in found):
        return
    _check_packages(config)
    spec = getattr(config, "engine_spec", None)
    if spec is not None and spec.check is not None:
        spec.check(config.engine_settings, False)
    if isinstance(config, ColumnOptions):
        parse_columns(config.columns)
    for kind, one in found:
        if check := CHECKS.get(kind):
            check(one, config)
    for kind, one in found:  # last, because a judge that is asked may cost money
        if kind == "scorer":
            _probe_scorer(one, config)


def _require_name(text: str) -> None:
    """Refuse a path that has a NUL character or is not UTF-8; libraries cannot open such paths."""
    if "\0" in text:
        raise UserError(f"{text!r}: holds a NUL character, which no path can; remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{text!r}: is not UTF-8; use a path in UTF-8") from error


def _require_reachable(path: str) -> None:
    """Refuse a path that exists but may not be read; a missing path passes."""
    place = os.path.expanduser(path)
    try:
        is_folder = stat.S_ISDIR(os.stat(place).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if is_folder and not os.access(place, os.R_OK | os.X_OK, effective_ids=True):
        raise UserError(f"{path}: may not be read; check its permissions")


def _check_packages(config: Any) -> None:
    """Refuse a flag that needs an optional package that is not installed."""
    if getattr(config, "use_lora", False):
        _require_package("peft", "--use_lora", "install rrhf[peft]")
    attention = getattr(config, "attn_implementation", "")
    if attention.startswith("flash_attention"):
        fix = "install rrhf[flash] on a machine with CUDA, or use sdpa"
        _require_package("flash-attn", f"--attn_implementation {attention}", fix)
    if getattr(config, "draws_pictures", False):
        _require_package("matplotlib", "pictures", "install rrhf[report]")
    if (tracker := getattr(config, "report_to", "none")) != "none":
        fix = f"pip install {tracker}, or leave the flag out (metrics.jsonl is always written)"
        _require_package(tracker, "--report_to", fix)


def _require_package(name: str, place: str, fix: str) -> None:
    module = name.replace("-", "_")
    if sys.modules.get(module) is None and importlib.util.find_spec(module) is None:
        raise UserError(f"{place}: the package {name} is not installed; {fix}")


def _is_finished(run: str) -> bool:
    manifest = read_manifest(run) if Path(run).is_dir() else None
    return manifest is not None and manifest.get("status") == COMPLETE


def _check_engines_model(name: str, config: Any) -> None:
    spec = getattr(config, "engine_spec", None)  # `response-gen` leaves it to its first stage
    if spec is not None and spec.has_model:
        check_model_path(name)


def _check_scorer(spec: str, config: Any) -> None:
    from rrhf.scoring.build import check_scorer_place

    check_scorer_place(spec, _scorer_options(config))


def _probe_scorer(spec: str, config: Any) -> None:
    from rrhf.scoring.build import probe_scorer

    probe_scorer(spec, _scorer_options(config))


def _scorer_options(config: Any) -> RewardModelOptions:
    from rrhf.scoring.config import RewardModelOptions

    names = (item.name for item in fields(RewardModelOptions))
    given = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return RewardModelOptions(**given)


def _check_data(specs: str, config: Any, may_be_prompt: bool = False) -> None:
    from rrhf.data.mixing import check_sources
    from rrhf.data.prompt_text import as_file_of_prompts, as_prompt, prompt_text

    is_prompt = prompt_text(specs) is not None
    if is_prompt and may_be_prompt:
        return
    try:
        check_sources(specs, getattr(config, "split", None))
    except UserError as error:
        if may_be_prompt:
            raise UserError(f"{error}; a prompt itself is given as {as_prompt(specs)}") from error
        if is_prompt:
            raise UserError(
                f"{specs!r}: is a text, but a data source is needed; put prompts into a file, one "
                f"a line, and name that: {as_file_of_prompts(specs)}"
            ) from error
        raise


def _check_responses(spec: str, config: Any) -> None:
    require_plain_input(spec)
    if spec != "dataset" and not Path(spec).is_file():
        raise UserError(
            f"{spec}: there is no such file of responses; check the path, or give the word dataset "
            "for the responses that come with the prompts"
        )


def _check_model_or_file(path: str, config: Any) -> None:
    require_plain_input(path)
    if not Path(path).is_file():
        check_model_path(path)


def _check_row(path: str, config: Any) -> None:
    require_plain_input(path)
    if not Path(path).exists():
        raise UserError(
            f"{path}: there is no such file or folder; name what `rrhf evaluate` wrote, or the "
            "folder that holds it"
        )


def _check_run(path: str, config: Any) -> None:
    """Check that a run can be written.

    Only the first process checks that the folder is free, because it may have begun the run before
    the others check.
    """
    from rrhf.runs import RunFolder
    from rrhf.training.rounds.iterative_config import IterativeConfig
    from rrhf.training.rounds.rounds_folder import RoundsFolder

    _check_output(path, is_folder=True)
    if is_first_process() and not config.resume_from_checkpoint:
        kind = RoundsFolder if isinstance(config, IterativeConfig) else RunFolder
        kind(path).require_free()


def _check_output(path: str, is_folder: bool) -> None:
    """Refuse an output that could not be written; nothing is written to find out."""
    place = Path(path)
    if not is_folder:
        if path.endswith("/"):
            raise UserError(f"{path}: names a folder; give the name of a file in it")
        require_plain_output(place)
    with explained_os_errors(place):
        folder = place if is_folder else place.parent
        there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
        target = Path(os.path.realpath(place))
        is_dead_link = place.is_symlink() and not place.exists()
        may_be_made = not (is_folder or target.is_symlink()) and target.parent.is_dir()
        for number, where, applies in (
            (errno.ENOENT, place, is_dead_link and not may_be_made),
            (errno.ENOTDIR, place, is_folder and place.exists() and not place.is_dir()),
            (errno.EISDIR, place, not is_folder and place.is_dir()),
            (errno.ENOTDIR, there, not there.is_dir()),
            (errno.EACCES, there, not os.access(there, os.W_OK | os.X_OK)),
        ):
            if applies:
                raise OSError(number, os.strerror(number), str(where))


CHECKS: dict[str, Callable[[str, Any], None]] = {
    "model": lambda path, config: check_model_path(path),
    "engine's model": _check_engines_model,
    "scorer": _check_scorer,
    "data": _check_data,
    "prompts": partial(_check_data, may_be_prompt=True),
    "responses": _check_responses,
    "model or file": _check_model_or_file,
    "row": _check_row,
    "run": _check_run,
    "output file": lambda path, config: _check_output(path, is_folder=False),
    "output": lambda path, config: _check_output(path, is_folder=bool(config.parts)),
    "output folder": lambda path, config: _check_output(path, is_folder=True),
}
