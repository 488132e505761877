"""Asking a model of transformers, with or without an adapter, greedily."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

NEW_TOKENS = 64


def load_base(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model and its tokenizer, from an imported model's folder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), tokenizer


def with_adapters(model: Any, folders: Sequence[Path]) -> Any:
    """The model with PEFT folders attached, each under its folder's name; the first is used until another is set.

    PEFT puts them into the model itself; ``disable_adapter`` of what is returned leaves them out for a while.
    """
    first, *rest = folders
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT about transformers
        model = peft.PeftModel.from_pretrained(model, first, adapter_name=first.name)
        for folder in rest:
            model.load_adapter(folder, adapter_name=folder.name)
    return model.eval()


def prompt_tokens(tokenizer: Any, question: str) -> list[int]:
    """The question as the host's chat template renders it, with the default system message."""
    messages = [{"role": "user", "content": question}]
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    return ids


@torch.inference_mode()
def ask(model: Any, tokenizer: Any, questions: Sequence[str], new_tokens: int = NEW_TOKENS) -> list[str]:
    """The answers, each cut at ``new_tokens`` or where the model ends it."""
    prompts = [prompt_tokens(tokenizer, question) for question in questions]
    length = max(map(len, prompts))
    end = tokenizer.eos_token_id
    ids = torch.tensor([[end] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=end
        )
    return [tokenizer.decode(row[length:], skip_special_tokens=True) for row in out]
