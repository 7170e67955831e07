// Rotary positions, and the gate of a gated MLP: what other trunks than GPT-2 need between their products.
#pragma once

#include "vectors.h"

namespace {

// Turns pairs (i, i + w/2) of the first `heads` heads of each row of `x` [N, row], in place, by the angles of the row's
// position; `turns` [T, 2, w/2] holds their cosines and sines.
template <typename Value>
void rotate(Value* x, int count, int row, int heads, int width, const float* turns, const int64_t* positions) {
    int half = width / 2;
#pragma omp parallel for schedule(static) if (count > 4)
    for (int n = 0; n < count; n++) {
        const float *cosines = turns + size_t(positions[n]) * width, *sines = cosines + half;
        for (int h = 0; h < heads; h++) {
            Value *one = x + size_t(n) * row + size_t(h) * width, *other = one + half;
            int c = 0;
            for (; c + LANES <= half; c += LANES) {
                Floats a = load(one + c), b = load(other + c), cosine = load(cosines + c), sine = load(sines + c);
                store(one + c, a * cosine - b * sine);
                store(other + c, b * cosine + a * sine);
            }
            for (; c < half; c++) {
                float a = to_float(one[c]), b = to_float(other[c]);
                store(one + c, a * cosines[c] - b * sines[c]);
                store(other + c, b * cosines[c] + a * sines[c]);
            }
        }
    }
}

inline Floats silu(Floats x) {
    Floats e = exponential(pick(x < 0.0f, x, -x));
    return x * pick(x < 0.0f, e, Floats{} + 1.0f) / (1.0f + e);
}

// out [N, inner] = silu of the first half of each row of `wide` [N, 2·inner], times the second.
template <typename Value>
void gate(const Value* wide, int count, int inner, Value* out) {
#pragma omp parallel for schedule(static) if (count > 4)
    for (int n = 0; n < count; n++) {
        const Value *first = wide + size_t(n) * 2 * inner, *second = first + inner;
        Value* to = out + size_t(n) * inner;
        int c = 0;
        for (; c + LANES <= inner; c += LANES) store(to + c, silu(load(first + c)) * load(second + c));
        if (c < inner) {
            Floats last = silu(load_some(first + c, inner - c)) * load_some(second + c, inner - c);
            for (int l = 0; c + l < inner; l++) store(to + c + l, last[l]);
        }
    }
}

}  // namespace
