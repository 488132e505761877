"""Text to token ids and back, from a model folder's ``tokenizer.json``.

Encoding is the ``tokenizers`` library's. Decoding is ours: the bytes of every token are worked
out once, so that a stream costs a table look-up a token and never splits a character.
No torch here: guest workers import this.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from realm.errors import RealmError
from realm.models.chat import ChatTemplate
from realm.models.config import ModelConfig
from realm.models.json_files import parse_object, read_bytes, read_optional

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each of the 256 bytes, and the byte it stands for."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in alphabet.values()]
    return alphabet | {chr(256 + at): byte for at, byte in enumerate(others)}


class TokenStream:
    """Turns the tokens of one text into pieces of whole characters.

    The pieces of all pushes and the flush together are exactly :meth:`Tokenizer.decode` of all tokens.
    """

    __slots__ = ("_bytes", "_decoder", "_slow", "_strip", "_strips", "_texts")

    def __init__(self, token_bytes: list[bytes], token_texts: list[str | None], strip: bool) -> None:
        self._bytes = token_bytes
        self._texts = token_texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strips = self._strip = strip
        # True while a character is half done or the first space is still to be dropped.
        self._slow = strip

    def push(self, ids: Sequence[int]) -> str:
        """The text that becomes whole with these tokens; a character still incomplete waits.

        Raises:
            RealmError: ``invalid_params`` if an id is not in the vocabulary; the stream is unchanged.
        """
        if len(ids) == 1 and not self._slow:
            token = ids[0]
            if 0 <= token < len(self._texts):
                text = self._texts[token]
                if text is not None:
                    return text
        return self._take(self._decoder.decode(_join(self._bytes, ids)))

    def flush(self) -> str:
        """What is left: U+FFFD for a character that never became whole. The stream may be used again."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._slow = self._strip = self._strips
        return text

    def _take(self, text: str) -> str:
        if self._strip and text:
            text, self._strip = text.removeprefix(" "), False
        self._slow = self._strip or bool(self._decoder.getstate()[0])
        return text


class Tokenizer:
    """The tokenizer of one model folder. Its methods may be called from several threads.

    Attributes:
        vocab_size: number of the model's logits (from ``config.json``; ids without a token have no text).
        bos: the token that begins a text, if the model has one.
        eos: the tokens that end an answer.
        add_bos: whether the model was trained with ``bos`` before every text. Nothing adds it here.

    Raises:
        RealmError: ``model_invalid`` or ``model_unsupported`` naming the file and the field.
    """

    def __init__(self, folder: Path) -> None:
        config = ModelConfig.load(folder)
        settings = read_optional(folder / "tokenizer_config.json")
        generation = read_optional(folder / "generation_config.json")
        raw = read_bytes(folder / "tokenizer.json")
        definition = parse_object("tokenizer.json", raw)
        # One encoder for each way: switching one back and forth would wait for other threads' calls.
        self._encoder, self._encoder_special = _load(raw), _load(raw)
        self._encoder.encode_special_tokens = True
        self._encoder_special.encode_special_tokens = False
        self.vocab_size = config.vocab_size

        added = self._encoder.get_added_tokens_decoder()
        vocab = self._encoder.get_vocab(with_added_tokens=True)
        highest = max(vocab.values(), default=0)
        if highest >= self.vocab_size:
            raise RealmError(
                "model_invalid",
                f"tokenizer.json has token id {highest}, but the model has {self.vocab_size} logits",
                details={"field": "vocab"},
            )
        decode_token, self._strip = _byte_decoder(definition.get("decoder"))
        table = [b""] * self.vocab_size
        for content, token in vocab.items():
            table[token] = decode_token(content)
        for token, entry in added.items():
            table[token] = entry.content.encode()
        self._bytes_all = table
        self._texts_all = [_whole(data) for data in table]
        self._bytes, self._texts = table.copy(), self._texts_all.copy()
        for token, entry in added.items():
            if entry.special:
                self._bytes[token], self._texts[token] = b"", ""

        special_tokens = _special_tokens(settings)
        bos = vocab.get(special_tokens["bos_token"]) if "bos_token" in special_tokens else None
        self.bos: int | None = bos if bos is not None else config.bos
        self.add_bos = settings.get("add_bos_token") is True
        self.eos: frozenset[int] = _end_tokens(config, generation, vocab.get(special_tokens.get("eos_token", "")))
        for field, ids in (("bos_token_id", {self.bos}), ("eos_token_id", self.eos)):
            if any(not 0 <= token < self.vocab_size for token in ids if token is not None):
                raise RealmError(
                    "model_invalid", f"{field} is outside the vocabulary of {self.vocab_size}", details={"field": field}
                )
        source = _template_source(folder, settings)
        self._chat = ChatTemplate(source, special_tokens) if source is not None else None

    @property
    def has_chat_template(self) -> bool:
        """Whether :meth:`chat` works for this model."""
        return self._chat is not None

    def encode(self, text: str, special: bool) -> list[int]:
        """Token ids of ``text``; no token is added at the front.

        With ``special``, special tokens written in the text (``<|im_start|>``) become those tokens;
        without, they are text like any other, so untrusted text cannot forge a turn.

        Raises:
            RealmError: ``invalid_params`` if the text holds lone surrogates.
        """
        encoder = self._encoder_special if special else self._encoder
        try:
            # Unlike encode, a batch gives up the interpreter lock, and this one counts no offsets.
            ids: list[int] = encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except (UnicodeEncodeError, TypeError) as error:
            raise RealmError(
                "invalid_params", f"the text is not valid Unicode: {error}", details={"param": "text"}
            ) from error
        return ids

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of ``ids``; bytes that are no UTF-8 become U+FFFD. ``special`` writes special tokens too.

        Raises:
            RealmError: ``invalid_params`` if an id is not in the vocabulary.
        """
        text = _join(self._bytes_all if special else self._bytes, ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._strip else text

    def stream(self, special: bool = False) -> TokenStream:
        """A decoder for tokens that arrive one after another."""
        if special:
            return TokenStream(self._bytes_all, self._texts_all, self._strip)
        return TokenStream(self._bytes, self._texts, self._strip)

    def chat(self, messages: list[dict[str, Any]], generate: bool) -> str:
        """Render a conversation with the model's template; encode it with ``special``.

        Raises:
            RealmError: ``model_unsupported`` without a template, ``invalid_params`` for bad messages.
        """
        if self._chat is None:
            raise RealmError("model_unsupported", "the model has no chat template", details={"field": "chat_template"})
        return self._chat.render(messages, generate)


def _join(table: list[bytes], ids: Iterable[int]) -> bytes:
    try:
        ids = list(ids)
        if ids and min(ids) < 0:
            raise IndexError
        return b"".join([table[token] for token in ids])
    except (IndexError, TypeError) as error:
        raise RealmError(
            "invalid_params", f"a token id is outside the vocabulary of {len(table)}", details={"param": "tokens"}
        ) from error


def _whole(data: bytes) -> str | None:
    """The text of a token that is whole characters by itself, else None."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _byte_decoder(decoder: Any) -> tuple[Any, bool]:
    """How a token's text becomes bytes, and whether the whole text loses one leading space."""
    kind = decoder.get("type") if isinstance(decoder, dict) else None
    if kind == "ByteLevel":
        alphabet = byte_alphabet()

        def byte_level(content: str) -> bytes:
            try:
                return bytes([alphabet[char] for char in content])
            except KeyError:
                return content.encode()

        return byte_level, False

    def sentence_piece(content: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(content)
        return bytes([int(byte[1], 16)]) if byte else content.replace("▁", " ").encode()

    if kind == "Metaspace" and decoder.get("replacement", "▁") == "▁":
        return sentence_piece, decoder.get("prepend_scheme", "always") != "never"
    if kind == "Sequence" and isinstance(decoder.get("decoders"), list):
        parts = [part for part in decoder["decoders"] if isinstance(part, dict)]
        kinds = [part.get("type") for part in parts]
        replaces = parts[0].get("pattern") == {"String": "▁"} and parts[0].get("content") == " " if parts else False
        if kinds == ["ByteLevel"]:
            return _byte_decoder(parts[0])
        if replaces and kinds[:3] == ["Replace", "ByteFallback", "Fuse"]:
            if len(kinds) == 3:
                return sentence_piece, False
            strip = parts[3]
            if kinds[3:] == ["Strip"] and (strip.get("content"), strip.get("start"), strip.get("stop")) == (" ", 1, 0):
                return sentence_piece, True
    raise RealmError(
        "model_unsupported",
        f"tokenizer.json: the decoder {kind!r} is not supported; supported are byte-level and SentencePiece's",
        details={"field": "decoder"},
    )


def _load(raw: bytes) -> tokenizers.Tokenizer:
    try:
        encoder = tokenizers.Tokenizer.from_buffer(raw)
    except Exception as error:  # the library raises bare Exception
        raise RealmError(
            "model_invalid", f"tokenizer.json cannot be used: {error}", details={"field": "tokenizer.json"}
        ) from error
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """Special tokens by name; each is text, or an object with the text as ``content``."""
    found: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        value = settings.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _end_tokens(config: ModelConfig, generation: dict[str, Any], named: int | None) -> frozenset[int]:
    more = generation.get("eos_token_id")
    more = more if isinstance(more, list) else [more]
    found = set(config.eos) | {token for token in more if isinstance(token, int)}
    return frozenset(found if named is None else found | {named})


def _template_source(folder: Path, settings: dict[str, Any]) -> str | None:
    """The chat template: its own file, or a text or a list of named texts in ``tokenizer_config.json``."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return read_bytes(path).decode()
        except UnicodeDecodeError as error:
            raise RealmError(
                "model_invalid", f"{path.name} is not UTF-8", details={"field": "chat_template"}
            ) from error
    value = settings.get("chat_template")
    if isinstance(value, list):
        named = [entry for entry in value if isinstance(entry, dict) and entry.get("name") == "default"]
        value = named[0].get("template") if named else None
    if value is not None and not isinstance(value, str):
        raise RealmError(
            "model_invalid", "tokenizer_config.json: chat_template is not a text", details={"field": "chat_template"}
        )
    return value
