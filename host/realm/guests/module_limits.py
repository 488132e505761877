"""How large each part of a guest module may be."""

from __future__ import annotations

from dataclasses import dataclass

from realm.guests.fiber_types import SETTINGS


@dataclass(frozen=True)
class ModuleLimits:
    """Limits on the structure of a module, checked before the compiler sees it.

    They keep three things small: the compiler's time and memory (some grow with the square of a number
    here), the time in which an instance is made (it runs no loop that could be interrupted, so nothing
    else runs in that worker meanwhile), and the tables that every worker keeps of a module. Each is well
    above what compilers for C, C++, Rust, Zig and Go write. The numbers in the comments were measured
    with Wasmtime 50 on one core of a server.
    """

    module_bytes: int = 256 << 20
    """The most that an operator can allow; what is taken of a tenant is a limit of that tenant."""

    types: int = 10_000
    parameters: int = 256
    """Of one function type; so many results, too."""
    imports: int = 1_000
    functions: int = 16_000
    """Imported ones included. Calls of the functions that :mod:`realm.guests.bulk_memory` adds must fit
    into three bytes, which hold indices below 16,384."""
    body_bytes: int = 1 << 20
    """Of one function: 1 MiB of calls takes the compiler 4 s. A large interpreter's loop has some 0.2 MiB."""
    locals: int = 20_000
    """Of one function, parameters left out."""
    nesting: int = 10_000
    """Blocks inside one another; Go's compiler nests one for each call of a function. 10,000 loops compile
    in 1.5 s."""
    br_table_targets: int = 20_000

    tables: int = 16
    table_elements: int = 1_000_000
    """Least size of one table. What a guest may really have is a limit of its tenant."""
    memory_bytes: int = 512 << 20
    """Least size of the memory, which is made when the module's version is asked. What a guest may really
    have, and grow to, is a limit of its tenant."""
    globals: int = 10_000
    exports: int = 10_000
    name_bytes: int = 4_096
    """Of one import's, export's or custom section's name."""

    element_segments: int = 1_000
    element_items: int = 100_000
    """Of all segments together."""
    element_expressions: int = 10_000
    """Items of all segments together that are expressions, passive, or go to a place that is computed:
    10,000 compile in 0.5 s and take 0.3 ms at each start; 100,000 took 12 s and 8 ms."""
    data_segments: int = 100_000
    """Of a memory image of up to :attr:`image_bytes`, which is mapped at a start (0.01 ms); the first start
    in each worker copies it (6 ms for 15 MiB). Go's linker leaves zeros out and so makes up to as many."""
    image_bytes: int = 16 << 20
    """From the first to the last byte that data segments set. What is spread wider is set piece by piece."""
    scattered_segments: int = 1_000
    """Of data that is spread wider or goes to places that are computed. 1,000 take 1.5 ms at each start;
    100,000 took 30 ms, and the compiler two minutes."""
    scattered_bytes: int = 4 << 20
    """Of such data: 4 MiB take 1.6 ms at each start."""
    passive_bytes: int = 1 << 20
    """Of one passive data segment: what one ``memory.init`` copies (0.35 ms into fresh memory)."""

    custom_sections: int = 100
    custom_bytes: int = 8 << 20
    """Names and debugging information, of all custom sections together."""

    wide_memory: bool = bool(SETTINGS["wasm_memory64"])
    """Whether the memory may be a 64-bit one."""
