// y = x·Wᵀ + b in float32 or bfloat16, with gelu if asked for. Of bfloat16, results may stay float32 where rounding them
// would hurt.
//
// Processors without AVX512-BF16 don't multiply bfloat16, and Intel's multiply pairs of it at half the rate of float32:
// there the weights are widened on their way into the registers, and x beforehand, once.
//
// Where few rows meet many weights, memory decides: weights lie in the order in which they are read, and are asked for
// ahead. oneDNN reads them half as fast on the processors that we have measured.
#pragma once

#include "vectors.h"

namespace {

constexpr int ROWS = SUMS >= 16 ? 8 : SUMS >= 4 ? 2 : 1;  // of one pass: all sums stay in registers
constexpr int COLUMNS = 3, GROUP = LANES * COLUMNS;  // outputs of one pass over the inner dimension
constexpr int AHEAD = 8192, NEAR = 2048;  // bytes, for a whole tile and for fewer rows

template <typename X, typename Value, typename Out>
struct Product {
    const X* x;            // [count, inner]
    const Value* weights;  // [outer / 48, inner / s, 3, 16, s] with s values in 4 bytes
    const float* bias;  // [outer, rounded up to 48]
    int inner, outer, gelu;
    Out* out;  // [count, outer]
};

// x·sigmoid(2u), u = √(2/π)(x + 0.044715 x³): GPT-2's gelu, its tanh written with exp.
inline Floats gelu(Floats x) {
    Floats u = (x + x * x * x * 0.044715f) * 1.5957691216057308f;
    Floats e = exponential(pick(u < 0.0f, u, -u));
    return x * pick(u < 0.0f, e, Floats{} + 1.0f) / (1.0f + e);
}

// sum + weights·x for 4 bytes of weights a lane, and the values of x at `at` that belong to them.
inline Register multiply(Register sum, const float* weights, const float* at) {
    return sum + *reinterpret_cast<const Register*>(weights) * *at;
}
#ifdef __AVX512BF16__
inline Register multiply(Register sum, const bf16* weights, const bf16* at) {
    int32_t pair;
    std::memcpy(&pair, at, 4);
    return (Register)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(weights), (__m512bh)_mm512_set1_epi32(pair));
}
#endif
inline Register multiply(Register sum, const bf16* weights, const float* at) {
    Bits pairs = *reinterpret_cast<const Bits*>(weights);
    return sum + (Register)(pairs << 16) * at[0] + (Register)(pairs & 0xffff0000u) * at[1];
}

// N rows by 48 outputs in registers.
template <int N, typename X, typename Value, typename Out>
void tile(const Product<X, Value, Out>& p, int row, int group, bool ask) {
    constexpr int STEP = 4 / sizeof(Value), LINE_STEP = 64 / sizeof(Value);
    constexpr int PARTS = COLUMNS * REGISTERS, PART_STEP = LINE_STEP / REGISTERS;
    Register sums[N][PARTS];
    for (int c = 0; c < PARTS; c++)
        for (int n = 0; n < N; n++) sums[n][c] = *reinterpret_cast<const Register*>(p.bias + group * GROUP + c * WIDTH);
    const Value* from = p.weights + size_t(group) * GROUP * p.inner;
    const X* x = p.x + size_t(row) * p.inner;
    for (int i = 0; i < p.inner; i += STEP, from += COLUMNS * LINE_STEP) {
        if (ask)
            for (int c = 0; c < COLUMNS; c++) fetch(reinterpret_cast<const char*>(from) + (N < ROWS ? NEAR : AHEAD) + c * 64);
        auto step = [&](int n, int c) {
            sums[n][c] = multiply(sums[n][c], from + c * PART_STEP, x + size_t(n) * p.inner + i);
        };
        if (N > PARTS)  // the inner loop's operands are in registers all at once
            for (int n = 0; n < N; n++)
                for (int c = 0; c < PARTS; c++) step(n, c);
        else
            for (int c = 0; c < PARTS; c++)
                for (int n = 0; n < N; n++) step(n, c);
    }
    for (int n = 0; n < N; n++)
        for (int c = 0; c < COLUMNS; c++) {
            Floats sum;
            for (int i = 0; i < REGISTERS; i++) sum.part[i] = sums[n][c * REGISTERS + i];
            if (p.gelu) sum = gelu(sum);
            int at = group * GROUP + c * LANES, count = std::min(LANES, p.outer - at);
            Out* to = p.out + size_t(row + n) * p.outer + at;
            if (count == LANES)
                store(to, sum);
            else
                for (int l = 0; l < count; l++) store(to + l, sum[l]);
        }
}

template <typename X, typename Value, typename Out>
void multiply_all(const Product<X, Value, Out>& p, int count) {
    int groups = (p.outer + GROUP - 1) / GROUP;
#pragma omp parallel for schedule(static)
    for (int group = 0; group < groups; group++) {
        int row = 0;
        for (; row + ROWS <= count; row += ROWS) tile<ROWS>(p, row, group, row == 0);
        if (ROWS > 4 && row + 4 <= count) tile<std::min(ROWS, 4)>(p, row, group, row == 0), row += 4;
        if (ROWS > 2 && row + 2 <= count) tile<2>(p, row, group, row == 0), row += 2;
        if (row < count) tile<1>(p, row, group, row == 0);
    }
}

template <typename Out>
void product(const Product<float, float, Out>& p, int count) { multiply_all(p, count); }
template <typename Out>
void product(const Product<bf16, bf16, Out>& p, int count) {
#ifdef __AVX512BF16__
    static const bool narrow = !__builtin_cpu_is("intel");
    if (narrow) return multiply_all(p, count);
#endif
    static thread_local std::vector<float> wide;
    wide.resize(size_t(count) * p.inner);
    for (size_t n = 0; n < wide.size(); n++) wide[n] = to_float(p.x[n]);
    multiply_all(Product<float, bf16, Out>{wide.data(), p.weights, p.bias, p.inner, p.outer, p.gelu, p.out}, count);
}

}  // namespace
