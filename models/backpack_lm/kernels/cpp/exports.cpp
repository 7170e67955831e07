// The engine's own operations on a CPU, behind ctypes (native.py): products, attention over caches, residual +
// norm, rotary positions, gates, all of them together as the trunk, the sense mix with its annealing, and drawing.
//
// Every output element is computed by one fixed order of additions, whatever else is in the batch and however a
// prompt was cut into chunks. So a sequence gets the same bits alone and in any company.
//
// T is the context, S slots, H heads in G groups, w a head's width, k senses, d the model's width. Keys and values lie
// in pages of P positions, keys in tiles of 16 of them, [.., P/16, w, 16]: scores are computed for 16 positions at a
// time without a horizontal sum. What is added up across pages is added in the order of positions: where the pages
// are changes no bit.

#include "draw.h"
#include "mix.h"
#include "norm.h"
#include "append.h"
#include "layouts.h"
#include "product.h"
#include "project.h"
#include "rotary.h"
#include "trunk.h"

// Operations over activations and caches of a Value.
#define OPERATIONS(NAME, Value)                                                                                      \
    void attend_##NAME(const Value* qkv, Value* keys, Value* values, const PageTable* pages, const Span* spans,       \
                       int count, int heads, int groups, int width, float scale, Value* out) {                       \
        attention(Attention<Value>{qkv, keys, values, out, heads, groups, width, scale, *pages}, spans, count);       \
    }                                                                                                                \
    void rotate_##NAME(Value* x, int count, int row, int heads, int width, const float* turns, const int64_t* positions) { \
        rotate(x, count, row, heads, width, turns, positions);                                                        \
    }                                                                                                                \
    void gate_##NAME(const Value* wide, int count, int inner, Value* out) { gate(wide, count, inner, out); }           \
    void residual_norm_##NAME(float* x, const Value* delta, const float* gain, const float* bias, float epsilon,     \
                              int count, int width, Value* out) {                                                    \
        residual_norm(x, delta, gain, bias, epsilon, count, width, out);                                             \
    }

// Those that read weights or the sense table too.
#define WEIGHTED(NAME, Value, Weight, Cell)                                                                          \
    void mix_##NAME(const Mix<Value, Cell>* state, const Prediction* rows, int count, const Value* queries,          \
                    const Value* keys, int head_width, float* out) {                                                 \
        mix(*state, rows, count, queries, keys, head_width, out);                                                    \
    }                                                                                                                \
    void update_annealing_##NAME(const Mix<Value, Cell>* state, const Prediction* row, int start) {                  \
        update_annealing(*state, *row, start);                                                                       \
    }                                                                                                                \
    void trunk_##NAME(const Trunk<Value, Weight>* state, const NewTokens* in, int count, const Span* spans,          \
                      int how_many, float* scratch, Value* queries) {                                                \
        trunk(*state, *in, count, spans, how_many, scratch, queries);                                                \
    }

#define PRODUCT(WHAT, NAME, Value, Weight, Out)                                                                      \
    void WHAT##_##NAME(const Value* x, int count, const Weight* weights, const float* bias, int inner, int outer,    \
                       int gelu, Out* out) {                                                                         \
        WHAT(Product<Value, Weight, Out>{x, weights, bias, inner, outer, gelu, out}, count);                         \
    }

#define PROJECT(NAME, Cell)                                                                                          \
    void project_##NAME(const Cell* table, int64_t rows, int width, const float* direction, int threads, float* out) { \
        project(table, rows, width, direction, threads, out);                                                         \
    }

extern "C" {
// What `layouts.h` says of every structure that comes through here, for structs.py to compare.
const char* layouts() {
    static const std::string text = all_layouts();
    return text.c_str();
}

OPERATIONS(float32, float)
OPERATIONS(bfloat16, bf16)
WEIGHTED(float32, float, float, float)
WEIGHTED(bfloat16, bf16, bf16, bf16)
WEIGHTED(int8_float32, float, Block, int8_t)
WEIGHTED(int8_bfloat16, bf16, Block, int8_t)
PRODUCT(product, float32_float32, float, float, float)
PRODUCT(product, bfloat16_bfloat16, bf16, bf16, bf16)
PRODUCT(product, bfloat16_float32, bf16, bf16, float)
PRODUCT(product, int8_float32_float32, float, Block, float)
PRODUCT(product, int8_bfloat16_bfloat16, bf16, Block, bf16)
PRODUCT(product_of_int16, int8_float32_float32, float, Block, float)
PRODUCT(product_of_int16, int8_bfloat16_bfloat16, bf16, Block, bf16)
PROJECT(float32, float)
PROJECT(bfloat16, bf16)
PROJECT(int8, int8_t)

void pack_int8(const float* weight, int outer, int inner, Block* out) { pack(weight, outer, inner, out); }

void draw_float32(const float* logits, int count, int vocabulary, const DrawParams* how, int32_t* out) {
#pragma omp parallel for schedule(dynamic, 1) if (count > 1)
    for (int n = 0; n < count; n++) out[n] = draw(logits + size_t(n) * vocabulary, vocabulary, how[n]);
}

void log_probabilities_float32(const float* logits, int count, int vocabulary, const int32_t* chosen, int top,
                               double* own, int32_t* tokens, double* logs) {
#pragma omp parallel for schedule(dynamic, 1) if (count > 1)
    for (int n = 0; n < count; n++)
        log_probabilities(logits + size_t(n) * vocabulary, vocabulary, chosen[n], top, own + n, tokens + n * top,
                          logs + n * top);
}

void append_tokens_int32(const AppendTargets* to, const Span* spans, int count, const int64_t* tokens, const int32_t* rows) {
    append_tokens(*to, spans, count, tokens, rows);
}
}
