"""GGUF import: right values from good files, a typed error that names the culprit from bad ones."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from realm.errors import RealmError
from realm.models.config import ModelConfig
from realm.models.gguf_file import GgufFile
from realm.models.gguf_import import import_gguf
from realm.models.gguf_tokenizer import PRE_TOKENIZERS
from realm.models.safetensors_file import from_bfloat16, read_header, to_bfloat16
from realm.models.tokenizer import Tokenizer
from tests.model_files import (
    HEAD_DIM,
    HIDDEN,
    INNER,
    SPECIAL,
    TEMPLATE,
    TOKENS,
    VOCAB,
    Array,
    random_weights,
    write_gguf,
)


def convert(path: Path, dtype: str = "float32") -> Path:
    folder = path.with_suffix(".out")
    folder.mkdir()
    import_gguf(path, folder, dtype=dtype, progress=lambda stage, done, total: None)
    return folder


def refused(path: Path) -> RealmError:
    with pytest.raises(RealmError) as caught:
        convert(path)
    return caught.value


@pytest.mark.parametrize(
    ("arch", "tied", "bias"), [("llama", True, False), ("llama", False, False), ("qwen2", True, True)]
)
def test_weights_come_back_as_they_were_before_llama_cpp_permuted_them(
    tmp_path: Path, arch: str, tied: bool, bias: bool
) -> None:
    weights = random_weights(tied=tied, bias=bias)
    folder = convert(write_gguf(tmp_path / "m.gguf", weights, arch=arch))
    loaded = load_file(folder / "model.safetensors")
    assert loaded.keys() == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(loaded[name], weight, err_msg=name)
    config = ModelConfig.load(folder)
    assert (config.tied_embeddings, config.qkv_bias) == (tied, bias)
    assert (config.rope_theta, config.norm_eps, config.context_length) == (10000.0, 1e-5, 128)
    assert (config.bos, config.eos) == (1, frozenset({2}))
    tokenizer = Tokenizer(folder)
    assert tokenizer.vocab_size == VOCAB and tokenizer.has_chat_template
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == TEMPLATE


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_rows_are_permuted_and_dequantized(tmp_path: Path, kind: str) -> None:
    quantization = GGMLQuantizationType[kind]
    weights = random_weights()
    folder = convert(write_gguf(tmp_path / "m.gguf", weights, kind=quantization), "bfloat16")
    header = read_header(folder / "model.safetensors")
    raw = (folder / "model.safetensors").read_bytes()
    for name, weight in weights.items():
        expected = weight
        if weight.ndim == 2:
            expected = gguf.quants.dequantize(gguf.quants.quantize(weight, quantization), quantization)
        stored = header[name]
        bits = np.frombuffer(raw[stored.start : stored.end], dtype=np.uint16).reshape(stored.shape)
        np.testing.assert_array_equal(bits, to_bfloat16(expected.astype(np.float32)), err_msg=name)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_rounding_to_bfloat16_is_torchs(values: list[float]) -> None:
    import torch

    array = np.array(values, dtype=np.float32)
    expected = torch.from_numpy(array).to(torch.bfloat16)
    np.testing.assert_array_equal(to_bfloat16(array).view(np.int16), expected.view(torch.int16).numpy())
    np.testing.assert_array_equal(from_bfloat16(to_bfloat16(array)), expected.float().numpy())


def llama3_divisors(factor: float, original: int) -> Array:
    """As llama.cpp's converter writes them (written out loop by loop)."""
    divisors = []
    for at in range(0, HEAD_DIM, 2):
        wavelength = 2 * np.pi * 10000.0 ** (at / HEAD_DIM)
        if wavelength < original / 4:
            divisors.append(1.0)
        elif wavelength > original:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


def test_llama3_rope_scaling_is_recovered(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", extra={"rope_freqs.weight": llama3_divisors(8.0, 8192)})
    scaling = ModelConfig.load(convert(path)).rope_scaling
    assert scaling is not None
    # With this little model's frequencies several contexts give these very divisors: compare what is computed.
    assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor) == (8.0, 1.0, 4.0)
    np.testing.assert_allclose(llama3_divisors(8.0, scaling.original_context), llama3_divisors(8.0, 8192), rtol=1e-4)


def set_key(key: str, value: Any) -> Any:
    return lambda meta: meta.update({key: value})


ones = np.ones(HEAD_DIM // 2, dtype=np.float32)


@pytest.mark.parametrize(
    ("changes", "code", "culprit"),
    [
        ({"arch": "mamba"}, "model_unsupported", "general.architecture"),
        ({"change": set_key("llama.block_count", None)}, "model_invalid", "llama.block_count"),
        ({"change": set_key("llama.block_count", 1 << 31)}, "model_invalid", "llama.block_count"),
        ({"change": set_key("llama.block_count", "two")}, "model_invalid", "llama.block_count"),
        ({"change": set_key("llama.block_count", 3)}, "model_invalid", "blk.2.attn_norm.weight"),
        ({"change": set_key("llama.block_count", 1)}, "model_invalid", "blk.1.attn_norm.weight"),
        ({"change": set_key("llama.attention.head_count", 0)}, "model_invalid", "llama.attention.head_count"),
        ({"change": set_key("llama.attention.head_count", [4, 2])}, "model_invalid", "llama.attention.head_count"),
        ({"change": set_key("llama.attention.head_count_kv", 3)}, "model_invalid", "num_key_value_heads"),
        ({"change": set_key("llama.attention.head_count_kv", 1)}, "model_invalid", "blk.0.attn_k.weight"),
        ({"change": set_key("llama.embedding_length", 128)}, "model_invalid", "token_embd.weight"),
        ({"change": set_key("llama.feed_forward_length", 64)}, "model_invalid", "blk.0.ffn_gate.weight"),
        ({"change": set_key("llama.attention.key_length", 32)}, "model_invalid", "blk.0.attn_q.weight"),
        ({"change": set_key("llama.attention.value_length", 8)}, "model_unsupported", "llama.attention.value_length"),
        ({"change": set_key("llama.rope.dimension_count", 8)}, "model_unsupported", "llama.rope.dimension_count"),
        ({"change": set_key("llama.rope.scaling.type", "yarn")}, "model_unsupported", "llama.rope.scaling.type"),
        ({"change": set_key("llama.rope.freq_base", float("inf"))}, "model_invalid", "llama.rope.freq_base"),
        ({"change": set_key("llama.expert_count", 8)}, "model_unsupported", "llama.expert_count"),
        ({"change": set_key("general.alignment", 7)}, "model_invalid", "general.alignment"),
        ({"change": set_key("tokenizer.ggml.model", "bert")}, "model_unsupported", "tokenizer.ggml.model"),
        ({"change": set_key("tokenizer.ggml.pre", "strange")}, "model_unsupported", "tokenizer.ggml.pre"),
        ({"change": set_key("tokenizer.ggml.pre", None)}, "model_unsupported", "tokenizer.ggml.pre"),
        ({"change": set_key("tokenizer.ggml.tokens", None)}, "model_invalid", "tokenizer.ggml.tokens"),
        ({"change": set_key("tokenizer.ggml.tokens", ["a", "a"])}, "model_invalid", "tokenizer.ggml.tokens"),
        ({"tokens": [*TOKENS, "extra"]}, "model_invalid", "tokenizer.ggml.tokens"),
        ({"change": set_key("tokenizer.ggml.token_type", [1])}, "model_invalid", "tokenizer.ggml.token_type"),
        ({"change": set_key("tokenizer.ggml.merges", ["q z"])}, "model_invalid", "tokenizer.ggml.merges"),
        ({"change": set_key("tokenizer.ggml.merges", ["th"])}, "model_invalid", "tokenizer.ggml.merges"),
        ({"change": set_key("tokenizer.ggml.eos_token_id", VOCAB)}, "model_invalid", "tokenizer.ggml.eos_token_id"),
        ({"change": set_key("tokenizer.chat_template", 5)}, "model_invalid", "tokenizer.chat_template"),
        ({"extra": {"blk.0.strange.weight": ones}}, "model_invalid", "blk.0.strange.weight"),
        ({"extra": {"blk.00.attn_q.bias": ones}}, "model_invalid", "blk.00.attn_q.bias"),
        ({"extra": {"rope_freqs.weight": ones[:3]}}, "model_invalid", "rope_freqs.weight"),
        ({"extra": {"rope_freqs.weight": ones * 3.5}}, "model_unsupported", "rope_freqs.weight"),
        ({"extra": {"rope_freqs.weight": ones * np.float32("nan")}}, "model_invalid", "rope_freqs.weight"),
        ({"extra": {"blk.0.attn_q.bias": ones}}, "model_invalid", "blk.0.attn_q.bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_wrong_field_or_tensor_is_named(tmp_path: Path, changes: dict[str, Any], code: str, culprit: str) -> None:
    error = refused(write_gguf(tmp_path / "m.gguf", **changes))
    assert error.code == code, error
    assert culprit in (error.details.get("field"), error.details.get("tensor"))
    assert culprit in error.message


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    weights = random_weights()
    down = weights.pop("model.layers.1.mlp.down_proj.weight")
    error = refused(write_gguf(tmp_path / "a.gguf", weights))
    assert error.details == {"tensor": "blk.1.ffn_down.weight"}
    weights["model.layers.1.mlp.down_proj.weight"] = down.T.copy()
    error = refused(write_gguf(tmp_path / "b.gguf", weights))
    assert error.details == {"tensor": "blk.1.ffn_down.weight"}
    assert f"{[INNER, HIDDEN]}" in error.message and f"{[HIDDEN, INNER]}" in error.message


@pytest.mark.parametrize("value", [np.nan, np.inf, np.float32(3.4e38)])
def test_values_that_are_not_finite_in_bfloat16_are_named(tmp_path: Path, value: float) -> None:
    weights = random_weights()
    weights["model.norm.weight"][3] = value
    path = write_gguf(tmp_path / "m.gguf", weights)
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(RealmError) as caught:
        import_gguf(path, folder, dtype="bfloat16", progress=lambda *_: None)
    assert caught.value.details == {"tensor": "model.norm.weight"}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf").read_bytes()


def patched(good: bytes, at: int, data: bytes) -> bytes:
    return good[:at] + data + good[at + len(data) :]


def descriptions(good: bytes) -> int:
    """Offset of the first tensor's description (its name's length)."""
    return good.index(b"token_embd.weight") - 8


huge = struct.pack("<Q", (1 << 64) - 1)


@pytest.mark.parametrize(
    ("patch", "culprit"),
    [
        (lambda g: b"", "header"),
        (lambda g: g[:20], "header"),
        (lambda g: patched(g, 0, b"GGML"), "magic"),
        (lambda g: patched(g, 4, struct.pack("<I", 1)), "version"),
        (lambda g: patched(g, 4, struct.pack(">I", 3)), "version"),
        (lambda g: patched(g, 8, huge), "tensor_count"),
        (lambda g: patched(g, 8, struct.pack("<Q", 60_000)), "tensor_count"),
        (lambda g: patched(g, 16, huge), "kv_count"),
        (lambda g: patched(g, 24, huge), "key 0"),
        (lambda g: patched(g, 24, struct.pack("<Q", 60_000)), "key 0"),
        (lambda g: patched(g, 32, b"\xff"), "key 0"),
        (lambda g: patched(g, g.index(b"llama", 60) - 8, huge), "general.architecture"),
        (lambda g: patched(g, g.index(b".tokens") + 7 + 4 + 4, huge), "tokenizer.ggml.tokens"),
        (lambda g: patched(g, g.index(b".tokens") + 7 + 4, b"\x09"), "tokenizer.ggml.tokens"),
        (lambda g: patched(g, g.index(b".tokens") + 7, b"\x63"), "tokenizer.ggml.tokens"),
        (lambda g: patched(g, g.index(b".token_type") + 11 + 4 + 4, huge), "tokenizer.ggml.token_type"),
        (lambda g: g[: g.index(b".token_type") + 40], "tokenizer.ggml.token_type"),
        (lambda g: patched(g, descriptions(g), huge), "tensor 0"),
        (lambda g: patched(g, descriptions(g) + 25, b"\x09"), "token_embd.weight"),
        (lambda g: patched(g, descriptions(g) + 29, huge), "token_embd.weight"),
        (lambda g: patched(g, descriptions(g) + 29, bytes(8)), "token_embd.weight"),
        (lambda g: patched(g, descriptions(g) + 45, b"\xc8"), "token_embd.weight"),
        (lambda g: patched(g, descriptions(g) + 49, b"\x01"), "token_embd.weight"),
        (lambda g: patched(g, descriptions(g) + 49, huge[:5]), "token_embd.weight"),
        (lambda g: patched(g, descriptions(g) + 49, struct.pack("<Q", 1 << 63)), "token_embd.weight"),
        (lambda g: patched(g, descriptions(g) + 49, struct.pack("<Q", 1024)), "output_norm.weight"),
        (lambda g: g.replace(b"blk.0.attn_norm", b"blk.1.attn_norm"), "blk.1.attn_norm.weight"),
        (lambda g: g[:-2000], "blk.1.ffn_down.weight"),
    ],
)
def test_hostile_headers_are_named_and_cost_no_memory(tmp_path: Path, good: bytes, patch: Any, culprit: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(patch(good))
    tracemalloc.start()
    try:
        error = refused(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert error.code in ("model_invalid", "model_unsupported")
    assert culprit in error.message, error


# Mostly the structured part: a byte of the weights is only a different weight.
mutations = st.lists(
    st.tuples(
        st.integers(0, 7000),
        st.binary(min_size=1, max_size=8) | st.sampled_from([huge, bytes(8), b"\x01" + bytes(7)]),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(mutations=mutations, length=st.none() | st.integers(0, 10_000))
def test_any_mutation_of_a_file_imports_or_gives_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory, good: bytes, mutations: list[tuple[int, bytes]], length: int | None
) -> None:
    raw = bytearray(good)
    for at, new in mutations:
        raw[at : at + len(new)] = new
    if length is not None:
        del raw[length:]
    path = tmp_path_factory.mktemp("fuzz") / "m.gguf"
    path.write_bytes(raw)
    try:
        folder = convert(path, "bfloat16")
        ModelConfig.load(folder)
        Tokenizer(folder)
    except RealmError as error:
        assert error.code in ("model_invalid", "model_unsupported")
        assert error.details.get("field") or error.details.get("tensor")


def test_the_header_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", change=set_key("general.alignment", 64))
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    assert set(ours.fields) == {key for key in theirs.fields if not key.startswith("GGUF.")}
    for key, value in ours.fields.items():
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == theirs.fields[key].contents(), key
    assert [(t.name, t.start, t.size) for t in ours.tensors.values()] == [
        (t.name, t.data_offset, t.n_bytes) for t in theirs.tensors
    ]
    for tensor in ours.tensors.values():
        rows = int(np.prod(tensor.shape[:-1]))
        assert ours.rows(tensor, 0, rows).shape == (rows, tensor.size // rows)
    ours.close()


REGEX_CASES = {
    "smollm": [("12 the", ["1", "2", "Ġthe"]), ("a½b", ["a", "Â½", "b"])],
    "gpt-2": [("12 the's", ["12", "Ġthe", "'s"])],
    "llama-bpe": [("1234 the\n\n  x", ["123", "4", "Ġthe", "ĊĊ", "Ġ", "Ġx"]), ("(foo DON'T", ["(foo", "ĠDON", "'T"])],
    "qwen2": [("12 the", ["1", "2", "Ġthe"])],
    "default": [("1234, the", ["123", "4", ",", "Ġthe"])],
}


@pytest.mark.parametrize("name", REGEX_CASES)
def test_pre_tokenizers_cut_as_their_models_do(tmp_path: Path, name: str) -> None:
    folder = convert(write_gguf(tmp_path / "m.gguf", change=set_key("tokenizer.ggml.pre", name)))
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text, pieces in REGEX_CASES[name]:
        assert [piece for piece, _ in library.pre_tokenizer.pre_tokenize_str(text)] == pieces


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_pre_tokenizer_loads_and_keeps_text(tmp_path: Path, name: str) -> None:
    folder = convert(write_gguf(tmp_path / "m.gguf", change=set_key("tokenizer.ggml.pre", name)))
    tokenizer = Tokenizer(folder)
    text = "the thing, ½ 日本 1234\n\n \t x😀 don't"
    assert tokenizer.decode(tokenizer.encode(text, special=False)) == text
    assert tokenizer.encode(SPECIAL[0], special=True) == [0]
    assert 0 not in tokenizer.encode(SPECIAL[0], special=False)


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentence_piece_file(path: Path, pieces: list[str], **changes: Any) -> Path:
    """A GGUF of the small model with a SentencePiece vocabulary: earlier pieces have better scores."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *pieces]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]

    def change(meta: dict[str, Any]) -> None:
        meta |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces))],
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
        }
        meta |= changes

    weights = random_weights()
    weights["model.embed_tokens.weight"] = np.zeros((len(tokens), HIDDEN), dtype=np.float32)
    return write_gguf(path, weights, change=change)


def sentence_piece_reference(text: str, pieces: list[str]) -> list[str]:
    """SentencePiece's BPE in its plainest form: join the best-scored adjacent pair, leftmost first, until none is."""
    rank = {piece: number for number, piece in enumerate(pieces)}
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [(rank.get(parts[i] + parts[i + 1], len(rank)), i) for i in range(len(parts) - 1)]
        best = min(pairs, default=None)
        if best is None or best[0] == len(rank):
            break
        parts[best[1] : best[1] + 2] = [parts[best[1]] + parts[best[1] + 1]]
    found = [[part] if part in rank else [f"<0x{byte:02X}>" for byte in part.encode()] for part in parts]
    return [token for tokens in found for token in tokens]


WORD_PIECES = ["▁t", "he", "in", "▁a", "▁the", "ing", "an", "▁▁", "▁an", "th", "▁th", *"▁abcdeghint"]


@given(st.text(st.sampled_from(" abcdeghint\n1é😀"), max_size=40))
def test_sentence_piece_tokens_are_those_of_its_algorithm(sentence_piece: Tokenizer, text: str) -> None:
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *WORD_PIECES]
    ids = sentence_piece.encode(text, special=False)
    assert [tokens[token] for token in ids] == sentence_piece_reference(text, WORD_PIECES)
    assert sentence_piece.decode(ids) == text


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = sentence_piece_file(tmp_path_factory.mktemp("piece") / "m.gguf", WORD_PIECES)
    tokenizer = Tokenizer(convert(path))
    assert tokenizer.add_bos and tokenizer.encode("<s>a", special=True)[0] == 1
    return tokenizer


@pytest.mark.parametrize(
    ("changes", "code", "field"),
    [
        ({"tokenizer.ggml.scores": None}, "model_invalid", "tokenizer.ggml.scores"),
        ({"tokenizer.ggml.scores": [0.0] * 3}, "model_invalid", "tokenizer.ggml.scores"),
        ({"tokenizer.ggml.scores": [float("nan")] * 261}, "model_invalid", "tokenizer.ggml.scores"),
        ({"tokenizer.ggml.token_type": [2] + [1] * 260}, "model_invalid", "tokenizer.ggml.token_type"),
        ({"tokenizer.ggml.token_type": [1, 3, 3, *[6] * 256, 1, 1]}, "model_invalid", "tokenizer.ggml.token_type"),
        ({"tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 1, 4]}, "model_unsupported", "tokenizer.ggml.token_type"),
    ],
)
def test_wrong_sentence_piece_fields_are_named(tmp_path: Path, changes: dict[str, Any], code: str, field: str) -> None:
    error = refused(sentence_piece_file(tmp_path / "m.gguf", ["a", "b"], **changes))
    assert (error.code, error.details) == (code, {"field": field})
