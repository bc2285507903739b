"""Loads the models and tokenizers of an evaluation, each once even if it has several roles."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

from rrhf.data.chat_format import ChatCodec
from rrhf.evaluation.config import EvaluateConfig
from rrhf.evaluation.likelihoods import LikelihoodReader
from rrhf.evaluation.paper_perplexity import PaperPerplexity
from rrhf.generation.build import LOCAL, EngineOptions, EngineSpec
from rrhf.generation.engine import GenerationEngine
from rrhf.model_paths import model_folder
from rrhf.models.loading import LoadOptions, load_causal_lm, load_tokenizer, resolve_device


class Models:
    """Loads models and tokenizers (by folder, run folder or hub name) when they are first used."""

    def __init__(self, config: EvaluateConfig) -> None:
        self.config = config
        self._loaded: dict[str, Any] = {}
        self.codec = cache(self._load_codec)

    def model(self, path: str) -> Any:
        folder = Path(model_folder(path))
        key = str(folder.resolve()) if folder.exists() else path
        if key not in self._loaded:
            model = load_causal_lm(path, LoadOptions.of(self.config, self.config.bf16))
            self._loaded[key] = model.to(resolve_device())  # type: ignore[arg-type]
        return self._loaded[key]

    def _load_codec(self, path: str) -> ChatCodec:
        tokenizer = load_tokenizer(path, self.config.trust_remote_code)
        return ChatCodec(tokenizer, self.config.chat_format)

    def reader(self, path: str, name: str = "") -> LikelihoodReader:
        codec, layout = self.codec(path), self.config.layout
        return LikelihoodReader(self.model(path), codec, name or path, layout=layout)

    def paper_perplexity(self, path: str) -> PaperPerplexity:
        return PaperPerplexity(
            self.model(path),
            load_tokenizer(path, self.config.trust_remote_code),
            self.config.ppl_max_tokens or None,
            model_folder(path),
            self.config.layout,
        )

    def engine(
        self, path: str, spec: EngineSpec = LOCAL, answers_file: Path | None = None
    ) -> GenerationEngine:
        config = self.config
        return spec.build(
            EngineOptions(
                path,
                partial(self.model, path),
                partial(self.codec, path),
                config.per_device_eval_batch_size,
                config.max_prompt_tokens or None,
                config.engine_settings,
                config.temperature,
                answers_file=answers_file,
            )
        )
