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
#define REALM_MAX_ADAPTER 128 /* bytes of a name */

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

static inline bool realm_append_number(struct realm_buffer *buffer, uint64_t number) {
    char digits[20];
    uint32_t at = sizeof digits;
    do digits[--at] = (char)('0' + number % 10);
    while (number /= 10);
    return realm_append(buffer, digits + at, (uint32_t)sizeof digits - at);
}

/* A log-probability (0 or less) with so many decimals, at most 9. */
static inline bool realm_append_logprob(struct realm_buffer *buffer, double value, uint32_t decimals) {
    if (!(value >= -999999)) value = -999999; /* also an infinite one, which no integer holds */
    uint64_t unit = 1;
    for (uint32_t i = 0; i < decimals; i++) unit *= 10;
    uint64_t units = value < 0 ? (uint64_t)(-value * (double)unit + 0.5) : 0;
    if (units && !realm_append_literal(buffer, "-")) return false;
    if (!realm_append_number(buffer, units / unit) || !realm_append_literal(buffer, ".")) return false;
    while (unit /= 10) {
        char digit = (char)('0' + units / unit % 10);
        if (!realm_append(buffer, &digit, 1)) return false;
    }
    return true;
}

/* --- input and options -------------------------------------------------------------------------- */

/* Puts text behind the `size` bytes of a log line of `room`, as far as it fits; the new size. */
static inline uint32_t realm_line_(char *line, uint32_t room, uint32_t size, const char *text, uint32_t count) {
    for (uint32_t i = 0; i < count && size < room; i++) line[size++] = text[i];
    return size;
}

/* Logs "name: why" and gives the code for run() to return. */
static inline int32_t realm_refuse(const char *name, const char *why) {
    char line[160];
    uint32_t size = realm_line_(line, sizeof line, 0, name, (uint32_t)strlen(name));
    size = realm_line_(line, sizeof line, size, ": ", 2);
    size = realm_line_(line, sizeof line, size, why, (uint32_t)strlen(why));
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
    struct realm_text adapter; /* at is NULL when none is asked for */
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

/* The name of an adapter; absent, null or empty is the model as it is. Returns 0 or an error code. */
static inline int32_t realm_option_adapter(struct realm_json root, const char *name, struct realm_text *out) {
    int32_t code = realm_option_text(root, name, out);
    if (code < 0) return code;
    return out->size > REALM_MAX_ADAPTER ? realm_refuse(name, "must be a name of at most 128 bytes") : 0;
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

/* Reads max_tokens, sampling, stop and adapter into *out, which holds the defaults. Returns 0 or an error code. */
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
    return realm_option_adapter(root, "adapter", &out->adapter);
}

/* From now on the sequence computes with this adapter; no name changes nothing. Returns 0 or an error code, with a log
 * line that says which adapter. It is a warning: the host's line before it says why, and stays the run's last error. */
static inline int32_t realm_use_adapter(int32_t seq, struct realm_text name) {
    if (name.size == 0) return 0;
    int32_t code = realm_lora_apply(seq, name.at, name.size);
    if (code >= 0) return 0;
    char line[160];
    uint32_t size = realm_line_(line, sizeof line, 0, "adapter: ", 9);
    size = realm_line_(line, sizeof line, size, name.at, name.size);
    size = realm_line_(line, sizeof line, size, ": cannot be used", 16);
    realm_log(REALM_LOG_WARNING, line, size);
    return code;
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

/* Replaces *tokens by those of the input's `prompt` or `messages`: rendered with the chat template where the model has
 * one, else of the prompt as it stands. There is at least one. Returns 0 or an error code. */
static inline int32_t realm_prompt_tokens(struct realm_json root, bool has_template, struct realm_buffer *tokens) {
    struct realm_json prompt = {0, 0}, messages = {0, 0};
    bool has_prompt = realm_json_find(root, "prompt", &prompt) && realm_json_kind(prompt) != 'n';
    bool has_messages = realm_json_find(root, "messages", &messages) && realm_json_kind(messages) != 'n';
    if (has_prompt == has_messages) return realm_refuse("prompt", "give either prompt or messages");
    if (has_prompt && realm_json_kind(prompt) != '"') return realm_refuse("prompt", "must be text");
    if (has_messages && realm_json_kind(messages) != '[') return realm_refuse("messages", "must be a list");

    struct realm_buffer list = {0}, rendered = {0};
    int32_t code;
    if (!has_template) {
        struct realm_text text;
        if (has_messages) {
            realm_log_literal(REALM_LOG_ERROR, "messages: the model has no chat template");
            return REALM_NOT_SUPPORTED;
        }
        if ((code = realm_option_text(root, "prompt", &text)) < 0) return code;
        code = realm_tokens(text.at, text.size, 0, tokens);
    } else {
        /* A prompt is already JSON text, so that it goes into the message as it stands. */
        bool fits = has_messages
                        ? realm_append(&list, messages.at, (uint32_t)(messages.end - messages.at))
                        : realm_append_literal(&list, "[{\"role\":\"user\",\"content\":") &&
                              realm_append(&list, prompt.at, (uint32_t)(prompt.end - prompt.at)) &&
                              realm_append_literal(&list, "}]");
        if (!fits) return realm_memory_full();
        if ((code = realm_render(list.at, list.size, &rendered)) < 0) return code;
        code = realm_tokens(rendered.at, rendered.size, REALM_TOKENIZE_SPECIAL, tokens);
    }
    if (code < 0) return code;
    return tokens->size == 0 ? realm_refuse("prompt", "is empty") : 0;
}

/* --- answer ------------------------------------------------------------------------------------- */

/* Appends the text of tokens; with a stream number, what `count` more of them make whole (0 ends the stream). */
static inline int32_t realm_append_decoded(
    struct realm_buffer *out, uint32_t stream, const uint32_t *tokens, uint32_t count) {
    uint32_t guess = count < (1u << 28) ? count * 8 + 256 : count;
    for (;;) {
        if (!realm_reserve(out, guess)) return realm_memory_full();
        uint32_t room = out->room - out->size;
        int32_t needed = realm_detokenize(stream, tokens, count, 0, out->at + out->size, room);
        if (needed < 0) return needed;
        if ((uint32_t)needed <= room) {
            out->size += (uint32_t)needed;
            return 0;
        }
        guess = (uint32_t)needed;
    }
}

/* Emits a long text in pieces, because one emit takes at most 1 MiB. Returns 0 or an error code. */
static inline int32_t realm_emit_all(const char *text, uint32_t size) {
    for (uint32_t at = 0; at < size;) {
        uint32_t piece = size - at < 65536 ? size - at : 65536;
        int32_t code = realm_emit(text + at, piece);
        if (code < 0) return code;
        at += piece;
    }
    return 0;
}

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
        if ((code = realm_append_decoded(&answer->text, 1, &token, 1)) < 0) return code;
        if ((code = realm_answer_take(answer, options, false)) < 0) return code;
        if (answer->stopped) break;
        finish = REALM_FINISH_LENGTH;
        if (made >= options->max_tokens || out.length >= context_length) break;
        if (!realm_append(&answer->tokens, (const char *)&token, sizeof token)) return realm_memory_full();
        code = realm_forward(seq, &token, 1, &options->sampling, &out);
    }
    bool stopped = answer->stopped;
    uint32_t size = answer->text.size;
    if ((code = realm_append_decoded(&answer->text, 1, &token, 0)) < 0) return code;
    if (stopped) answer->text.size = size;
    if ((code = realm_answer_take(answer, options, true)) < 0) return code;
    return answer->stopped ? REALM_FINISH_STOP : finish;
}

#endif
