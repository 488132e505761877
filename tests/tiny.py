"""Tiny random models of the Llama family, saved as Hugging Face folders, with their oracles."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from realm.engine.core import EngineCore
from realm.engine.loading import EngineOptions, load_engine
from realm.engine.runners.cpu import CpuRunner
from realm.engine.workers import WORKER_SHIFT
from realm.messages import CallFailed, EngineOp, EngineResult, Forward, ForwardDone, OpenSequence, SamplingParams

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-untied": ("Llama", {"tie_word_embeddings": False}),
    "llama-rope-scaled": ("Llama", {"rope_parameters": LLAMA3_SCALING}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", {"head_dim": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
}


def make_model(
    folder: Path, variant: str = "llama-tied", seed: int = 0, **changes: Any
) -> transformers.PreTrainedModel:
    """Write a random model to ``folder`` and return transformers' model of it, float32.

    ``changes`` are fields of transformers' configuration beside those of the variant.
    """
    family, own = VARIANTS[variant]
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **own, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.copy_(parameter + 0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def oracle_logits(model: transformers.PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """Logits [n, vocab] at every position, float32."""
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float()


def make_engine(folder: Path, *, clock: Callable[[], float] = time.monotonic, **options: Any) -> EngineCore:
    """A float32 engine on the CPU; ``options`` are fields of :class:`EngineOptions`."""
    defaults: dict[str, Any] = {"device": "cpu", "dtype": "float32", "pages": 64, "token_budget": 64}
    return load_engine(folder, EngineOptions(**{**defaults, **options}), clock=clock)


def kv_layers(engine: EngineCore) -> list[torch.Tensor]:
    """The KV cache of an engine on the CPU: of each layer keys and values [2, kv_heads, pages + 1, 16, head_dim]."""
    runner = engine.runner
    assert isinstance(runner, CpuRunner)
    return runner._device._cache.layers


def pack(tokens: list[int]) -> bytes:
    return b"".join(token.to_bytes(4, "little") for token in tokens)


class Driver:
    """A plain Python caller of an engine: what a worker does, without guests."""

    WORKER = 7

    def __init__(self, engine: EngineCore) -> None:
        self.engine = engine
        self._calls = 0
        self._seqs = self.WORKER << WORKER_SHIFT
        self.answers: dict[int, EngineResult] = {}

    def open(self, tenant: str = "a", run: int = 1) -> int:
        self._seqs += 1
        self.op(OpenSequence(self._seqs, tenant, run))
        return self._seqs

    def fresh(self) -> int:
        """A sequence number for a fork."""
        self._seqs += 1
        return self._seqs

    def op(self, op: EngineOp) -> None:
        self.engine.submit(self.WORKER, [op])

    def ask(self, seq: int, tokens: list[int], sampling: SamplingParams | None = None, *, logits: bool = False) -> int:
        self._calls += 1
        self.op(Forward(self._calls, seq, pack(tokens), sampling, logits))
        return self._calls

    def step(self) -> None:
        for result in self.engine.step().get(self.WORKER, []):
            self.answers[result.call] = result
        self.engine.check()

    def wait(self, *calls: int) -> list[ForwardDone]:
        while any(call not in self.answers for call in calls):
            assert self.engine.has_work(), "calls are pending but the engine has nothing to do"
            self.step()
        results = [self.answers.pop(call) for call in calls]
        for result in results:
            assert isinstance(result, ForwardDone), result
        return results  # type: ignore[return-value]

    def wait_failed(self, call: int) -> CallFailed:
        while call not in self.answers:
            assert self.engine.has_work()
            self.step()
        result = self.answers.pop(call)
        assert isinstance(result, CallFailed), result
        return result

    def greedy(self, prompt: list[int], count: int, tenant: str = "a") -> list[int]:
        """``count`` greedy tokens after ``prompt``, alone."""
        seq, tokens, asked = self.open(tenant), [], prompt
        for _ in range(count):
            (done,) = self.wait(self.ask(seq, asked, SamplingParams()))
            tokens.append(done.token)
            asked = [done.token]
        return tokens
