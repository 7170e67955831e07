// Appending new tokens to their slots.
#pragma once

#include "attention.h"

namespace {

struct AppendTargets {
    int32_t *ids, *rows, *previous, *following;  // of all slots, as in caches.py
    int senses, context;
};

// `tokens` [N] and the table rows that are their senses, [N, k]; each is linked with where it stood last in its slot.
void append_tokens(const AppendTargets& to, const Span* spans, int count, const int64_t* tokens, const int32_t* rows) {
    for (const Span* span = spans; span < spans + count; span++) {
        size_t slot = size_t(span->slot) * to.context;
        int32_t *ids = to.ids + slot, *previous = to.previous + slot, *following = to.following + slot;
        for (int n = 0; n < span->size; n++) {
            int at = span->position + n, last = -1;
            int32_t token = ids[at] = int32_t(tokens[span->token + n]);
            for (int t = 0; t < at; t++) last = std::max(last, ids[t] == token ? t : -1);
            previous[at] = last;
            following[at] = 0;
            if (last >= 0) following[last] = at;
            std::memcpy(to.rows + (slot + at) * to.senses, rows + size_t(span->token + n) * to.senses, to.senses * sizeof(int32_t));
        }
    }
}

}  // namespace
