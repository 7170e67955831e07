// Attention of new tokens over their slots' caches.
#pragma once

#include "vectors.h"

namespace {

// scores[q][t] = Σ_c queries[q][c]·keys[t][c] for N queries, t < length rounded up to 16; keys [T/16, w, 16].
// `ahead` is asked for meanwhile, as many bytes as the keys have.
template <int N, typename Value>
void score(const float* const* queries, const Value* keys, int width, int length, const Value* ahead,
           float* const* scores) {
    constexpr int TILES = N == 1 || 2 * N <= SUMS ? 2 : 1;
    int tiles = (length + LANES - 1) / LANES, t = 0;
    size_t tile = size_t(width) * LANES;
    auto some = [&](auto count) {
        constexpr int M = decltype(count)::value;
        Floats sums[N][M] = {};
        for (int c = 0; c < width; c++)
            for (int i = 0; i < M; i++) {
                size_t at = (t + i) * tile + size_t(c) * LANES;
                if (c % (LINE<Value> / LANES) == 0) fetch(ahead + at);
                Floats key = load(keys + at);
                for (int q = 0; q < N; q++) sums[q][i] += key * queries[q][c];
            }
        for (int q = 0; q < N; q++)
            for (int i = 0; i < M; i++) store(scores[q] + (t + i) * LANES, sums[q][i]);
        t += M;
    };
    while (t + TILES <= tiles) some(std::integral_constant<int, TILES>{});
    while (t < tiles) some(std::integral_constant<int, 1>{});
}

// Softmax of scores[0, length), in place; zero from there to the next multiple of 16.
void softmax(float* scores, int length) {
    int end = (length + LANES - 1) / LANES * LANES;
    for (int t = length; t < end; t++) scores[t] = -INFINITY;
    Floats peaks = load(scores), sums{};
    for (int t = LANES; t < end; t += LANES) {
        Floats next = load(scores + t);
        peaks = pick(next > peaks, next, peaks);
    }
    float largest = peaks[0];
    for (int n = 1; n < LANES; n++) largest = std::max(largest, peaks[n]);
    for (int t = 0; t < end; t += LANES) {
        Floats e = exponential(load(scores + t) - largest);
        store(scores + t, e);
        sums += e;
    }
    float scale = 1.0f / horizontal(sums);
    for (int t = 0; t < end; t += LANES) store(scores + t, load(scores + t) * scale);
}

constexpr int QUERIES = std::min(8, SUMS);  // of one chunk that share a pass over the keys

// out[q] = Σ_t weights[q][t]·values[t] for t < lengths[q] (ascending in q), of the 16·VECTORS columns from the first on;
// `ahead` as in `score`.
template <int N, int VECTORS, typename Value>
void gather(float* const* weights, const int* lengths, const Value* values, int width, int first, const Value* ahead,
            Value* const* out) {
    values += first, ahead += first;
    Floats sums[N][VECTORS] = {};
    int common = lengths[0];
    auto row = [&](int t, int v) {
        if (v * LANES % LINE<Value> == 0) fetch(ahead + size_t(t) * width + v * LANES);
        return load(values + size_t(t) * width + v * LANES);
    };
    for (int t = 0; t < common; t++)
        for (int v = 0; v < VECTORS; v++) {
            Floats value = row(t, v);
            for (int q = 0; q < N; q++) sums[q][v] += value * weights[q][t];
        }
    for (int q = 1; q < N; q++)
        for (int t = common; t < lengths[q]; t++)
            for (int v = 0; v < VECTORS; v++) sums[q][v] += row(t, v) * weights[q][t];
    for (int q = 0; q < N; q++)
        for (int v = 0; v < VECTORS; v++) store(out[q] + first + v * LANES, sums[q][v]);
}

// Any width; 64 and 32 are those of the published models and of ours.
template <int N, typename Value>
void gather_any(float* const* weights, const int* lengths, const Value* values, int width, const Value* ahead,
                Value* const* out) {
    constexpr int VECTORS = std::max(1, std::min(4, SUMS / N));  // as many as stay in registers
    constexpr int HALF = std::min(2, VECTORS);
    if (width == 64) {
        for (int c = 0; c < width; c += VECTORS * LANES) gather<N, VECTORS>(weights, lengths, values, width, c, ahead, out);
        return;
    }
    if (width == 32) {
        for (int c = 0; c < width; c += HALF * LANES) gather<N, HALF>(weights, lengths, values, width, c, ahead, out);
        return;
    }
    for (int q = 0; q < N; q++)
        for (int c = 0; c < width; c++) {
            float sum = 0;
            for (int t = 0; t < lengths[q]; t++) sum = std::fma(to_float(values[size_t(t) * width + c]), weights[q][t], sum);
            store(out[q] + c, sum);
        }
}

template <typename Value>
struct Attention {
    const Value* qkv;  // [N, 3, H, w] of the new tokens
    Value *keys, *values;  // [S, H, T/16, w, 16], [S, H, T, w] of one layer
    Value* out;  // [N, H, w]
    int heads, width, context;
    float scale;

    void write(int token, int slot, int position, int head) const {
        const Value* k = qkv + (size_t(token) * 3 + 1) * heads * width + head * width;
        const Value* v = k + size_t(heads) * width;
        Value* to = keys + (size_t(slot) * heads + head) * width * context;
        to += size_t(position / LANES) * width * LANES + position % LANES;
        for (int c = 0; c < width; c++) to[c * LANES] = k[c];
        std::memcpy(values + ((size_t(slot) * heads + head) * context + position) * width, v, width * sizeof(Value));
    }

    template <int N>
    void attend(int token, int slot, int position, int head, float* scratch) const {
        float *queries[N], *scores[N];
        Value* to[N];
        int lengths[N];
        for (int q = 0; q < N; q++) {
            queries[q] = scratch + q * (width + context + LANES);
            scores[q] = queries[q] + width;
            lengths[q] = position + q + 1;
            const Value* from = qkv + size_t(token + q) * 3 * heads * width + head * width;
            for (int c = 0; c < width; c++) queries[q][c] = to_float(from[c]) * scale;
            to[q] = out + (size_t(token + q) * heads + head) * width;
        }
        size_t place = (size_t(slot) * heads + head) * width * context;
        score<N>(queries, keys + place, width, lengths[N - 1], values + place, scores);
        for (int q = 0; q < N; q++) softmax(scores[q], lengths[q]);
        const Value* next = keys + place + (head + 1 < heads ? size_t(width) * context : 0);
        constexpr int PART = N > 4 ? 4 : N;
        for (int q = 0; q < N; q += PART) gather_any<PART>(scores + q, lengths + q, values + place, width, next, to + q);
    }
};

struct Span {
    int32_t token, slot, position, size;
};

template <typename Value>
void attention(const Attention<Value>& a, const Span* spans, int count) {
    struct Item {
        int span, at, size;
    };
    int most = 0;
    for (int r = 0; r < count; r++) most += spans[r].size;
    std::unique_ptr<Item[]> items(new Item[most]);
    int blocks = 0;
    for (int r = 0; r < count; r++)  // full blocks first have the most to do: the last ones, so from the end
        for (int at = 0; at < spans[r].size;) {
            int size = spans[r].size - at >= QUERIES ? QUERIES : 1;
            items[blocks++] = {r, at, size};
            at += size;
        }
#pragma omp parallel
    {
        std::unique_ptr<float[]> scratch(new float[QUERIES * (a.width + a.context + LANES)]);
#pragma omp for collapse(2) schedule(static)
        for (int head = 0; head < a.heads; head++)
            for (int b = 0; b < blocks; b++) {
                const Span& span = spans[items[b].span];
                for (int n = items[b].at; n < items[b].at + items[b].size; n++)
                    a.write(span.token + n, span.slot, span.position + n, head);
            }
#pragma omp for collapse(2) schedule(dynamic, (a.heads + 1) / 2)
        for (int b = blocks - 1; b >= 0; b--)
            for (int head = 0; head < a.heads; head++) {
                const Span& span = spans[items[b].span];
                int token = span.token + items[b].at, position = span.position + items[b].at;
                if (items[b].size == QUERIES)
                    a.template attend<QUERIES>(token, span.slot, position, head, scratch.get());
                else
                    a.template attend<1>(token, span.slot, position, head, scratch.get());
            }
    }
}


}  // namespace
