// 16 floats at a time, of float32, bfloat16 or int8 values.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>
#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
constexpr int BLOCK = 64;  // values of int8 that share a scale
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(2), may_alias));  // pairs of bfloat16, too

struct bf16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
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
inline Floats load(const int8_t* from) {
    Ints wide = __builtin_convertvector(*reinterpret_cast<const Bytes*>(from), Ints);
    return __builtin_convertvector(wide, Floats);
}
inline void store(float* to, Floats x) { *reinterpret_cast<Floats*>(to) = x; }
inline void store(bf16* to, Floats x) {
    Words bits = (Words)x;
    Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    Words nan = (bits & 0x7fffffffu) > 0x7f800000u ? Words{} + 1 : Words{};
    rounded = nan != 0 ? (bits >> 16) | 0x40 : rounded;
    *reinterpret_cast<Halves*>(to) = __builtin_convertvector(rounded, Halves);
}

// 32 values as two vectors: of bfloat16 the even ones and the odd ones, which costs half of bringing them into order.
inline void widen(const int8_t* from, Floats* two) { two[0] = load(from), two[1] = load(from + LANES); }
inline void widen(const float* from, Floats* two) { two[0] = load(from), two[1] = load(from + LANES); }
inline void widen(const bf16* from, Floats* two) {
    Words pairs = *reinterpret_cast<const Words*>(from);
    two[0] = (Floats)(pairs << 16), two[1] = (Floats)(pairs & 0xffff0000u);
}

// Brings what was added up in such vectors into order.
inline void order(const int8_t*, Floats*) {}
inline void order(const float*, Floats*) {}
inline void order(const bf16*, Floats* two) {
    Floats even = two[0], odd = two[1];
    two[0] = __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    two[1] = __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
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

// The sums of 16 numbers each, halves onto halves; of four vectors at a time, in lanes 0, 4, 8 and 12.
inline Floats horizontal(Floats a, Floats b, Floats c, Floats d) {
    auto fold = [](Floats x, Floats y) {
        return __builtin_shufflevector(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               __builtin_shufflevector(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    };
    Floats ab = fold(a, b), cd = fold(c, d);
    Floats s = __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    s += __builtin_shufflevector(s, s, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    s += __builtin_shufflevector(s, s, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return s;
}
inline float horizontal(Floats a) { return horizontal(a, Floats{}, Floats{}, Floats{})[0]; }

// 0, 1, … 15.
inline Ints lanes() {
    Ints lane;
    for (int n = 0; n < LANES; n++) lane[n] = n;
    return lane;
}

// 16 vectors as the rows of a matrix, transposed.
inline void transpose(Floats* rows) {
    Ints lane = lanes();
    for (int step = 1; step < LANES; step *= 2) {
        Ints low = (lane & step) != 0 ? lane - step + LANES : lane, high = (lane & step) != 0 ? lane + LANES : lane + step;
        for (int n = 0; n < LANES; n++)
            if (!(n & step)) {
                Floats a = rows[n], b = rows[n + step];
                rows[n] = __builtin_shuffle(a, b, low);
                rows[n + step] = __builtin_shuffle(a, b, high);
            }
    }
}

// 16 running sums of the products of a and b.
template <typename A, typename B>
inline Floats products(const A* a, const B* b, int width) {
    Floats sums{};
    int n = 0;
    for (; n + LANES <= width; n += LANES) sums += load(a + n) * load(b + n);
    if (n < width) sums += load_some(a + n, width - n) * load_some(b + n, width - n);
    return sums;
}

#ifdef __AVX512BF16__
inline __m512bh pairs(const bf16* from, int count) {
    __mmask32 some = count >= 32 ? ~0u : (1u << count) - 1;
    return (__m512bh)_mm512_maskz_loadu_epi16(some, from);
}

inline Floats products(const bf16* a, const bf16* b, int width) {
    __m512 sums = _mm512_setzero_ps();
    for (int n = 0; n < width; n += 32)
        sums = _mm512_dpbf16_ps(sums, pairs(a + n, width - n), pairs(b + n, width - n));
    return (Floats)sums;
}
#endif

}  // namespace
