// Choosing a token in one pass over its logits: the greatest, or by Gumbel's trick argmax_y (logit_y / temperature −
// log e_y), e_y exponential.
#pragma once

#include "vectors.h"

namespace {

typedef uint64_t Longs __attribute__((vector_size(8 * LANES), aligned(8)));

// Philox4x32-10 (Salmon et al., SC 2011) for 16 counters (block, position, 0, 0) under one key.
inline void philox(uint64_t seed, uint32_t position, Words block, Words* out) {
    Words c0 = block, c1 = Words{} + position, c2{}, c3{};
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; round++) {
        Longs a = __builtin_convertvector(c0, Longs) * 0xD2511F53ull, b = __builtin_convertvector(c2, Longs) * 0xCD9E8D57ull;
        Words low_a = __builtin_convertvector(a, Words), low_b = __builtin_convertvector(b, Words);
        Words high_a = __builtin_convertvector(a >> 32, Words), high_b = __builtin_convertvector(b >> 32, Words);
        c0 = high_b ^ c1 ^ k0;
        c1 = low_b;
        c2 = high_a ^ c3 ^ k1;
        c3 = low_a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

// log e for e = −log(1 − v), v = (x + ½)/2³²: small e, which decide, are exact to float32.
inline Floats log_exponential(Words x) {
    Floats v = (__builtin_convertvector(x, Floats) + 0.5f) * 0x1p-32f;
    Floats series = v * (1.0f + v * (0.5f + v * (1.0f / 3 + v * (0.25f + v * 0.2f))));
    Floats rest = 1.0f - v;
    Floats direct = -logarithm(rest < 0x1p-26f ? Floats{} + 0x1p-26f : rest);
    return logarithm(v < 0.03125f ? series : direct);
}

// The chosen token; −1 where a logit is NaN or +∞, or all are −∞. DRAWN: at a temperature, else the greatest.
template <bool DRAWN>
int32_t choose(const float* logits, int vocabulary, float temperature, uint64_t seed, uint32_t position) {
    Floats best = Floats{} - INFINITY;
    Ints where{}, lane, numbers = Ints{} - 1;
    for (int n = 0; n < LANES; n++) lane[n] = n;
    for (int group = 0; group < vocabulary; group += 4 * LANES) {
        Words words[4];
        if (DRAWN) philox(seed, position, (Words)(lane + group / 4), words);
        for (int i = 0; i < 4; i++) {
            int first = group + i * LANES, count = std::min(LANES, vocabulary - first);
            if (count <= 0) break;
            Floats logit = count == LANES ? load(logits + first) : load_some(logits + first, count), value = logit;
            if (DRAWN) value = logit / temperature - log_exponential(words[i]);
            numbers &= logit < INFINITY;
            Ints better = (value > best) & (lane < count);
            best = better ? value : best;
            where = better ? lane + first : where;
        }
    }
    int winner = 0;
    bool good = numbers[0];
    for (int n = 1; n < LANES; n++) {
        if (best[n] > best[winner] || (best[n] == best[winner] && where[n] < where[winner])) winner = n;
        good = good && numbers[n];
    }
    return good && best[winner] > -INFINITY ? where[winner] : -1;
}

}  // namespace
