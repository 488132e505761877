"""Tokenizer: streams, special tokens, and files that are wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from realm.errors import RealmError
from realm.models.tokenizer import Tokenizer, byte_alphabet
from tests.model_files import SPECIAL, TOKENS, VOCAB, hf_config, tokenizer_definition, write_folder

PIECES = [chr(c) for c in range(0x20, 0x7F)] + ["▁", "▁a", "▁▁", "he", "▁he", "é"]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
SENTENCE_PIECE = ["<unk>", "<s>", "</s>", *BYTE_TOKENS, *PIECES]


def sentence_piece_definition() -> dict[str, Any]:
    """A tokenizer.json as of Llama 2."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            | {"special": True}
            for i, t in enumerate(["<unk>", "<s>", "</s>"])
        ],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]},
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: number for number, token in enumerate(SENTENCE_PIECE)},
            "merges": [["▁", "a"], ["h", "e"], ["▁", "he"], ["▁", "▁"]],
        },
    }


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_folder(tmp_path_factory.mktemp("byte"), {}))


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = write_folder(
        tmp_path_factory.mktemp("piece"),
        {},
        config=hf_config(vocab_size=len(SENTENCE_PIECE)),
        tokenizer=sentence_piece_definition(),
    )
    return Tokenizer(folder)


def pieces(tokenizer: Tokenizer, chunks: list[list[int]], special: bool) -> list[str]:
    stream = tokenizer.stream(special)
    return [*(stream.push(chunk) for chunk in chunks), stream.flush()]


chunks_of_tokens = st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=5), max_size=30)


@given(chunks_of_tokens, st.booleans())
def test_the_pieces_of_a_stream_are_the_decoded_text(
    byte_level: Tokenizer, chunks: list[list[int]], special: bool
) -> None:
    whole = byte_level.decode([token for chunk in chunks for token in chunk], special)
    assert "".join(pieces(byte_level, chunks, special)) == whole


@given(chunks_of_tokens, st.booleans())
def test_a_sentence_piece_stream_is_the_decoded_text(
    sentence_piece: Tokenizer, chunks: list[list[int]], special: bool
) -> None:
    whole = sentence_piece.decode([token for chunk in chunks for token in chunk], special)
    assert "".join(pieces(sentence_piece, chunks, special)) == whole


@given(chunks_of_tokens, st.booleans())
def test_decoding_is_that_of_the_library(byte_level: Tokenizer, chunks: list[list[int]], special: bool) -> None:
    ids = [token for chunk in chunks for token in chunk]
    library = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_definition()))
    assert byte_level.decode(ids, special) == library.decode(ids, skip_special_tokens=not special)


@given(st.text())
def test_text_survives_the_way_to_tokens_and_back(byte_level: Tokenizer, text: str) -> None:
    assert byte_level.decode(byte_level.encode(text, special=False)) == text


@given(st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"])))
def test_sentence_piece_text_survives_too(sentence_piece: Tokenizer, text: str) -> None:
    ids = sentence_piece.encode(text, special=False)
    assert sentence_piece.decode(ids) == text
    library = tokenizers.Tokenizer.from_str(json.dumps(sentence_piece_definition()))
    assert library.decode(ids) == text


@given(st.text(min_size=1))
def test_a_stream_never_splits_a_character(byte_level: Tokenizer, text: str) -> None:
    bytewise = {chr_: i for i, chr_ in enumerate(TOKENS)}
    alphabet = {byte: bytewise[char] for char, byte in byte_alphabet().items()}
    stream = byte_level.stream()
    out = [stream.push((alphabet[byte],)) for byte in text.encode()]
    assert "".join(out) == text and stream.flush() == ""
    assert [piece for piece in out if piece] == list(text)


def test_a_character_cut_off_at_the_end_is_replaced_once_and_the_stream_goes_on(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a😀", special=False)
    stream = byte_level.stream()
    assert stream.push(ids[:-1]) == "a"
    assert stream.flush() == "\ufffd"
    assert stream.push(ids) == "a😀" and stream.flush() == ""


def test_a_reused_sentence_piece_stream_drops_the_first_space_again(sentence_piece: Tokenizer) -> None:
    ids = sentence_piece.encode("he", special=False)
    stream = sentence_piece.stream()
    assert [stream.push(ids) + stream.flush() for _ in range(3)] == ["he"] * 3


def test_special_tokens_in_text_are_tokens_only_when_asked_for(byte_level: Tokenizer) -> None:
    text = "<|im_start|>the"
    special, plain = byte_level.encode(text, special=True), byte_level.encode(text, special=False)
    assert special == [1, TOKENS.index("the")]
    assert not set(plain) & {0, 1, 2}
    assert byte_level.encode(text, special=True) == special
    assert byte_level.decode(special) == "the"
    assert byte_level.decode(special, special=True) == text == byte_level.decode(plain)


@pytest.mark.parametrize("ids", [[-1], [VOCAB], [1 << 70], [3, -2], [3, VOCAB]])
def test_ids_outside_the_vocabulary_are_refused_and_leave_the_stream_as_it_was(
    byte_level: Tokenizer, ids: list[int]
) -> None:
    stream = byte_level.stream()
    half = byte_level.encode("é", special=False)
    stream.push(half[:1])
    for call in (stream.push, byte_level.decode):
        with pytest.raises(RealmError) as caught:
            call(ids)
        assert (caught.value.code, caught.value.details["param"]) == ("invalid_params", "tokens")
    assert stream.push(half[1:]) == "é"


def test_ids_of_the_padding_of_the_embedding_have_no_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_folder(tmp_path, {}, config=hf_config(vocab_size=VOCAB + 8)))
    assert tokenizer.vocab_size == VOCAB + 8
    assert tokenizer.decode([VOCAB + 7]) == "" == tokenizer.stream().push([VOCAB + 7])


def test_lone_surrogates_are_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(RealmError, match="not valid Unicode"):
        byte_level.encode("a\ud800", special=False)


def test_begin_and_end_tokens_come_from_all_three_files(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path, {}, config=hf_config(eos_token_id=[5]), settings={"eos_token": {"content": SPECIAL[2]}}
    )
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    tokenizer = Tokenizer(folder)
    assert (tokenizer.bos, tokenizer.eos) == (1, frozenset({2, 5, 7, 8}))
    assert not tokenizer.has_chat_template
    with pytest.raises(RealmError) as caught:
        tokenizer.chat([{"role": "user", "content": ""}], generate=True)
    assert caught.value.code == "model_unsupported"


@pytest.mark.parametrize(
    ("file", "content", "code", "field"),
    [
        ("tokenizer.json", None, "model_invalid", "tokenizer.json"),
        ("tokenizer.json", "{", "model_invalid", "tokenizer.json"),
        ("tokenizer.json", "[" * 100_000, "model_invalid", "tokenizer.json"),
        ("tokenizer.json", '{"model": {"type": "Nonsense"}}', "model_invalid", "tokenizer.json"),
        ("tokenizer.json", json.dumps(tokenizer_definition(decoder=None)), "model_unsupported", "decoder"),
        (
            "tokenizer.json",
            json.dumps(tokenizer_definition(decoder={"type": "CTC"})),
            "model_invalid",
            "tokenizer.json",
        ),
        ("config.json", "\x00", "model_invalid", "config.json"),
        ("config.json", json.dumps(hf_config(rms_norm_eps="x")), "model_invalid", "rms_norm_eps"),
        ("config.json", json.dumps(hf_config(eos_token_id=["x"])), "model_invalid", "eos_token_id"),
        ("config.json", json.dumps(hf_config(rope_scaling=5)), "model_invalid", "rope_scaling"),
        ("config.json", json.dumps(hf_config(rope_scaling={"factor": -1})), "model_invalid", "rope_scaling"),
        ("tokenizer_config.json", "[]", "model_invalid", "tokenizer_config.json"),
        ("tokenizer_config.json", '{"chat_template": 5}', "model_invalid", "chat_template"),
        ("tokenizer_config.json", '{"chat_template": "{% for %}"}', "model_invalid", "chat_template"),
        ("config.json", json.dumps(hf_config(vocab_size=VOCAB - 1)), "model_invalid", "vocab"),
        ("config.json", json.dumps(hf_config(eos_token_id=VOCAB)), "model_invalid", "eos_token_id"),
        ("config.json", json.dumps(hf_config(bos_token_id=-4)), "model_invalid", "bos_token_id"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, file: str, content: str | None, code: str, field: str) -> None:
    folder = write_folder(tmp_path, {}, settings={})
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(RealmError) as caught:
        Tokenizer(folder)
    assert (caught.value.code, caught.value.details["field"]) == (code, field)


def test_the_template_may_be_a_file_or_a_named_list(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "x"}]
    named = [{"name": "tool", "template": "no"}, {"name": "default", "template": "from the list"}]
    folder = write_folder(tmp_path, {}, settings={"chat_template": named})
    assert Tokenizer(folder).chat(messages, generate=False) == "from the list"
    (folder / "chat_template.jinja").write_text("from the file")
    assert Tokenizer(folder).chat(messages, generate=False) == "from the file"


def test_workers_do_not_import_torch() -> None:
    code = "import realm.models.tokenizer, realm.models.store, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
