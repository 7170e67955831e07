// Choosing a token of a row of logits: the greatest, or by Gumbel's trick argmax_y (logit_y / temperature − log e_y),
// e_y exponential, of all tokens or of the likeliest. And how likely it was.
#pragma once

#include "vectors.h"

namespace {

// 16 running sums.
struct Doubles {
    typedef double Part __attribute__((vector_size(4 * WIDTH)));
    typedef float Half __attribute__((vector_size(2 * WIDTH), aligned(4), may_alias));  // as many numbers as a `Part`
    Part part[2 * REGISTERS];

    void add(Floats x) {
        for (int i = 0; i < 2 * REGISTERS; i++)
            part[i] += __builtin_convertvector(reinterpret_cast<const Half*>(x.part)[i], Part);
    }
    double sum() const {
        double all = 0;
        for (const Part& some : part)
            for (int n = 0; n < WIDTH / 2; n++) all += some[n];
        return all;
    }
};

// As in native.py. Temperature 0 is greedy, top_k 0 and top_p 1 leave the whole vocabulary.
struct DrawParams {
    uint64_t seed;
    double top_p;
    int32_t position, top_k;
    float temperature;
};

struct Candidate {
    float logit;
    int32_t token;
};

// Of equal ones the first in the vocabulary.
inline bool likelier(Candidate a, Candidate b) { return a.logit > b.logit || (a.logit == b.logit && a.token < b.token); }

// Which of 16 are no less likely than one.
inline Ints up_to(Candidate last, Floats logits, Ints tokens) {
    return (logits > last.logit) | ((logits == last.logit) & (tokens <= last.token));
}

typedef uint64_t Longs __attribute__((vector_size(4 * WIDTH)));

// The products of every second number, from the first on, with the lower half of each of b.
inline Longs multiply_even(Longs a, Longs b) {
#if defined(__AVX512F__)
    return (Longs)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Longs)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && !defined(__AVX__)
    return (Longs)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__ARM_NEON)
    return (Longs)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
    return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// The lower and the upper halves of 16 products.
inline void multiply(Words a, uint32_t b, Words& low, Words& high) {
    constexpr uint64_t LOW = 0xffffffffu;
    for (int i = 0; i < REGISTERS; i++) {
        Longs factor = Longs{} + b, pairs = (Longs)a.part[i];
        Longs even = multiply_even(pairs, factor), odd = multiply_even(pairs >> 32, factor);
        low.part[i] = (Bits)((even & LOW) | (odd << 32));
        high.part[i] = (Bits)((even >> 32) | (odd & ~LOW));
    }
}

// Philox4x32-10 (Salmon et al., SC 2011) for 16 counters (block, position, 0, 0) under one key.
inline void philox(uint64_t seed, uint32_t position, Words block, Words* out) {
    Words c0 = block, c1 = Words{} + position, c2{}, c3{};
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; round++) {
        Words low_a, low_b, high_a, high_b;
        multiply(c0, 0xD2511F53u, low_a, high_a);
        multiply(c2, 0xCD9E8D57u, low_b, high_b);
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
    Floats v = (convert<Floats>(x) + 0.5f) * 0x1p-32f;
    Floats series = v * (1.0f + v * (0.5f + v * (1.0f / 3 + v * (0.25f + v * 0.2f))));
    Floats rest = 1.0f - v;
    Floats direct = -logarithm(pick(rest < 0x1p-26f, Floats{} + 0x1p-26f, rest));
    return logarithm(pick(v < 0.03125f, series, direct));
}

// No less than −log_exponential(x), as was checked for all 2³²: e ≥ v, and v is at least the power of two that it begins with.
inline Floats at_most(Words x) {
    Floats v = (convert<Floats>(x) + 0.5f) * 0x1p-32f;
    return convert<Floats>(127 - (bits<Ints>(v) >> 23)) * 0.6932f;
}

// The greatest of values that come 16 at a time, and whose it is.
struct Greatest {
    Floats value = Floats{} - INFINITY;
    Ints token{};

    void take(Floats values, Ints tokens, Ints valid) {
        Ints better = (values > value) & valid;
        value = pick(better, values, value);
        token = pick(better, tokens, token);
    }
    float most() const {
        float all = value[0];
        for (int n = 1; n < LANES; n++) all = std::max(all, value[n]);
        return all;
    }
    // Of equal ones the first in the vocabulary; −1 if there is none above −∞.
    int32_t winner() const {
        Candidate best{-INFINITY, -1};
        for (int n = 0; n < LANES; n++)
            if (value[n] > -INFINITY && likelier({value[n], token[n]}, best)) best = {value[n], token[n]};
        return best.token;
    }
};

// 16 logits of a row, from the first-th on; those beyond its end are 0.
inline Floats load(const float* logits, int vocabulary, int first) {
    int count = std::max(0, std::min(LANES, vocabulary - first));
    return count == LANES ? load(logits + first) : load_some(logits + first, count);
}

inline bool any(Ints mask) {
    uint64_t bits[LANES / 2], all = 0;
    std::memcpy(bits, &mask, sizeof mask);
    for (uint64_t part : bits) all |= part;
    return all;
}

constexpr Candidate NONE{-INFINITY, INT32_MAX};  // which all are at least as likely as

// The token, of those that are no less likely than `least`. −1 where a logit is NaN or +∞, or all are −∞. DRAWN: at a
// temperature, else the greatest.
template <bool DRAWN>
int32_t choose(const float* logits, int vocabulary, const DrawParams& how, Candidate least = NONE) {
    Greatest greatest;
    Ints lane = lanes(), numbers = Ints{} - 1;
    float best = -INFINITY;
    for (int group = 0; group < vocabulary; group += 4 * LANES) {
        Floats logit[4];
        Ints may[4], some{};
        for (int i = 0; i < 4; i++) {
            Ints token = lane + group + i * LANES;
            logit[i] = load(logits, vocabulary, group + i * LANES);
            numbers &= logit[i] < INFINITY;
            may[i] = up_to(least, logit[i], token) & (token < vocabulary);
            some |= may[i];
        }
        if (!any(some)) continue;
        Words words[4];
        if (DRAWN) philox(how.seed, uint32_t(how.position), bits<Words>(lane + group / 4), words);
        for (int i = 0; i < 4; i++) {
            Ints token = lane + group + i * LANES;
            if (!DRAWN) {
                greatest.take(logit[i], token, may[i]);
                continue;
            }
            Floats heated = logit[i] / how.temperature;
            if (!any((heated + at_most(words[i]) >= best) & may[i])) continue;  // none can be the greatest
            greatest.take(heated - log_exponential(words[i]), token, may[i]);
            best = greatest.most();
        }
    }
    for (int n = 0; n < LANES; n++)
        if (!numbers[n]) return -1;
    return greatest.winner();
}

// What all of the `count` likeliest reach: the count-th of the maxima of several times as many parts of the row.
inline float reached(const float* logits, int vocabulary, int count) {
    int parts = (4 * count + LANES - 1) / LANES * LANES;
    if (2 * parts > vocabulary) return -INFINITY;
    std::vector<float> maxima(parts, -INFINITY);
    for (int first = 0, part = 0; first + LANES <= vocabulary; first += LANES, part = (part + LANES) % parts) {
        Floats old = load(&maxima[part]), logit = load(logits + first);
        store(&maxima[part], pick(logit > old, logit, old));
    }
    std::nth_element(maxima.begin(), maxima.begin() + count - 1, maxima.end(), std::greater<float>());
    return maxima[count - 1];
}

// The last of the likeliest that has less than `goal` before it.
inline Candidate last_within(std::vector<Candidate>& some, float peak, float temperature, double goal) {
    std::sort(some.begin(), some.end(), likelier);
    size_t last = 0;
    double before = 0;
    for (; last + 1 < some.size(); last++) {
        before += std::exp(double(some[last].logit - peak) / temperature);
        if (before >= goal) break;
    }
    return some[last];
}

// The `count` likeliest of a row, and some others that may be as likely as the last of them, in no order.
inline std::vector<Candidate>& likeliest(const float* logits, int vocabulary, int count) {
    static thread_local std::vector<Candidate> some;
    float least = reached(logits, vocabulary, count);
    some.clear();
    for (int first = 0; first < vocabulary; first += LANES) {
        int size = std::min(LANES, vocabulary - first);
        if (size == LANES && !any(load(logits + first) >= least)) continue;
        for (int n = first; n < first + size; n++)
            if (logits[n] >= least) some.push_back({logits[n], n});
    }
    return some;
}

// The last of the top_k likeliest, or of those the last of the smallest set of mass top_p.
inline Candidate last_of_count(const float* logits, int vocabulary, const DrawParams& how, float peak) {
    std::vector<Candidate>& some = likeliest(logits, vocabulary, how.top_k);
    auto last = some.begin() + how.top_k - 1;
    std::nth_element(some.begin(), last, some.end(), likelier);
    if (how.top_p >= 1) return *last;
    some.resize(how.top_k);
    double total = 0;
    for (Candidate c : some) total += std::exp(double(c.logit - peak) / how.temperature);
    return last_within(some, peak, how.temperature, how.top_p * total);
}

// The last of the smallest set of mass top_p: buckets of like tokens are weighed, and only those of one bucket sorted.
// Tokens of less than (1 − top_p) / V have less than 1 − top_p together, so none of them is needed.
inline Candidate last_of_mass(const float* logits, int vocabulary, const DrawParams& how, float peak) {
    constexpr int BUCKETS = 1024;
    static thread_local std::vector<Candidate> some;
    static thread_local std::vector<double> sums;
    double depth = std::log(vocabulary / (1 - how.top_p)) + 1e-3, total = 0;
    float temperature = how.temperature, scale = float(BUCKETS / depth);
    auto distance = [&](int first) {
        Floats under = (peak - load(logits, vocabulary, first)) / temperature;
        return pick(lanes() + first < vocabulary, under, Floats{} + INFINITY);
    };
    auto bucket = [&](Floats far) {
        Floats place = far * scale;
        return convert<Ints>(pick(place < BUCKETS, place, Floats{} + BUCKETS));
    };
    sums.assign(BUCKETS + 1, 0);
    for (int first = 0; first < vocabulary; first += LANES) {
        Floats far = distance(first), weights = exponential(-far);
        Ints where = bucket(far);
        for (int n = 0; n < LANES; n++) sums[where[n]] += weights[n];
    }
    for (double sum : sums) total += sum;
    double goal = how.top_p * total, before = 0;
    int border = 0;
    while (border < BUCKETS && before + sums[border] < goal) before += sums[border++];
    if (border == BUCKETS) return NONE;
    some.clear();
    for (int first = 0; first < vocabulary; first += LANES) {
        Ints where = bucket(distance(first));
        if (!any(where == border)) continue;
        for (int n = 0; n < LANES; n++)
            if (where[n] == border) some.push_back({logits[first + n], first + n});
    }
    return last_within(some, peak, temperature, goal - before);
}

// What 16 tokens from the first-th on weigh beside one of the logit `peak`, the greatest; beyond the row's end, nothing.
inline Floats weights(const float* logits, int vocabulary, int first, float peak, float temperature) {
    Floats under = (load(logits, vocabulary, first) - peak) / temperature;
    return exponential(pick(lanes() + first < vocabulary, under, Floats{} - INFINITY));
}

// Whether a token is in the smallest set of mass top_p, as those before it have less; not sure near the border.
inline bool surely_within(const float* logits, int vocabulary, const DrawParams& how, float peak, int32_t token) {
    Candidate last{logits[token], token};
    Doubles before{}, all{};
    for (int first = 0; first < vocabulary; first += LANES) {
        Ints others = lanes() + first;
        Floats weight = weights(logits, vocabulary, first, peak, how.temperature);
        Ints earlier = up_to(last, load(logits, vocabulary, first), others) & (others != token);
        all.add(weight);
        before.add(pick(earlier, weight, Floats{}));
    }
    return before.sum() < (how.top_p - 1e-5) * all.sum();
}

// One row's token; −1 where a logit is NaN or +∞, or all are −∞.
inline int32_t draw(const float* logits, int vocabulary, const DrawParams& how) {
    if (how.temperature <= 0) return choose<false>(logits, vocabulary, how);
    bool few = how.top_k > 0 && how.top_k < vocabulary;
    if (!few && how.top_p >= 1) return choose<true>(logits, vocabulary, how);
    int32_t likeliest = choose<false>(logits, vocabulary, how);
    if (likeliest < 0) return -1;
    if (!few && how.top_p > 0.5) {  // mostly, what is drawn of all is one of them
        int32_t token = choose<true>(logits, vocabulary, how);
        if (surely_within(logits, vocabulary, how, logits[likeliest], token)) return token;
    }
    auto last = few ? last_of_count : last_of_mass;
    return choose<true>(logits, vocabulary, how, last(logits, vocabulary, how, logits[likeliest]));
}

// Natural log-probabilities, at temperature 1, of a token of a row of numbers and of the `count` likeliest, in order.
inline void log_probabilities(const float* logits, int vocabulary, int32_t chosen, int count, double* own,
                              int32_t* tokens, double* logs) {
    float peak = logits[choose<false>(logits, vocabulary, {})];
    Doubles sums{};
    for (int first = 0; first < vocabulary; first += LANES)
        sums.add(weights(logits, vocabulary, first, peak, 1));
    double whole = peak + std::log(sums.sum());
    *own = logits[chosen] - whole;
    if (count == 0) return;
    std::vector<Candidate>& some = likeliest(logits, vocabulary, count);
    std::partial_sort(some.begin(), some.begin() + count, some.end(), likelier);
    for (int n = 0; n < count; n++) tokens[n] = some[n].token, logs[n] = some[n].logit - whole;
}

}  // namespace
