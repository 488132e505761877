/* What the text-generating guests share: reading input and options, rendering and tokenizing a
 * prompt, and streaming an answer with stop strings. A guest may as well do all of this itself:
 * nothing here is known to the host. */
#ifndef REALM_ANSWER_H
#define REALM_ANSWER_H

#include "realm.h"
#include "realm_json.h"
#include "realm_support.h"

/* Non-negative results of a text-generating guest's run(). */
enum realm_finish {
    REALM_FINISH_STOP = 0,   /* the model ended its answer, or a stop string came */
    REALM_FINISH_LENGTH = 1, /* max_tokens, or the context is full */
};

#define REALM_MAX_STOPS 8

/* --- a buffer that grows ------------------------------------------------------------------------ */

struct realm_buffer {
    char *at;
    uint32_t size; /* bytes in use */
    uint32_t room; /* bytes there are */
};

/* Room for `more` bytes after those in use. False if memory is at its limit. */
static inline bool realm_reserve(struct realm_buffer *buffer, uint32_t more) {
    uint64_t needed = (uint64_t)buffer->size + more;
    if (needed <= buffer->room) return true;
    uint64_t room = needed + needed / 2 + 256;
    if (room > UINT32_MAX) return false;
    char *at = realm_alloc((uint32_t)room);
    if (!at) return false;
    memcpy(at, buffer->at, buffer->size);
    buffer->at = at;
    buffer->room = (uint32_t)room;
    return true;
}

static inline bool realm_append(struct realm_buffer *buffer, const char *text, uint32_t size) {
    if (!realm_reserve(buffer, size)) return false;
    memcpy(buffer->at + buffer->size, text, size);
    buffer->size += size;
    return true;
}

#define realm_append_literal(buffer, literal) realm_append((buffer), (literal), (uint32_t)sizeof(literal) - 1)

/* Appends text as a JSON string. */
static inline bool realm_append_json(struct realm_buffer *buffer, const char *text, uint32_t size) {
    uint64_t needed = realm_json_write_string(text, size, NULL, 0);
    if (needed > UINT32_MAX || !realm_reserve(buffer, (uint32_t)needed)) return false;
    realm_json_write_string(text, size, buffer->at + buffer->size, needed);
    buffer->size += (uint32_t)needed;
    return true;
}

/* --- input and options -------------------------------------------------------------------------- */

/* Logs "name: why" and gives the code for run() to return. */
static inline int32_t realm_refuse(const char *name, const char *why) {
    char line[160];
    uint32_t size = 0;
    for (const char *p = name; *p && size < sizeof line; p++) line[size++] = *p;
    for (const char *p = ": "; *p && size < sizeof line; p++) line[size++] = *p;
    for (const char *p = why; *p && size < sizeof line; p++) line[size++] = *p;
    realm_log(REALM_LOG_ERROR, line, size);
    return REALM_INVALID_ARGUMENT;
}

/* A host function returns OUT_OF_MEMORY for the engine's KV pages; the guest's own memory is a limit of the run. */
static inline int32_t realm_memory_full(void) {
    realm_log_literal(REALM_LOG_ERROR, "the guest's memory may not grow further");
    return REALM_LIMIT;
}

/* The run's whole input. Returns 0 or an error code. */
static inline int32_t realm_read_input(struct realm_text *out) {
    int32_t size = realm_input_len();
    if (size < 0) return size;
    char *at = realm_alloc((uint32_t)size);
    if (!at) return realm_memory_full();
    int32_t got = realm_input_read(0, at, (uint32_t)size);
    if (got < 0) return got;
    out->at = at;
    out->size = (uint32_t)got;
    return 0;
}

struct realm_options {
    struct realm_sampling sampling;
    uint32_t max_tokens;
    struct realm_text stops[REALM_MAX_STOPS];
    uint32_t stop_count;
};

/* An integer option; absent or null leaves *out as it is. Returns 0 or an error code. */
static inline int32_t realm_option_integer(
    struct realm_json root, const char *name, int64_t low, int64_t high, const char *why, uint32_t *out) {
    struct realm_json value;
    int64_t number;
    if (!realm_json_find(root, name, &value) || realm_json_kind(value) == 'n') return 0;
    if (!realm_json_integer(value, &number) || number < low || number > high) return realm_refuse(name, why);
    *out = (uint32_t)number;
    return 0;
}

static inline int32_t realm_option_float(
    struct realm_json root, const char *name, double low, double high, const char *why, float *out) {
    struct realm_json value;
    double number;
    if (!realm_json_find(root, name, &value) || realm_json_kind(value) == 'n') return 0;
    if (!realm_json_number(value, &number) || !(number >= low && number <= high)) return realm_refuse(name, why);
    *out = (float)number;
    return 0;
}

/* A text option, decoded into new memory. Absent or null gives at = NULL. Returns 0 or an error code. */
static inline int32_t realm_option_text(struct realm_json root, const char *name, struct realm_text *out) {
    struct realm_json value;
    out->at = NULL;
    out->size = 0;
    if (!realm_json_find(root, name, &value) || realm_json_kind(value) == 'n') return 0;
    if (realm_json_kind(value) != '"') return realm_refuse(name, "must be text");
    uint32_t room = (uint32_t)(value.end - value.at);
    char *at = realm_alloc(room);
    if (!at) return realm_memory_full();
    out->at = at;
    out->size = (uint32_t)realm_json_string(value, at, room);
    return 0;
}

static inline int32_t realm_read_stop(struct realm_json value, struct realm_options *out) {
    if (out->stop_count == REALM_MAX_STOPS) return realm_refuse("stop", "at most 8 texts");
    if (realm_json_kind(value) != '"') return realm_refuse("stop", "must be a list of texts");
    uint32_t room = (uint32_t)(value.end - value.at);
    char *at = realm_alloc(room);
    if (!at) return realm_memory_full();
    uint32_t size = (uint32_t)realm_json_string(value, at, room);
    if (size == 0) return realm_refuse("stop", "a text is empty");
    out->stops[out->stop_count++] = (struct realm_text){at, size};
    return 0;
}

/* Reads max_tokens, sampling and stop into *out, which holds the defaults. Returns 0 or an error code. */
static inline int32_t realm_read_options(struct realm_json root, struct realm_options *out) {
    struct realm_sampling *s = &out->sampling;
    struct realm_json value, item = {0, 0};
    int32_t code;
    if ((code = realm_option_integer(
             root, "max_tokens", 1, 1 << 20, "must be an integer from 1 to 1048576", &out->max_tokens)))
        return code;
    if ((code = realm_option_integer(root, "top_k", 0, 1 << 20, "must be an integer from 0 to 1048576", &s->top_k)))
        return code;
    if ((code = realm_option_float(root, "temperature", 0, 100, "must be a number from 0 to 100", &s->temperature)))
        return code;
    if ((code = realm_option_float(root, "top_p", 0, 1, "must be a number from 0 to 1", &s->top_p))) return code;
    if ((code = realm_option_float(root, "min_p", 0, 1, "must be a number from 0 to 1", &s->min_p))) return code;
    if ((code = realm_option_float(
             root, "repetition_penalty", 0.01, 100, "must be a number from 0.01 to 100", &s->repetition_penalty)))
        return code;
    if (realm_json_find(root, "stop", &value) && realm_json_kind(value) != 'n') {
        if (realm_json_kind(value) == '"') return realm_read_stop(value, out);
        if (realm_json_kind(value) != '[') return realm_refuse("stop", "must be a list of texts");
        while (realm_json_next(value, &item))
            if ((code = realm_read_stop(item, out))) return code;
    }
    return 0;
}

/* --- prompt ------------------------------------------------------------------------------------- */

/* Replaces *out by the messages (JSON text) rendered for an answer. Returns 0 or an error code. */
static inline int32_t realm_render(const char *messages, uint32_t size, struct realm_buffer *out) {
    out->size = 0;
    uint32_t guess = size < (1u << 28) ? size * 2 + 1024 : size;
    for (;;) {
        if (!realm_reserve(out, guess)) return realm_memory_full();
        int32_t needed = realm_chat_template(messages, size, REALM_CHAT_GENERATE, out->at, out->room);
        if (needed < 0) return needed;
        if ((uint32_t)needed <= out->room) {
            out->size = (uint32_t)needed;
            return 0;
        }
        guess = (uint32_t)needed;
    }
}

/* Replaces *out by the token ids (uint32) of a text. Returns 0 or an error code. */
static inline int32_t realm_tokens(const char *text, uint32_t size, uint32_t flags, struct realm_buffer *out) {
    out->size = 0;
    uint64_t guess = (uint64_t)size + 16;
    for (;;) {
        if (guess > UINT32_MAX / 4 || !realm_reserve(out, (uint32_t)guess * 4)) return realm_memory_full();
        int32_t needed = realm_tokenize(text, size, flags, (uint32_t *)(void *)out->at, out->room / 4);
        if (needed < 0) return needed;
        if ((uint32_t)needed <= out->room / 4) {
            out->size = (uint32_t)needed * 4;
            return 0;
        }
        guess = (uint32_t)needed;
    }
}

/* --- answer ------------------------------------------------------------------------------------- */

struct realm_answer {
    struct realm_buffer text;   /* what was answered, without a stop string */
    struct realm_buffer tokens; /* uint32 ids that were appended to the sequence after the prompt */
    uint32_t sent;              /* bytes of text already emitted; the rest may begin a stop string */
    bool stopped;
};

static inline int32_t realm_answer_emit(struct realm_answer *answer, uint32_t end) {
    if (end == answer->sent) return 0;
    int32_t code = realm_emit(answer->text.at + answer->sent, end - answer->sent);
    answer->sent = end;
    return code < 0 ? code : 0;
}

/* Emits what is new and cannot begin a stop string; at the first whole stop string the text ends. */
static inline int32_t realm_answer_take(struct realm_answer *answer, const struct realm_options *options, bool last) {
    const char *text = answer->text.at;
    uint32_t size = answer->text.size, safe = size;
    for (uint32_t at = answer->sent; at < size; at++) {
        for (uint32_t i = 0; i < options->stop_count; i++) {
            struct realm_text stop = options->stops[i];
            uint32_t compare = size - at < stop.size ? size - at : stop.size;
            if (memcmp(text + at, stop.at, compare)) continue;
            if (compare == stop.size) {
                answer->text.size = at;
                answer->stopped = true;
                return realm_answer_emit(answer, at);
            }
            if (safe > at) safe = at;
        }
    }
    return realm_answer_emit(answer, last ? size : safe);
}

/* Appends the text that `count` more tokens make whole (0 ends the stream). */
static inline int32_t realm_answer_decode(struct realm_answer *answer, const uint32_t *token, uint32_t count) {
    uint32_t guess = 256;
    for (;;) {
        if (!realm_reserve(&answer->text, guess)) return realm_memory_full();
        uint32_t room = answer->text.room - answer->text.size;
        int32_t needed = realm_detokenize(1, token, count, 0, answer->text.at + answer->text.size, room);
        if (needed < 0) return needed;
        if ((uint32_t)needed <= room) {
            answer->text.size += (uint32_t)needed;
            return 0;
        }
        guess = (uint32_t)needed;
    }
}

/* Forwards the prompt's tokens and streams the answer, one emit for each token that has text.
 * *answer is emptied first and may be used again. Returns enum realm_finish or an error code. */
static inline int32_t realm_answer_stream(
    int32_t seq, const uint32_t *prompt, uint32_t count, const struct realm_options *options, uint32_t context_length,
    struct realm_answer *answer) {
    struct realm_token out;
    uint32_t token = 0;
    int32_t finish;
    answer->text.size = answer->tokens.size = answer->sent = 0;
    answer->stopped = false;
    int32_t code = realm_forward(seq, prompt, count, &options->sampling, &out);
    for (uint32_t made = 1;; made++) {
        if (code < 0) return code;
        finish = REALM_FINISH_STOP;
        if (out.flags & REALM_TOKEN_EOS) break;
        token = (uint32_t)out.token;
        if ((code = realm_answer_decode(answer, &token, 1)) < 0) return code;
        if ((code = realm_answer_take(answer, options, false)) < 0) return code;
        if (answer->stopped) break;
        finish = REALM_FINISH_LENGTH;
        if (made >= options->max_tokens || out.length >= context_length) break;
        if (!realm_append(&answer->tokens, (const char *)&token, sizeof token)) return realm_memory_full();
        code = realm_forward(seq, &token, 1, &options->sampling, &out);
    }
    bool stopped = answer->stopped;
    uint32_t size = answer->text.size;
    if ((code = realm_answer_decode(answer, &token, 0)) < 0) return code;
    if (stopped) answer->text.size = size;
    if ((code = realm_answer_take(answer, options, true)) < 0) return code;
    return answer->stopped ? REALM_FINISH_STOP : finish;
}

#endif
