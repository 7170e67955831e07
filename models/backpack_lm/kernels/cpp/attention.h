// Attention of new tokens over their sequences' caches.
#pragma once

#include "vectors.h"

namespace {

// Where the caches of a sequence are: its position t in the page table[slot][t / size].
struct PageTable {
    const int32_t* pages;  // [S, each]
    int32_t each, size;  // pages of a slot, positions of a page: a multiple of 16

    const int32_t* of(size_t slot) const { return pages + slot * each; }
};

// scores[q][start + t] = Σ_c queries[q][c]·keys[t][c] for N queries, t < length rounded up to 16; keys [T/16, w, 16] of
// one page. `ahead` is asked for meanwhile, as many bytes as the keys have.
template <int N, typename Value>
void score(const float* const* queries, const Value* keys, int width, int length, const Value* ahead,
           float* const* scores, int start) {
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
            for (int i = 0; i < M; i++) store(scores[q] + start + (t + i) * LANES, sums[q][i]);
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

// The values of one head in the pages of a sequence, and what is read after them in the same pages.
template <typename Value>
struct Rows {
    const Value *values, *ahead;  // [P, w], of page 0
    const int32_t* pages;
    size_t step;  // from page to page
    int size, width;

    size_t at(int t) const { return pages[t / size] * step + size_t(t % size) * width; }
};

// out[q][c + …] = Σ_t weights[q][t]·values[t][c + …] for t < lengths[q] (ascending in q), 16·VECTORS of them.
template <int N, int VECTORS, typename Value>
void gather(float* const* weights, const int* lengths, const Rows<Value>& rows, int c, Value* const* out) {
    Floats sums[N][VECTORS] = {};
    const Value *values = rows.values + c, *ahead = rows.ahead + c;
    auto row = [&](size_t at, int v) {
        if (v * LANES % LINE<Value> == 0) fetch(ahead + at + v * LANES);
        return load(values + at + v * LANES);
    };
    int common = lengths[0];
    for (int start = 0; start < common; start += rows.size) {
        size_t page = rows.at(start);
        int end = std::min(rows.size, common - start);
        for (int t = 0; t < end; t++)
            for (int v = 0; v < VECTORS; v++) {
                Floats value = row(page + size_t(t) * rows.width, v);
                for (int q = 0; q < N; q++) sums[q][v] += value * weights[q][start + t];
            }
    }
    for (int q = 1; q < N; q++)
        for (int t = common; t < lengths[q]; t++)
            for (int v = 0; v < VECTORS; v++) sums[q][v] += row(rows.at(t), v) * weights[q][t];
    for (int q = 0; q < N; q++)
        for (int v = 0; v < VECTORS; v++) store(out[q] + c + v * LANES, sums[q][v]);
}

// Any width, as many dimensions at a time as fit into registers.
template <int N, typename Value>
void gather_all(float* const* weights, const int* lengths, const Rows<Value>& rows, Value* const* out) {
    constexpr int VECTORS = std::max(1, std::min(4, SUMS / N)), HALF = std::min(2, VECTORS);
    int c = 0;
    for (; c + VECTORS * LANES <= rows.width; c += VECTORS * LANES) gather<N, VECTORS>(weights, lengths, rows, c, out);
    for (; c + HALF * LANES <= rows.width; c += HALF * LANES) gather<N, HALF>(weights, lengths, rows, c, out);
    for (; c + LANES <= rows.width; c += LANES) gather<N, 1>(weights, lengths, rows, c, out);
    for (; c < rows.width; c++)
        for (int q = 0; q < N; q++) {
            float sum = 0;
            for (int t = 0; t < lengths[q]; t++) sum = std::fma(to_float(rows.values[rows.at(t) + c]), weights[q][t], sum);
            store(out[q] + c, sum);
        }
}

struct Span {
    int32_t token, slot, position, size;
};

constexpr int QUERIES = std::min(8, SUMS);  // at most, that share a pass over the keys: of a chunk, or of the heads of a group

// Query heads h·G/H share a head of keys and values: H heads in G groups.
template <typename Value>
struct Attention {
    const Value* qkv;  // [N, H + 2·G, w] of the new tokens: queries, keys, values
    Value *keys, *values;  // [pages, G, P/16, w, 16], [pages, G, P, w] of one layer
    Value* out;  // [N, H, w]
    int heads, groups, width;
    float scale;
    PageTable table;

    int each() const { return heads / groups; }
    size_t head_size() const { return size_t(table.size) * width; }

    void write(int token, int slot, int position, int group) const {
        const Value* k = qkv + (size_t(token) * (heads + 2 * groups) + heads + group) * width;
        const Value* v = k + size_t(groups) * width;
        int t = position % table.size;
        size_t place = (size_t(table.of(slot)[position / table.size]) * groups + group) * head_size();
        Value* to = keys + place + size_t(t / LANES) * width * LANES + t % LANES;
        for (int c = 0; c < width; c++) to[c * LANES] = k[c];
        std::memcpy(values + place + size_t(t) * width, v, width * sizeof(Value));
    }

    // N queries of one group: of a token and heads from `head` on, or of one head and tokens from `token` on (`chunk`).
    // `scratch` holds for each a query and scores of `most` positions.
    template <int N>
    void attend(int token, int slot, int position, int head, bool chunk, float* scratch, int most) const {
        float *queries[N], *scores[N];
        Value* to[N];
        int lengths[N];
        for (int q = 0; q < N; q++) {
            int own_token = chunk ? token + q : token, own_head = chunk ? head : head + q;
            queries[q] = scratch + q * (width + most);
            scores[q] = queries[q] + width;
            lengths[q] = position + 1 + (chunk ? q : 0);
            const Value* from = qkv + (size_t(own_token) * (heads + 2 * groups) + own_head) * width;
            for (int c = 0; c < width; c++) queries[q][c] = to_float(from[c]) * scale;
            to[q] = out + (size_t(own_token) * heads + own_head) * width;
        }
        int group = head / each(), longest = lengths[N - 1];
        size_t own = group * head_size(), next = group + 1 < groups ? own + head_size() : own;
        Rows<Value> rows{values + own, keys + next, table.of(slot), groups * head_size(), table.size, width};
        for (int start = 0; start < longest; start += table.size) {
            size_t page = rows.at(start);
            int length = std::min(table.size, longest - start);
            score<N>(queries, keys + own + page, width, length, rows.values + page, scores, start);
        }
        for (int q = 0; q < N; q++) softmax(scores[q], lengths[q]);
        constexpr int PART = N > 4 ? 4 : N, REST = N % PART;
        for (int q = 0; q + PART <= N; q += PART) gather_all<PART>(scores + q, lengths + q, rows, to + q);
        if constexpr (REST > 0) gather_all<REST>(scores + N - REST, lengths + N - REST, rows, to + N - REST);
    }

    // One token, `count` heads of a group: N at a time, and what is left.
    template <int N = QUERIES>
    void attend_heads(int token, int slot, int position, int head, int count, float* scratch, int most) const {
        for (; count >= N; head += N, count -= N) attend<N>(token, slot, position, head, false, scratch, most);
        if constexpr (N > 1)
            if (count) attend_heads<N - 1>(token, slot, position, head, count, scratch, most);
    }
};

template <typename Value>
void attention(const Attention<Value>& a, const Span* spans, int count) {
    struct Item {
        int span, at, size;
    };
    int total = 0, longest = 0;
    for (int r = 0; r < count; r++) {
        total += spans[r].size;
        longest = std::max(longest, spans[r].position + spans[r].size);
    }
    int most = (longest + LANES - 1) / LANES * LANES;
    std::unique_ptr<Item[]> items(new Item[total]);
    int blocks = 0;
    for (int r = 0; r < count; r++)  // full blocks first have the most to do: the last ones, so from the end
        for (int at = 0; at < spans[r].size;) {
            int size = spans[r].size - at >= QUERIES ? QUERIES : 1;
            items[blocks++] = {r, at, size};
            at += size;
        }
#pragma omp parallel
    {
        std::unique_ptr<float[]> scratch(new float[QUERIES * (a.width + most)]);
#pragma omp for collapse(2) schedule(static)
        for (int group = 0; group < a.groups; group++)
            for (int b = 0; b < blocks; b++) {
                const Span& span = spans[items[b].span];
                for (int n = items[b].at; n < items[b].at + items[b].size; n++)
                    a.write(span.token + n, span.slot, span.position + n, group);
            }
#pragma omp for collapse(2) schedule(dynamic, (a.groups + 1) / 2)
        for (int b = blocks - 1; b >= 0; b--)
            for (int group = 0; group < a.groups; group++) {
                const Span& span = spans[items[b].span];
                int token = span.token + items[b].at, position = span.position + items[b].at, head = group * a.each();
                if (items[b].size < QUERIES)
                    a.attend_heads(token, span.slot, position, head, a.each(), scratch.get(), most);
                else
                    for (int h = head; h < head + a.each(); h++)
                        a.template attend<QUERIES>(token, span.slot, position, h, true, scratch.get(), most);
            }
    }
}

}  // namespace
