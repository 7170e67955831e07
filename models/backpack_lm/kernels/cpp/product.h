// y = x·Wᵀ + b with gelu if asked for; x is float32 or bfloat16, weights are the same or int8. Of bfloat16, results may
// stay float32 where rounding them would hurt.
//
// Processors without AVX512-BF16 don't multiply bfloat16, and Intel's multiply pairs of it at half the rate of float32:
// there the weights are widened on their way into the registers, and x beforehand, once.
//
// Of int8, each 64 inputs share a scale, and x is quantised the same way as it comes in: to 8 bits, or to 16 where errors
// cost most, which is in the head and in what attention compares. Products of whole numbers are added up exactly within these 64, by whatever instruction
// a processor has for it, and only then in float32.
//
// Where few rows meet many weights, memory decides: weights lie in the order in which they are read, and are asked for
// ahead. oneDNN reads them half as fast on the processors that we have measured. Where many rows meet them, they are
// read from the first-level cache: a part of the inner dimension that fits it is multiplied with all rows, and then
// the next.
#pragma once

#include "vectors.h"

namespace {

// Rows of one pass, and its sums, which all stay in registers. With 12 sums of 16 registers, 4 rows by 3 registers of
// outputs load least: 7 for 12 products.
#if defined(__AVX512F__)
constexpr int ROWS = 8, TILE = 24;
#elif defined(__aarch64__)
constexpr int ROWS = 4, TILE = 24;
#else
constexpr int ROWS = 4, TILE = 12;
#endif
typedef uint16_t Pairs __attribute__((vector_size(4 * WIDTH), aligned(2), may_alias));
typedef int32_t Counts __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

constexpr int COLUMNS = 3, GROUP = LANES * COLUMNS;  // outputs of one pass over the inner dimension
constexpr int OUTPUTS = GROUP / WIDTH;  // registers of them
template <int N>
constexpr int ACROSS = std::min(OUTPUTS, TILE / N);  // registers of outputs in a pass of N rows
constexpr int WAITING = 64;  // rows whose sums wait in the cache
constexpr int AHEAD = 8192, NEAR = 2048;  // bytes, for a whole tile and for fewer rows

template <typename X, typename Weight, typename Out>
struct Product {
    const X* x;            // [count, inner]
    const Weight* weights;  // [outer / 48, inner / s, 48, s] with s values in 4 bytes; of int8, see `Block`
    const float* bias;  // [outer, rounded up to 48]
    int inner, outer, gelu;
    Out* out;  // [count, outer]
};

// x·sigmoid(2u), u = √(2/π)(x + 0.044715 x³): GPT-2's gelu, its tanh written with exp.
inline Floats gelu(Floats x) {
    Floats u = (x + x * x * x * 0.044715f) * 1.5957691216057308f;
    Floats e = exponential(pick(u < 0.0f, u, -u));
    return x * pick(u < 0.0f, e, Floats{} + 1.0f) / (1.0f + e);
}

// sum + weights·x for 4 bytes of weights a lane, and the values of x at `at` that belong to them.
inline Register multiply(Register sum, const float* weights, const float* at) {
    return sum + *reinterpret_cast<const Register*>(weights) * *at;
}
#ifdef __AVX512BF16__
inline Register multiply(Register sum, const bf16* weights, const bf16* at) {
    int32_t pair;
    std::memcpy(&pair, at, 4);
    return (Register)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(weights), (__m512bh)_mm512_set1_epi32(pair));
}
#endif
inline Register multiply(Register sum, const bf16* weights, const float* at) {
    Bits pairs = *reinterpret_cast<const Bits*>(weights);
    return sum + (Register)(pairs << 16) * at[0] + (Register)(pairs & 0xffff0000u) * at[1];
}

// x and weights of float32 or bfloat16.
template <typename X, typename Value>
struct Factors {
    const X* x;
    const Value* weights;
    int inner;

    static constexpr int PART = 24576 / (GROUP * sizeof(Value));  // inputs whose weights fit the first-level cache
    int parts() const { return (inner + PART - 1) / PART; }

    // Adds N rows by 48 outputs of a part of the inner dimension to sums [N, 48].
    template <int N>
    void add(int row, int group, int part, bool ask, float* sums) const {
        constexpr int STEP = 4 / sizeof(Value);
        int start = part * PART, end = std::min(start + PART, inner);
        const Value* from = weights + (size_t(group) * inner + start) * GROUP;
        const X* at = x + size_t(row) * inner;
        for (int first = 0; first < OUTPUTS; first += ACROSS<N>, sums += ACROSS<N> * WIDTH) {
            const Value* to = from + first * WIDTH * STEP;
            Register sum[N][ACROSS<N>];
            for (int n = 0; n < N; n++)
                for (int c = 0; c < ACROSS<N>; c++) sum[n][c] = *reinterpret_cast<const Register*>(sums + n * GROUP + c * WIDTH);
            for (int i = start; i < end; i += STEP, to += GROUP * STEP) {
                if (ask && first == 0)
                    for (int c = 0; c < COLUMNS; c++) fetch(reinterpret_cast<const char*>(to) + (N < ROWS ? NEAR : AHEAD) + c * 64);
                auto step = [&](int n, int c) {
                    sum[n][c] = multiply(sum[n][c], to + c * WIDTH * STEP, at + size_t(n) * inner + i);
                };
                if (N > ACROSS<N>)  // the inner loop's operands are in registers all at once
                    for (int n = 0; n < N; n++)
                        for (int c = 0; c < ACROSS<N>; c++) step(n, c);
                else
                    for (int c = 0; c < ACROSS<N>; c++)
                        for (int n = 0; n < N; n++) step(n, c);
            }
            for (int n = 0; n < N; n++)
                for (int c = 0; c < ACROSS<N>; c++) *reinterpret_cast<Register*>(sums + n * GROUP + c * WIDTH) = sum[n][c];
        }
    }
};

struct Block {  // 48 outputs by 64 inputs
    float scales[GROUP];
    uint8_t weights[BLOCK / 4][GROUP][4];  // 128 more than what is multiplied by the scale
};

// sum + Σ a·b of the two halves of each lane; of a, they are positive.
inline Counts multiply_halves(Counts sum, Bits a, int32_t b) {
#if defined(__AVX512VNNI__)
    return (Counts)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, _mm512_set1_epi32(b));
#elif defined(__AVX512BW__)
    return sum + (Counts)_mm512_madd_epi16((__m512i)a, _mm512_set1_epi32(b));
#elif defined(__AVX2__)
    return sum + (Counts)_mm256_madd_epi16((__m256i)a, _mm256_set1_epi32(b));
#elif defined(__SSE2__)
    return sum + (Counts)_mm_madd_epi16((__m128i)a, _mm_set1_epi32(b));
#else
    return sum + (Counts)(a & 0xffffu) * int32_t(int16_t(b)) + (Counts)(a >> 16) * (b >> 16);
#endif
}

// sum + Σ (128 + w)·x for four weights a lane and the four of x that belong to them, in the order 0, 2, 1, 3.
inline Counts multiply(Counts sum, const uint8_t* weights, const int16_t* at) {
    Bits four = *reinterpret_cast<const Bits*>(weights);
    int32_t even, odd;
    std::memcpy(&even, at, 4), std::memcpy(&odd, at + 2, 4);
    return multiply_halves(multiply_halves(sum, four & 0x00ff00ffu, even), (Bits)((Pairs)four >> 8), odd);
}

// The same of x in its own order, where there is an instruction for it. `Narrow` is what x of 8 bits is kept in.
#if defined(__AVX512VNNI__)
typedef int8_t Narrow;
inline Counts multiply(Counts sum, const uint8_t* weights, const int8_t* at) {
    int32_t four;
    std::memcpy(&four, at, 4);
    return (Counts)_mm512_dpbusd_epi32((__m512i)sum, _mm512_loadu_si512(weights), _mm512_set1_epi32(four));
}
#elif defined(__ARM_FEATURE_DOTPROD)
typedef int8_t Narrow;
inline Counts multiply(Counts sum, const uint8_t* weights, const int8_t* at) {  // Σ w·x: it has a sign on both sides
    int32_t four;
    std::memcpy(&four, at, 4);
    int8x16_t w = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(weights), vdupq_n_u8(128)));
    return (Counts)vdotq_s32((int32x4_t)sum, w, vreinterpretq_s8_s32(vdupq_n_s32(four)));
}
#else
typedef int16_t Narrow;
#endif

// How much Σ (128 + w)·x is greater than Σ w·x, for each one that x sums up to.
template <typename Small>
constexpr int EXCESS = 128;
#ifdef __ARM_FEATURE_DOTPROD
template <>
constexpr int EXCESS<int8_t> = 0;
#endif

template <typename Small>
struct Quantised {  // 64 values of x
    float scale;
    int32_t offset;  // minus what a sum has too much
    Small values[BLOCK];
};

// The low bits of 16 numbers; of 16 bits, each four of them in the order 0, 2, 1, 3.
template <typename Small>
inline void narrow(Ints from, Small* to) {
    typedef Small Part __attribute__((vector_size(WIDTH * sizeof(Small)), aligned(sizeof(Small)), may_alias));
    typedef Small Some __attribute__((vector_size(LANES * sizeof(Small)), aligned(sizeof(Small)), may_alias));
    for (int i = 0; i < REGISTERS; i++) reinterpret_cast<Part*>(to)[i] = __builtin_convertvector(from.part[i], Part);
    if (sizeof(Small) == 2) {
        Some& all = *reinterpret_cast<Some*>(to);
        all = __builtin_shufflevector(all, all, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    }
}

#ifdef __AVX512F__  // GCC takes them one by one
inline void narrow(Ints from, int8_t* to) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)from.part[0]));
}
#endif

// x as whole numbers: x / scale to the nearest even, of a scale that makes the greatest of them `limit`. Where x has NaN
// or infinity, so is the scale.
template <typename X, typename Small>
void quantise(const X* x, int count, float limit, Quantised<Small>& to) {
    constexpr int VECTORS = BLOCK / LANES;
    Floats values[VECTORS];
    Ints peaks{};
    for (int n = 0; n < VECTORS; n++) {
        int some = std::min(LANES, count - n * LANES);
        values[n] = some == LANES ? load(x + n * LANES) : some > 0 ? load_some(x + n * LANES, some) : Floats{};
        Ints size = bits<Ints>(values[n]) & 0x7fffffff;  // as whole numbers they are in the same order, NaN the greatest
        peaks = pick(size > peaks, size, peaks);
    }
    int32_t greatest = peaks[0];
    for (int n = 1; n < LANES; n++) greatest = std::max(greatest, peaks[n]);
    float peak;
    std::memcpy(&peak, &greatest, 4);
    to.scale = peak / limit;
    float inverse = peak > 1e-30f ? limit / peak : 0.0f;
    Floats sums{};
    for (int n = 0; n < VECTORS; n++) {
        constexpr float SHIFT = 12582912.0f;  // 1.5·2²³: the last bits of a sum with it are the nearest whole number
        Floats shifted = values[n] * inverse + SHIFT;
        sums += shifted - SHIFT;
        narrow(bits<Ints>(shifted), to.values + n * LANES);
    }
    float sum = horizontal(sums);
    to.offset = std::isfinite(sum) ? -EXCESS<Small> * int32_t(sum) : 0;
}

// A weight [outer, inner] in blocks, filled up with zeros.
inline void pack(const float* weight, int outer, int inner, Block* out) {
    int groups = (outer + GROUP - 1) / GROUP, parts = (inner + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static)
    for (int group = 0; group < groups; group++)
        for (int part = 0; part < parts; part++) {
            Block& block = out[size_t(group) * parts + part];
            for (int n = 0; n < GROUP; n++) {
                int output = group * GROUP + n, first = part * BLOCK;
                Quantised<int8_t> row{};
                if (output < outer) quantise(weight + size_t(output) * inner + first, inner - first, 127.0f, row);
                block.scales[n] = row.scale;
                for (int i = 0; i < BLOCK; i++) block.weights[i / 4][n][i % 4] = uint8_t(row.values[i] + 128);
            }
        }
}

// x quantised and weights of int8.
template <typename Small>
struct Blocks {
    const Quantised<Small>* x;
    const Block* weights;
    int count;

    int parts() const { return count; }

    template <int N>
    void add(int row, int group, int part, bool ask, float* sums) const {
        const Block* from = weights + size_t(group) * count + part;
        const Quantised<Small>* at = x + size_t(row) * count + part;
        for (int first = 0; first < GROUP; first += ACROSS<N> * WIDTH) {
            Counts sum[N][ACROSS<N>];
            for (int n = 0; n < N; n++)
                for (int c = 0; c < ACROSS<N>; c++) sum[n][c] = Counts{} + at[size_t(n) * count].offset;
            for (int i = 0; i < BLOCK / 4; i++) {
                if (ask && first == 0)
                    for (int c = 0; c < COLUMNS; c++) fetch(reinterpret_cast<const char*>(from->weights[i]) + (N < ROWS ? NEAR : AHEAD) + c * 64);
                for (int c = 0; c < ACROSS<N>; c++)
                    for (int n = 0; n < N; n++)
                        sum[n][c] = multiply(sum[n][c], from->weights[i][first + c * WIDTH], at[size_t(n) * count].values + i * 4);
            }
            for (int n = 0; n < N; n++)
                for (int c = 0; c < ACROSS<N>; c++) {
                    int output = first + c * WIDTH;
                    Register scale = *reinterpret_cast<const Register*>(from->scales + output) * at[size_t(n) * count].scale;
                    *reinterpret_cast<Register*>(sums + n * GROUP + output) += __builtin_convertvector(sum[n][c], Register) * scale;
                }
        }
        if (ask)
            for (int c = 0; c < COLUMNS; c++) fetch(reinterpret_cast<const char*>(from + 1) + (N < ROWS ? NEAR : AHEAD) + c * 64);
    }
};

template <typename Source, typename Out>
void multiply_all(const Source& source, const float* bias, int outer, bool with_gelu, Out* out, int count) {
    int groups = (outer + GROUP - 1) / GROUP;
#pragma omp parallel for schedule(static)
    for (int group = 0; group < groups; group++) {
        float sums[WAITING][GROUP];
        for (int first = 0; first < count; first += WAITING) {
            int rows = std::min(WAITING, count - first);
            for (int n = 0; n < rows; n++) std::memcpy(sums[n], bias + group * GROUP, sizeof(sums[n]));
            for (int part = 0; part < source.parts(); part++) {
                int n = 0;
                auto some = [&](auto size) {
                    source.template add<size>(first + n, group, part, first + n == 0, sums[n]);
                    n += size;
                };
                while (n + ROWS <= rows) some(std::integral_constant<int, ROWS>{});
                if (ROWS > 4 && n + 4 <= rows) some(std::integral_constant<int, std::min(ROWS, 4)>{});
                if (ROWS > 2 && n + 2 <= rows) some(std::integral_constant<int, 2>{});
                if (n < rows) some(std::integral_constant<int, 1>{});
            }
            for (int n = 0; n < rows; n++)
                for (int c = 0; c < COLUMNS; c++) {
                    Floats sum = load(sums[n] + c * LANES);
                    if (with_gelu) sum = gelu(sum);
                    int at = group * GROUP + c * LANES, some = std::min(LANES, outer - at);
                    Out* to = out + size_t(first + n) * outer + at;
                    if (some == LANES)
                        store(to, sum);
                    else
                        for (int l = 0; l < some; l++) store(to + l, sum[l]);
                }
        }
    }
}

template <typename Out>
void product(const Product<float, float, Out>& p, int count) {
    multiply_all(Factors<float, float>{p.x, p.weights, p.inner}, p.bias, p.outer, p.gelu, p.out, count);
}

template <typename Out>
void product(const Product<bf16, bf16, Out>& p, int count) {
#ifdef __AVX512BF16__
    static const bool narrow = !__builtin_cpu_is("intel");
    if (narrow) return multiply_all(Factors<bf16, bf16>{p.x, p.weights, p.inner}, p.bias, p.outer, p.gelu, p.out, count);
#endif
    static thread_local std::vector<float> wide;
    wide.resize(size_t(count) * p.inner);
    for (size_t n = 0; n < wide.size(); n++) wide[n] = to_float(p.x[n]);
    multiply_all(Factors<float, bf16>{wide.data(), p.weights, p.inner}, p.bias, p.outer, p.gelu, p.out, count);
}

template <typename Small, typename X, typename Out>
void product_of_blocks(const Product<X, Block, Out>& p, int count, float limit) {
    static thread_local std::vector<Quantised<Small>> quantised;
    int blocks = (p.inner + BLOCK - 1) / BLOCK;
    quantised.resize(size_t(count) * blocks);
    Quantised<Small>* to = quantised.data();
#pragma omp parallel for schedule(static) if (count > 4)
    for (int n = 0; n < count; n++)
        for (int b = 0; b < blocks; b++)
            quantise(p.x + size_t(n) * p.inner + b * BLOCK, p.inner - b * BLOCK, limit, to[size_t(n) * blocks + b]);
    multiply_all(Blocks<Small>{to, p.weights, blocks}, p.bias, p.outer, p.gelu, p.out, count);
}

template <typename X, typename Out>
void product(const Product<X, Block, Out>& p, int count) { product_of_blocks<Narrow>(p, count, 127.0f); }

// The same, with x of 16 bits where weights are int8.
template <typename X, typename Weight, typename Out>
void product_of_int16(const Product<X, Weight, Out>& p, int count) { product(p, count); }

template <typename X, typename Out>
void product_of_int16(const Product<X, Block, Out>& p, int count) { product_of_blocks<int16_t>(p, count, 32767.0f); }

}  // namespace
