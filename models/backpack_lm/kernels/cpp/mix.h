// The sense mix, with releases' topics and their annealing.
#pragma once

#include "attention.h"

namespace {

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
    const int32_t *previous, *following;  // where the same token stands before (−1: nowhere) and next (0), [S, T]
    float* satisfied;  // a = Σ_i relu(E[x_i]·C(x_j)_l), [S, T, k]; kept where a token stands first
    const Topic* topics;
    int senses, width, context;

    const Value* row(int slot, int t, int sense) const {
        return table + size_t(rows[(size_t(slot) * context + t) * senses + sense]) * width;
    }
    const Value* token(int slot, int t) const { return embedding + size_t(ids[size_t(slot) * context + t]) * width; }
    bool first(int slot, int t) const { return previous[size_t(slot) * context + t] < 0; }
    int next(int slot, int t) const { return following[size_t(slot) * context + t]; }
    float* sums(int slot, int t) const { return satisfied + (size_t(slot) * context + t) * senses; }

    // δ of the senses [l, l + count) of a position.
    Floats aims(const Topic& topic, int slot, int t, int l, int count) const {
        const uint8_t* levels = topic.levels + size_t(ids[size_t(slot) * context + t]) * senses + l;
        float some[LANES] = {};
        for (int i = 0; i < count; i++) some[i] = topic.multipliers[levels[i]];
        return load(some);
    }

    // Calls act(sense) for the senses of a position whose multiplier can still change.
    template <typename Act>
    void for_open(const Row& r, int t, Act act) const {
        const float* sum = sums(r.slot, t);
        for (int l = 0; l < senses; l += LANES) {
            int count = std::min(LANES, senses - l);
            Floats some = load_some(sum + l, count);
            Ints open{};
            for (int n = r.first_topic; n < r.first_topic + r.topics; n++)
                if (topics[n].annealed)
                    open |= (some * topics[n].scale < SATISFIED) & (aims(topics[n], r.slot, t, l, count) != 1.0f);
            for (int i = 0; i < count; i++)
                if (open[i]) act(l + i);
        }
    }

    // Count tokens [from, to) for a cell, in their order; four at a time share the horizontal sums.
    void satisfy(const Row& r, int t, int sense, int from, int to) const {
        const Value* vector = row(r.slot, t, sense);
        float& sum = sums(r.slot, t)[sense];
        for (int i = from; i < to; i += 4) {
            Floats part[4] = {};
            int count = std::min(4, to - i);
            for (int n = 0; n < count; n++) part[n] = products(token(r.slot, i + n), vector, width);
            Floats dots = horizontal(part[0], part[1], part[2], part[3]);
            for (int n = 0; n < count; n++) sum += std::max(0.0f, dots[4 * n]);
        }
    }

    // Count one token for several cells of a position.
    void satisfy_all(const Row& r, int t, const int* open, int count, int newest) const {
        for (int i = 0; i < count; i += 4) {
            Floats part[4] = {};
            int some = std::min(4, count - i);
            for (int n = 0; n < some; n++) part[n] = products(token(r.slot, newest), row(r.slot, t, open[i + n]), width);
            Floats dots = horizontal(part[0], part[1], part[2], part[3]);
            for (int n = 0; n < some; n++) sums(r.slot, t)[open[i + n]] += std::max(0.0f, dots[4 * n]);
        }
    }

    void satisfy_new(const Row& r, int t, int to) const {
        std::fill(sums(r.slot, t), sums(r.slot, t) + senses, 0.0f);
        for_open(r, t, [&](int sense) { satisfy(r, t, sense, 0, to); });
    }

    // weights[l] of position t times its topics' multipliers, b·δ + (1 − b), b = sigmoid(6 − f·a)·(1 + t/100), where a
    // is kept at `first`.
    void steer(const Row& r, int first, int t, float* weights) const {
        const float* sum = sums(r.slot, first);
        for (int n = r.first_topic; n < r.first_topic + r.topics; n++) {
            const Topic& topic = topics[n];
            for (int l = 0; l < senses; l += LANES) {
                int count = std::min(LANES, senses - l);
                Floats aim = aims(topic, r.slot, first, l, count), factor = aim;
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

    // weights[l] = Σ α[l][t]·m[l][t] over all positions t of the token that stands first at `first`.
    void weigh(const Row& r, const float* alpha, int stride, int first, float* weights, float* one) const {
        std::fill(weights, weights + senses, 0.0f);
        int t = first;
        do {
            for (int l = 0; l < senses; l++) one[l] = alpha[size_t(l) * stride + t];
            if (r.topics) steer(r, first, t, one);
            for (int l = 0; l < senses; l++) weights[l] += one[l];
            t = next(r.slot, t);
        } while (t && t < r.length);
    }

    // out += Σ_t Σ_l alpha[l][t]·m[l][t]·C(x_t)_l over all positions of the tokens that stand first in [from, to).
    void add(const Row& r, const float* alpha, int stride, int from, int to, float* out, float* scratch) const {
        float *weights = scratch, *one = scratch + senses;
        int* open = reinterpret_cast<int*>(scratch + 2 * senses);
        const Value** senses_of = reinterpret_cast<const Value**>(scratch + (3 * senses + 1) / 2 * 2);
        int newest = r.length - 1;
        auto skip = [&](int t) {
            while (t < to && !first(r.slot, t)) t++;
            return t;
        };
        for (int t = skip(from), following = 0; t < to; t = following) {
            following = skip(t + 1);
            for (int l = 0; l < senses; l++) senses_of[l] = row(r.slot, t, l);
            if (r.topics && r.fresh && t < newest) {
                int count = 0;
                for_open(r, t, [&](int sense) { open[count++] = sense; });
                satisfy_all(r, t, open, count, newest);
            }
            weigh(r, alpha, stride, t, weights, one);
            const Value* ahead = following < to ? row(r.slot, following, 0) : senses_of[0];
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
        std::unique_ptr<float[]> scratch(new float[2 * head_width + 5 * k + 8]);
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
                if (l == 0 && r.fresh && r.topics && m.first(r.slot, r.length - 1))
                    m.satisfy_new(r, r.length - 1, r.length);
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
        if (t >= start && m.first(r.slot, t))
            m.satisfy_new(r, t, r.length);
        else if (m.first(r.slot, t))
            m.for_open(r, t, [&](int sense) { m.satisfy(r, t, sense, start, r.length); });
}

}  // namespace
