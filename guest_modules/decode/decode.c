/* The plainest loop: a random prompt, then greedy tokens that are streamed one by one, whatever they
 * are. Benchmarks use it, because it makes exactly as many tokens as it is told. */
#include "realm.h"
#include "realm_support.h"

REALM_GUEST

static uint32_t prompt[4096];
static char input[32], text[256];

static uint32_t number(const char **at) {
    uint32_t value = 0;
    while (*at < input + sizeof input && **at >= '0' && **at <= '9') value = value * 10 + (uint32_t)(*(*at)++ - '0');
    return value;
}

/* Input: "PROMPT NEW", two counts of tokens. */
REALM_EXPORT(run) int32_t run(void) {
    struct realm_model_info model;
    int32_t code;
    if ((code = realm_input_read(0, input, sizeof input - 1)) < 0) return code;
    const char *at = input;
    uint32_t count = number(&at);
    at++;
    uint32_t wanted = number(&at);
    if (count == 0 || count > 4096 || wanted == 0) return REALM_INVALID_ARGUMENT;
    if ((code = realm_model_info(&model)) < 0) return code;
    for (uint32_t i = 0; i < count; i++) prompt[i] = (uint32_t)((uint64_t)realm_random() % model.vocab_size);

    int32_t seq = realm_seq_new();
    if (seq < 0) return seq;
    struct realm_sampling greedy = REALM_GREEDY;
    int32_t token = realm_forward(seq, prompt, count, &greedy, NULL);
    for (uint32_t made = 1; token >= 0; made++) {
        uint32_t id = (uint32_t)token;
        int32_t size = realm_detokenize(1, &id, 1, 0, text, sizeof text);
        if (size > 0 && (code = realm_emit(text, (uint32_t)size)) < 0) return code;
        if (made == wanted) return 0;
        token = realm_forward(seq, &id, 1, &greedy, NULL);
    }
    return token;
}
