/* The guest behind the wire protocol's `generate`: one prompt, one streamed answer. */
#include "realm_answer.h"

REALM_GUEST

/* The prompt's tokens: rendered with the chat template where the model has one. */
static int32_t prompt_tokens(struct realm_json root, bool has_template, struct realm_buffer *tokens) {
    struct realm_json prompt = {0, 0}, messages = {0, 0};
    bool has_prompt = realm_json_find(root, "prompt", &prompt) && realm_json_kind(prompt) != 'n';
    bool has_messages = realm_json_find(root, "messages", &messages) && realm_json_kind(messages) != 'n';
    if (has_prompt == has_messages) return realm_refuse("prompt", "give either prompt or messages");
    if (has_prompt && realm_json_kind(prompt) != '"') return realm_refuse("prompt", "must be text");
    if (has_messages && realm_json_kind(messages) != '[') return realm_refuse("messages", "must be a list");

    if (!has_template) {
        struct realm_text text;
        if (has_messages) {
            realm_log_literal(REALM_LOG_ERROR, "messages: the model has no chat template");
            return REALM_NOT_SUPPORTED;
        }
        int32_t code = realm_option_text(root, "prompt", &text);
        return code < 0 ? code : realm_tokens(text.at, text.size, 0, tokens);
    }

    struct realm_buffer list = {0}, rendered = {0};
    bool fits = true;
    if (has_messages) {
        fits = realm_append(&list, messages.at, (uint32_t)(messages.end - messages.at));
    } else {
        /* The prompt is already JSON text, so that it goes into the message as it stands. */
        fits = realm_append_literal(&list, "[{\"role\":\"user\",\"content\":") &&
               realm_append(&list, prompt.at, (uint32_t)(prompt.end - prompt.at)) && realm_append_literal(&list, "}]");
    }
    if (!fits) return realm_memory_full();
    int32_t code = realm_render(list.at, list.size, &rendered);
    return code < 0 ? code : realm_tokens(rendered.at, rendered.size, REALM_TOKENIZE_SPECIAL, tokens);
}

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
    if ((code = prompt_tokens(root, model.flags & REALM_MODEL_CHAT_TEMPLATE, &tokens)) < 0) return code;
    if (tokens.size == 0) return realm_refuse("prompt", "is empty");

    int32_t seq = realm_seq_new();
    if (seq < 0) return seq;
    return realm_answer_stream(
        seq, (const uint32_t *)(const void *)tokens.at, tokens.size / 4, &options, model.context_length, &answer);
}
