// The trunk and the sense weights over a step's new tokens, from their ids to the sense weights' queries.
#pragma once

#include <chrono>

#include "attention.h"
#include "norm.h"
#include "product.h"

namespace {

template <typename Weight>
struct Matrix {
    const Weight* weights;  // as `Product` reads them
    const float* bias;
};

struct Norm {
    const float *gain, *bias;
};

template <typename Value, typename Weight = Value>
struct Layer {
    Matrix<Weight> qkv, proj, fc, out;
    Norm middle, after;  // the LayerNorms within the block, and behind it
    Value *keys, *values;  // of this layer's caches
    float scale;
};

enum Part { QKV, ATTENTION, PROJ, FC, OUT, NORMS, SENSE_WEIGHTS, PARTS };

template <typename Value, typename Weight = Value>
struct Trunk {
    const Layer<Value, Weight>* layers;
    Matrix<Weight> sense_weights;
    Norm first;
    const float *tokens, *positions;  // embeddings
    Value* sense_keys;  // [S, k, T/16, d/k, 16]
    double* seconds;  // [PARTS], what each has taken so far
    int count, width, heads, senses, context;
    float epsilon;
};

struct NewTokens {  // each token's id, slot and position
    const int64_t *tokens, *slots, *positions;
};

// `scratch` [N, 7·d] floats; queries [N, k, d/k].
template <typename Value, typename Weight>
void trunk(const Trunk<Value, Weight>& t, const NewTokens& in, int count, const Span* spans, int how_many, float* scratch, Value* queries) {
    size_t d = t.width, head = d / t.senses, keyed = head * t.senses;
    float* x = scratch;
    auto* y = reinterpret_cast<Value*>(x + count * d);
    Value *delta = y + count * d, *wide = delta + count * d;  // wide [N, up to 4·d]
    auto last = std::chrono::steady_clock::now();
    auto done = [&](Part part) {
        auto now = std::chrono::steady_clock::now();
        t.seconds[part] += std::chrono::duration<double>(now - last).count();
        last = now;
    };
    auto multiply = [&](const Value* from, const Matrix<Weight>& by, int inner, int outer, Value* to, Part part) {
        product(Product<Value, Weight, Value>{from, by.weights, by.bias, inner, outer, part == FC, to}, count);
        done(part);
    };
    auto add_and_norm = [&](const Value* more, const Norm& norm) {
        residual_norm(x, more, norm.gain, norm.bias, t.epsilon, count, t.width, y);
        done(NORMS);
    };
    for (int n = 0; n < count; n++)
        for (size_t c = 0; c < d; c++) x[n * d + c] = t.tokens[in.tokens[n] * d + c] + t.positions[in.positions[n] * d + c];
    add_and_norm(nullptr, t.first);
    for (const Layer<Value, Weight>* layer = t.layers; layer < t.layers + t.count; layer++) {
        int width = t.width / t.heads;
        multiply(y, layer->qkv, d, 3 * d, wide, QKV);
        attention(Attention<Value>{wide, layer->keys, layer->values, delta, t.heads, width, t.context, layer->scale}, spans, how_many);
        done(ATTENTION);
        multiply(delta, layer->proj, d, d, y, PROJ);
        add_and_norm(y, layer->middle);
        multiply(y, layer->fc, d, 4 * d, wide, FC);
        multiply(wide, layer->out, 4 * d, d, delta, OUT);
        add_and_norm(delta, layer->after);
    }
    multiply(y, t.sense_weights, d, 2 * keyed, wide, SENSE_WEIGHTS);
#pragma omp parallel for schedule(static) if (count > 4)
    for (int n = 0; n < count; n++) {
        const Value* from = wide + n * 2 * keyed;
        std::memcpy(queries + n * keyed, from, keyed * sizeof(Value));
        Value* to = t.sense_keys + (in.slots[n] * t.senses * t.context + in.positions[n] / LANES * LANES) * head + in.positions[n] % LANES;
        for (int l = 0; l < t.senses; l++, to += t.context * head)
            for (size_t c = 0; c < head; c++) to[c * LANES] = from[keyed + l * head + c];
    }
    done(SENSE_WEIGHTS);
}

}  // namespace
