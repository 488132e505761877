/* What a guest without libc needs: the memory functions that compilers call by themselves, an
 * allocator that only grows, and small text helpers. */
#ifndef REALM_SUPPORT_H
#define REALM_SUPPORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __wasm__

/* Weak, so that a libc or compiler-rt that is linked too takes precedence without a clash. */
#define REALM_WEAK(name) __attribute__((weak, no_builtin(#name)))

REALM_WEAK(memcpy) void *memcpy(void *restrict to, const void *restrict from, size_t size) {
    unsigned char *t = to;
    const unsigned char *f = from;
    for (size_t i = 0; i < size; i++) t[i] = f[i];
    return to;
}

REALM_WEAK(memmove) void *memmove(void *to, const void *from, size_t size) {
    unsigned char *t = to;
    const unsigned char *f = from;
    if (t < f) {
        for (size_t i = 0; i < size; i++) t[i] = f[i];
    } else {
        for (size_t i = size; i > 0; i--) t[i - 1] = f[i - 1];
    }
    return to;
}

REALM_WEAK(memset) void *memset(void *to, int value, size_t size) {
    unsigned char *t = to;
    for (size_t i = 0; i < size; i++) t[i] = (unsigned char)value;
    return to;
}

REALM_WEAK(memcmp) int memcmp(const void *a, const void *b, size_t size) {
    const unsigned char *x = a, *y = b;
    for (size_t i = 0; i < size; i++)
        if (x[i] != y[i]) return x[i] < y[i] ? -1 : 1;
    return 0;
}

REALM_WEAK(strlen) size_t strlen(const char *text) {
    size_t size = 0;
    while (text[size]) size++;
    return size;
}

extern unsigned char __heap_base;
static uintptr_t realm_heap_next;

/* Zeroed memory (fresh pages of WebAssembly are zero and nothing is ever given back), aligned to
 * 16; NULL when the memory may not grow further. */
static inline void *realm_alloc(uint32_t size) {
    if (realm_heap_next == 0) realm_heap_next = ((uintptr_t)&__heap_base + 15) & ~(uintptr_t)15;
    uint64_t end = ((uint64_t)realm_heap_next + size + 15) & ~(uint64_t)15;
    uint64_t have = (uint64_t)__builtin_wasm_memory_size(0) << 16;
    if (end > have) {
        uint64_t pages = (end - have + 65535) >> 16;
        if (end > UINT32_MAX || __builtin_wasm_memory_grow(0, (uintptr_t)pages) == (uintptr_t)-1) return NULL;
    }
    void *found = (void *)realm_heap_next;
    realm_heap_next = (uintptr_t)end;
    return found;
}

#else
#include <string.h>
#endif

/* A run of bytes that somebody else owns. */
struct realm_text {
    const char *at;
    uint32_t size;
};

#define REALM_TEXT(literal) ((struct realm_text){(literal), (uint32_t)sizeof(literal) - 1})

/* A log line, level REALM_LOG_*, from a string literal. */
#define realm_log_literal(level, literal) realm_log((level), (literal), (uint32_t)sizeof(literal) - 1)

#endif
