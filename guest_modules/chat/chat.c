/* A conversation: answers a message, then waits for the next one. What is computed for the turns so
 * far stays in the sequence, so that each turn forwards only its own tokens. */
#include "realm_answer.h"

REALM_GUEST

/* Non-negative result besides those of enum realm_finish. */
#define FINISH_TIMED_OUT 2

static struct realm_options options = {
    .sampling = {.temperature = 0.7f, .top_p = 0.95f, .repetition_penalty = 1.0f},
    .max_tokens = 256,
};
static struct realm_buffer messages; /* JSON: an array that is still open */
static struct realm_buffer rendered; /* the conversation as the model reads it */
static struct realm_buffer tokens;   /* its tokens */
static struct realm_buffer computed; /* the tokens that the sequence holds */
static struct realm_answer answer;
static uint32_t turns = 1;
static uint32_t timeout_ms = 300000;

static bool add_message(const char *role, const char *text, uint32_t size) {
    return (messages.size == 0 ? realm_append_literal(&messages, "[") : realm_append_literal(&messages, ",")) &&
           realm_append_literal(&messages, "{\"role\":\"") && realm_append(&messages, role, (uint32_t)strlen(role)) &&
           realm_append_literal(&messages, "\",\"content\":") && realm_append_json(&messages, text, size) &&
           realm_append_literal(&messages, "}");
}

/* Reads the input: JSON when it begins with a brace, else the first message itself. */
static int32_t begin(void) {
    struct realm_text input, text;
    struct realm_json root, list;
    int32_t code;
    if ((code = realm_read_input(&input)) < 0) return code;
    const char *end = input.at + input.size;
    const char *start = realm_json_space_(input.at, end);
    if (start == end) return realm_refuse("input", "is empty");
    if (*start != '{') return add_message("user", input.at, input.size) ? 0 : realm_memory_full();

    if (!realm_json_parse(input.at, input.size, &root))
        return realm_refuse("input", "begins with a brace but is not a JSON object");
    if ((code = realm_read_options(root, &options)) < 0) return code;
    if ((code = realm_option_integer(root, "turns", 1, 1000, "must be an integer from 1 to 1000", &turns)) < 0)
        return code;
    if ((code = realm_option_integer(
             root, "timeout_ms", 0, 3600000, "must be an integer from 0 to 3600000", &timeout_ms)) < 0)
        return code;

    bool has_messages = realm_json_find(root, "messages", &list) && realm_json_kind(list) != 'n';
    if ((code = realm_option_text(root, "system", &text)) < 0) return code;
    if (has_messages && text.at) return realm_refuse("system", "put it into messages");
    if (text.at && !add_message("system", text.at, text.size)) return realm_memory_full();
    if ((code = realm_option_text(root, "prompt", &text)) < 0) return code;
    if (has_messages == (text.at != NULL)) return realm_refuse("prompt", "give either prompt or messages");
    if (!has_messages) return add_message("user", text.at, text.size) ? 0 : realm_memory_full();
    if (realm_json_kind(list) != '[') return realm_refuse("messages", "must be a list");
    struct realm_json item = {0, 0};
    if (!realm_json_next(list, &item)) return realm_refuse("messages", "is empty");
    /* Without its closing bracket: further messages follow. */
    return realm_append(&messages, list.at, (uint32_t)(list.end - 1 - list.at)) ? 0 : realm_memory_full();
}

/* Answers the last message. The part of the conversation that the sequence already holds is found by
 * comparing tokens, so that it works with any template, also one that rewrites earlier turns. */
static int32_t answer_turn(int32_t seq, uint32_t context_length) {
    int32_t code;
    uint32_t open = messages.size;
    if (!realm_append_literal(&messages, "]")) return realm_memory_full();
    code = realm_render(messages.at, messages.size, &rendered);
    messages.size = open;
    if (code < 0) return code;
    if ((code = realm_tokens(rendered.at, rendered.size, REALM_TOKENIZE_SPECIAL, &tokens)) < 0) return code;
    if (tokens.size == 0) return realm_refuse("prompt", "is empty");

    const uint32_t *all = (const uint32_t *)(const void *)tokens.at;
    const uint32_t *have = (const uint32_t *)(const void *)computed.at;
    uint32_t count = tokens.size / 4, held = computed.size / 4, same = 0;
    while (same < held && same < count - 1 && all[same] == have[same]) same++;
    if (same < held && (code = realm_seq_truncate(seq, same)) < 0) return code;

    int32_t finish = realm_answer_stream(seq, all + same, count - same, &options, context_length, &answer);
    if (finish < 0) return finish;
    computed.size = 0;
    if (!realm_append(&computed, tokens.at, tokens.size) ||
        !realm_append(&computed, answer.tokens.at, answer.tokens.size))
        return realm_memory_full();
    return finish;
}

/* Waits for the client's next message and adds it. */
static int32_t next_message(void) {
    static struct realm_buffer message;
    uint32_t guess = 4096;
    for (;;) {
        if (!realm_reserve(&message, guess)) return realm_memory_full();
        int32_t size = realm_recv(message.at, message.room, timeout_ms);
        if (size < 0) return size;
        if ((uint32_t)size <= message.room)
            return add_message("user", message.at, (uint32_t)size) ? 0 : realm_memory_full();
        guess = (uint32_t)size;
    }
}

REALM_EXPORT(run) int32_t run(void) {
    struct realm_model_info model;
    int32_t code;
    if ((code = realm_model_info(&model)) < 0) return code;
    if (!(model.flags & REALM_MODEL_CHAT_TEMPLATE)) {
        realm_log_literal(REALM_LOG_ERROR, "chat needs a model with a chat template");
        return REALM_NOT_SUPPORTED;
    }
    if ((code = begin()) < 0) return code;
    int32_t seq = realm_seq_new();
    if (seq < 0) return seq;
    if ((code = realm_use_adapter(seq, options.adapter)) < 0) return code;
    for (uint32_t turn = 1;; turn++) {
        int32_t finish = answer_turn(seq, model.context_length);
        if (finish < 0 || turn == turns) return finish;
        if ((code = realm_emit("\n", 1)) < 0) return code;
        if (!add_message("assistant", answer.text.at, answer.text.size)) return realm_memory_full();
        /* A program that drives the conversation waits for this line. */
        if ((code = realm_log_literal(REALM_LOG_INFO, "waiting for the next message")) < 0) return code;
        code = next_message();
        if (code == REALM_TIMED_OUT) return FINISH_TIMED_OUT;
        if (code < 0) return code;
    }
}
