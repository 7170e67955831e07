// The engine's own operations on a CPU, behind ctypes (native.py): attention over caches, the sense mix with its
// annealing, the head, and residual + LayerNorm. Matrix products of the trunk are oneDNN's.
//
// Every output element is computed by one fixed order of additions, whatever else is in the batch and however a
// prompt was cut into chunks. So a sequence gets the same bits alone and in any company.
//
// T is the context, S slots, H heads, w a head's width, k senses, d the model's width. Keys lie in tiles of 16
// positions, [.., T/16, w, 16]: scores are computed for 16 positions at a time without a horizontal sum, and memory is
// read in one stream.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <omp.h>
#include <type_traits>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

struct bf16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline void store(float* to, float x) { *to = x; }
inline void store(bf16* to, float x) {  // round to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        to->bits = uint16_t((bits >> 16) | 0x40);
        return;
    }
    to->bits = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
inline Floats load(const bf16* from) {
    Words wide = __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words) << 16;
    return (Floats)wide;  // the same bits
}
inline void store(float* to, Floats x) { *reinterpret_cast<Floats*>(to) = x; }
inline void store(bf16* to, Floats x) {
    Words bits = (Words)x;
    Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    Words nan = (bits & 0x7fffffffu) > 0x7f800000u ? Words{} + 1 : Words{};
    rounded = nan != 0 ? (bits >> 16) | 0x40 : rounded;
    *reinterpret_cast<Halves*>(to) = __builtin_convertvector(rounded, Halves);
}

// The first `count` of 16 numbers, the others 0; never reads beyond them.
template <typename Value>
inline Floats load_some(const Value* from, int count) {
    float some[LANES] = {};
    for (int n = 0; n < count; n++) some[n] = to_float(from[n]);
    return load(some);
}

// exp(x) within 2 units in the last place (Cephes' polynomial); x ≤ 0 here, and below −87 it is 0.
inline Floats exponential(Floats x) {
    Floats low = Floats{} - 87.0f;
    Ints tiny = x < low;
    x = x < low ? low : x;
    Floats scaled = x * 1.44269504088896341f - 0.5f;  // negative: truncation rounds it to the nearest
    Ints power = __builtin_convertvector(scaled, Ints);
    Floats whole = __builtin_convertvector(power, Floats);
    Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats y = Floats{} + 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    Floats scaled_back = (Floats)((Ints)y + (power << 23));
    return tiny ? Floats{} : scaled_back;
}

// Ask for what is read next, into the second-level cache: without it, memory delivers half as much.
inline void fetch(const void* at) { __builtin_prefetch(at, 0, 2); }
template <typename Value>
constexpr int LINE = 64 / sizeof(Value);  // values of one cache line

// One fixed order: 16 running sums, then halves onto halves.
inline float horizontal(Floats sums) {
    float part[LANES];
    store(part, sums);
    for (int size = LANES / 2; size; size /= 2)
        for (int n = 0; n < size; n++) part[n] += part[n + size];
    return part[0];
}

template <typename A, typename B>
inline float dot(const A* a, const B* b, int width) {
    Floats sums{};
    int n = 0;
    for (; n + LANES <= width; n += LANES) sums += load(a + n) * load(b + n);
    if (n < width) sums += load_some(a + n, width - n) * load_some(b + n, width - n);
    return horizontal(sums);
}

// scores[q][t] = Σ_c queries[q][c]·keys[t][c] for N queries, t < length rounded up to 16; keys [T/16, w, 16].
// `ahead` is asked for meanwhile, as many bytes as the keys have.
template <int N, typename Value>
void score(const float* const* queries, const Value* keys, int width, int length, const Value* ahead,
           float* const* scores) {
    constexpr int TILES = 2;
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
        peaks = next > peaks ? next : peaks;
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

constexpr int QUERIES = 8;  // of one chunk that share a pass over the keys

// out[q] = Σ_t weights[q][t]·values[t] for t < lengths[q] (ascending in q), width 16·VECTORS; `ahead` as in `score`.
template <int N, int VECTORS, typename Value>
void gather(float* const* weights, const int* lengths, const Value* values, int width, const Value* ahead,
            Value* const* out) {
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
        for (int v = 0; v < VECTORS; v++) store(out[q] + v * LANES, sums[q][v]);
}

// Any width; 64 and 32 are those of the published models and of ours.
template <int N, typename Value>
void gather_any(float* const* weights, const int* lengths, const Value* values, int width, const Value* ahead,
                Value* const* out) {
    if (width == 64) return gather<N, 4>(weights, lengths, values, width, ahead, out);
    if (width == 32) return gather<N, 2>(weights, lengths, values, width, ahead, out);
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

struct Run {
    int32_t token, slot, position, count;
};

template <typename Value>
void attention(const Attention<Value>& a, const Run* runs, int count) {
    struct Item {
        int run, at, size;
    };
    int most = 0;
    for (int r = 0; r < count; r++) most += runs[r].count;
    std::unique_ptr<Item[]> items(new Item[most]);
    int blocks = 0;
    for (int r = 0; r < count; r++)  // full blocks first have the most to do: the last ones, so from the end
        for (int at = 0; at < runs[r].count;) {
            int size = runs[r].count - at >= QUERIES ? QUERIES : 1;
            items[blocks++] = {r, at, size};
            at += size;
        }
#pragma omp parallel
    {
        std::unique_ptr<float[]> scratch(new float[QUERIES * (a.width + a.context + LANES)]);
#pragma omp for collapse(2) schedule(static)
        for (int head = 0; head < a.heads; head++)
            for (int b = 0; b < blocks; b++) {
                const Run& run = runs[items[b].run];
                for (int n = items[b].at; n < items[b].at + items[b].size; n++)
                    a.write(run.token + n, run.slot, run.position + n, head);
            }
#pragma omp for collapse(2) schedule(dynamic, (a.heads + 1) / 2)
        for (int b = blocks - 1; b >= 0; b--)
            for (int head = 0; head < a.heads; head++) {
                const Run& run = runs[items[b].run];
                int token = run.token + items[b].at, position = run.position + items[b].at;
                if (items[b].size == QUERIES)
                    a.template attend<QUERIES>(token, run.slot, position, head, scratch.get());
                else
                    a.template attend<1>(token, run.slot, position, head, scratch.get());
            }
    }
}


// ---- the sense mix

struct Topic {  // one topic edit of a release, as overlay.TopicMultipliers has it
    const uint8_t* levels;  // [V, k]
    float multipliers[4];
    float scale;
    int32_t annealed;
};

struct Row {  // one prediction: the newest of `length` tokens in a slot
    int32_t slot, length;
    int32_t fresh;  // whether its newest token has still to be counted in `satisfied`
    int32_t topics, first_topic;
};

constexpr float SATISFIED = 32.0f;  // scale·a from which sigmoid(6 − scale·a) is lost in 1 − it, in float32
constexpr int BLOCK = 64;  // positions of one unit of work

template <typename Value>
struct Mix {
    const Value* table;  // [V·k + overlay rows, d]
    const Value* embedding;  // [V, d]
    const int32_t *rows, *ids;  // [S, T, k], [S, T]
    float* satisfied;  // a = Σ_i relu(E[x_i]·C(x_j)_l), [S, T, k]
    const Topic* topics;
    int senses, width, context;

    const Value* row(int slot, int t, int sense) const {
        return table + size_t(rows[(size_t(slot) * context + t) * senses + sense]) * width;
    }
    const Value* token(int slot, int t) const { return embedding + size_t(ids[size_t(slot) * context + t]) * width; }
    float* sums(int slot, int t) const { return satisfied + (size_t(slot) * context + t) * senses; }

    float target(const Topic& topic, int slot, int t, int sense) const {
        return topic.multipliers[topic.levels[size_t(ids[size_t(slot) * context + t]) * senses + sense]];
    }

    // Whether a cell's multiplier can still change.
    bool open(const Row& r, int t, int sense) const {
        float sum = sums(r.slot, t)[sense];
        for (int n = r.first_topic; n < r.first_topic + r.topics; n++)
            if (topics[n].annealed && topics[n].scale * sum < SATISFIED && target(topics[n], r.slot, t, sense) != 1)
                return true;
        return false;
    }

    // Count tokens [from, to) for a cell, in their order.
    void satisfy(const Row& r, int t, int sense, int from, int to) const {
        const Value* vector = row(r.slot, t, sense);
        float& sum = sums(r.slot, t)[sense];
        for (int i = from; i < to; i++) sum += std::max(0.0f, dot(token(r.slot, i), vector, width));
    }

    void satisfy_new(const Row& r, int t, int sense, int to) const {
        sums(r.slot, t)[sense] = 0;
        if (open(r, t, sense)) satisfy(r, t, sense, 0, to);
    }

    // weights[l] times the product of the topics' multipliers, b·δ + (1 − b), b = sigmoid(6 − f·a)·(1 + j/100).
    void steer(const Row& r, int t, float* weights) const {
        const float* sum = sums(r.slot, t);
        for (int n = r.first_topic; n < r.first_topic + r.topics; n++) {
            const Topic& topic = topics[n];
            const uint8_t* levels = topic.levels + size_t(ids[size_t(r.slot) * context + t]) * senses;
            for (int l = 0; l < senses; l += LANES) {
                int count = std::min(LANES, senses - l);
                float aims[LANES];
                for (int i = 0; i < count; i++) aims[i] = topic.multipliers[levels[l + i]];
                Floats aim = load_some(aims, count), factor = aim;
                if (topic.annealed) {
                    Floats x = 6.0f - load_some(sum + l, count) * topic.scale;
                    Floats e = exponential(x < 0.0f ? x : -x);
                    Floats keep = (x < 0.0f ? e : Floats{} + 1.0f) / (1.0f + e) * (1.0f + t / 100.0f);
                    factor = keep * aim + (1.0f - keep);
                }
                for (int i = 0; i < count; i++) weights[l + i] *= factor[i];
            }
        }
    }

    // out += Σ_t Σ_l alpha[l][t]·m[l][t]·C(x_t)_l over the positions [from, to) of one prediction.
    void add(const Row& r, const float* alpha, int stride, int from, int to, float* out, float* weights) const {
        const Value** senses_of = reinterpret_cast<const Value**>(weights + (senses + 1) / 2 * 2);
        int newest = r.length - 1;
        for (int t = from; t < to; t++) {
            for (int l = 0; l < senses; l++) {
                senses_of[l] = row(r.slot, t, l);
                weights[l] = alpha[size_t(l) * stride + t];
            }
            if (r.topics) {
                if (r.fresh && t < newest)
                    for (int l = 0; l < senses; l++)
                        if (open(r, t, l)) satisfy(r, t, l, newest, newest + 1);
                steer(r, t, weights);
            }
            const Value* ahead = t + 1 < to ? row(r.slot, t + 1, 0) : senses_of[0];
            int c = 0;
            for (; c + LANES <= width; c += LANES) {
                Floats sum = load(out + c);
                for (int l = 0; l < senses; l++) {
                    if (c % LINE<Value> == 0) fetch(ahead + size_t(l) * width + c);
                    sum += load(senses_of[l] + c) * weights[l];
                }
                store(out + c, sum);
            }
            for (; c < width; c++)
                for (int l = 0; l < senses; l++) out[c] = std::fma(to_float(senses_of[l][c]), weights[l], out[c]);
        }
    }
};

template <typename Value>
void mix(const Mix<Value>& m, const Row* predictions, int count, const Value* queries, const Value* sense_keys,
         int head_width, float* alpha, float* parts, float* out) {
    int blocks = 0;
    for (int b = 0; b < count; b++) blocks += (predictions[b].length + BLOCK - 1) / BLOCK;
    struct Item {
        int prediction, block;
    };
    std::unique_ptr<Item[]> items(new Item[blocks]);
    for (int b = 0, at = 0; b < count; b++)
        for (int n = 0; n * BLOCK < predictions[b].length; n++) items[at++] = {b, n};
    int k = m.senses, stride = m.context, most = (m.context + BLOCK - 1) / BLOCK;
    float scale = 1.0f / std::sqrt(float(head_width));
#pragma omp parallel
    {
        std::unique_ptr<float[]> scratch(new float[2 * head_width + 4 * k + 8]);
#pragma omp for collapse(2) schedule(dynamic, 4)
        for (int b = 0; b < count; b++)
            for (int l = 0; l < k; l++) {
                const Row& r = predictions[b];
                const float* query = scratch.get();
                float* scores = alpha + (size_t(b) * k + l) * stride;
                for (int c = 0; c < head_width; c++)
                    scratch[c] = to_float(queries[(size_t(b) * k + l) * head_width + c]) * scale;
                const Value* keys = sense_keys + (size_t(r.slot) * k + l) * head_width * m.context;
                score<1>(&query, keys, head_width, r.length, keys, &scores);
                softmax(scores, r.length);
                if (r.fresh && r.topics) m.satisfy_new(r, r.length - 1, l, r.length);
            }
#pragma omp for schedule(dynamic, 1)
        for (int n = 0; n < blocks; n++) {
            int b = items[n].prediction, from = items[n].block * BLOCK;
            float* part = parts + (size_t(b) * most + items[n].block) * m.width;
            std::memset(part, 0, m.width * sizeof(float));
            m.add(predictions[b], alpha + size_t(b) * k * stride, stride, from,
                  std::min(from + BLOCK, predictions[b].length), part, scratch.get());
        }
#pragma omp for schedule(static)
        for (int b = 0; b < count; b++) {
            float* to = out + size_t(b) * m.width;
            std::memset(to, 0, m.width * sizeof(float));
            for (int n = 0; n * BLOCK < predictions[b].length; n++) {
                const float* part = parts + (size_t(b) * most + n) * m.width;
                for (int c = 0; c < m.width; c++) to[c] += part[c];
            }
        }
    }
}

// Bring `satisfied` up to date with the tokens [start, r.length) of a slot.
template <typename Value>
void satisfy(const Mix<Value>& m, const Row& r, int start) {
#pragma omp parallel for schedule(dynamic, 4)
    for (int t = 0; t < r.length; t++)
        for (int l = 0; l < m.senses; l++) {
            if (t >= start)
                m.satisfy_new(r, t, l, r.length);
            else if (m.open(r, t, l))
                m.satisfy(r, t, l, start, r.length);
        }
}

// x += delta, if there is one; out = LayerNorm(x). x [N, d] is float32 always.
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
        float mean = (horizontal(sums) + rest) / width;
        Floats squares{};
        rest = 0;
        for (int c = 0; c < whole; c += LANES) {
            Floats centred = load(at + c) - mean;
            squares += centred * centred;
        }
        for (int c = whole; c < width; c++) rest += (at[c] - mean) * (at[c] - mean);
        float scale = 1.0f / std::sqrt((horizontal(squares) + rest) / width + epsilon);
        for (int c = 0; c < whole; c += LANES)
            store(out + size_t(n) * width + c, (load(at + c) - mean) * scale * load(gain + c) + load(bias + c));
        for (int c = whole; c < width; c++) store(out + size_t(n) * width + c, (at[c] - mean) * scale * gain[c] + bias[c]);
    }
}

#ifdef __AVX512BF16__
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
#endif

}  // namespace

#define EXPORTS(NAME, Value)                                                                                         \
    void attend_##NAME(const Value* qkv, Value* keys, Value* values, const Run* runs, int count, int heads,          \
                       int width, int context, float scale, Value* out) {                                            \
        attention(Attention<Value>{qkv, keys, values, out, heads, width, context, scale}, runs, count);              \
    }                                                                                                                \
    void mix_##NAME(const Mix<Value>* state, const Row* rows, int count, const Value* queries, const Value* keys,    \
                    int head_width, float* alpha, float* parts, float* out) {                                        \
        mix(*state, rows, count, queries, keys, head_width, alpha, parts, out);                                      \
    }                                                                                                                \
    void satisfy_##NAME(const Mix<Value>* state, const Row* row, int start) { satisfy(*state, *row, start); }        \
    void residual_norm_##NAME(float* x, const Value* delta, const float* gain, const float* bias, float epsilon,     \
                              int count, int width, Value* out) {                                                    \
        residual_norm(x, delta, gain, bias, epsilon, count, width, out);                                             \
    }

extern "C" {
EXPORTS(float32, float)
EXPORTS(bfloat16, bf16)

#ifdef __AVX512BF16__
void head_bfloat16(const bf16* x, int count, const bf16* weights, int width, int vocabulary, float* out) {
    head(x, count, weights, width, vocabulary, out);
}
#endif
}
