"""Every attack of a guest, with what must come of it: the table that the tests run.

What each tries is the first line of its source: ``attacks/NAME.wat``, or a function of :mod:`building`.
The attacks of one group run at once, beside one neighbour.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Attack:
    """One row.

    Attributes:
        name: of its source. group: what it runs together with.
        refused: the codes one of which its module is refused with.
        error: the codes one of which its run ends with.
        result: what its run returns if it completes; None if any result will do.
        details: what the error's details must have. message: what its message must contain.
        completes: it may complete instead of ending with ``error``.
        limits: of its tenant, changed from the tight ones; with any, it has a tenant of its own.
        text: what it emits, or a check of that.
        lines: the most log lines it may cause, the host's warnings included.
        waits: the error must say when to come back.
        saves: it leaves saved sequences, as it may.
    """

    name: str
    group: str = ""
    refused: tuple[str, ...] = ()
    error: tuple[str, ...] = ()
    result: int | None = 0
    details: dict[str, Any] = field(default_factory=dict)
    message: str = ""
    completes: bool = False
    limits: dict[str, int] = field(default_factory=dict)
    text: str | Callable[[str], bool] | None = None
    lines: int = 1100
    waits: bool = False
    saves: bool = False
    input: str = ""
    variant: str = ""

    @property
    def tenant(self) -> str:
        return f"m-{self.module_name.replace('_', '-')}"[:60] if self.limits or self.saves else "mallory"

    @property
    def module_name(self) -> str:
        return f"{self.name}-{self.variant}" if self.variant else self.name

    @property
    def expected(self) -> str:
        """What must come of it, in words."""
        if self.refused:
            return "refused: " + " or ".join(self.refused)
        if not self.error:
            return "completes" if self.result is None else f"completes with {self.result}"
        names = " or ".join(self.error) + (" or completes" if self.completes else "")
        limit, trap = self.details.get("name"), self.details.get("trap")
        return f"{names} ({limit or trap})" if limit or trap else names


def completes(name: str, result: int | None = 0, **more: Any) -> Attack:
    return Attack(name, result=result, **more)


def fails(name: str, *codes: str, **more: Any) -> Attack:
    return Attack(name, error=codes, **more)


def traps(name: str, trap: str, **more: Any) -> Attack:
    return Attack(name, error=("guest_trap",), details={"trap": trap}, **more)


def meets(name: str, code: str, limit: str, **more: Any) -> Attack:
    """The run ends with ``code``, which names a limit of its tenant, its value and what was used."""
    return Attack(name, error=(code,), details={"name": limit}, **more)


def burns(name: str, **more: Any) -> Attack:
    return meets(name, "fuel_exhausted", "fuel_per_run", **more)


def refused(name: str, *codes: str, **more: Any) -> Attack:
    return Attack(name, refused=codes or ("module_invalid",), **more)


_BIG = 64 << 20
_UNLIMITED = 1 << 50
_EMPTY = "module_export_missing"

GROUPS: dict[str, list[Attack]] = {
    "loops": [
        burns("endless_loop"),
        burns(
            "endless_loop",
            variant="slowed",
            limits={"fuel_per_second": 100_000_000, "fuel_per_run": 150_000_000},
        ),
        burns("loop_in_initialize"),
        burns("tail_calls"),
        burns("host_call_flood"),
        burns("memory_fill_loop", limits={"memory_bytes": _BIG}),
        burns("memory_copy_loop", limits={"memory_bytes": _BIG}),
        burns("memory_init_loop"),
        burns("table_fill_loop"),
        meets(
            "loop_before_first_call",
            "first_call_timeout",
            "seconds_to_first_call",
            limits={"fuel_per_run": _UNLIMITED, "seconds_to_first_call": 1},
        ),
        meets(
            "loop_past_wall_time",
            "wall_time_exceeded",
            "seconds_per_run",
            limits={"fuel_per_run": _UNLIMITED, "seconds_per_run": 1},
        ),
        refused("loop_in_start"),
        refused("loop_in_version"),
        refused("start_fills_memory"),
        refused("start_calls_host"),
    ],
    "stack": [
        traps("mutual_recursion", "stack_overflow"),
        traps("recursion_through_table", "stack_overflow"),
        traps("recursion_with_host_calls", "stack_overflow"),
        traps("run_calls_itself", "stack_overflow"),
        traps("big_frames", "stack_overflow"),
        completes("initialize_calls_run", text="xx"),
        completes("wasi_exit_zero"),
        completes("wasi_exit_three", 3),
        completes("wasi_exit_in_initialize", 5),
        fails("wasi_exit_as_host", "guest_error", details={"code": -13}),
        fails("returns_internal", "guest_error", details={"code": -13}),
        fails("returns_nonsense", "guest_error", details={"name": "unknown"}),
    ],
    "memory": [
        completes("memory_to_the_limit", 64),
        completes("memory_all_at_once"),
        meets("memory_too_large_to_start", "memory_limit", "memory_bytes"),
        completes("table_to_the_limit", 1000),
        completes("table_all_at_once"),
        meets("table_too_large_to_start", "memory_limit", "table_elements"),
        completes("sixteen_tables"),
        traps("memory_init_outside", "memory_out_of_bounds"),
        traps("memory_init_dropped", "memory_out_of_bounds"),
        traps("memory_fill_outside", "memory_out_of_bounds"),
        traps("memory_copy_outside", "memory_out_of_bounds"),
        traps("load_at_the_end", "memory_out_of_bounds"),
        traps("load_wraps", "memory_out_of_bounds"),
        traps("store_wraps", "memory_out_of_bounds"),
        traps("load_in_the_guard", "memory_out_of_bounds"),
        traps("simd_outside", "memory_out_of_bounds"),
        completes("memory64", 64),
        traps("memory64_load_wraps", "memory_out_of_bounds"),
        meets("memory64_too_large_to_start", "memory_limit", "memory_bytes"),
        burns("memory64_fill_loop"),
        refused("memory64_of_2_to_the_64"),
        refused("memory64_with_wasi", "module_import_unknown"),
        refused("memory64_with_32_bit_imports", "module_import_unknown"),
        refused("data_outside"),
        refused("data_at_minus_one"),
        refused("elements_outside"),
    ],
    "traps": [
        traps("unreachable", "unreachable_code_reached"),
        traps("divide_by_zero", "integer_division_by_zero"),
        traps("divide_overflow", "integer_overflow"),
        traps("float_to_int", "bad_conversion_to_integer"),
        traps("indirect_wrong_type", "bad_signature"),
        traps("indirect_null", "indirect_call_to_null"),
        traps("indirect_outside", "table_out_of_bounds"),
        traps("trap_with_sequences", "unreachable_code_reached"),
        traps("name_section_lies", "unreachable_code_reached"),
        traps("name_section_of_terminal_escapes", "unreachable_code_reached"),
        completes("simd", 8),
    ],
    "handles": [
        completes("forks_10000", 63),
        completes("sequences_10000", 64),
        completes("sequence_churn", 50_000),
        completes("fork_churn"),
        completes("guess_handles"),
        completes("guess_to_forward"),
        completes("free_twice"),
        completes("stale_handles"),
        completes("bad_pointers"),
        completes("bad_pointers_64"),
        completes("wasi_bad_pointers"),
        completes("import_everything"),
    ],
    "output": [
        meets("emit_flood", "output_limit", "output_bytes_per_run", text=lambda text: len(text) == 256 << 10),
        completes("emit_byte_by_byte", text="." * 20_000),
        completes("emit_nothing", text=""),
        completes("emit_not_utf8", text=lambda text: "".join(c for c in text if c != "\ufffd") == "ABC"),
        completes("emit_too_much_at_once", text="", limits={"memory_bytes": _BIG}),
        completes("emit_controls", text='\0\x1b[2J\x07"}\\\r\n\x7f'),
        completes("log_flood"),
        completes("log_empty_lines"),
        completes("log_lies"),
        completes("warnings_flood", lines=70),
        completes("print_newlines"),
        completes("print_the_same_buffer"),
        completes("recv_without_client"),
        completes("recv_flood"),
        completes("recv_timers"),
        meets("recv_for_ever", "wall_time_exceeded", "seconds_per_run", limits={"seconds_per_run": 1}),
        completes("wasi_files_and_sockets"),
        completes("wasi_environment"),
        completes("wasi_random_4gib"),
        completes("wasi_bad_buffers"),
    ],
    "model": [
        completes("batch_same_twice"),
        completes("batch_overlapping"),
        completes("batch_of_1025"),
        completes("forward_two_billion"),
        completes("forward_answer_over_tokens"),
        completes("forward_beyond_context", limits={"tokens_per_run": 100_000, "kv_pages": 1000}),
        completes("tokens_outside_vocabulary"),
        completes("adapter_names", lines=20),
        completes("adapter_flood", lines=70),
        completes("sampling_not_finite"),
        completes("sampling_denormal"),
        completes("sampling_unknown_flags"),
        completes("mask_of_nothing"),
        completes("mask_of_one"),
        completes("bias_to_infinity"),
        completes("sample_without_logits"),
        completes("logits_hoard", 21),
        burns("logits_flood"),
        meets("tokens_over_the_run", "token_limit", "tokens_per_run", limits={"tokens_per_run": 16}),
        meets(
            "tokens_over_the_minute",
            "rate_limited",
            "tokens_per_minute",
            limits={"tokens_per_minute": 40},
            waits=True,
        ),
        meets("pages_over_the_limit", "limit_exceeded", "kv_pages", limits={"kv_pages": 8}),
    ],
    "text and store": [
        burns("tokenize_huge"),
        fails(
            "tokenize_16mib",
            "guest_error",
            completes=True,
            limits={"fuel_per_run": _UNLIMITED, "memory_bytes": _BIG},
        ),
        completes("tokenize_not_utf8"),
        fails("detokenize_hoard", "fuel_exhausted", "limit_exceeded", completes=True),
        fails("detokenize_into_one_stream", "fuel_exhausted", "limit_exceeded", completes=True),
        completes("chat_nested"),
        completes("chat_injection", text=lambda text: "{{ 7*7 }}{% for i in range(99999999) %}" in text),
        completes("chat_odd_messages"),
        burns("chat_many_messages"),
        meets("store_flood", "limit_exceeded", "store_bytes", limits={"store_bytes": 8192}),
        meets("store_many_keys", "limit_exceeded", "store_bytes", limits={"store_bytes": 4096}),
        completes("store_strange_keys"),
        meets("save_flood", "limit_exceeded", "saved_sequences", saves=True),
    ],
    "imports and exports": [
        *(
            refused(name, "module_export_missing")
            for name in (
                "memory_is_a_function",
                "memory_is_missing",
                "run_takes_parameters",
                "run_returns_nothing",
                "run_returns_two",
                "run_is_a_global",
                "run_is_missing",
                "version_is_missing",
                "version_returns_i64",
                "initialize_takes_parameters",
            )
        ),
        refused("version_is_2", "module_abi_version"),
        refused("version_traps"),
        refused("version_calls_host"),
        completes("re_exports_host_functions", 1),
        refused("import_unknown", "module_import_unknown", message="realm.exec"),
        refused("import_misspelt", "module_import_unknown", message="forward"),
        *(
            refused(name, "module_import_unknown")
            for name in ("import_wrong_type", "import_other_module", "import_memory", "import_global", "import_table")
        ),
    ],
    "proposals": [
        refused(name)
        for name in (
            "multi_memory",
            "shared_memory",
            "atomics",
            "atomic_wait",
            "exceptions",
            "gc_types",
            "function_references",
            "stack_switching",
            "custom_page_size",
            "relaxed_simd",
            "component",
            "empty_file",
            "native_library",
            "precompiled_here",
            "compressed",
            "text_format",
            "cut_in_the_middle",
            "section_of_4gib",
            "number_too_long",
            "sections_out_of_order",
            "junk_at_the_end",
            "export_name_not_utf8",
        )
    ]
    + [refused("header_only", _EMPTY, "module_invalid")],
    "sizes": [
        refused("data_16mib", "module_too_large"),
        refused("big_function", "module_too_large"),
        *(
            refused(name, details={"name": limit} if limit else {})
            for name, limit in {
                "functions_100000": "functions",
                "types_100000": "types",
                "parameters_10000": "parameters",
                "results_10000": "parameters",
                "locals_1000000": "locals",
                "locals_that_wrap": "locals",
                "blocks_100000": "nesting",
                "globals_65536": "globals",
                "exports_100000": "exports",
                "imports_100000": "imports",
                "tables_1000": "tables",
                "data_segments_200000": "data_segments",
                "data_scattered": "scattered_segments",
                "data_8mib": "passive_bytes",
                "elements_10000000": "element_items",
                "branch_table_1000000": "br_table_targets",
                "export_name_of_1mib": "name_bytes",
                "import_name_of_90kb": "name_bytes",
                "custom_sections_100000": "custom_sections",
                "count_of_4_billion": "types",
                "sixty_tables": "tables",
                "body_of_2mib": "body_bytes",
            }.items()
        ),
        fails("name_of_4mib", "guest_trap"),
        completes("compile_bomb"),
    ],
}

CATALOGUE: list[Attack] = [
    Attack(**{**attack.__dict__, "group": group}) for group, attacks in GROUPS.items() for attack in attacks
]
