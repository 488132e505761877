"""Takes a WebAssembly module apart without trusting a byte of it, and refuses what is too large.

:func:`parse_module` reads each section once, in time linear in the module's size. It checks the frame
(order and sizes of sections, numbers, names) and counts; types and indices are left to Wasmtime, which
validates the module after this. Source: WebAssembly core specification 2.0, binary format, and the
memory64 proposal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from realm.errors import RealmError
from realm.guests.instructions import Body, BulkSite, Malformed, constant_expression, feature, over, read_number
from realm.guests.module_limits import ModuleLimits

HEADER: Final = b"\0asm\1\0\0\0"
PAGE: Final = 65_536

CUSTOM, TYPE, IMPORT, FUNCTION, TABLE, MEMORY, GLOBAL, EXPORT, START, ELEMENT, CODE, DATA, DATA_COUNT, TAG = range(14)
_ORDER: Final = (TYPE, IMPORT, FUNCTION, TABLE, MEMORY, GLOBAL, EXPORT, START, ELEMENT, DATA_COUNT, CODE, DATA)
# fmt: off
_SECTION_NAMES: Final = (
    "custom", "type", "import", "function", "table", "memory", "global", "export", "start", "element", "code", "data",
    "data count", "tag",
)
# fmt: on
_FUNCTION_REFERENCE: Final = 0x70
_VALUE_TYPES: Final = frozenset((0x7F, 0x7E, 0x7D, 0x7C, 0x7B, _FUNCTION_REFERENCE))


@dataclass(frozen=True, slots=True)
class Section:
    """Where a section is in the file: its first byte, that of its content, and the one behind it."""

    kind: int
    start: int
    content: int
    end: int


@dataclass
class ModuleFacts:
    """What a module is made of. ``functions`` counts imported ones too; ``sites`` are in file order."""

    sections: list[Section] = field(default_factory=list)
    types: int = 0
    imports: int = 0
    functions: int = 0
    tables: int = 0
    memories: int = 0
    wide_memory: bool = False
    memory_bytes: int = 0
    globals: int = 0
    exports: int = 0
    element_segments: int = 0
    element_items: int = 0
    data_segments: int = 0
    data_bytes: int = 0
    custom_sections: int = 0
    sites: list[BulkSite] = field(default_factory=list)

    def section(self, kind: int) -> Section | None:
        """The section of that kind; not for custom ones, of which there may be many."""
        return next((section for section in self.sections if section.kind == kind), None)


def parse_module(data: bytes, limits: ModuleLimits | None = None) -> ModuleFacts:
    """Check a module's structure.

    Raises:
        RealmError: ``module_too_large`` or ``module_invalid``; where a limit is met, the details have its
            ``name``, the ``limit`` and what was ``used``; where a feature is off, ``feature``.
    """
    limits = limits or ModuleLimits()
    if len(data) > limits.module_bytes:
        raise over("module_bytes", limits.module_bytes, len(data), "bytes", "module_too_large")
    try:
        return _Parser(data, limits).parse()
    except Malformed as error:
        raise RealmError("module_invalid", f"the module is not valid WebAssembly: {error}") from None


class _Parser:
    """Reads one module from front to back."""

    def __init__(self, data: bytes, limits: ModuleLimits) -> None:
        self._data = data
        self._limits = limits
        self._at = 0
        self._end = len(data)
        self._facts = ModuleFacts()
        self._defined = 0
        self._bodies = 0
        self._data_count: int | None = None
        self._custom_bytes = 0
        self._element_expressions = 0

    def parse(self) -> ModuleFacts:
        if not self._data.startswith(HEADER):
            raise Malformed("it does not begin as a module does")
        readers: dict[int, Callable[[], None]] = {
            TYPE: self._types,
            IMPORT: self._imports,
            FUNCTION: self._functions,
            TABLE: self._tables,
            MEMORY: self._memories,
            GLOBAL: self._globals,
            EXPORT: self._exports,
            START: self._skip_number,
            ELEMENT: self._elements,
            DATA_COUNT: self._counted_data,
            CODE: self._code,
            DATA: self._segments,
        }
        self._at = len(HEADER)
        whole = len(self._data)
        place = -1
        while self._at < whole:
            self._end = whole
            start = self._at
            kind = self._byte()
            size = self._number()
            if kind == TAG:
                raise feature("exceptions (a tag section)")
            if kind > TAG:
                raise Malformed(f"there is no section {kind} (offset {start:#x})")
            name = f"the {_SECTION_NAMES[kind]} section at offset {start:#x}"
            if size > whole - self._at:
                raise Malformed(f"{name} goes on behind the file's end")
            self._end = self._at + size
            self._facts.sections.append(Section(kind, start, self._at, self._end))
            if kind == CUSTOM:
                self._custom()
                continue
            if _ORDER.index(kind) <= place:
                raise Malformed(f"{name} is out of order or not the only one")
            place = _ORDER.index(kind)
            readers[kind]()
            if self._at != self._end:
                raise Malformed(f"{name} is longer than its content")
        if self._bodies != self._defined:
            raise Malformed(f"it declares {self._defined:,} functions and has code for {self._bodies:,}")
        if self._data_count not in (None, self._facts.data_segments):
            raise Malformed("its data count section does not fit its data")
        return self._facts

    # --- the smallest parts -----------------------------------------------------------------------

    def _byte(self) -> int:
        if self._at >= self._end:
            raise Malformed(f"it ends too early at offset {self._at:#x}")
        self._at += 1
        return self._data[self._at - 1]

    def _number(self, bits: int = 32) -> int:
        value, self._at = read_number(self._data, self._at, self._end, bits)
        return value

    def _skip_number(self) -> None:
        self._number()

    def _skip(self, size: int) -> None:
        if size > self._end - self._at:
            raise Malformed(f"it ends too early at offset {self._at:#x}")
        self._at += size

    def _name(self) -> str:
        size = self._number()
        if size > self._limits.name_bytes:
            raise over("name_bytes", self._limits.name_bytes, size, "bytes in a name")
        start = self._at
        self._skip(size)
        try:
            return self._data[start : self._at].decode()
        except UnicodeDecodeError:
            raise Malformed(f"the name at offset {start:#x} is not UTF-8") from None

    def _count(self, name: str, what: str, sofar: int = 0) -> int:
        """The length of a list, checked before any of it is read."""
        count = self._number()
        self._check(name, sofar + count, what)
        if count > self._end - self._at:
            # Everything takes a byte at least.
            raise Malformed(f"a list at offset {self._at:#x} is longer than its section")
        return count

    def _check(self, name: str, used: int, what: str) -> None:
        limit: int = getattr(self._limits, name)
        if used > limit:
            raise over(name, limit, used, what)

    def _value_type(self) -> None:
        kind = self._byte()
        if kind not in _VALUE_TYPES:
            if 0x63 <= kind <= 0x74:
                raise feature("gc or typed references (a reference type other than funcref)")
            raise Malformed(f"there is no value type {kind:#04x} (offset {self._at - 1:#x})")

    def _reference_type(self) -> None:
        if self._byte() != _FUNCTION_REFERENCE:
            raise feature("gc or typed references (a table of another type than funcref)")

    def _expression(self) -> int | None:
        value, self._at = constant_expression(self._data, self._at, self._end)
        return value

    def _range(self, flags: int, what: str) -> int:
        """The least size of a table or memory, behind its ``flags``."""
        if flags & 2:
            raise feature(f"threads (a shared {what})")
        if flags & 8:
            raise feature("custom page sizes")
        if flags > 7:
            raise Malformed(f"a {what} has unknown flags {flags:#x}")
        bits = 64 if flags & 4 else 32
        least = self._number(bits)
        if flags & 1:
            self._number(bits)
        return least

    # --- sections ---------------------------------------------------------------------------------

    def _custom(self) -> None:
        self._facts.custom_sections += 1
        self._check("custom_sections", self._facts.custom_sections, "custom sections")
        self._custom_bytes += self._end - self._at
        self._check("custom_bytes", self._custom_bytes, "bytes in custom sections")
        self._name()
        self._at = self._end

    def _types(self) -> None:
        self._facts.types = self._count("types", "types")
        for _ in range(self._facts.types):
            form = self._byte()
            if form in (0x4E, 0x4F, 0x50, 0x5E, 0x5F):
                raise feature("gc (a type that is no function)")
            if form == 0x5D:
                raise feature("stack switching (a continuation type)")
            if form != 0x60:
                raise Malformed(f"there is no form of types {form:#04x} (offset {self._at - 1:#x})")
            for what in ("parameters in one type", "results in one type"):
                for _ in range(self._count("parameters", what)):
                    self._value_type()

    def _imports(self) -> None:
        facts = self._facts
        facts.imports = self._count("imports", "imports")
        for _ in range(facts.imports):
            self._name()
            self._name()
            kind = self._byte()
            if kind == 0:
                self._number()
                facts.functions += 1
            elif kind == 1:
                self._table()
            elif kind == 2:
                self._memory()
            elif kind == 3:
                self._global()
            elif kind == 4:
                raise feature("exceptions (an imported tag)")
            else:
                raise Malformed(f"there is no kind of imports {kind} (offset {self._at - 1:#x})")

    def _functions(self) -> None:
        self._defined = self._count("functions", "functions", self._facts.functions)
        self._facts.functions += self._defined
        for _ in range(self._defined):
            self._number()

    def _tables(self) -> None:
        for _ in range(self._count("tables", "tables", self._facts.tables)):
            self._table()

    def _table(self) -> None:
        if self._at < self._end and self._data[self._at] == 0x40:
            raise feature("typed function references (a table with an initial value)")
        self._reference_type()
        flags = self._byte()
        if flags & 4 and not self._limits.wide_memory:
            raise feature("memory64 (a table with 64-bit indices)")
        self._check("table_elements", self._range(flags, "table"), "elements in a table")
        self._facts.tables += 1
        self._check("tables", self._facts.tables, "tables")

    def _memories(self) -> None:
        for _ in range(self._number()):
            self._memory()

    def _memory(self) -> None:
        facts = self._facts
        if facts.memories:
            raise feature("multi-memory (more than one memory)")
        flags = self._byte()
        facts.wide_memory = bool(flags & 4)
        if facts.wide_memory and not self._limits.wide_memory:
            raise feature("memory64 (a memory with 64-bit addresses)")
        facts.memory_bytes = self._range(flags, "memory") * PAGE
        self._check("memory_bytes", facts.memory_bytes, "bytes of memory at its start")
        facts.memories = 1

    def _globals(self) -> None:
        for _ in range(self._count("globals", "globals", self._facts.globals)):
            self._global()
            self._expression()

    def _global(self) -> None:
        self._value_type()
        self._byte()
        self._facts.globals += 1
        self._check("globals", self._facts.globals, "globals")

    def _exports(self) -> None:
        self._facts.exports = self._count("exports", "exports")
        names: set[str] = set()
        for _ in range(self._facts.exports):
            name = self._name()
            if name in names:
                raise Malformed(f"two exports have the name {name[:100]!r}")
            names.add(name)
            kind = self._byte()
            if kind == 4:
                raise feature("exceptions (an exported tag)")
            if kind > 4:
                raise Malformed(f"there is no kind of exports {kind} (offset {self._at - 1:#x})")
            self._number()

    def _elements(self) -> None:
        facts = self._facts
        facts.element_segments = self._count("element_segments", "element segments")
        for _ in range(facts.element_segments):
            flags = self._number()
            if flags > 7:
                raise Malformed(f"an element segment has unknown flags {flags:#x} (offset {self._at:#x})")
            expressions = bool(flags & 4)
            active = not flags & 1
            if active:
                if flags & 2:
                    self._number()
                computed = self._expression() is None
            else:
                computed = True
            if flags & 3:
                if expressions:
                    self._reference_type()
                else:
                    self._byte()
            count = self._count("element_items", "items in element segments", facts.element_items)
            facts.element_items += count
            if expressions or computed:
                self._element_expressions += count
                self._check("element_expressions", self._element_expressions, "passive or computed element items")
            for _ in range(count):
                if expressions:
                    self._expression()
                else:
                    self._number()

    def _counted_data(self) -> None:
        self._data_count = self._number()

    def _code(self) -> None:
        self._bodies = self._number()
        if self._bodies != self._defined:
            raise Malformed(f"it declares {self._defined:,} functions and has code for {self._bodies:,}")
        limits, end = self._limits, self._end
        for _ in range(self._bodies):
            size = self._number()
            self._check("body_bytes", size, "bytes of code in one function")
            if size > end - self._at:
                raise Malformed(f"the function at offset {self._at:#x} goes on behind its section")
            self._end = self._at + size
            self._locals()
            body = Body(self._data, self._at, self._end, limits.nesting, limits.br_table_targets)
            self._facts.sites += body.sites
            self._at, self._end = self._end, end

    def _locals(self) -> None:
        """Runs of locals, each with a length of up to 2**32."""
        total = 0
        for _ in range(self._number()):
            total += self._number()
            self._check("locals", total, "locals in one function")
            self._value_type()

    def _segments(self) -> None:
        facts, limits = self._facts, self._limits
        facts.data_segments = self._count("data_segments", "data segments")
        low, high, active, computed = 1 << 64, 0, 0, False
        active_bytes = 0
        for _ in range(facts.data_segments):
            flags = self._number()
            if flags > 2:
                raise Malformed(f"a data segment has unknown flags {flags:#x} (offset {self._at:#x})")
            place: int | None = None
            if flags != 1:
                if flags == 2:
                    self._number()
                place = self._expression()
            size = self._number()
            self._skip(size)
            facts.data_bytes += size
            if flags == 1:
                self._check("passive_bytes", size, "bytes in one passive data segment")
                continue
            active += 1
            active_bytes += size
            if place is None:
                computed = True
            elif size:
                low, high = min(low, place), max(high, place + size)
        if computed or high - low > limits.image_bytes:
            self._check("scattered_segments", active, "data segments that are spread or placed by an expression")
            self._check("scattered_bytes", active_bytes, "bytes of data that are spread or placed by an expression")
