/* A strict JSON reader (RFC 8259) and string writer for guests: no allocation, no libc.
 *
 * realm_json_parse() checks a whole document once: grammar, UTF-8, surrogate pairs, depth. After
 * that every value is a slice of the document, and reading it cannot fail for lack of syntax:
 *
 *     struct realm_json root, value;
 *     if (!realm_json_parse(text, size, &root)) ...;
 *     double temperature = 0;
 *     if (realm_json_find(root, "temperature", &value) && !realm_json_number(value, &temperature)) ...;
 *
 * Stricter than some readers: a lone surrogate (\ud800) is refused, because no UTF-8 stands for it,
 * as is nesting deeper than REALM_JSON_DEPTH. When a key occurs twice, the last one counts. */
#ifndef REALM_JSON_H
#define REALM_JSON_H

#include <stdbool.h>
#include <stdint.h>

/* Deepest nesting of arrays and objects. Bounds the stack that a hostile document can use. */
#define REALM_JSON_DEPTH 64

/* One value: its text without the white space around it. An empty one is "no value". */
struct realm_json {
    const char *at;
    const char *end;
};

/* --- checking ----------------------------------------------------------------------------------- */

static inline const char *realm_json_space_(const char *p, const char *end) {
    while (p < end && (*p == ' ' || *p == '\t' || *p == '\n' || *p == '\r')) p++;
    return p;
}

/* Four hexadecimal digits at p, or -1. */
static inline int32_t realm_json_hex_(const char *p, const char *end) {
    int32_t value = 0;
    if (end - p < 4) return -1;
    for (int i = 0; i < 4; i++) {
        char c = p[i];
        int32_t digit;
        if (c >= '0' && c <= '9') digit = c - '0';
        else if (c >= 'a' && c <= 'f') digit = c - 'a' + 10;
        else if (c >= 'A' && c <= 'F') digit = c - 'A' + 10;
        else return -1;
        value = value * 16 + digit;
    }
    return value;
}

/* Length of the UTF-8 character at p, or 0: no overlong forms, surrogates or code points past 10FFFF. */
static inline uint32_t realm_utf8_(const char *p, const char *end) {
    const unsigned char *u = (const unsigned char *)p;
    unsigned char low = 0x80, high = 0xBF;
    uint32_t size;
    if (u[0] < 0x80) return 1;
    if (u[0] >= 0xC2 && u[0] <= 0xDF) size = 2;
    else if (u[0] >= 0xE0 && u[0] <= 0xEF) size = 3;
    else if (u[0] >= 0xF0 && u[0] <= 0xF4) size = 4;
    else return 0;
    if ((uint64_t)(end - p) < size) return 0;
    if (u[0] == 0xE0) low = 0xA0;
    if (u[0] == 0xED) high = 0x9F;
    if (u[0] == 0xF0) low = 0x90;
    if (u[0] == 0xF4) high = 0x8F;
    if (u[1] < low || u[1] > high) return 0;
    for (uint32_t i = 2; i < size; i++)
        if (u[i] < 0x80 || u[i] > 0xBF) return 0;
    return size;
}

/* Past the string that begins at p (its quote included), or NULL. */
static inline const char *realm_json_skip_string_(const char *p, const char *end) {
    for (p++; p < end;) {
        unsigned char c = (unsigned char)*p;
        if (c == '"') return p + 1;
        if (c < 0x20) return 0;
        if (c != '\\') {
            uint32_t size = realm_utf8_(p, end);
            if (!size) return 0;
            p += size;
            continue;
        }
        if (end - p < 2) return 0;
        switch (p[1]) {
        case '"': case '\\': case '/': case 'b': case 'f': case 'n': case 'r': case 't':
            p += 2;
            break;
        case 'u': {
            int32_t unit = realm_json_hex_(p + 2, end);
            if (unit < 0 || (unit >= 0xDC00 && unit <= 0xDFFF)) return 0;
            p += 6;
            if (unit >= 0xD800 && unit <= 0xDBFF) {
                if (end - p < 2 || p[0] != '\\' || p[1] != 'u') return 0;
                int32_t second = realm_json_hex_(p + 2, end);
                if (second < 0xDC00 || second > 0xDFFF) return 0;
                p += 6;
            }
            break;
        }
        default:
            return 0;
        }
    }
    return 0;
}

static inline const char *realm_json_skip_digits_(const char *p, const char *end) {
    while (p < end && *p >= '0' && *p <= '9') p++;
    return p;
}

static inline const char *realm_json_skip_number_(const char *p, const char *end) {
    const char *start;
    if (p < end && *p == '-') p++;
    start = p;
    p = realm_json_skip_digits_(p, end);
    if (p == start || (*start == '0' && p - start > 1)) return 0;
    if (p < end && *p == '.') {
        start = ++p;
        p = realm_json_skip_digits_(p, end);
        if (p == start) return 0;
    }
    if (p < end && (*p == 'e' || *p == 'E')) {
        p++;
        if (p < end && (*p == '+' || *p == '-')) p++;
        start = p;
        p = realm_json_skip_digits_(p, end);
        if (p == start) return 0;
    }
    return p;
}

static inline const char *realm_json_skip_word_(const char *p, const char *end, const char *word) {
    while (*word) {
        if (p == end || *p != *word) return 0;
        p++, word++;
    }
    return p;
}

/* Past the value at p (no white space before it), or NULL. `depth` is what may still be nested. */
static inline const char *realm_json_skip_(const char *p, const char *end, int depth) {
    if (p >= end) return 0;
    switch (*p) {
    case '"': return realm_json_skip_string_(p, end);
    case 't': return realm_json_skip_word_(p, end, "true");
    case 'f': return realm_json_skip_word_(p, end, "false");
    case 'n': return realm_json_skip_word_(p, end, "null");
    case '{': case '[': break;
    default: return realm_json_skip_number_(p, end);
    }
    if (depth == 0) return 0;
    bool object = *p == '{';
    char close = object ? '}' : ']';
    p = realm_json_space_(p + 1, end);
    if (p < end && *p == close) return p + 1;
    for (;;) {
        if (object) {
            if (p >= end || *p != '"' || !(p = realm_json_skip_string_(p, end))) return 0;
            p = realm_json_space_(p, end);
            if (p >= end || *p != ':') return 0;
            p = realm_json_space_(p + 1, end);
        }
        if (!(p = realm_json_skip_(p, end, depth - 1))) return 0;
        p = realm_json_space_(p, end);
        if (p >= end) return 0;
        if (*p == close) return p + 1;
        if (*p != ',') return 0;
        p = realm_json_space_(p + 1, end);
    }
}

/* Checks a document; `out` becomes its value. False if it is not JSON. */
static inline bool realm_json_parse(const char *text, uint32_t size, struct realm_json *out) {
    const char *end = text + size;
    const char *start = realm_json_space_(text, end);
    const char *stop = realm_json_skip_(start, end, REALM_JSON_DEPTH);
    if (!stop || realm_json_space_(stop, end) != end) return false;
    out->at = start;
    out->end = stop;
    return true;
}

/* --- reading ------------------------------------------------------------------------------------ */

/* What a value is: '{', '[', '"', 't' (true), 'f' (false), 'n' (null), '0' (number), or 0 (none). */
static inline char realm_json_kind(struct realm_json value) {
    if (value.at == value.end) return 0;
    char c = *value.at;
    return c == '-' || (c >= '0' && c <= '9') ? '0' : c;
}

/* One character of a checked string at *p as UTF-8; returns its bytes (1..4) and moves *p on. */
static inline uint32_t realm_json_character_(const char **p, const char *end, char out[4]) {
    const char *at = *p;
    if (*at != '\\') {
        uint32_t size = realm_utf8_(at, end);
        for (uint32_t i = 0; i < size; i++) out[i] = at[i];
        *p = at + size;
        return size;
    }
    if (at[1] != 'u') {
        char c = at[1];
        out[0] = c == 'b' ? '\b' : c == 'f' ? '\f' : c == 'n' ? '\n' : c == 'r' ? '\r' : c == 't' ? '\t' : c;
        *p = at + 2;
        return 1;
    }
    uint32_t code = (uint32_t)realm_json_hex_(at + 2, end);
    at += 6;
    if (code >= 0xD800 && code <= 0xDBFF) {
        code = 0x10000 + ((code - 0xD800) << 10) + ((uint32_t)realm_json_hex_(at + 2, end) - 0xDC00);
        at += 6;
    }
    *p = at;
    if (code < 0x80) {
        out[0] = (char)code;
        return 1;
    }
    uint32_t size = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (uint32_t i = size - 1; i > 0; i--) {
        out[i] = (char)(0x80 | (code & 0x3F));
        code >>= 6;
    }
    out[0] = (char)((size == 2 ? 0xC0 : size == 3 ? 0xE0 : 0xF0) | code);
    return size;
}

/* A string as UTF-8. Returns the bytes it needs, or -1 if the value is no string. Nothing is
 * written when that is more than `room`. No 0 is added at the end, and the text may hold one. */
static inline int64_t realm_json_string(struct realm_json value, char *out, uint32_t room) {
    if (realm_json_kind(value) != '"') return -1;
    const char *end = value.end - 1;
    char piece[4];
    int64_t size = 0;
    for (const char *p = value.at + 1; p < end;) size += realm_json_character_(&p, end, piece);
    if (size > room) return size;
    for (const char *p = value.at + 1; p < end;) {
        uint32_t n = realm_json_character_(&p, end, piece);
        for (uint32_t i = 0; i < n; i++) *out++ = piece[i];
    }
    return size;
}

/* Whether a string value is this text. */
static inline bool realm_json_is(struct realm_json value, const char *text) {
    if (realm_json_kind(value) != '"') return false;
    const char *end = value.end - 1;
    char piece[4];
    for (const char *p = value.at + 1; p < end;) {
        uint32_t n = realm_json_character_(&p, end, piece);
        for (uint32_t i = 0; i < n; i++, text++)
            if (!*text || *text != piece[i]) return false;
    }
    return !*text;
}

/* Steps through an array: start with *item empty ({0, 0}); false at the end (or if it is no array). */
static inline bool realm_json_next(struct realm_json array, struct realm_json *item) {
    if (realm_json_kind(array) != '[') return false;
    const char *p = realm_json_space_(item->at == item->end ? array.at + 1 : item->end, array.end);
    if (*p == ',') p = realm_json_space_(p + 1, array.end);
    if (*p == ']') return false;
    item->at = p;
    item->end = realm_json_skip_(p, array.end, REALM_JSON_DEPTH);
    return true;
}

/* Steps through an object's members in the same way; *key and *item both start empty. */
static inline bool realm_json_next_member(struct realm_json object, struct realm_json *key, struct realm_json *item) {
    if (realm_json_kind(object) != '{') return false;
    const char *p = realm_json_space_(item->at == item->end ? object.at + 1 : item->end, object.end);
    if (*p == ',') p = realm_json_space_(p + 1, object.end);
    if (*p == '}') return false;
    key->at = p;
    key->end = realm_json_skip_string_(p, object.end);
    item->at = realm_json_space_(realm_json_space_(key->end, object.end) + 1, object.end);
    item->end = realm_json_skip_(item->at, object.end, REALM_JSON_DEPTH);
    return true;
}

/* The value of a key in an object; false if it is not there. */
static inline bool realm_json_find(struct realm_json object, const char *name, struct realm_json *out) {
    struct realm_json key = {0, 0}, item = {0, 0};
    bool found = false;
    while (realm_json_next_member(object, &key, &item)) {
        if (realm_json_is(key, name)) {
            *out = item;
            found = true;
        }
    }
    return found;
}

static inline bool realm_json_bool(struct realm_json value, bool *out) {
    char kind = realm_json_kind(value);
    if (kind != 't' && kind != 'f') return false;
    *out = kind == 't';
    return true;
}

/* A number as a double: exact up to 15 significant digits with an exponent of at most 22, else
 * within a few units of the last place (so the very largest doubles, and all above, become infinity).
 * False if it is no number. */
static inline bool realm_json_number(struct realm_json value, double *out) {
    if (realm_json_kind(value) != '0') return false;
    const char *p = value.at;
    bool negative = *p == '-', fraction = false;
    uint64_t digits = 0;
    int64_t exponent = 0;
    if (negative) p++;
    for (; p < value.end && *p != 'e' && *p != 'E'; p++) {
        if (*p == '.') {
            fraction = true;
        } else if (digits < 1000000000000000000u) {
            digits = digits * 10 + (uint64_t)(*p - '0');
            if (fraction) exponent--;
        } else if (!fraction) {
            exponent++;
        }
    }
    if (p < value.end) {
        bool down = *++p == '-';
        int64_t written = 0;
        if (*p == '-' || *p == '+') p++;
        for (; p < value.end; p++)
            if (written < 1000000000) written = written * 10 + (*p - '0');
        exponent += down ? -written : written;
    }
    double result = (double)digits;
    /* One power of ten, so that one rounding is added; two when the power alone would leave the range. */
    bool divide = exponent < 0;
    int64_t left = divide ? -exponent : exponent;
    if (left > 400) left = 400;
    while (left > 0 && digits) {
        int64_t part = left > 300 ? 300 : left;
        double power = 1, base = 10;
        for (int64_t bits = part; bits; bits >>= 1, base *= base)
            if (bits & 1) power *= base;
        result = divide ? result / power : result * power;
        left -= part;
    }
    *out = negative ? -result : result;
    return true;
}

/* A number without fraction or exponent that fits; false otherwise. */
static inline bool realm_json_integer(struct realm_json value, int64_t *out) {
    if (realm_json_kind(value) != '0') return false;
    const char *p = value.at;
    bool negative = *p == '-';
    uint64_t total = 0;
    for (p += negative; p < value.end; p++) {
        if (*p < '0' || *p > '9') return false;
        uint64_t digit = (uint64_t)(*p - '0');
        if (total > (UINT64_MAX - digit) / 10) return false;
        total = total * 10 + digit;
    }
    if (total > (uint64_t)INT64_MAX + negative) return false;
    *out = negative ? (int64_t)(0 - total) : (int64_t)total;
    return true;
}

/* --- writing ------------------------------------------------------------------------------------ */

/* Writes text as a JSON string with its quotes. Returns the bytes it needs; nothing is written when
 * that is more than `room`. The text should be UTF-8: it is passed through but for escapes. */
static inline uint64_t realm_json_write_string(const char *text, uint32_t size, char *out, uint64_t room) {
    static const char hex[] = "0123456789abcdef";
    uint64_t needed = 2;
    for (uint32_t i = 0; i < size; i++) {
        unsigned char c = (unsigned char)text[i];
        needed += c == '"' || c == '\\' || c == '\n' || c == '\r' || c == '\t' ? 2 : c < 0x20 ? 6 : 1;
    }
    if (needed > room) return needed;
    *out++ = '"';
    for (uint32_t i = 0; i < size; i++) {
        unsigned char c = (unsigned char)text[i];
        if (c == '"' || c == '\\') {
            *out++ = '\\', *out++ = (char)c;
        } else if (c == '\n' || c == '\r' || c == '\t') {
            *out++ = '\\', *out++ = c == '\n' ? 'n' : c == '\r' ? 'r' : 't';
        } else if (c < 0x20) {
            *out++ = '\\', *out++ = 'u', *out++ = '0', *out++ = '0', *out++ = hex[c >> 4], *out++ = hex[c & 15];
        } else {
            *out++ = (char)c;
        }
    }
    *out = '"';
    return needed;
}

#endif
