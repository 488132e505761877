/* The guest behind the wire protocol's `generate`: one prompt, one streamed answer. */
#include "realm_answer.h"

REALM_GUEST

REALM_EXPORT(run) int32_t run(void) {
    static struct realm_options options = {.sampling = REALM_GREEDY, .max_tokens = 128};
    static struct realm_answer answer;
    struct realm_buffer tokens = {0};
    struct realm_model_info model;
    struct realm_text input;
    struct realm_json root;
    int32_t code;

    if ((code = realm_model_info(&model)) < 0) return code;
    if ((code = realm_read_input(&input)) < 0) return code;
    if (!realm_json_parse(input.at, input.size, &root) || realm_json_kind(root) != '{')
        return realm_refuse("input", "must be a JSON object");
    if ((code = realm_read_options(root, &options)) < 0) return code;
    if ((code = realm_prompt_tokens(root, model.flags & REALM_MODEL_CHAT_TEMPLATE, &tokens)) < 0) return code;

    int32_t seq = realm_seq_new();
    if (seq < 0) return seq;
    if ((code = realm_use_adapter(seq, options.adapter)) < 0) return code;
    return realm_answer_stream(
        seq, (const uint32_t *)(const void *)tokens.at, tokens.size / 4, &options, model.context_length, &answer);
}
