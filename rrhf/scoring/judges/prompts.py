"""Writes the questions to a judge: a preset's prompt, or the user's own, filled in.

Shown texts stand between marks that are made from the texts themselves, so that a response cannot
close its own mark, and are put in at once, so that a placeholder inside a response stays text.
Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rrhf.data.conversations import conversation_of
from rrhf.errors import UserError
from rrhf.records import CandidateSet
from rrhf.scoring.judges.presets import Preset

_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


def own_prompt(path: str, preset: Preset) -> str:
    """Read the user's own prompt, which replaces the preset's; the form of the answer is added.

    Raises:
        UserError: the file cannot be read, or its placeholders are not those of the preset.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"prompt_file {path}: cannot be read ({error})") from error
    found, wanted = _PLACEHOLDER.findall(text), preset.placeholders
    listed = ", ".join(f"{{{name}}}" for name in wanted)
    for name in found:
        if name not in wanted:
            raise UserError(
                f"prompt_file {path}: the placeholder {{{name}}} is unknown; there are {listed}"
            )
    for name in wanted:
        if found.count(name) != 1:
            raise UserError(
                f"prompt_file {path}: holds {{{name}}} {found.count(name)} times; write each of "
                f"{listed} once"
            )
    return text.strip()


def question_text(prompt: str, preset: Preset, s: CandidateSet, responses: Sequence[str]) -> str:
    """Fill in a prompt.

    Args:
        prompt: the preset's prompt, or the user's.
        preset: the preset.
        s: the conversation.
        responses: the responses in the order in which they are shown.
    """
    turns = [f"{turn.role}: {turn.content}" for turn in conversation_of(s)]
    said = "\n\n".join(turns)
    mark = hashlib.sha256(json.dumps([said, *responses]).encode()).hexdigest()[:16]

    def shown(kind: str, text: str) -> str:
        return f"<{kind}-{mark}>\n{text}\n</{kind}-{mark}>"

    numbered = (f"Reply {n}:\n{shown('reply', text)}" for n, text in enumerate(responses, start=1))
    values: Mapping[str, str] = {
        "prompt": shown("conversation", said),
        "responses": "\n\n".join(numbered),
        **{
            name: shown("reply", text)
            for name, text in zip(("response_a", "response_b"), responses, strict=False)
        },
        "response": shown("reply", responses[0]),
    }
    question = _PLACEHOLDER.sub(lambda found: values[found.group(1)], prompt)
    return f"{question}\n\n{preset.answer_form.replace('{K}', str(len(responses)))}"
