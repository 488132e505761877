/* Best of n: the prompt is computed once, forked, and n answers are drawn side by side, each step of
 * all of them in one batch. The answer that the model itself finds most likely is kept. */
#include "realm_answer.h"

REALM_GUEST

#define MOST_CANDIDATES 32

struct candidate {
    int32_t seq;
    uint32_t token; /* drawn, not yet forwarded */
    double logprob; /* sum over the drawn tokens, the end-of-sequence token included */
    uint32_t draws;
    bool ended;
    struct realm_buffer tokens; /* the answer: uint32 ids */
};

static struct realm_options options = {
    .sampling = {.temperature = 0.8f, .top_p = 1.0f, .repetition_penalty = 1.0f, .flags = REALM_SAMPLE_LOGPROB},
    .max_tokens = 48,
};
static struct candidate candidates[MOST_CANDIDATES];
static uint32_t order[MOST_CANDIDATES]; /* of candidates, best first */
static uint32_t count = 4;
static bool table = true;
static struct realm_buffer output;

static double mean(const struct candidate *c) { return c->draws ? c->logprob / c->draws : 0; }

/* Reads the input (JSON when it begins with a brace, else the prompt itself) and forwards the prompt. */
static int32_t prefill(int32_t seq, uint32_t *left) {
    struct realm_model_info model;
    struct realm_text input, text;
    struct realm_json root, value;
    struct realm_buffer list = {0}, rendered = {0}, tokens = {0};
    struct realm_token out;
    int32_t code;
    if ((code = realm_model_info(&model)) < 0) return code;
    if ((code = realm_read_input(&input)) < 0) return code;
    const char *start = realm_json_space_(input.at, input.at + input.size);
    text = input;
    if (start < input.at + input.size && *start == '{') {
        if (!realm_json_parse(input.at, input.size, &root))
            return realm_refuse("input", "begins with a brace but is not a JSON object");
        if ((code = realm_read_options(root, &options)) < 0) return code;
        if (options.stop_count) return realm_refuse("stop", "is not an option of best_of_n");
        if ((code = realm_option_integer(
                 root, "n", 1, MOST_CANDIDATES, "must be an integer from 1 to 32", &count)) < 0)
            return code;
        if (realm_json_find(root, "table", &value) && !realm_json_bool(value, &table))
            return realm_refuse("table", "must be true or false");
        if ((code = realm_option_text(root, "prompt", &text)) < 0) return code;
    }
    if (text.size == 0) return realm_refuse("prompt", "must be text that is not empty");
    if (model.flags & REALM_MODEL_CHAT_TEMPLATE) {
        if (!realm_append_literal(&list, "[{\"role\":\"user\",\"content\":") ||
            !realm_append_json(&list, text.at, text.size) || !realm_append_literal(&list, "}]"))
            return realm_memory_full();
        if ((code = realm_render(list.at, list.size, &rendered)) < 0) return code;
        code = realm_tokens(rendered.at, rendered.size, REALM_TOKENIZE_SPECIAL, &tokens);
    } else {
        code = realm_tokens(text.at, text.size, 0, &tokens);
    }
    if (code < 0) return code;
    if ((code = realm_use_adapter(seq, options.adapter)) < 0) return code;
    /* Without sampling the logits stay with the sequence, and with each of its forks. */
    code = realm_forward(seq, (const uint32_t *)(const void *)tokens.at, tokens.size / 4, NULL, &out);
    if (code < 0) return code;
    *left = model.context_length - out.length + 1;
    return 0;
}

/* Takes in a draw. Returns 0 or an error code. */
static int32_t take(struct candidate *c, int32_t token, float logprob, uint32_t flags, uint32_t most) {
    c->logprob += (double)logprob;
    c->draws++;
    if (flags & REALM_TOKEN_EOS) {
        c->ended = true;
        return 0;
    }
    c->token = (uint32_t)token;
    if (!realm_append(&c->tokens, (const char *)&c->token, sizeof c->token)) return realm_memory_full();
    c->ended = c->draws >= most;
    return 0;
}

/* Draws all answers to their ends; candidates that have ended leave the batch. */
static int32_t draw_answers(uint32_t most) {
    static struct realm_item items[MOST_CANDIDATES];
    static uint32_t owner[MOST_CANDIDATES];
    int32_t code;
    for (uint32_t i = 0; i < count; i++) {
        struct realm_token out;
        if ((code = realm_sample(candidates[i].seq, &options.sampling, &out)) < 0) return code;
        if ((code = take(&candidates[i], out.token, out.logprob, out.flags, most)) < 0) return code;
    }
    for (;;) {
        uint32_t active = 0;
        for (uint32_t i = 0; i < count; i++) {
            if (candidates[i].ended) {
                if (candidates[i].seq >= 0 && (code = realm_seq_free(candidates[i].seq)) < 0) return code;
                candidates[i].seq = -1;
                continue;
            }
            items[active] = (struct realm_item){
                .seq = candidates[i].seq,
                .count = 1,
                .tokens = realm_ptr(&candidates[i].token),
                .sampling = realm_ptr(&options.sampling),
            };
            owner[active++] = i;
        }
        if (active == 0) return 0;
        if ((code = realm_batch_forward(items, active)) < 0) return code;
        for (uint32_t i = 0; i < active; i++) {
            if (items[i].token < 0) return items[i].token;
            struct candidate *c = &candidates[owner[i]];
            if ((code = take(c, items[i].token, items[i].logprob, items[i].flags, most)) < 0) return code;
        }
    }
}

/* Appends a candidate's text to the output. */
static int32_t append_text(const struct candidate *c) {
    const uint32_t *tokens = (const uint32_t *)(const void *)c->tokens.at;
    return c->tokens.size ? realm_append_decoded(&output, 0, tokens, c->tokens.size / 4) : 0;
}

/* One line for each candidate: rank, score, length, how it begins. */
static int32_t append_table(void) {
    bool fits = realm_append_literal(&output, "\n\nrank  mean log-probability  tokens  text\n");
    for (uint32_t i = 0; i < count && fits; i++) {
        const struct candidate *c = &candidates[order[i]];
        fits = realm_append_number(&output, i + 1) && realm_append_literal(&output, "  ") &&
               realm_append_logprob(&output, mean(c), 3) && realm_append_literal(&output, "  ") &&
               realm_append_number(&output, c->tokens.size / 4) && realm_append_literal(&output, "  ");
        if (!fits) break;
        uint32_t start = output.size;
        int32_t code = append_text(c);
        if (code < 0) return code;
        uint32_t end = start + 60;
        if (output.size > end) {
            /* Not in the middle of a character. */
            while (((unsigned char)output.at[end] & 0xC0) == 0x80) end--;
            output.size = end;
        }
        for (uint32_t at = start; at < output.size; at++)
            if ((unsigned char)output.at[at] < 0x20) output.at[at] = ' ';
        fits = realm_append_literal(&output, "\n");
    }
    return fits ? 0 : realm_memory_full();
}

REALM_EXPORT(run) int32_t run(void) {
    uint32_t left = 0;
    int32_t code;
    int32_t seq = realm_seq_new();
    if (seq < 0) return seq;
    if ((code = prefill(seq, &left)) < 0) return code;
    candidates[0].seq = seq;
    for (uint32_t i = 1; i < count; i++)
        if ((candidates[i].seq = realm_seq_fork(seq)) < 0) return candidates[i].seq;
    if ((code = draw_answers(options.max_tokens < left ? options.max_tokens : left)) < 0) return code;

    for (uint32_t i = 0; i < count; i++) {
        uint32_t at = i;
        for (; at > 0 && mean(&candidates[order[at - 1]]) < mean(&candidates[i]); at--) order[at] = order[at - 1];
        order[at] = i;
    }
    if ((code = append_text(&candidates[order[0]])) < 0) return code;
    if (table && (code = append_table()) < 0) return code;
    return realm_emit_all(output.at, output.size);
}
