/* What an application's chat does for each token, with a prompt and an end that a benchmark chooses: it draws,
 * turns the token into text, streams that, and goes on, without stopping early. */
#include "realm.h"
#include "realm_support.h"

REALM_GUEST

#define MOST 32768
#define NAME 128

static char input[8 * MOST], text[256];
static uint32_t prompt[MOST];

/* The next number of the input; false at its end. */
static bool number(const char **at, uint32_t *value) {
    while (**at == ' ') (*at)++;
    if (**at < '0' || **at > '9') return false;
    *value = 0;
    while (**at >= '0' && **at <= '9') *value = *value * 10 + (uint32_t)(*(*at)++ - '0');
    return true;
}

/* The end of the input: nothing, or an adapter's name after " @". False if it is anything else. */
static bool adapter(const char *at, const char *end, const char **name, uint32_t *size) {
    *name = at;
    *size = 0;
    if (at == end) return true;
    if (*at != '@' || at[-1] != ' ') return false;
    *name = at + 1;
    for (at++; at < end; at++)
        if (*at <= ' ' || *at > '~') return false;
    *size = (uint32_t)(end - *name);
    return *size > 0 && *size <= NAME;
}

/* Input: "NEW TEMPERATURE TOP_P TOP_K TOKEN... [@ADAPTER]", where temperature and top_p are thousandths. */
REALM_EXPORT(run) int32_t run(void) {
    const char *at = input, *name;
    uint32_t wanted, temperature, top_p, top_k, size_of_name, count = 0;
    if (realm_input_len() >= (int32_t)sizeof input) return REALM_INVALID_ARGUMENT;
    int32_t code = realm_input_read(0, input, sizeof input - 1);
    if (code < 0) return code;
    if (!number(&at, &wanted) || !number(&at, &temperature) || !number(&at, &top_p) || !number(&at, &top_k))
        return REALM_INVALID_ARGUMENT;
    while (count < MOST && number(&at, &prompt[count])) count++;
    if (wanted == 0 || count == 0 || !adapter(at, input + code, &name, &size_of_name)) return REALM_INVALID_ARGUMENT;

    struct realm_sampling sampling = {
        .temperature = (float)temperature / 1000.0f, .top_p = (float)top_p / 1000.0f, .top_k = top_k};
    int32_t seq = realm_seq_new();
    if (seq < 0) return seq;
    if (size_of_name && (code = realm_lora_apply(seq, name, size_of_name)) < 0) return code;
    int32_t token = realm_forward(seq, prompt, count, &sampling, NULL);
    for (uint32_t made = 1; token >= 0; made++) {
        uint32_t id = (uint32_t)token;
        int32_t size = realm_detokenize(1, &id, 1, 0, text, sizeof text);
        if (size > (int32_t)sizeof text) size = 0;
        if (size > 0 && (code = realm_emit(text, (uint32_t)size)) < 0) return code;
        if (made == wanted) return 0;
        token = realm_forward(seq, &id, 1, &sampling, NULL);
    }
    return token;
}
