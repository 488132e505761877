"""Random calls of host functions, made from the tables: mostly nearly right, so that they get past the first check.

:data:`CALLER` is a guest that carries a list of them out: its input is an image of its memory, then
the calls.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from random import Random

from realm.guests import abi, wasi

IMAGE = 8192
PROGRAM_AT = 32768
RECORD = 8 + 8 * 10
GROW = len(abi.FUNCTIONS) + len(wasi.SIGNATURES)
"""The number of the operation that grows the memory instead of calling."""
MEMORY = 65_536

REALM = [function.name for function in abi.FUNCTIONS]
WASI = list(wasi.SIGNATURES)

EDGES_32 = (0, 1, 2, 3, 7, 8, 127, 128, 129, 1023, 1024, 4096, 65535, 65536, 65537, 1 << 20, (1 << 20) + 1, 1 << 24)
EDGES_32 += (1 << 26, (1 << 26) + 1, (1 << 30) - 1, 1 << 30, (1 << 31) - 1, 1 << 31, (1 << 32) - 8, (1 << 32) - 1)
EDGES_64 = (*EDGES_32, 1 << 32, (1 << 32) + 8, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
FLOATS = (0.0, -0.0, 1.0, 0.5, 1e-45, -1.0, 100.0, 100.1, 3.4e38, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    b"",
    b"a",
    b"name",
    b"caf\xc3\xa9",
    b"\xc3",
    b"\xff\xfe",
    b"\0",
    b"<|im_start|>user",
    b"x" * 300,
    "\u2028\U0001f600".encode(),
)
MESSAGES: tuple[object, ...] = (
    [],
    [{"role": "user", "content": "hi"}],
    [{"role": "user"}],
    [{"role": 1, "content": []}],
    {"role": "user"},
    [[[[[]]]]],
    "x",
    None,
    [{"role": "user", "content": "a" * 500}] * 3,
)


@dataclass(frozen=True)
class Call:
    """One call: the function's number in the tables, and its arguments as they are passed."""

    number: int
    arguments: tuple[int, ...]

    @property
    def name(self) -> str:
        return (*REALM, *(f"wasi.{name}" for name in WASI), "memory.grow")[self.number]


def number_32(random: Random) -> int:
    kind = random.randrange(4)
    if kind == 0:
        return random.choice(EDGES_32)
    if kind == 1:
        return random.randrange(64)
    return random.randrange(MEMORY) if kind == 2 else random.getrandbits(32)


def pointer(random: Random) -> int:
    """Mostly inside the image, sometimes at an edge of the memory or far outside."""
    kind = random.randrange(10)
    if kind < 6:
        return random.randrange(0, IMAGE, 8)
    if kind == 6:
        return random.randrange(IMAGE)
    if kind == 7:
        return MEMORY - random.randrange(64)
    return number_32(random)


def count(random: Random, low: int, high: int) -> int:
    kind = random.randrange(10)
    if kind < 6:
        return min(max(low, random.randrange(12)), high)
    if kind == 6:
        return random.choice([max(low - 1, 0), low, high, high + 1]) & 0xFFFF_FFFF
    return random.randrange(300) if kind < 9 else number_32(random)


def scalar(random: Random, p: abi.Scalar) -> int:
    edges = EDGES_64 if p.kind in ("i64", "u64") else EDGES_32
    low, high = p.low or 0, p.high if p.high is not None else 64
    if random.random() < 0.7:
        return random.randint(low, min(high, low + 100))
    return random.choice(edges)


def handle(random: Random) -> int:
    return random.choice([1, 1, 1, 2, 3]) if random.random() < 0.9 else number_32(random)


@dataclass
class Image:
    """Memory in which calls find what they look for.

    ``regions`` says where: for "tokens", "text", "messages" and the structs' names, (address, count) of each.
    """

    data: bytearray = field(default_factory=bytearray)
    regions: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def add(self, kind: str, content: bytes, count: int) -> None:
        self.regions.setdefault(kind, []).append((len(self.data), count))
        self.data += content + bytes(-len(content) % 8)

    def find(self, random: Random, kind: str) -> tuple[int, int]:
        return random.choice(self.regions.get(kind) or [(pointer(random), 1)])


def span(random: Random, image: Image, function: str, p: abi.Input | abi.InOut | abi.Output) -> list[int]:
    """Pointer and count: mostly of what the function asks for, as long as that is, or nearly."""
    if isinstance(p, abi.Output) or random.random() < 0.3:
        low = 0 if isinstance(p, abi.Output) else p.low
        return [pointer(random), count(random, low, p.high)]
    if isinstance(p.element, abi.StructType):
        kind = p.element.name
    elif p.element == "u8":
        kind = "messages" if function == "chat_template" else "text"
    else:
        kind = "tokens"
    at, length = image.find(random, kind)
    return [at, length if random.random() < 0.8 else count(random, p.low, p.high)]


def arguments(random: Random, image: Image, function: abi.Function) -> tuple[int, ...]:
    given: list[int] = []
    for p in function.parameters:
        match p:
            case abi.Scalar():
                given.append(scalar(random, p))
            case abi.Handle():
                given.append(handle(random))
            case abi.Input() | abi.InOut() | abi.Output():
                given += span(random, image, function.name, p)
            case abi.StructIn() | abi.StructOut():
                if p.optional and random.random() < 0.3:
                    given.append(0)
                elif isinstance(p, abi.StructIn) and random.random() < 0.7:
                    given.append(image.find(random, p.struct.name)[0])
                else:
                    given.append(pointer(random))
    return tuple(given)


def call(random: Random, image: Image) -> Call:
    kind = random.randrange(20)
    if kind == 0:
        return Call(GROW, (random.choice([0, 1, 1, 2, 64, 65535, 0xFFFF_FFFF]),))
    if kind < 4:
        number = random.randrange(len(WASI))
        given = tuple(
            random.choice(EDGES_64) if kind == "U" else random.choice([random.randrange(4), pointer(random)])
            for kind in wasi.SIGNATURES[WASI[number]]
        )
        return Call(len(REALM) + number, given)
    number = random.randrange(len(REALM))
    return Call(number, arguments(random, image, abi.FUNCTIONS[number]))


def struct_field(random: Random, kind: str) -> bytes:
    """A struct's field. Wide ones are mostly pointers."""
    if kind == "f32":
        value = random.choice(FLOATS) if random.random() < 0.5 else random.random()
        return struct.pack("<f", value)
    if kind == "u64":
        if random.random() < 0.4:
            return bytes(8)
        return struct.pack("<Q", pointer(random) if random.random() < 0.8 else random.choice(EDGES_64))
    return struct.pack("<I", random.randrange(4) if random.random() < 0.7 else number_32(random))


def good_struct(random: Random, image: Image, layout: abi.StructType) -> bytes | None:
    """A struct that passes the checks, of those that have any."""
    if layout is abi.SAMPLING:
        temperature, top_k = random.choice([0.0, 0.7, 1.5]), random.choice([0, 0, 1, 9])
        floats = (
            temperature,
            random.choice([0.0, 0.9, 1.0]),
            random.choice([0.0, 0.1]),
            random.choice([0.0, 1.0, 1.3]),
        )
        return struct.pack(layout.format, *floats, top_k, random.randrange(8), random.getrandbits(64), 0, 0, 0, 0)
    if layout is abi.ITEM:
        at, length = image.find(random, "tokens")
        sampling = image.find(random, abi.SAMPLING.name)[0] if random.random() < 0.6 else 0
        return struct.pack(layout.format, random.randint(1, 3), length, at, sampling, 0, 0.0, 0, 0)
    if layout is abi.BIAS:
        return struct.pack(layout.format, random.randrange(260), random.uniform(-5, 5))
    if layout is abi.SPECULATION:
        at, length = image.find(random, "tokens")
        return struct.pack(layout.format, random.randrange(3), random.randrange(5), at, length, 0, 0, 0, 0)
    return None


def image(random: Random) -> Image:
    """Structs, tokens, text and rubbish, 8 bytes apart."""
    made = Image()
    while len(made.data) < IMAGE - 512:
        kind = random.randrange(7)
        if kind < 3:
            layout = random.choice([abi.SAMPLING, abi.ITEM, *abi.STRUCTS])
            good = good_struct(random, made, layout) if random.random() < 0.6 else None
            made.add(layout.name, good or b"".join(struct_field(random, f.kind) for f in layout.fields), 1)
        elif kind == 3:
            size = random.randrange(1, 12)
            made.add("tokens", b"".join(struct.pack("<I", random.randrange(264)) for _ in range(size)), size)
        elif kind == 4:
            text = random.choice(TEXTS)
            made.add("text", text, len(text))
        elif kind == 5:
            messages = json.dumps(random.choice(MESSAGES)).encode()
            made.add("messages", messages, len(messages))
        else:
            size = random.randrange(64)
            made.add("rubbish", random.randbytes(size) if random.random() < 0.5 else bytes(size), size)
    made.data = made.data[:IMAGE] + bytes(max(0, IMAGE - len(made.data)))
    return made


def program(seed: int) -> tuple[bytes, list[Call]]:
    """A memory image and calls, among them enough sequences and logits for the rest to work on."""
    random = Random(seed)
    memory = image(random)
    calls = [Call(REALM.index("seq_new"), ()) for _ in range(random.randrange(1, 4))]
    calls += [call(random, memory) for _ in range(random.randrange(4, 60))]
    for _ in range(random.randrange(8)):
        # A forward that works, and mostly keeps the logits.
        at, length = memory.find(random, "tokens")
        drawing = random.choice([0, 0, memory.find(random, abi.SAMPLING.name)[0]])
        made = Call(REALM.index("forward"), (random.choice([1, 1, 2]), at, length, drawing, 0))
        calls.insert(random.randrange(1, len(calls)), made)
    return bytes(memory.data), calls


def encode(memory: bytes, calls: list[Call]) -> bytes:
    """The input of :data:`CALLER`."""
    parts = [memory]
    for item in calls:
        values = [value & (1 << 64) - 1 for value in item.arguments]
        values += [0] * (10 - len(values))
        parts.append(struct.pack("<Q10Q", item.number, *values))
    parts.append(struct.pack("<Q10Q", GROW + 1, *[0] * 10))
    return b"".join(parts)


def decode(data: bytes) -> tuple[bytes, list[Call]]:
    """The opposite of :func:`encode`."""
    calls = []
    for at in range(IMAGE, len(data) - RECORD + 1, RECORD):
        number, *values = struct.unpack_from("<Q10Q", data, at)
        if number > GROW:
            break
        calls.append(Call(number, tuple(values[: len(_kinds(number))])))
    return data[:IMAGE], calls


def as_text(data: bytes) -> str:
    """The same for :data:`TEXT_CALLER`, where the input can only be text: two letters a byte."""
    return "".join(chr(97 + (byte >> 4)) + chr(97 + (byte & 15)) for byte in data)


def _kinds(number: int, wide: bool = False) -> list[str]:
    if number < len(REALM):
        return list(abi.wasm_parameters(abi.FUNCTIONS[number], wide))
    if number < GROW:
        return ["i64" if kind == "U" else "i32" for kind in wasi.SIGNATURES[WASI[number - len(REALM)]]]
    return ["i64" if wide else "i32"]


def _read_bytes(address: str) -> str:
    """The calls to their place, then the image to the front."""
    size = REALM.index("input_read")

    def read(offset: int, to: int, room: int) -> str:
        return f"(drop (call $f{size} (i32.const {offset}) ({address}.const {to}) ({address}.const {room})))"

    return read(IMAGE, PROGRAM_AT, MEMORY - PROGRAM_AT) + read(0, 0, IMAGE)


def _read_text() -> str:
    """Two letters a byte. What is written is always behind what is still to be read."""
    size = REALM.index("input_read")
    letters = [
        f"(i32.sub (i32.load8_u offset={PROGRAM_AT + at} (i32.shl (local.get $n) (i32.const 1))) (i32.const 97))"
        for at in (0, 1)
    ]
    return f"""
        (local.set $end (i32.shr_u
          (call $f{size} (i32.const 0) (i32.const {PROGRAM_AT}) (i32.const {MEMORY - PROGRAM_AT})) (i32.const 1)))
        (loop $decode
          (i32.store8
            (select (local.get $n) (i32.add (local.get $n) (i32.const {PROGRAM_AT - IMAGE}))
              (i32.lt_u (local.get $n) (i32.const {IMAGE})))
            (i32.or (i32.shl {letters[0]} (i32.const 4)) {letters[1]}))
          (br_if $decode (i32.lt_u (local.tee $n (i32.add (local.get $n) (i32.const 1))) (local.get $end))))"""


def _caller(*, wide: bool = False, text: bool = False) -> str:
    """The guest; ``wide`` has a 64-bit memory (and no WASI), ``text`` takes :func:`as_text`."""
    address = "i64" if wide else "i32"
    imports, cases = [], []
    for number in range(GROW + 1):
        kinds = _kinds(number, wide)
        pushes = "".join(
            f"(i64.load offset={8 + at * 8} (local.get $pc))"
            if kind == "i64"
            else f"(i32.wrap_i64 (i64.load offset={8 + at * 8} (local.get $pc)))"
            for at, kind in enumerate(kinds)
        )
        if number == GROW:
            cases.append(f"(drop (memory.grow {pushes}))")
            continue
        if number < len(REALM):
            module, name, result = abi.IMPORT_MODULE, REALM[number], abi.FUNCTIONS[number].result
        elif wide:
            cases.append("")
            continue
        else:
            module, name = wasi.IMPORT_MODULE, WASI[number - len(REALM)]
            result = wasi.result(name) or ""
        parameters = f"(param {' '.join(kinds)})" if kinds else ""
        results = f"(result {result})" if result else ""
        imports.append(f'(import "{module}" "{name}" (func $f{number} {parameters} {results}))')
        called = f"(call $f{number} {pushes})"
        cases.append(f"(drop {called})" if result else called)
    labels = " ".join(f"$c{number}" for number in range(GROW + 1))
    # Block k ends just before the work of case k; each case then goes on with the next record.
    body = f"(br_table {labels} $stop (i32.wrap_i64 (i64.load (local.get $pc))))"
    for number, work in enumerate(cases):
        body = f"(block $c{number} {body}) {work} (br $next)"
    return f"""(module {" ".join(imports)}
      (memory (export "memory") {"i64" if wide else ""} 1)
      (func (export "realm_abi_version") (result i32) (i32.const 1))
      (func (export "run") (result i32) (local $pc {address}) (local $n i32) (local $end i32)
        (local.set $pc ({address}.const {PROGRAM_AT - RECORD}))
        {_read_text() if text else _read_bytes(address)}
        (block $stop (loop $again (block $next
          (local.set $pc ({address}.add (local.get $pc) ({address}.const {RECORD})))
          (br_if $stop ({address}.gt_u (local.get $pc) ({address}.const {MEMORY - RECORD})))
          {body})
          (br $again)))
        (i32.const 0)))"""


CALLER = _caller()
WIDE_CALLER = _caller(wide=True)
TEXT_CALLER = _caller(text=True)
