/* One prompt answered side by side with adapter a, adapter b and the model as it is: each step of all answers is one
 * batch, in which every sequence has its own adapter. The answers are ranked by how sure each model is of its own. */
#include "realm_answer.h"

REALM_GUEST

/* What one detokenize takes. */
#define MOST_TOKENS 65536
#define ARMS 3

struct arm {
    const char *name;
    struct realm_text adapter; /* empty is the model as it is */
    int32_t seq;               /* -1 once it has ended */
    uint32_t token;            /* drawn, not yet forwarded */
    double logprob;            /* sum over the draws, the end-of-sequence token included */
    uint32_t draws;
    bool ended, cut;
    struct realm_buffer tokens; /* the answer: uint32 ids */
};

static struct realm_options options = {
    .sampling = {.top_p = 1.0f, .repetition_penalty = 1.0f, .flags = REALM_SAMPLE_LOGPROB},
    .max_tokens = 128,
};
static struct arm arms[ARMS] = {{.name = "a"}, {.name = "b"}, {.name = "base"}};
static struct realm_buffer prompt; /* its tokens */
static struct realm_buffer output;

static double mean(const struct arm *arm) { return arm->logprob / arm->draws; }

/* Reads the input. Returns 0 or an error code. */
static int32_t begin(const struct realm_model_info *model) {
    struct realm_text input;
    struct realm_json root;
    int32_t code;
    if ((code = realm_read_input(&input)) < 0) return code;
    if (!realm_json_parse(input.at, input.size, &root) || realm_json_kind(root) != '{')
        return realm_refuse("input", "must be a JSON object");
    if ((code = realm_read_options(root, &options)) < 0) return code;
    if (options.adapter.at) return realm_refuse("adapter", "name two of them, as a and b");
    if (options.stop_count) return realm_refuse("stop", "is not an option of ab_test");
    if (options.max_tokens > MOST_TOKENS) return realm_refuse("max_tokens", "must be at most 65536");
    for (uint32_t i = 0; i < 2; i++) {
        if ((code = realm_option_adapter(root, arms[i].name, &arms[i].adapter)) < 0) return code;
        if (arms[i].adapter.size == 0) return realm_refuse(arms[i].name, "must be the name of an adapter");
    }
    return realm_prompt_tokens(root, model->flags & REALM_MODEL_CHAT_TEMPLATE, &prompt);
}

/* Takes in a draw. Returns 0 or an error code. */
static int32_t take(struct arm *arm, const struct realm_item *item, uint32_t context_length) {
    if (item->token < 0) return item->token; /* the host has logged why */
    arm->logprob += (double)item->logprob;
    arm->draws++;
    arm->token = (uint32_t)item->token;
    arm->ended = item->flags & REALM_TOKEN_EOS;
    if (!arm->ended) {
        if (!realm_append(&arm->tokens, (const char *)&arm->token, sizeof arm->token)) return realm_memory_full();
        arm->ended = arm->cut = arm->draws >= options.max_tokens || item->length >= context_length;
    }
    if (!arm->ended) return 0;
    int32_t seq = arm->seq;
    arm->seq = -1;
    return realm_seq_free(seq);
}

/* Draws all answers to their ends; those that have ended leave the batch. */
static int32_t draw_answers(uint32_t context_length) {
    int32_t code;
    for (;;) {
        struct realm_item items[ARMS];
        struct arm *owner[ARMS];
        uint32_t active = 0;
        for (struct arm *arm = arms; arm < arms + ARMS; arm++) {
            if (arm->ended) continue;
            items[active] = (struct realm_item){
                .seq = arm->seq,
                .count = arm->draws ? 1 : prompt.size / 4,
                .tokens = arm->draws ? realm_ptr(&arm->token) : realm_ptr(prompt.at),
                .sampling = realm_ptr(&options.sampling),
            };
            owner[active++] = arm;
        }
        if (active == 0) return 0;
        if ((code = realm_batch_forward(items, active)) < 0) return code;
        for (uint32_t i = 0; i < active; i++)
            if ((code = take(owner[i], &items[i], context_length)) < 0) return code;
    }
}

/* Appends an answer as a JSON object. */
static int32_t append_answer(const struct arm *arm, uint32_t rank) {
    static struct realm_buffer text;
    const uint32_t *tokens = (const uint32_t *)(const void *)arm->tokens.at;
    int32_t code;
    text.size = 0;
    if (arm->tokens.size && (code = realm_append_decoded(&text, 0, tokens, arm->tokens.size / 4)) < 0) return code;
    bool fits = realm_append_literal(&output, "{\"rank\": ") && realm_append_number(&output, rank) &&
                realm_append_literal(&output, ", \"name\": ") &&
                realm_append_json(&output, arm->name, (uint32_t)strlen(arm->name)) &&
                realm_append_literal(&output, ", \"adapter\": ") &&
                (arm->adapter.size ? realm_append_json(&output, arm->adapter.at, arm->adapter.size)
                                   : realm_append_literal(&output, "null")) &&
                realm_append_literal(&output, ", \"mean_logprob\": ") &&
                realm_append_logprob(&output, mean(arm), 6) && realm_append_literal(&output, ", \"tokens\": ") &&
                realm_append_number(&output, arm->draws) && realm_append_literal(&output, ", \"finish\": ") &&
                (arm->cut ? realm_append_literal(&output, "\"length\"") : realm_append_literal(&output, "\"stop\"")) &&
                realm_append_literal(&output, ", \"text\": ") && realm_append_json(&output, text.at, text.size) &&
                realm_append_literal(&output, "}");
    return fits ? 0 : realm_memory_full();
}

REALM_EXPORT(run) int32_t run(void) {
    struct realm_model_info model;
    const struct arm *order[ARMS]; /* best first */
    int32_t code;
    if ((code = realm_model_info(&model)) < 0) return code;
    if ((code = begin(&model)) < 0) return code;
    for (struct arm *arm = arms; arm < arms + ARMS; arm++) {
        if ((arm->seq = realm_seq_new()) < 0) return arm->seq;
        if ((code = realm_use_adapter(arm->seq, arm->adapter)) < 0) return code;
    }
    if ((code = draw_answers(model.context_length)) < 0) return code;

    for (uint32_t i = 0; i < ARMS; i++) {
        uint32_t at = i;
        for (; at > 0 && mean(order[at - 1]) < mean(&arms[i]); at--) order[at] = order[at - 1];
        order[at] = &arms[i];
    }
    bool fits = realm_append_literal(&output, "{\"prompt_tokens\": ") &&
                realm_append_number(&output, prompt.size / 4) && realm_append_literal(&output, ", \"answers\": [");
    for (uint32_t i = 0; fits && i < ARMS; i++) {
        if (i > 0) fits = realm_append_literal(&output, ", ");
        if (fits && (code = append_answer(order[i], i + 1)) < 0) return code;
    }
    if (!fits || !realm_append_literal(&output, "]}")) return realm_memory_full();
    return realm_emit_all(output.at, output.size);
}
