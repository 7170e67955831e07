// The trunk and the sense weights over a step's new tokens, from their ids to the sense weights' queries.
#pragma once

#include <chrono>

#include "attention.h"
#include "norm.h"
#include "product.h"
#include "rotary.h"

namespace {

template <typename Weight>
struct Matrix {
    const Weight* weights;  // as `Product` reads them
    const float* bias;
};

struct Norm {
    const float *gain, *bias;  // of RMSNorm no bias
};

template <typename Value, typename Weight = Value>
struct Layer {
    Matrix<Weight> qkv, proj, fc, out;  // `fc` of a gated MLP makes the gate, then what it multiplies
    Norm middle, after;  // the norms within the block, and behind it
    Value *keys, *values;  // of this layer's caches
    float scale;
};

// A state of the trunk that the sense weights read: what follows `layer` layers, by this norm, as the `query_part`-th of
// the states that queries are made from and the `key_part`-th of those of keys; −1: not of those.
struct Tap {
    Norm norm;
    int layer, query_part, key_part;
};

enum Part { QKV, ATTENTION, PROJ, FC, OUT, NORMS, SENSE_WEIGHTS, PARTS };

template <typename Value, typename Weight = Value>
struct Trunk {
    const Layer<Value, Weight>* layers;
    const Tap* taps;  // by their layers; none where queries and keys are made together, from the last state
    Matrix<Weight> together, query, key;
    Norm first;
    const float *tokens, *positions;  // embeddings; no positions where heads are turned:
    const float* turns;  // [T, 2, w/2]
    const float* sense_turns;  // [T, 2, sense_width/2], or none
    Value* sense_keys;  // [pages, k, P/16, sense_width, 16]
    double* seconds;  // [PARTS], what each has taken so far
    PageTable pages;
    int count, width, heads, groups, head_width, inner, gated, senses, sense_width, tapped, query_states, key_states;
    float epsilon;
};

struct NewTokens {  // each token's id, slot and position
    const int64_t *tokens, *slots, *positions;
};

// `scratch` as `NativeTrunk` makes it; queries [N, k, sense_width].
template <typename Value, typename Weight>
void trunk(const Trunk<Value, Weight>& t, const NewTokens& in, int count, const Span* spans, int how_many, float* scratch, Value* queries) {
    size_t d = t.width, keyed = size_t(t.senses) * t.sense_width, mixed = size_t(t.heads) * t.head_width;
    size_t qkv = mixed + 2 * size_t(t.groups) * t.head_width, fc = t.gated ? 2 * t.inner : t.inner;
    float* x = scratch;
    auto* y = reinterpret_cast<Value*>(x + count * d);
    Value *delta = y + count * d, *wide = delta + count * std::max(d, mixed);
    Value* gated = wide + count * std::max({qkv, fc, 2 * keyed});
    Value *of_queries = gated + (t.gated ? count * size_t(t.inner) : 0), *of_keys = of_queries + count * d * t.query_states;
    auto last = std::chrono::steady_clock::now();
    auto done = [&](Part part) {
        auto now = std::chrono::steady_clock::now();
        t.seconds[part] += std::chrono::duration<double>(now - last).count();
        last = now;
    };
    auto multiply = [&](const Value* from, const Matrix<Weight>& by, int inner, int outer, Value* to, Part part) {
        Product<Value, Weight, Value> all{from, by.weights, by.bias, inner, outer, part == FC && !t.gated, to};
        part == QKV ? product_of_int16(all, count) : product(all, count);
        done(part);
    };
    auto add_and_norm = [&](const Value* more, const Norm& norm) {
        residual_norm(x, more, norm.gain, norm.bias, t.epsilon, count, t.width, y);
        done(NORMS);
    };
    const Tap* tap = t.taps;
    auto tap_after = [&](int layer) {
        for (; tap < t.taps + t.tapped && tap->layer == layer; tap++) {
            const Value* state = y;
            if (tap->norm.gain) {
                residual_norm(x, static_cast<const Value*>(nullptr), tap->norm.gain, tap->norm.bias, t.epsilon, count, t.width, delta);
                state = delta;
            }
            auto place = [&](Value* to, int part, int parts) {
                for (int n = 0; part >= 0 && n < count; n++)
                    std::memcpy(to + (size_t(n) * parts + part) * d, state + n * d, d * sizeof(Value));
            };
            place(of_queries, tap->query_part, t.query_states);
            place(of_keys, tap->key_part, t.key_states);
        }
    };
    for (int n = 0; n < count; n++) {
        const float* token = t.tokens + in.tokens[n] * d;
        for (size_t c = 0; c < d; c++) x[n * d + c] = t.positions ? token[c] + t.positions[in.positions[n] * d + c] : token[c];
    }
    tap_after(0);
    add_and_norm(nullptr, t.first);
    for (int l = 0; l < t.count; l++) {
        const Layer<Value, Weight>& layer = t.layers[l];
        multiply(y, layer.qkv, d, qkv, wide, QKV);
        if (t.turns) rotate(wide, count, qkv, t.heads + t.groups, t.head_width, t.turns, in.positions);
        attention(Attention<Value>{wide, layer.keys, layer.values, delta, t.heads, t.groups, t.head_width, layer.scale, t.pages}, spans, how_many);
        done(ATTENTION);
        multiply(delta, layer.proj, mixed, d, y, PROJ);
        add_and_norm(y, layer.middle);
        multiply(y, layer.fc, d, fc, wide, FC);
        if (t.gated) gate(wide, count, t.inner, gated);
        multiply(t.gated ? gated : wide, layer.out, t.inner, d, delta, OUT);
        add_and_norm(delta, layer.after);
        tap_after(l + 1);
    }
    const Value *from = wide + keyed, *query = wide;
    size_t row = 2 * keyed;
    if (t.tapped) {
        row = keyed, query = wide, from = wide + count * keyed;
        multiply(of_queries, t.query, d * t.query_states, keyed, wide, SENSE_WEIGHTS);
        multiply(of_keys, t.key, d * t.key_states, keyed, wide + count * keyed, SENSE_WEIGHTS);
    } else {
        multiply(y, t.together, d, row, wide, SENSE_WEIGHTS);
    }
    if (t.sense_turns) {
        int heads = t.senses * int(row / keyed);
        rotate(wide, count, row, heads, t.sense_width, t.sense_turns, in.positions);
        if (t.tapped) rotate(wide + count * keyed, count, row, heads, t.sense_width, t.sense_turns, in.positions);
    }
    size_t head = t.sense_width;
#pragma omp parallel for schedule(static) if (count > 4)
    for (int n = 0; n < count; n++) {
        std::memcpy(queries + n * keyed, query + n * row, keyed * sizeof(Value));
        int page = t.pages.of(in.slots[n])[in.positions[n] / t.pages.size], at = in.positions[n] % t.pages.size;
        Value* to = t.sense_keys + (size_t(page) * t.senses * t.pages.size + at / LANES * LANES) * head + at % LANES;
        for (int l = 0; l < t.senses; l++, to += t.pages.size * head)
            for (size_t c = 0; c < head; c++) to[c * LANES] = from[n * row + l * head + c];
    }
    done(SENSE_WEIGHTS);
}

}  // namespace
