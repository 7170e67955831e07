// Residual and norm in one pass.
#pragma once

#include "vectors.h"

namespace {

// x += delta, if there is one; out = LayerNorm(x), or RMSNorm(x) where there is no bias. x [N, d] is float32 always.
template <typename Value>
void residual_norm(float* x, const Value* delta, const float* gain, const float* bias, float epsilon, int count,
                   int width, Value* out) {
#pragma omp parallel for schedule(static) if (count > 4)
    for (int n = 0; n < count; n++) {
        float* at = x + size_t(n) * width;
        Floats sums{};
        float rest = 0;
        int whole = width / LANES * LANES;
        for (int c = 0; c < whole; c += LANES) {
            Floats value = load(at + c);
            if (delta) store(at + c, value += load(delta + size_t(n) * width + c));
            sums += value;
        }
        for (int c = whole; c < width; c++) rest += at[c] += delta ? to_float(delta[size_t(n) * width + c]) : 0.0f;
        float mean = bias ? (horizontal(sums) + rest) / width : 0.0f;
        Floats squares{};
        rest = 0;
        for (int c = 0; c < whole; c += LANES) {
            Floats centred = load(at + c) - mean;
            squares += centred * centred;
        }
        for (int c = whole; c < width; c++) rest += (at[c] - mean) * (at[c] - mean);
        float scale = 1.0f / std::sqrt((horizontal(squares) + rest) / width + epsilon);
        Value* to = out + size_t(n) * width;
        if (bias) {
            for (int c = 0; c < whole; c += LANES) store(to + c, (load(at + c) - mean) * scale * load(gain + c) + load(bias + c));
            for (int c = whole; c < width; c++) store(to + c, (at[c] - mean) * scale * gain[c] + bias[c]);
        } else {
            for (int c = 0; c < whole; c += LANES) store(to + c, load(at + c) * scale * load(gain + c));
            for (int c = whole; c < width; c++) store(to + c, at[c] * scale * gain[c]);
        }
    }
}

}  // namespace
