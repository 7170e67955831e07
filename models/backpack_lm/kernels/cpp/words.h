// The words of predictions: each token of a text once, by groups of tokens that are mixed one after another.
#pragma once

#include "vectors.h"

namespace {

constexpr int GROUPS = 32;  // of tokens: one is a unit of work

struct Word {  // a token of a text, where it stands first
    int32_t token, position;
};

struct Place {  // a word of a prediction, and another one of the same token
    int32_t prediction, position, next;
};

struct Lists {
    int32_t* starts;  // [B, GROUPS + 1], of the groups in
    Word* words;  // [B, T]
    int context, vocabulary;

    // Those of prediction b, each where its token stands first: there origins[t] == t. `counts` has each group's.
    void list(int b, const int32_t* tokens, int length, const int32_t* origins, const int32_t* counts) const {
        int32_t *start = starts + b * (GROUPS + 1), ends[GROUPS];
        start[0] = 0;
        for (int group = 0; group < GROUPS; group++) {
            ends[group] = start[group];
            start[group + 1] = start[group] + counts[group];
        }
        for (int t = 0; t < length; t++)
            if (origins[t] == t) words[b * context + ends[tokens[t] % GROUPS]++] = {tokens[t], t};
    }

    // A group's words of all predictions; those of one token one after another.
    void gather(int count, int group, std::vector<int32_t>& heads, std::vector<Place>& scratch,
                std::vector<Place>& places) const {
        heads.assign((vocabulary + GROUPS - 1) / GROUPS, -1);
        scratch.clear();
        places.clear();
        for (int b = 0; b < count; b++) {
            const int32_t* start = starts + b * (GROUPS + 1) + group;
            for (const Word* word = words + b * context + start[0]; word < words + b * context + start[1]; word++) {
                int32_t& head = heads[word->token / GROUPS];
                scratch.push_back({b, word->position, head});
                head = int32_t(scratch.size()) - 1;
            }
        }
        for (int at : heads)
            for (; at >= 0; at = scratch[at].next) places.push_back(scratch[at]);
    }
};

}  // namespace
