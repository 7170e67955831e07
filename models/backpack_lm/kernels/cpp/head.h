// The head in bfloat16 with float32 logits: oneDNN would round them to 8 bits.
#pragma once

#include "vectors.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

namespace {

constexpr int COLUMNS = 3, LINES = 8;

// LINES·16·COLUMNS logits in registers; weights [V/16, d/2, 16, 2].
template <int N, int M>
void head_tile(const bf16* x, const bf16* weights, int width, int vocabulary, int columns, float* out) {
    __m512 sums[N][M];
    for (int n = 0; n < N; n++)
        for (int c = 0; c < M; c++) sums[n][c] = _mm512_setzero_ps();
    for (int i = 0; i < width / 2; i++) {
        __m512bh weight[M];
        for (int c = 0; c < M; c++)
            weight[c] = (__m512bh)_mm512_loadu_si512(weights + (size_t(c) * width / 2 + i) * 32);
        for (int n = 0; n < N; n++) {
            int32_t pair;
            std::memcpy(&pair, x + size_t(n) * width + 2 * i, 4);
            __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
            for (int c = 0; c < M; c++) sums[n][c] = _mm512_dpbf16_ps(sums[n][c], weight[c], value);
        }
    }
    for (int n = 0; n < N; n++)
        for (int c = 0; c < M; c++) {
            int left = std::min(LANES, columns - c * LANES);
            _mm512_mask_storeu_ps(out + size_t(n) * vocabulary + c * LANES, __mmask16((1u << left) - 1), sums[n][c]);
        }
}

template <int M>
void head_columns(const bf16* x, int count, const bf16* weights, int width, int vocabulary, int columns, float* out) {
    int n = 0;
    for (; n + LINES <= count; n += LINES)
        head_tile<LINES, M>(x + size_t(n) * width, weights, width, vocabulary, columns, out + size_t(n) * vocabulary);
    for (; n < count; n++)
        head_tile<1, M>(x + size_t(n) * width, weights, width, vocabulary, columns, out + size_t(n) * vocabulary);
}

void head(const bf16* x, int count, const bf16* weights, int width, int vocabulary, float* out) {
    int groups = (vocabulary + LANES * COLUMNS - 1) / (LANES * COLUMNS);
#pragma omp parallel for schedule(static)
    for (int g = 0; g < groups; g++) {
        int first = g * LANES * COLUMNS, columns = std::min(LANES * COLUMNS, vocabulary - first);
        const bf16* from = weights + size_t(first) * width;
        if (columns > LANES * (COLUMNS - 1))
            head_columns<COLUMNS>(x, count, from, width, vocabulary, columns, out + first);
        else
            for (int c = 0; c < columns; c += LANES)
                head_columns<1>(x, count, from + size_t(c) * width, width, vocabulary, columns - c, out + first + c);
    }
}
}  // namespace
#endif
