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
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

// Floats of a register, and how many sums of 16 floats stay in registers beside what is added to them.
#if defined(__AVX512F__)
constexpr int WIDTH = 16, SUMS = 16;
#elif defined(__AVX__)
constexpr int WIDTH = 8, SUMS = 4;
#elif defined(__ARM_NEON)
constexpr int WIDTH = 4, SUMS = 4;
#else
constexpr int WIDTH = 4, SUMS = 2;
#endif
constexpr int LANES = 16, REGISTERS = LANES / WIDTH;  // of 16 floats
constexpr int BLOCK = 64;  // values of int8 that share a scale

// 16 numbers in as many registers as that takes: GCC keeps a vector that is wider than a register in memory.
template <typename Number>
struct Wide {
    typedef Number Part __attribute__((vector_size(sizeof(Number) * WIDTH), may_alias));
    Part part[REGISTERS];

    Number operator[](int n) const {
        Wide own = *this;  // whose address is taken, so that this one may stay in registers
        return reinterpret_cast<const Number*>(own.part)[n];
    }

#define EACH(RESULT, VALUE)                                                                   \
    {                                                                                         \
        RESULT out;                                                                           \
        for (int i = 0; i < REGISTERS; i++) out.part[i] = (typename RESULT::Part)(VALUE);     \
        return out;                                                                           \
    }
#define OPERATOR(OP, RESULT)                                                                  \
    friend inline RESULT operator OP(Wide a, Wide b) EACH(RESULT, a.part[i] OP b.part[i])     \
    friend inline RESULT operator OP(Wide a, Number b) EACH(RESULT, a.part[i] OP b)           \
    friend inline RESULT operator OP(Number a, Wide b) EACH(RESULT, a OP b.part[i])
    OPERATOR(+, Wide) OPERATOR(-, Wide) OPERATOR(*, Wide) OPERATOR(/, Wide)
    OPERATOR(&, Wide) OPERATOR(|, Wide) OPERATOR(^, Wide) OPERATOR(<<, Wide) OPERATOR(>>, Wide)
    OPERATOR(<, Wide<int32_t>) OPERATOR(>, Wide<int32_t>) OPERATOR(<=, Wide<int32_t>) OPERATOR(>=, Wide<int32_t>)
    OPERATOR(==, Wide<int32_t>) OPERATOR(!=, Wide<int32_t>)
#undef OPERATOR
    friend inline Wide operator-(Wide a) EACH(Wide, -a.part[i])
    Wide& operator+=(Wide b) { return *this = *this + b; }
    Wide& operator*=(Wide b) { return *this = *this * b; }
    Wide& operator&=(Wide b) { return *this = *this & b; }
    Wide& operator|=(Wide b) { return *this = *this | b; }
};
using Floats = Wide<float>;
using Ints = Wide<int32_t>;
using Words = Wide<uint32_t>;
// As they lie in memory. `Bits` are pairs of bfloat16, too.
typedef float Register __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH), aligned(2), may_alias));
typedef int8_t Bytes __attribute__((vector_size(WIDTH), aligned(1), may_alias));
typedef int32_t Whole __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint16_t HalfBits __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));

// a where the mask is set, b elsewhere.
template <typename Number>
inline Wide<Number> pick(Ints mask, Wide<Number> a, Wide<Number> b)
    EACH(Wide<Number>, mask.part[i] ? a.part[i] : b.part[i])
// The same bits as another type, and the same numbers.
template <typename To, typename From>
inline To bits(From from) EACH(To, from.part[i])
template <typename To, typename From>
inline To convert(From from) EACH(To, __builtin_convertvector(from.part[i], typename To::Part))

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

inline Floats load(const float* from) EACH(Floats, reinterpret_cast<const Register*>(from)[i])
#ifdef __ARM_NEON  // GCC loads a half register's numbers one by one
inline Floats load(const bf16* from) EACH(Floats, vshlq_n_u32(vmovl_u16(vld1_u16(&from[i * WIDTH].bits)), 16))
#else
inline Floats load(const bf16* from)
    EACH(Floats, __builtin_convertvector(reinterpret_cast<const HalfBits*>(from)[i], Bits) << 16)
#endif
inline Whole whole(const int8_t* from) {  // GCC takes them one by one
#if defined(__AVX512F__)
    return (Whole)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
    return (Whole)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#elif defined(__SSE4_1__)
    int32_t four;
    std::memcpy(&four, from, 4);
    return (Whole)_mm_cvtepi8_epi32(_mm_cvtsi32_si128(four));
#elif defined(__ARM_NEON)
    int32_t four;
    std::memcpy(&four, from, 4);
    return (Whole)vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))));
#else
    return __builtin_convertvector(*reinterpret_cast<const Bytes*>(from), Whole);
#endif
}
inline Floats load(const int8_t* from) EACH(Floats, __builtin_convertvector(whole(from + i * WIDTH), Register))
inline void store(float* to, Floats x) {
    for (int i = 0; i < REGISTERS; i++) reinterpret_cast<Register*>(to)[i] = x.part[i];
}
inline void store(bf16* to, Floats x) {
    Words whole = bits<Words>(x);
    Words rounded = (whole + 0x7fffu + ((whole >> 16) & 1)) >> 16;
    rounded = pick((whole & 0x7fffffffu) > 0x7f800000u, (whole >> 16) | 0x40, rounded);
    for (int i = 0; i < REGISTERS; i++)
        reinterpret_cast<HalfBits*>(to)[i] = __builtin_convertvector(rounded.part[i], HalfBits);
}
#undef EACH

// 32 values as two vectors: of bfloat16 the even ones and the odd ones, which costs half of bringing them into order.
inline void widen(const int8_t* from, Floats* two) { two[0] = load(from), two[1] = load(from + LANES); }
inline void widen(const float* from, Floats* two) { two[0] = load(from), two[1] = load(from + LANES); }
inline void widen(const bf16* from, Floats* two) {
    for (int i = 0; i < REGISTERS; i++) {
        Bits pairs = reinterpret_cast<const Bits*>(from)[i];
        two[0].part[i] = (Register)(pairs << 16), two[1].part[i] = (Register)(pairs & 0xffff0000u);
    }
}

// Brings what was added up in such vectors into order.
inline void order(const int8_t*, float*) {}
inline void order(const float*, float*) {}
inline void order(const bf16*, float* two) {
    float old[2 * LANES];
    std::memcpy(old, two, sizeof old);
    for (int n = 0; n < LANES; n++) two[2 * n] = old[n], two[2 * n + 1] = old[LANES + n];
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
    x = pick(tiny, low, x);
    Floats scaled = x * 1.44269504088896341f - 0.5f;  // negative: truncation rounds it to the nearest
    Ints power = convert<Ints>(scaled);
    Floats whole = convert<Floats>(power);
    Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats y = Floats{} + 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    Floats scaled_back = bits<Floats>(bits<Ints>(y) + (power << 23));
    return pick(tiny, Floats{}, scaled_back);
}

// log(x) for normal x > 0, within 2 units in the last place (Cephes' polynomial).
inline Floats logarithm(Floats x) {
    Ints whole = bits<Ints>(x);
    Ints power = ((whole >> 23) & 0xff) - 126;
    Floats r = bits<Floats>((whole & 0x007fffff) | 0x3f000000);  // in [½, 1)
    Ints low = r < 0.707106781186547524f;
    power = pick(low, power - 1, power);
    r = pick(low, r + r, r) - 1.0f;
    Floats y = Floats{} + 7.0376836292e-2f;
    y = y * r - 1.1514610310e-1f;
    y = y * r + 1.1676998740e-1f;
    y = y * r - 1.2420140846e-1f;
    y = y * r + 1.4249322787e-1f;
    y = y * r - 1.6668057665e-1f;
    y = y * r + 2.0000714765e-1f;
    y = y * r - 2.4999993993e-1f;
    y = y * r + 3.3333331174e-1f;
    Floats e = convert<Floats>(power);
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
#ifdef __AVX512F__
    auto fold = [](Register x, Register y) {
        return __builtin_shufflevector(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               __builtin_shufflevector(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    };
    Register ab = fold(a.part[0], b.part[0]), cd = fold(c.part[0], d.part[0]);
    Register s = __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                 __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    s += __builtin_shufflevector(s, s, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    s += __builtin_shufflevector(s, s, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return {{s}};
#else
    float lanes[4][LANES];
    store(lanes[0], a), store(lanes[1], b), store(lanes[2], c), store(lanes[3], d);
    for (int half = LANES / 2; half; half /= 2)
        for (float* row : lanes)
            for (int n = 0; n < half; n++) row[n] += row[n + half];
    for (int n = 1; n < 4; n++) lanes[0][4 * n] = lanes[n][0];
    return load(lanes[0]);
#endif
}
inline float horizontal(Floats a) { return horizontal(a, Floats{}, Floats{}, Floats{})[0]; }

// 0, 1, … 15.
inline Ints lanes() {
    Ints lane;
    for (int n = 0; n < LANES; n++) reinterpret_cast<int32_t*>(lane.part)[n] = n;
    return lane;
}

// 16 vectors as the rows of a matrix, transposed.
inline void transpose(Floats* rows) {
#ifdef __AVX512F__
    Ints::Part lane = lanes().part[0];
    for (int step = 1; step < LANES; step *= 2) {
        Ints::Part low = (lane & step) != 0 ? lane - step + LANES : lane, high = (lane & step) != 0 ? lane + LANES : lane + step;
        for (int n = 0; n < LANES; n++)
            if (!(n & step)) {
                Register a = rows[n].part[0], b = rows[n + step].part[0];
                rows[n].part[0] = __builtin_shuffle(a, b, low);
                rows[n + step].part[0] = __builtin_shuffle(a, b, high);
            }
    }
#else
    float* at = reinterpret_cast<float*>(rows);
    for (int n = 0; n < LANES; n++)
        for (int i = 0; i < n; i++) std::swap(at[n * LANES + i], at[i * LANES + n]);
#endif
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
    return {{(Register)sums}};
}
#endif

}  // namespace
