// 16 floats at a time, of float32 or bfloat16 values.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

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

// log(x) for normal x > 0, within 2 units in the last place (Cephes' polynomial).
inline Floats logarithm(Floats x) {
    Ints bits = (Ints)x;
    Ints power = ((bits >> 23) & 0xff) - 126;
    Floats r = (Floats)((bits & 0x007fffff) | 0x3f000000);  // in [½, 1)
    Ints low = r < 0.707106781186547524f;
    power = low ? power - 1 : power;
    r = (low ? r + r : r) - 1.0f;
    Floats y = Floats{} + 7.0376836292e-2f;
    y = y * r - 1.1514610310e-1f;
    y = y * r + 1.1676998740e-1f;
    y = y * r - 1.2420140846e-1f;
    y = y * r + 1.4249322787e-1f;
    y = y * r - 1.6668057665e-1f;
    y = y * r + 2.0000714765e-1f;
    y = y * r - 2.4999993993e-1f;
    y = y * r + 3.3333331174e-1f;
    Floats e = __builtin_convertvector(power, Floats);
    Floats square = r * r;
    y = y * r * square - e * 2.12194440e-4f - square * 0.5f;
    return r + y + e * 0.693359375f;
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

}  // namespace
