"""A ``tokenizer.json`` from the vocabulary inside a GGUF file.

A GGUF names its pre-tokenizer instead of holding it (``tokenizer.ggml.pre``); :data:`PRE_TOKENIZERS`
has the definitions from the models' own published ``tokenizer.json``. An unknown name is refused,
because a wrong split gives wrong tokens without any error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from realm.errors import RealmError

_UNKNOWN, _CONTROL, _USER, _BYTE = 2, 3, 4, 6
"""Values of ``tokenizer.ggml.token_type`` (1 is normal, 5 unused)."""

Json = dict[str, Any]


@dataclass(frozen=True)
class PreTokenizer:
    """How one model cuts text before byte-pair merging.

    Attributes:
        regexes: cut in turn, each match and each gap a piece; then every piece becomes bytes.
        digits: cut off each digit, before anything else.
        gpt2: use the byte-level step's own regular expression (GPT-2's).
        normalizer: the ``tokenizers`` normalizer, if any.
        whole_words: a piece that is a token as it stands is not split by the merges.
    """

    regexes: tuple[str, ...] = ()
    digits: bool = False
    gpt2: bool = False
    normalizer: str | None = None
    whole_words: bool = False

    def definition(self) -> Json:
        """The ``pre_tokenizer`` of ``tokenizer.json``."""
        steps: list[Json] = [{"type": "Digits", "individual_digits": True}] if self.digits else []
        steps += [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
            for regex in self.regexes
        ]
        steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": self.gpt2})
        return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = PreTokenizer(gpt2=True)
_LLAMA3 = PreTokenizer((_WORDS + r"\p{N}{1,3}" + _REST,), whole_words=True)
_QWEN2 = PreTokenizer((_WORDS + r"\p{N}" + _REST,), normalizer="NFC")

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "smollm": PreTokenizer(digits=True, gpt2=True),
    "gpt-2": _GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    # llama.cpp's stand-in for models of unknown origin; no model publishes it.
    "default": PreTokenizer(
        (
            r"[\p{P}\$\+<=>\^~\|]+",
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
            r"\p{N}+",
            r"[0-9][0-9][0-9]",
        )
    ),
}


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer part of a GGUF's metadata, checked."""

    tokens: list[str]
    types: list[int]
    special_ids: dict[str, int]
    end_ids: tuple[int, ...]


def read_vocabulary(fields: Json, vocab_size: int) -> Vocabulary:
    """Check tokens, types and special ids.

    Args:
        fields: the GGUF's metadata.
        vocab_size: rows of the embedding.

    Raises:
        RealmError: ``model_invalid`` naming the field.
    """
    key = "tokenizer.ggml.tokens"
    tokens = fields.get(key)
    if not isinstance(tokens, list) or not tokens:
        raise _invalid(key, "is missing or is not a list of texts")
    if len(tokens) > vocab_size:
        raise _invalid(key, f"has {len(tokens)} tokens, but the embedding has {vocab_size} rows")
    if len(set(tokens)) != len(tokens):
        raise _invalid(key, "has the same token twice")
    types = _numbers(fields, "tokenizer.ggml.token_type", len(tokens), default=1)
    special: dict[str, int] = {}
    for name in ("bos", "eos", "unknown", "padding"):
        token = _token_id(fields, f"tokenizer.ggml.{name}_token_id", len(tokens))
        if token is not None:
            special[name] = token
    ends = [
        special.get("eos"),
        *(_token_id(fields, f"tokenizer.ggml.{n}_token_id", len(tokens)) for n in ("eot", "eom")),
    ]
    return Vocabulary(tokens, [int(t) for t in types], special, tuple(dict.fromkeys(e for e in ends if e is not None)))


def build_tokenizer(fields: Json, vocabulary: Vocabulary) -> Json:
    """The content of ``tokenizer.json``.

    Raises:
        RealmError: ``model_unsupported`` naming the field for a kind of tokenizer that is not known,
            ``model_invalid`` for contradictions.
    """
    model = fields.get("tokenizer.ggml.model")
    if model == "gpt2":
        return _byte_level(fields, vocabulary)
    if model == "llama":
        return _sentence_piece(fields, vocabulary)
    raise RealmError(
        "model_unsupported",
        f"GGUF: tokenizer.ggml.model is {str(model)[:100]!r}; supported are 'gpt2' and 'llama'",
        details={"field": "tokenizer.ggml.model"},
    )


def build_settings(fields: Json, vocabulary: Vocabulary, context_length: int) -> Json:
    """The content of ``tokenizer_config.json``: special tokens and the chat template.

    Raises:
        RealmError: ``model_invalid`` naming ``tokenizer.chat_template``.
    """
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    settings: Json = {names[name]: vocabulary.tokens[token] for name, token in vocabulary.special_ids.items()}
    template = fields.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise _invalid("tokenizer.chat_template", "is not a text")
    if template is not None:
        settings["chat_template"] = template
    return settings | {
        "add_bos_token": bool(
            fields.get("tokenizer.ggml.add_bos_token", fields.get("tokenizer.ggml.model") == "llama")
        ),
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _byte_level(fields: Json, vocabulary: Vocabulary) -> Json:
    key = "tokenizer.ggml.pre"
    name = fields.get(key)
    pre = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if pre is None:
        known = ", ".join(PRE_TOKENIZERS)
        raise RealmError(
            "model_unsupported",
            f"GGUF: {key} is {str(name)[:100]!r}; supported are {known}",
            details={"field": key},
        )
    return _definition(
        vocabulary,
        normalizer={"type": pre.normalizer} if pre.normalizer else None,
        pre_tokenizer=pre.definition(),
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        model={"merges": _merges(fields, vocabulary), "ignore_merges": pre.whole_words},
    )


def _merges(fields: Json, vocabulary: Vocabulary) -> list[list[str]]:
    key = "tokenizer.ggml.merges"
    lines = fields.get(key)
    if not isinstance(lines, list):
        raise _invalid(key, "is missing or is not a list of texts")
    known = set(vocabulary.tokens)
    merges: list[list[str]] = []
    for number, line in enumerate(lines):
        # A token is never empty, so the separator is a space after the first character.
        cut = line.find(" ", 1)
        left, right = line[:cut], line[cut + 1 :]
        if cut < 0 or left not in known or right not in known or left + right not in known:
            raise _invalid(key, f"has entry {number}, {line[:100]!r}, which does not join two tokens into a token")
        merges.append([left, right])
    return merges


def _sentence_piece(fields: Json, vocabulary: Vocabulary) -> Json:
    """SentencePiece's BPE: the best-scored joined piece is merged first, unknown characters become bytes."""
    tokens, types = vocabulary.tokens, vocabulary.types
    key = "tokenizer.ggml.scores"
    scores = [float(score) for score in _numbers(fields, key, len(tokens), default=None)]
    if not all(math.isfinite(score) for score in scores):
        raise _invalid(key, "has a score that is not finite")
    bytes_there = {tokens[at] for at, kind in enumerate(types) if kind == _BYTE}
    if bytes_there != {f"<0x{byte:02X}>" for byte in range(256)}:
        raise _invalid("tokenizer.ggml.token_type", "does not have the 256 byte tokens <0x00> to <0xFF>")
    unknown = [at for at, kind in enumerate(types) if kind == _UNKNOWN]
    if len(unknown) != 1:
        raise _invalid("tokenizer.ggml.token_type", f"marks {len(unknown)} tokens as unknown; exactly 1 is needed")
    if _USER in types:
        # SentencePiece puts no space in front of text after such a token; the library's pipeline would.
        raise RealmError(
            "model_unsupported",
            f"GGUF: tokenizer.ggml.token_type marks {tokens[types.index(_USER)]!r} as user-defined, "
            "which is not supported for SentencePiece",
            details={"field": "tokenizer.ggml.token_type"},
        )
    pieces = {token: scores[at] for at, token in enumerate(tokens) if types[at] == 1}
    merges = [
        (-score, piece[:cut], piece[cut:])
        for piece, score in pieces.items()
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    merges.sort(key=lambda merge: merge[0])
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    steps: list[Json] = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    decoders: list[Json] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _definition(
        vocabulary,
        normalizer={"type": "Sequence", "normalizers": steps},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": decoders},
        model={
            "merges": [[left, right] for _, left, right in merges],
            "unk_token": tokens[unknown[0]],
            "fuse_unk": True,
            "byte_fallback": True,
        },
    )


def _definition(vocabulary: Vocabulary, *, normalizer: Any, pre_tokenizer: Any, decoder: Json, model: Json) -> Json:
    added = [
        {
            "id": token,
            "content": vocabulary.tokens[token],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != _USER,
        }
        for token, kind in enumerate(vocabulary.types)
        if kind in (_CONTROL, _USER, _UNKNOWN) and vocabulary.tokens[token]
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(vocabulary.tokens)},
        }
        | model,
    }


def _numbers(fields: Json, key: str, count: int, default: float | None) -> list[float]:
    value = fields.get(key)
    if value is None and default is not None:
        return [default] * count
    if not isinstance(value, np.ndarray) or len(value) != count:
        raise _invalid(key, f"is missing or is not a list of {count} numbers")
    numbers: list[float] = value.tolist()
    return numbers


def _token_id(fields: Json, key: str, count: int) -> int | None:
    token = fields.get(key)
    if token is None:
        return None
    if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < count:
        raise _invalid(key, f"is {str(token)[:50]}; an id below {count} is needed")
    return token


def _invalid(field: str, problem: str) -> RealmError:
    return RealmError("model_invalid", f"GGUF: {field} {problem}", details={"field": field})
