// The sense mix, with releases' topics and their annealing.
#pragma once

#include "attention.h"
#include "words.h"

namespace {

struct Topic {  // one topic edit of a release, as overlay.TopicMultipliers has it
    const uint8_t* levels;  // [V, k]
    float multipliers[4];
    float scale;
    int32_t annealed;
};

struct Prediction {  // one prediction: the newest of `length` tokens in a slot
    int32_t slot, length;
    int32_t fresh;  // whether its newest token has still to be counted in `annealed_sum`
    int32_t topics, first_topic;
};

constexpr float FULLY_ANNEALED = 32.0f;  // scale·a from which sigmoid(6 − scale·a) is lost in 1 − it, in float32
constexpr int SOON = 4;  // words ahead, whose rows are asked for; their numbers and weights twice as far

// Rows of the table: `width` values, and of int8 behind them a float32 for each 64, that these are multiplied by.
template <typename Cell>
inline size_t stride(const Cell*, int width) { return width; }
inline size_t stride(const int8_t*, int width) { return width + (width + BLOCK - 1) / BLOCK * sizeof(float); }

template <typename Cell>
inline float scale(const Cell*, int, int) { return 1.0f; }
inline float scale(const int8_t* row, int width, int c) {  // of the value at c
    float found;
    std::memcpy(&found, row + width + c / BLOCK * sizeof(float), sizeof(found));
    return found;
}

// 16 running sums of the products of a token's embedding and a row.
template <typename Value, typename Cell>
inline Floats dot(const Value* token, const Cell* row, int width) { return products(token, row, width); }
template <typename Value>
inline Floats dot(const Value* token, const int8_t* row, int width) {
    Floats sums{};
    for (int c = 0; c < width; c += BLOCK)
        sums += products(token + c, row + c, std::min(BLOCK, width - c)) * scale(row, width, c);
    return sums;
}

template <typename Value, typename Cell = Value>
struct Mix {
    const Cell* table;  // [V·k + overlay rows, d], of int8 with each row's scales behind it
    const Value* embedding;  // [V, d]
    const int32_t *rows, *ids;  // [S, T, k], [S, T]
    const int32_t *previous, *following;  // where the same token stands before (−1: nowhere) and next (0), [S, T]
    float* annealed_sum;  // a = Σ_i relu(E[x_i]·C(x_j)_l), [S, T, k]; kept where a token stands first
    float *alpha, *parts;  // [B, T, k rounded up to 16], [GROUPS, S, d]: a group's, of all predictions, fit a cache
    Lists lists;
    const Topic* topics;
    PageTable pages;  // of `sense_keys`
    int senses, width, context, slots;

    int padded() const { return (senses + LANES - 1) / LANES * LANES; }
    const int32_t* rows_of(int slot, int t) const { return rows + (size_t(slot) * context + t) * senses; }
    const Cell* row(int32_t number) const { return table + number * stride(table, width); }
    const Cell* row(int slot, int t, int sense) const { return row(rows_of(slot, t)[sense]); }
    const Value* token(int slot, int t) const { return embedding + size_t(ids[size_t(slot) * context + t]) * width; }
    bool first(int slot, int t) const { return previous[size_t(slot) * context + t] < 0; }
    int next(int slot, int t) const { return following[size_t(slot) * context + t]; }
    float* sums(int slot, int t) const { return annealed_sum + (size_t(slot) * context + t) * senses; }

    // δ of the senses [l, l + count) of a position.
    Floats target_multipliers(const Topic& topic, int slot, int t, int l, int count) const {
        const uint8_t* levels = topic.levels + size_t(ids[size_t(slot) * context + t]) * senses + l;
        float some[LANES] = {};
        for (int i = 0; i < count; i++) some[i] = topic.multipliers[levels[i]];
        return load(some);
    }

    // Calls act(sense) for the senses of a position whose multiplier can still change.
    template <typename Act>
    void for_open(const Prediction& r, int t, Act act) const {
        const float* sum = sums(r.slot, t);
        for (int l = 0; l < senses; l += LANES) {
            int count = std::min(LANES, senses - l);
            Floats some = load_some(sum + l, count);
            Ints open{};
            for (int n = r.first_topic; n < r.first_topic + r.topics; n++)
                if (topics[n].annealed)
                    open |= (some * topics[n].scale < FULLY_ANNEALED) & (target_multipliers(topics[n], r.slot, t, l, count) != 1.0f);
            for (int i = 0; i < count; i++)
                if (open[i]) act(l + i);
        }
    }

    // Count tokens [from, to) for a cell, in their order; four at a time share the horizontal sums.
    void add_tokens(const Prediction& r, int t, int sense, int from, int to) const {
        const Cell* vector = row(r.slot, t, sense);
        float& sum = sums(r.slot, t)[sense];
        for (int i = from; i < to; i += 4) {
            Floats part[4] = {};
            int count = std::min(4, to - i);
            for (int n = 0; n < count; n++) part[n] = dot(token(r.slot, i + n), vector, width);
            Floats dots = horizontal(part[0], part[1], part[2], part[3]);
            for (int n = 0; n < count; n++) sum += std::max(0.0f, dots[4 * n]);
        }
    }

    // Count one token for several cells of a position.
    void add_token(const Prediction& r, int t, const int* open, int count, int newest) const {
        for (int i = 0; i < count; i += 4) {
            Floats part[4] = {};
            int some = std::min(4, count - i);
            for (int n = 0; n < some; n++) part[n] = dot(token(r.slot, newest), row(r.slot, t, open[i + n]), width);
            Floats dots = horizontal(part[0], part[1], part[2], part[3]);
            for (int n = 0; n < some; n++) sums(r.slot, t)[open[i + n]] += std::max(0.0f, dots[4 * n]);
        }
    }

    void restart_annealing(const Prediction& r, int t, int to) const {
        std::fill(sums(r.slot, t), sums(r.slot, t) + senses, 0.0f);
        for_open(r, t, [&](int sense) { add_tokens(r, t, sense, 0, to); });
    }

    // m of the senses [l, l + count) at position t: for each topic b·δ + (1 − b), b = sigmoid(6 − f·a)·(1 + t/100), where
    // a is kept at `first`.
    Floats multipliers(const Prediction& r, int first, int t, int l, int count) const {
        Floats product = Floats{} + 1.0f, sum = load_some(sums(r.slot, first) + l, count);
        for (int n = r.first_topic; n < r.first_topic + r.topics; n++) {
            Floats factor = target_multipliers(topics[n], r.slot, first, l, count);
            if (topics[n].annealed) {
                Floats x = 6.0f - sum * topics[n].scale;
                Floats e = exponential(pick(x < 0.0f, x, -x));
                Floats keep = pick(x < 0.0f, e, Floats{} + 1.0f) / (1.0f + e) * (1.0f + t / 100.0f);
                factor = keep * factor + (1.0f - keep);
            }
            product *= factor;
        }
        return product;
    }

    // weights[l] = Σ α[t][l]·m[t][l] over all positions t of the token that stands first at `first`.
    void weigh(const Prediction& r, const float* alpha, int first, float* weights) const {
        for (int l = 0; l < senses; l += LANES) {
            Floats sum{};
            int t = first;
            do {
                sum += load(alpha + t * padded() + l) * multipliers(r, first, t, l, std::min(LANES, senses - l));
                t = next(r.slot, t);
            } while (t && t < r.length);
            store(weights + l, sum);
        }
    }

    // out += Σ_l weights[l]·C_l for the rows `own`, in the order of `widen`; `ahead`, if there are any, are asked for.
    void add(const int32_t* own, const int32_t* ahead, const float* weights, float* out) const {
        constexpr int BOTH = 2 * LANES;
        static_assert(BLOCK % (2 * BOTH) == 0, "what is added at once shares a scale");
        auto some = [&](int c, auto count) {
            constexpr int M = decltype(count)::value;
            Floats sums[2 * M];
            for (int i = 0; i < 2 * M; i++) sums[i] = load(out + c + i * LANES);
            for (int l = 0; l < senses; l++) {
                const Cell* sense = row(own[l]);
                float weight = weights[l] * scale(sense, width, c);
                if (ahead)
                    for (int i = 0; i < M * BOTH; i += LINE<Cell>) fetch(row(ahead[l]) + c + i);
                for (int i = 0; i < M; i++) {
                    Floats two[2];
                    widen(sense + c + i * BOTH, two);
                    sums[2 * i] += two[0] * weight;
                    sums[2 * i + 1] += two[1] * weight;
                }
            }
            for (int i = 0; i < 2 * M; i++) store(out + c + i * LANES, sums[i]);
        };
        int c = 0;
        if (SUMS >= 4)
            for (; c + 2 * BOTH <= width; c += 2 * BOTH) some(c, std::integral_constant<int, 2>{});
        for (; c + BOTH <= width; c += BOTH) some(c, std::integral_constant<int, 1>{});
        for (; c < width; c++)
            for (int l = 0; l < senses; l++)
                out[c] = std::fma(to_float(row(own[l])[c]), weights[l] * scale(row(own[l]), width, c), out[c]);
        if (ahead && stride(table, width) > size_t(width))
            for (int l = 0; l < senses; l++) fetch(row(ahead[l]) + width);
    }

    // α of prediction b [T, k]: for each sense, a softmax over its positions. sense_keys [pages, k, P/16, d/k, 16];
    // `scratch` holds scores of `most` positions for each sense, and a query.
    void attend(const Prediction& r, int b, const Value* queries, const Value* sense_keys, int head_width, float* scratch, int most) const {
        const int32_t* own = pages.of(r.slot);
        size_t head = size_t(head_width) * pages.size, whole = senses * head;
        float *scores = scratch, *query = scratch + padded() * most;
        float scale = 1.0f / std::sqrt(float(head_width));
        for (int l = 0; l < senses; l++, scores += most) {
            for (int c = 0; c < head_width; c++) query[c] = to_float(queries[(b * senses + l) * head_width + c]) * scale;
            for (int start = 0; start < r.length; start += pages.size) {
                const Value* keys = sense_keys + own[start / pages.size] * whole + l * head;
                int length = std::min(pages.size, r.length - start);
                score<1>(&query, keys, head_width, length, l + 1 < senses ? keys + head : keys, &scores, start);
            }
            softmax(scores, r.length);
        }
        float* to = alpha + size_t(b) * context * padded();
        for (int t = 0; t < r.length; t += LANES)
            for (int l = 0; l < senses; l += LANES) {
                Floats tile[LANES];
                for (int i = 0; i < LANES; i++) tile[i] = load(scratch + (l + i) * most + t);
                transpose(tile);
                for (int i = 0; i < LANES; i++) store(to + (t + i) * padded() + l, tile[i]);
            }
    }

    // The words of prediction b by their groups. Without topics, α of a repeated word is added up where it stands first.
    void list(const Prediction& r, int b, int32_t* origins) const {
        const int32_t *tokens = ids + size_t(r.slot) * context, *before = previous + size_t(r.slot) * context;
        float* own = alpha + size_t(b) * context * padded();
        int32_t counts[GROUPS] = {};
        for (int t = 0; t < r.length; t++) {
            origins[t] = before[t] < 0 ? t : origins[before[t]];
            if (origins[t] == t)
                counts[tokens[t] % GROUPS]++;
            else if (!r.topics)
                for (int l = 0; l < senses; l += LANES) {
                    float* to = own + origins[t] * padded() + l;
                    store(to, load(to) + load(own + t * padded() + l));
                }
        }
        lists.list(b, tokens, r.length, origins, counts);
    }

    // What these words of a group add to each prediction, into its part.
    void add_all(const Prediction* predictions, int count, int group, const std::vector<Place>& places, float* weights) const {
        for (int b = 0; b < count; b++) std::fill(part(b, group), part(b, group) + width, 0.0f);
        auto row_numbers = [&](const Place& place) { return rows_of(predictions[place.prediction].slot, place.position); };
        auto alphas = [&](const Place& place) { return alpha + (size_t(place.prediction) * context + place.position) * padded(); };
        int* open = reinterpret_cast<int*>(weights + padded());
        for (size_t n = 0; n < places.size(); n++) {
            if (n + 2 * SOON < places.size()) {
                fetch(row_numbers(places[n + 2 * SOON]));
                fetch(alphas(places[n + 2 * SOON]));
            }
            const Place& place = places[n];
            const Prediction& r = predictions[place.prediction];
            const float* own = alphas(place);
            if (r.topics) {
                int t = place.position, newest = r.length - 1, some = 0;
                if (r.fresh && t < newest) {
                    for_open(r, t, [&](int sense) { open[some++] = sense; });
                    add_token(r, t, open, some, newest);
                }
                weigh(r, own - t * padded(), t, weights);
                own = weights;
            }
            const int32_t* ahead = n + SOON < places.size() ? row_numbers(places[n + SOON]) : nullptr;
            if (ahead && !std::memcmp(row_numbers(places[n + SOON - 1]), ahead, senses * sizeof(int32_t))) ahead = nullptr;
            add(row_numbers(place), ahead, own, part(place.prediction, group));
        }
    }

    float* part(int b, int group) const { return parts + (size_t(group) * slots + b) * width; }
};

template <typename Value, typename Cell>
void mix(const Mix<Value, Cell>& m, const Prediction* predictions, int count, const Value* queries, const Value* sense_keys,
         int head_width, float* out) {
    int longest = 0;
    for (int b = 0; b < count; b++) longest = std::max(longest, predictions[b].length);
    int most = (longest + LANES - 1) / LANES * LANES;
#pragma omp parallel
    {
        std::vector<float> scratch(size_t(m.padded()) * most + head_width);
        std::vector<int32_t> numbers(longest);
        std::vector<Place> some, places;
#pragma omp for schedule(dynamic, 1)
        for (int b = 0; b < count; b++) {
            const Prediction& r = predictions[b];
            m.attend(r, b, queries, sense_keys, head_width, scratch.data(), most);
            m.list(r, b, numbers.data());
            if (r.fresh && r.topics && m.first(r.slot, r.length - 1)) m.restart_annealing(r, r.length - 1, r.length);
        }
#pragma omp for schedule(dynamic, 1)
        for (int group = 0; group < GROUPS; group++) {
            m.lists.gather(count, group, numbers, some, places);
            m.add_all(predictions, count, group, places, scratch.data());
        }
#pragma omp for schedule(static)
        for (int b = 0; b < count; b++) {
            float* to = out + size_t(b) * m.width;
            std::fill(to, to + m.width, 0.0f);
            for (int group = 0; group < GROUPS; group++)
                for (int c = 0; c < m.width; c++) to[c] += m.part(b, group)[c];
            for (int c = 0; c + 2 * LANES <= m.width; c += 2 * LANES) order(m.table, to + c);
        }
    }
}

// Bring `annealed_sum` up to date with the tokens [start, r.length) of a slot.
template <typename Value, typename Cell>
void update_annealing(const Mix<Value, Cell>& m, const Prediction& r, int start) {
#pragma omp parallel for schedule(dynamic, 4)
    for (int t = 0; t < r.length; t++)
        if (t >= start && m.first(r.slot, t))
            m.restart_annealing(r, t, r.length);
        else if (m.first(r.slot, t))
            m.for_open(r, t, [&](int sense) { m.add_tokens(r, t, sense, start, r.length); });
}

}  // namespace
