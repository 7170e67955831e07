// y = x·Wᵀ + b in bfloat16 with AVX512-BF16, with gelu if asked for, and float32 results where rounding them would hurt.
//
// Where few rows meet many weights, memory decides: weights lie in the order in which they are read, and are asked for
// ahead. oneDNN reads them half as fast on the processors that we have measured.
#pragma once

#include "vectors.h"

#ifdef __AVX512BF16__
namespace {

constexpr int COLUMNS = 3, GROUP = LANES * COLUMNS;  // outputs of one pass over the inner dimension
constexpr int AHEAD = 4096;  // values

template <typename Out>
struct Product {
    const bf16 *x, *weights;  // [count, inner], [outer / 48, inner / 2, 3, 16, 2]
    const float* bias;  // [outer, rounded up], or null
    int inner, outer, gelu;
    Out* out;  // [count, outer]
};

// x·sigmoid(2u), u = √(2/π)(x + 0.044715 x³): GPT-2's gelu, its tanh written with exp.
inline Floats gelu(Floats x) {
    Floats u = (x + x * x * x * 0.044715f) * 1.5957691216057308f;
    Floats e = exponential(u < 0.0f ? u : -u);
    return x * (u < 0.0f ? e : Floats{} + 1.0f) / (1.0f + e);
}

// N rows by 48 outputs in registers.
template <int N, typename Out>
void tile(const Product<Out>& p, int row, int group, bool ask) {
    __m512 sums[N][COLUMNS];
    for (int c = 0; c < COLUMNS; c++) {
        __m512 start = p.bias ? _mm512_loadu_ps(p.bias + group * GROUP + c * LANES) : _mm512_setzero_ps();
        for (int n = 0; n < N; n++) sums[n][c] = start;
    }
    const bf16* from = p.weights + size_t(group) * GROUP * p.inner;
    const bf16* x = p.x + size_t(row) * p.inner;
    for (int i = 0; i < p.inner / 2; i++, from += 2 * GROUP) {
        __m512bh weight[COLUMNS];
        for (int c = 0; c < COLUMNS; c++) {
            if (ask) fetch(from + AHEAD + c * 2 * LANES);
            weight[c] = (__m512bh)_mm512_loadu_si512(from + c * 2 * LANES);
        }
        for (int n = 0; n < N; n++) {
            int32_t pair;
            std::memcpy(&pair, x + size_t(n) * p.inner + 2 * i, 4);
            __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
            for (int c = 0; c < COLUMNS; c++) sums[n][c] = _mm512_dpbf16_ps(sums[n][c], weight[c], value);
        }
    }
    for (int n = 0; n < N; n++)
        for (int c = 0; c < COLUMNS; c++) {
            Floats sum = (Floats)sums[n][c];
            if (p.gelu) sum = gelu(sum);
            int at = group * GROUP + c * LANES, count = std::min(LANES, p.outer - at);
            Out* to = p.out + size_t(row + n) * p.outer + at;
            if (count == LANES)
                store(to, sum);
            else
                for (int l = 0; l < count; l++) store(to + l, sum[l]);
        }
}

template <typename Out>
void product(const Product<Out>& p, int count) {
    int groups = (p.outer + GROUP - 1) / GROUP;
#pragma omp parallel for schedule(static)
    for (int group = 0; group < groups; group++) {
        int row = 0;
        for (; row + 8 <= count; row += 8) tile<8>(p, row, group, row == 0);
        if (row + 4 <= count) tile<4>(p, row, group, row == 0), row += 4;
        if (row + 2 <= count) tile<2>(p, row, group, row == 0), row += 2;
        if (row < count) tile<1>(p, row, group, row == 0);
    }
}

}  // namespace
#endif
