// The layouts of the structures that Python declares too, so that it can compare them with its own (structs.py).
#pragma once

#include <sstream>
#include <string>

#include "append.h"
#include "draw.h"
#include "mix.h"
#include "trunk.h"

namespace {

// Adds the line `Name size field:offset:size …`; `names` are the fields', separated by ", ".
template <typename Structure, typename... Field>
void add_layout(std::ostringstream& report, const char* name, std::istringstream names, const Structure& of,
                const Field&... fields) {
    report << name << ' ' << sizeof(Structure);
    auto add = [&](const void* field, size_t size) {
        std::string label;
        std::getline(names >> std::ws, label, ',');
        report << ' ' << label << ':' << static_cast<const char*>(field) - reinterpret_cast<const char*>(&of) << ':' << size;
    };
    (add(&fields, sizeof(fields)), ...);
    report << '\n';
}

// The fields in the order of their declaration: a list that lacks one, or has one too many, doesn't compile.
#define LAYOUT(NAME, STRUCTURE, ...)                                                            \
    {                                                                                           \
        const STRUCTURE of{};                                                                   \
        const auto& [__VA_ARGS__] = of;                                                         \
        add_layout(report, NAME, std::istringstream(#__VA_ARGS__), of, __VA_ARGS__);               \
    }

// Structures of float32; those of bfloat16 have the same pointers.
std::string all_layouts() {
    std::ostringstream report;
    LAYOUT("AppendTargets", AppendTargets, ids, rows, previous, following, senses, context)
    LAYOUT("DrawParams", DrawParams, seed, top_p, position, top_k, temperature)
    LAYOUT("Layer", Layer<float>, qkv, proj, fc, out, middle, after, keys, values, scale)
    LAYOUT("Lists", Lists, starts, words, context, vocabulary)
    LAYOUT("Matrix", Matrix<float>, weights, bias)
    LAYOUT("Mix", Mix<float>, table, embedding, rows, ids, previous, following, annealed_sum, alpha, parts, lists, topics,
           pages, senses, width, context, slots)
    LAYOUT("NewTokens", NewTokens, tokens, slots, positions)
    LAYOUT("Norm", Norm, gain, bias)
    LAYOUT("PageTable", PageTable, pages, each, size)
    LAYOUT("Prediction", Prediction, slot, length, fresh, topics, first_topic)
    LAYOUT("Span", Span, token, slot, position, size)
    LAYOUT("Topic", Topic, levels, multipliers, scale, annealed)
    LAYOUT("Tap", Tap, norm, layer, query_part, key_part)
    LAYOUT("Trunk", Trunk<float>, layers, taps, together, query, key, first, tokens, positions, turns, sense_turns, sense_keys, seconds, pages,
           count, width, heads, groups, head_width, inner, gated, senses, sense_width, tapped, query_states, key_states, epsilon)
    return report.str();
}

}  // namespace
