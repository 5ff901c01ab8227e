// The decoder layer of all families, for CPUs. A plain C ABI, called from library.py.
//
// Exact by construction: every number is worked out for one row in one order that depends on that row and on the cells
// it sees alone. A product sums over its inputs in order, one accumulator per (row, output); attention sums over the
// visible cells in order of position. Rows computed together only share the reading of weights and keys.
// Compiled without contraction: `a * b + c` rounds twice wherever the compiler puts it, `fused` once.
//
// All widths are padded with zeros to multiples of 64: `wide(n)`. Matrices lie in panels of 64 outputs.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32)));

constexpr int LANES = 16, TILES = 4, PANEL = LANES * TILES;
#if defined(__AVX512F__)
constexpr int MOST_ROWS = 6;  // rows that share a panel's reading: their sums fill the registers
#else
constexpr int MOST_ROWS = 1;
#endif
constexpr int UNPACKED_ONCE = std::min(4, MOST_ROWS);  // with more rows, codes are unpacked into memory first
constexpr int CHUNK = 64;                              // steps of a panel that stay in the first-level cache

constexpr int wide(int n) { return (n + PANEL - 1) / PANEL * PANEL; }

template <class V, class T> V load(const T* at) { V v; std::memcpy(&v, at, sizeof v); return v; }
template <class V, class T> void store(T* at, V v) { std::memcpy(at, &v, sizeof v); }
F all(float value) { return value - F{}; }
U all(uint32_t value) { return value - U{}; }

F fused(F a, F b, F c) {
#if defined(__AVX512F__)
    return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) || defined(__aarch64__)
    for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

float sum(F v) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
}

F exponential(F x) {  // about 1 ulp; Cody-Waite reduction and the Cephes polynomial
    x = x > all(88.0f) ? all(88.0f) : x;
    x = x < all(-87.0f) ? all(-87.0f) : x;
    const F magic = all(12582912.0f);
    const F shifted = fused(x, all(1.44269504f), magic), n = shifted - magic;
    F r = fused(n, all(-0.693359375f), x);
    r = fused(n, all(2.12194440e-4f), r);
    F p = all(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = fused(p, r, all(c));
    p = fused(p, r * r, r + 1.0f);
    return (F)((I)p + (((I)shifted - (I)magic) << 23));
}

U to_bfloat16(F v) {  // round to nearest even, the lower half of each lane
    const U bits = (U)v;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

F from_half(const void* at) {
#if defined(__AVX512F__)
    return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)at));
#else
    const U bits = __builtin_convertvector(load<H>((const uint16_t*)at), U);
    return (F)((U)((F)((bits & 0x7fff) << 13) * 0x1p112f) | (bits & 0x8000) << 16);
#endif
}

// ---- matrices -------------------------------------------------------------------------------------------------------

enum Format : int32_t { FLOAT32, BFLOAT16, NIBBLES, BYTES };

struct Matrix {
    const void* codes;   // [panels][steps / steps per word][4][16] words of 4 bytes
    const void* scales;  // [panels][inputs / block][64], or null
    const void* mins;    // as scales, or null
    int32_t format, outputs, inputs;
    int32_t block;        // inputs that share a scale
    int32_t half_scales;  // scales and mins are float16, else float32
    int32_t zero;         // what a nibble of 0 stands for, negated
};

// Sums `acc` and the products of two inputs: bfloat16 pairs, 16 outputs.
F pair(F acc, U weights, uint32_t x) {
#if defined(__AVX512BF16__)
    return (F)_mm512_dpbf16_ps((__m512)acc, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(x));
#else
    acc = fused((F)(weights << 16), (F)all(x << 16), acc);
    return fused((F)(weights & 0xffff0000u), (F)all(x & 0xffff0000u), acc);
#endif
}

struct Plain {  // float32: one input a step
    static constexpr int STEPS = 1;
    explicit Plain(int) {}
    U unpack(U word, int) const { return word; }
    static F dot(F acc, U w, uint32_t x) { return fused((F)w, (F)all(x), acc); }
};

struct Pairs {  // bfloat16: two inputs a step
    static constexpr int STEPS = 1;
    explicit Pairs(int) {}
    U unpack(U word, int) const { return word; }
    static F dot(F acc, U w, uint32_t x) { return pair(acc, w, x); }
};

struct Nibbles {  // eight inputs a word: step j has its two in bits 4j and 16 + 4j
    static constexpr int STEPS = 4;
#if defined(__AVX512BW__)
    __m512i table;
    explicit Nibbles(int zero) {
        const F values = F{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} - all((float)zero);
        uint16_t twice[32];  // vpermw looks at five bits, the fifth is the next nibble's
        for (int i = 0; i < 32; i++) twice[i] = to_bfloat16(values)[i % 16];
        table = _mm512_loadu_si512(twice);
    }
    U unpack(U word, int j) const { return (U)_mm512_permutexvar_epi16((__m512i)(word >> (4 * j)), table); }
#else
    int zero;
    explicit Nibbles(int zero) : zero(zero) {}
    U unpack(U word, int j) const {
        const I low = (I)(word >> (4 * j) & 15) - zero, high = (I)(word >> (16 + 4 * j) & 15) - zero;
        return (U)__builtin_convertvector(low, F) >> 16 | ((U)__builtin_convertvector(high, F) & 0xffff0000u);
    }
#endif
    static F dot(F acc, U w, uint32_t x) { return pair(acc, w, x); }
};

// Four inputs a word, sign and magnitude. Of four words the first eight bytes are step 0, the others step 1.
struct Bytes {
    static constexpr int STEPS = 2;
#if defined(__AVX512VBMI__)
    __m512i low[2], high[2];
    explicit Bytes(int) {
        uint8_t bytes[2][128];
        for (int i = 0; i < 128; i++) {
            const uint32_t bits = to_bfloat16(all((float)i))[0];
            bytes[0][i] = bits, bytes[1][i] = bits >> 8;
        }
        for (int i = 0; i < 2; i++)
            low[i] = _mm512_loadu_si512(bytes[0] + 64 * i), high[i] = _mm512_loadu_si512(bytes[1] + 64 * i);
    }
    U unpack(U word, int j) const {
        const __m512i code = (__m512i)word, lower = _mm512_permutex2var_epi8(low[0], code, low[1]);
        __m512i upper = _mm512_permutex2var_epi8(high[0], code, high[1]);
        upper = _mm512_or_si512(upper, _mm512_and_si512(code, _mm512_set1_epi8((char)0x80)));
        return (U)(j ? _mm512_unpackhi_epi8(lower, upper) : _mm512_unpacklo_epi8(lower, upper));
    }
#else
    explicit Bytes(int) {}
    U unpack(U word, int j) const {
        uint8_t code[64];
        uint16_t value[32];
        store(code, word);
        for (int i = 0; i < 32; i++) {
            const uint8_t c = code[i / 8 * 16 + 8 * j + i % 8];
            const float magnitude = c & 127;
            uint32_t bits;
            std::memcpy(&bits, &magnitude, 4);
            value[i] = (bits >> 16) | (c & 128) << 8;
        }
        return load<U>(value);
    }
#endif
    static F dot(F acc, U w, uint32_t x) { return pair(acc, w, x); }
};

// part[row][tile] += the panel's words times each row's `steps` inputs
template <class Codes, int ROWS>
inline void dots(const Codes& codes, const U* words, const uint32_t* const* x, int steps, F (*part)[TILES]) {
    F own[ROWS][TILES];
    std::memcpy(own, part, sizeof own);
    for (int at = 0; at < steps; at += Codes::STEPS, words += TILES) {
        U word[TILES];
#pragma GCC unroll 4
        for (int t = 0; t < TILES; t++) {
            // 0, 0: read once, so the caches may keep what is used again: code, activations, keys
            __builtin_prefetch((const char*)(words + t) + 4096, 0, 0);
            word[t] = load<U>(words + t);
        }
#pragma GCC unroll 4
        for (int j = 0; j < Codes::STEPS; j++)
#pragma GCC unroll 4
            for (int t = 0; t < TILES; t++) {
                const U w = codes.unpack(word[t], j);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) own[r][t] = Codes::dot(own[r][t], w, x[r][at + j]);
            }
    }
    std::memcpy(part, own, sizeof own);
}

template <class Codes, int ROWS = MOST_ROWS>
void dots_of(int rows, const Codes& codes, const U* words, const uint32_t* const* x, int steps, F (*part)[TILES]) {
    if (rows == ROWS) return dots<Codes, ROWS>(codes, words, x, steps, part);
    if constexpr (ROWS > 1) dots_of<Codes, ROWS - 1>(rows, codes, words, x, steps, part);
}

struct Rows {  // activations as matrices take them
    std::vector<uint32_t> words;  // [rows][stride]: float32, or bfloat16 pairs
    std::vector<float> sums;      // [rows][inputs / block] of bfloat16 inputs, for mins
    int rows, stride, blocks;
};

struct Group {  // up to MOST_ROWS rows that a panel is read for together
    int first, count;
    const uint32_t* x[MOST_ROWS];
    Group(const Rows& rows, int first, int most, int step) : first(first), count(std::min(most, rows.rows - first)) {
        for (int r = 0; r < count; r++) x[r] = rows.words.data() + (size_t)(first + r) * rows.stride + step;
    }
};

template <class Codes> void plain_panel(const Matrix& m, const Rows& rows, int panel, float* y, int width) {
    const Codes codes(0);
    const U* words = (const U*)m.codes + (size_t)panel * rows.stride * TILES;
    const int chunk = rows.rows > MOST_ROWS ? CHUNK : rows.stride;
    for (int step = 0; step < rows.stride; step += chunk)
        for (int first = 0; first < rows.rows; first += MOST_ROWS) {
            const Group group(rows, first, MOST_ROWS, step);
            F part[MOST_ROWS][TILES] = {};
            float* out = y + (size_t)first * width + panel * PANEL;
            if (step)
                for (int r = 0; r < group.count; r++) std::memcpy(part[r], out + (size_t)r * width, sizeof *part);
            dots_of<Codes>(group.count, codes, words + step * TILES, group.x, std::min(chunk, rows.stride - step), part);
            for (int r = 0; r < group.count; r++) std::memcpy(out + (size_t)r * width, part[r], sizeof *part);
        }
}

template <bool HALF> F scale(const void* scales, size_t at) {
    return HALF ? from_half((const uint16_t*)scales + at) : load<F>((const float*)scales + at);
}

template <class Codes, bool HALF> void scaled_panel(const Matrix& m, const Rows& rows, int panel, float* y, int width) {
    const Codes codes(m.zero);
    const Pairs unpacked_codes(0);
    const int steps = m.block / 2, words_per_block = steps / Codes::STEPS * TILES;
    const bool once = rows.rows > UNPACKED_ONCE;
    const int most = once ? MOST_ROWS : UNPACKED_ONCE;
    U unpacked[16 * TILES];
    for (int r = 0; r < rows.rows; r++) std::memset(y + (size_t)r * width + panel * PANEL, 0, PANEL * sizeof *y);
    for (int block = 0; block < rows.blocks; block++) {
        const size_t at = (size_t)panel * rows.blocks + block;
        const U* words = (const U*)m.codes + at * words_per_block;
        if (once)
            for (int i = 0; i < steps; i += Codes::STEPS)
                for (int j = 0; j < Codes::STEPS; j++)
                    for (int t = 0; t < TILES; t++)
                        unpacked[(i + j) * TILES + t] = codes.unpack(load<U>(words + i / Codes::STEPS * TILES + t), j);
        F d[TILES], least[TILES];
        for (int t = 0; t < TILES; t++) d[t] = scale<HALF>(m.scales, at * PANEL + t * LANES);
        for (int t = 0; t < TILES && m.mins; t++) least[t] = scale<HALF>(m.mins, at * PANEL + t * LANES);
        for (int first = 0; first < rows.rows; first += most) {
            const Group group(rows, first, most, block * steps);
            F part[MOST_ROWS][TILES] = {};
            if (once) dots_of<Pairs>(group.count, unpacked_codes, unpacked, group.x, steps, part);
            else dots_of<Codes, UNPACKED_ONCE>(group.count, codes, words, group.x, steps, part);
            for (int r = 0; r < group.count; r++) {
                float* out = y + (size_t)(first + r) * width + panel * PANEL;
                const F inputs = all(m.mins ? rows.sums[(size_t)(first + r) * rows.blocks + block] : 0.0f);
                for (int t = 0; t < TILES; t++) {
                    F total = fused(part[r][t], d[t], load<F>(out + t * LANES));
                    if (m.mins) total = fused(least[t], inputs, total);
                    store(out + t * LANES, total);
                }
            }
        }
    }
}

void panel_of(const Matrix& m, const Rows& rows, int panel, float* y, int width) {
    switch (m.format) {
        case FLOAT32: return plain_panel<Plain>(m, rows, panel, y, width);
        case BFLOAT16: return plain_panel<Pairs>(m, rows, panel, y, width);
        case NIBBLES:
            return m.half_scales ? scaled_panel<Nibbles, true>(m, rows, panel, y, width)
                                 : scaled_panel<Nibbles, false>(m, rows, panel, y, width);
        default:
            return m.half_scales ? scaled_panel<Bytes, true>(m, rows, panel, y, width)
                                 : scaled_panel<Bytes, false>(m, rows, panel, y, width);
    }
}

// Starts rows of `m`'s inputs; `put` fills them in, 16 at a time.
Rows& inputs_for(const Matrix& m, int rows) {
    static thread_local Rows x;
    const int width = wide(m.inputs);
    x.rows = rows, x.stride = m.format == FLOAT32 ? width : width / 2, x.blocks = m.scales ? width / m.block : 0;
    x.words.resize((size_t)rows * x.stride);
    return x;
}

void put(const Matrix& m, Rows& x, int row, int at, F v) {
    uint32_t* words = x.words.data() + (size_t)row * x.stride;
    if (m.format == FLOAT32) return store(words + at, v);
    store((uint16_t*)words + at, __builtin_convertvector(to_bfloat16(v), H));
}

// y[rows][wide(outputs)] = x times the matrix
void multiply(const Matrix& m, Rows& x, float* y, int threads) {
    if (m.mins) {
        x.sums.resize((size_t)x.rows * x.blocks);
        for (int at = 0; at < x.rows * x.blocks; at++) {
            const uint16_t* in = (const uint16_t*)x.words.data() + (size_t)at * m.block;
            F total = {};
            for (int i = 0; i < m.block; i += LANES)
                total += (F)(__builtin_convertvector(load<H>(in + i), U) << 16);
            x.sums[at] = sum(total);
        }
    }
    const int width = wide(m.outputs);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int panel = 0; panel < width / PANEL; panel++) panel_of(m, x, panel, y, width);
}

// ---- what happens to each row by itself -----------------------------------------------------------------------------

F some(const float* at, int count) {  // the first `count` of 16, then zeros
    if (count >= LANES) return load<F>(at);
    F v = {};
    for (int i = 0; i < count; i++) v[i] = at[i];
    return v;
}

void put_some(float* at, F v, int count) {
    if (count >= LANES) return store(at, v);
    for (int i = 0; i < count; i++) at[i] = v[i];
}

float inverse_rms(const float* x, int n, float eps) {
    F squares = {};
    for (int i = 0; i < n; i += LANES) {
        const F v = some(x + i, n - i);
        squares = fused(v, v, squares);
    }
    return 1.0f / std::sqrt(sum(squares) / n + eps);
}

void norm(float* x, const float* weight, int n, float eps) {
    const float inverse = inverse_rms(x, n, eps);
    for (int i = 0; i < n; i += LANES) put_some(x + i, some(x + i, n - i) * inverse * some(weight + i, n - i), n - i);
}

// One row of a matrix of embeddings.
template <class Codes> void embed(const Matrix& m, int32_t token, float factor, float* out) {
    const Codes codes(m.zero);
    const int steps = wide(m.inputs) / (m.format == FLOAT32 ? 1 : 2), lane = token % LANES, tile = token % PANEL / LANES;
    const U* words = (const U*)m.codes + (size_t)(token / PANEL) * (steps / Codes::STEPS) * TILES + tile;
    const auto number = [](uint32_t bits) { return (float)((F)all(bits))[0]; };
    for (int step = 0; step < steps; step += Codes::STEPS, words += TILES)
        for (int j = 0; j < Codes::STEPS; j++) {
            const uint32_t word = codes.unpack(load<U>(words), j)[lane];
            if (m.format == FLOAT32) out[step] = number(word);
            else out[2 * (step + j)] = number(word << 16), out[2 * (step + j) + 1] = number(word & 0xffff0000u);
        }
    const int blocks = m.scales ? wide(m.inputs) / m.block : 0;
    for (int i = 0; i < wide(m.inputs); i++) {
        if (m.scales) {
            const size_t at = ((size_t)(token / PANEL) * blocks + i / m.block) * PANEL + tile * LANES;
            const auto value = [&](const void* of) { return (m.half_scales ? scale<true>(of, at) : scale<false>(of, at))[lane]; };
            out[i] = out[i] * value(m.scales) + (m.mins ? value(m.mins) : 0.0f);
        }
        out[i] *= factor;
    }
}

// ---- attention ------------------------------------------------------------------------------------------------------

struct Config {
    int32_t hidden, heads, kv_heads, head_dim, intermediate, gelu;
    int32_t round_hidden;  // hidden states are bfloat16 between layers
    int32_t threads;
    float norm_eps, query_scale;
};

struct Run {  // row r is at positions[r] and sees the first positions[r] + 1 cells of prefix + its own tail, in order
    int32_t rows, prefix_count;
    const int32_t *positions, *cells, *prefix, *tails, *tail_ends;
};

struct Look {  // a run in layers of one kind
    int32_t window, block_count, first_block, last_block;
    int32_t* blocks;             // of 16 cells, which some row sees something of
    float *cosines, *sines;      // [rows][head_dim / 2]
    const float* frequencies;    // [head_dim / 2]
};

struct Cache {  // of one layer; `cells` is a multiple of 16
    float* keys;    // [kv_heads][cells / 16][head_dim][16]
    float* values;  // [kv_heads][cells][head_dim up to a multiple of 16]
    int32_t cells;
};

constexpr int up16(int n) { return (n + 15) / 16 * 16; }

struct Seen {  // the cells that a row sees, in order of position
    const int32_t *prefix, *tail;
    int from_prefix, from_tail;
    Seen(const Run& run, int row, int window) {
        const int count = run.positions[row] + 1, first = window ? std::max(0, count - window) : 0;
        const int in_prefix = std::min(count, run.prefix_count), skipped = std::max(0, first - in_prefix);
        prefix = run.prefix + std::min(first, in_prefix), from_prefix = std::max(0, in_prefix - first);
        tail = run.tails + (row ? run.tail_ends[row - 1] : 0) + skipped;
        from_tail = count - in_prefix - skipped;
    }
};

// scores[query][cell - 16 * first_block] of `count` queries for 4 blocks of cells
template <int COUNT>
void score(const float* const* queries, const float* const* keys, int head_dim, float* const* out, int stride) {
    F acc[COUNT][4] = {};
    for (int d = 0; d < head_dim; d++)
        for (int b = 0; b < 4; b++) {
            const F k = load<F>(keys[b] + d * LANES);
            for (int q = 0; q < COUNT; q++) acc[q][b] = fused(all(queries[q][d]), k, acc[q][b]);
        }
    for (int q = 0; q < COUNT; q++)
        for (int b = 0; b < 4; b++) store(out[b] + (size_t)q * stride, acc[q][b]);
}

// out[query][16 * DIMS] += weights[query][i] * values of cell i, in order of i
template <int COUNT, int DIMS>
void mix(const float* weights, int stride, const int32_t* cells, int n, const float* values, int width, float* out,
         int out_stride, const float* inverse) {
    F acc[COUNT][DIMS] = {};
    for (int i = 0; i < n; i++) {
        const float* value = values + (size_t)cells[i] * width;
        for (int d = 0; d < DIMS; d++) {
            const F v = load<F>(value + d * LANES);
            for (int q = 0; q < COUNT; q++) acc[q][d] = fused(all(weights[q * stride + i]), v, acc[q][d]);
        }
    }
    for (int q = 0; q < COUNT; q++)
        for (int d = 0; d < DIMS; d++) store(out + q * out_stride + d * LANES, acc[q][d] * inverse[q]);
}

template <int COUNT> void mix_of(int dims, const float* weights, int stride, const int32_t* cells, int n,
                                 const float* values, int width, float* out, int out_stride, const float* inverse) {
    for (; dims > 4; dims -= 4, values += 64, out += 64)
        mix<COUNT, 4>(weights, stride, cells, n, values, width, out, out_stride, inverse);
    switch (dims) {
        case 1: return mix<COUNT, 1>(weights, stride, cells, n, values, width, out, out_stride, inverse);
        case 2: return mix<COUNT, 2>(weights, stride, cells, n, values, width, out, out_stride, inverse);
        case 3: return mix<COUNT, 3>(weights, stride, cells, n, values, width, out, out_stride, inverse);
        default: return mix<COUNT, 4>(weights, stride, cells, n, values, width, out, out_stride, inverse);
    }
}

// Queries of rows [first, stop) of one KV head. `qkv` is [rows][stride]; `out` [rows][out_stride].
void attend(const Config& c, const Run& run, const Look& look, const Cache& cache, int kv, int first, int stop,
            const float* qkv, int stride, float* out, int out_stride) {
    static thread_local std::vector<float> scores, weights, mixed, inverse;
    static thread_local std::vector<int32_t> cells;
    const int group = c.heads / c.kv_heads, queries = (stop - first) * group, width = up16(c.head_dim);
    const int span = (look.last_block - look.first_block + 1) * LANES;
    scores.resize((size_t)queries * span + LANES * 4);
    const float* keys = cache.keys + (size_t)kv * cache.cells * c.head_dim;
    const float* values = cache.values + (size_t)kv * cache.cells * width;
    for (int at = 0; at < look.block_count; at += 4) {
        const float* block[4];
        for (int b = 0; b < 4; b++)
            block[b] = keys + (size_t)look.blocks[std::min(at + b, look.block_count - 1)] * c.head_dim * LANES;
        for (int q = 0; q < queries; q += 4) {
            const int count = std::min(4, queries - q);
            const float* query[4];
            float* to[4];
            for (int i = 0; i < count; i++)
                query[i] = qkv + (size_t)(first + (q + i) / group) * stride + (kv * group + (q + i) % group) * c.head_dim;
            for (int b = 0; b < 4; b++) {
                const int own = look.blocks[std::min(at + b, look.block_count - 1)] - look.first_block;
                to[b] = scores.data() + (size_t)q * span + own * LANES;
            }
            switch (count) {
                case 1: score<1>(query, block, c.head_dim, to, span); break;
                case 2: score<2>(query, block, c.head_dim, to, span); break;
                case 3: score<3>(query, block, c.head_dim, to, span); break;
                default: score<4>(query, block, c.head_dim, to, span);
            }
        }
    }
    mixed.resize((size_t)group * width);
    for (int row = first; row < stop; row++) {
        const Seen seen(run, row, look.window);
        const int n = seen.from_prefix + seen.from_tail, padded = up16(n);
        cells.resize(n);
        std::memcpy(cells.data(), seen.prefix, seen.from_prefix * sizeof(int32_t));
        std::memcpy(cells.data() + seen.from_prefix, seen.tail, seen.from_tail * sizeof(int32_t));
        weights.resize((size_t)group * padded);
        inverse.resize(group);
        for (int g = 0; g < group; g++) {
            const float* from = scores.data() + (size_t)((row - first) * group + g) * span - look.first_block * LANES;
            float* w = weights.data() + (size_t)g * padded;
            for (int i = 0; i < n; i++) w[i] = from[cells[i]];
            std::fill(w + n, w + padded, -INFINITY);
            F highest = all(-INFINITY), total = {};
            for (int i = 0; i < padded; i += LANES) {
                const F v = load<F>(w + i);
                highest = v > highest ? v : highest;
            }
            float top = highest[0];
            for (int i = 1; i < LANES; i++) top = std::max(top, highest[i]);
            for (int i = 0; i < padded; i += LANES) {
                F v = exponential(load<F>(w + i) - top);
                for (int j = n - i; j < LANES; j++) v[j] = 0;
                store(w + i, v);
                total += v;
            }
            inverse[g] = 1.0f / sum(total);
        }
        for (int g = 0; g < group; g += 4) {
            const float* w = weights.data() + (size_t)g * padded;
            float* to = mixed.data() + (size_t)g * width;
            const int dims = width / LANES;
            switch (std::min(4, group - g)) {
                case 1: mix_of<1>(dims, w, padded, cells.data(), n, values, width, to, width, inverse.data() + g); break;
                case 2: mix_of<2>(dims, w, padded, cells.data(), n, values, width, to, width, inverse.data() + g); break;
                case 3: mix_of<3>(dims, w, padded, cells.data(), n, values, width, to, width, inverse.data() + g); break;
                default: mix_of<4>(dims, w, padded, cells.data(), n, values, width, to, width, inverse.data() + g);
            }
        }
        for (int g = 0; g < group; g++)
            std::memcpy(out + (size_t)row * out_stride + (kv * group + g) * c.head_dim, mixed.data() + (size_t)g * width,
                        c.head_dim * sizeof(float));
    }
}

}  // namespace

// ---- the interface --------------------------------------------------------------------------------------------------

struct Layer {
    Matrix qkv, output, gate_up, down;
    const float *attention_norm, *qkv_bias, *qk_norm, *post_attention_norm, *mlp_norm, *post_mlp_norm;  // null: none
};

extern "C" {

// Which instructions sum up products: what may differ between machines that all have kernels.
const char* pipesim_variant() {
#if defined(__AVX512BF16__)
    return "AVX-512 with bfloat16 pairs";
#elif defined(__FMA__) || defined(__aarch64__)
    return "fused multiply-add";
#else
    return "multiply and add";
#endif
}

int32_t pipesim_has_threads() {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}

// rows of x, float32 [rows][inputs], times m: y is [rows][wide(outputs)]
void pipesim_linear(const Matrix* m, const float* x, int32_t rows, float* y, int32_t threads) {
    Rows& in = inputs_for(*m, rows);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < wide(m->inputs); i += LANES)
            put(*m, in, r, i, some(x + (size_t)r * m->inputs + i, std::max(0, m->inputs - i)));
    multiply(*m, in, y, threads);
}

// The embeddings of `rows` tokens, times `factor`: out is [rows][wide(inputs)].
void pipesim_embed(const Matrix* m, const int32_t* tokens, int32_t rows, float factor, float* out) {
    for (int r = 0; r < rows; r++) {
        float* to = out + (size_t)r * wide(m->inputs);
        switch (m->format) {
            case FLOAT32: embed<Plain>(*m, tokens[r], factor, to); break;
            case BFLOAT16: embed<Pairs>(*m, tokens[r], factor, to); break;
            case NIBBLES: embed<Nibbles>(*m, tokens[r], factor, to); break;
            default: embed<Bytes>(*m, tokens[r], factor, to);
        }
    }
}

// What a look needs to know of a run. `marks` are zeros, one byte for each block of cells.
void pipesim_look(const Config* c, const Run* run, Look* look, uint8_t* marks) {
    const int half = c->head_dim / 2;
    int lowest = INT32_MAX, highest = -1;
    const auto mark = [&](int32_t cell) {
        marks[cell / LANES] = 1;
        lowest = std::min(lowest, cell / LANES), highest = std::max(highest, cell / LANES);
    };
    int from = run->prefix_count, to = 0;
    for (int row = 0; row < run->rows; row++) {
        const Seen seen(*run, row, look->window);
        if (seen.from_prefix) {
            from = std::min<int>(from, seen.prefix - run->prefix);
            to = std::max<int>(to, seen.prefix - run->prefix + seen.from_prefix);
        }
        for (int i = 0; i < seen.from_tail; i++) mark(seen.tail[i]);
        for (int i = 0; i < half; i++) {
            const double angle = (float)run->positions[row] * look->frequencies[i];
            look->cosines[row * half + i] = (float)std::cos(angle);
            look->sines[row * half + i] = (float)std::sin(angle);
        }
    }
    for (int i = from; i < to; i++) mark(run->prefix[i]);
    look->block_count = 0, look->first_block = lowest, look->last_block = highest;
    for (int block = lowest; block <= highest; block++)
        if (marks[block]) look->blocks[look->block_count++] = block, marks[block] = 0;
}

// One decoder layer: `hidden` [rows][wide(hidden)] is changed in place.
void pipesim_layer(const Config* config, const Layer* layer, const Run* run, const Look* look, const Cache* cache,
                   float* hidden) {
    static thread_local std::vector<float> wider, attended, change;
    const Config& c = *config;
    const int rows = run->rows, width = wide(c.hidden), half = c.head_dim / 2, both = c.heads + c.kv_heads;
    const int qkv_width = wide((both + c.kv_heads) * c.head_dim), out_width = wide(c.heads * c.head_dim);
    const int inner = wide(2 * c.intermediate);
    wider.resize((size_t)rows * std::max(qkv_width, inner) + PANEL);
    attended.resize((size_t)rows * out_width);
    change.resize((size_t)rows * width);

    const auto normed = [&](const Matrix& m, const float* weight) -> Rows& {
        Rows& x = inputs_for(m, rows);
        for (int r = 0; r < rows; r++) {
            const float* h = hidden + (size_t)r * width;
            const float inverse = inverse_rms(h, c.hidden, c.norm_eps);
            for (int i = 0; i < width; i += LANES) put(m, x, r, i, load<F>(h + i) * inverse * load<F>(weight + i));
        }
        return x;
    };
    const auto add = [&](const float* post_norm) {
        for (int r = 0; r < rows; r++) {
            float *h = hidden + (size_t)r * width, *more = change.data() + (size_t)r * width;
            if (post_norm) norm(more, post_norm, c.hidden, c.norm_eps);
            for (int i = 0; i < width; i += LANES) store(h + i, load<F>(h + i) + load<F>(more + i));
        }
    };

    multiply(layer->qkv, normed(layer->qkv, layer->attention_norm), wider.data(), c.threads);
    for (int r = 0; r < rows; r++) {
        float* qkv = wider.data() + (size_t)r * qkv_width;
        for (int i = 0; layer->qkv_bias && i < (both + c.kv_heads) * c.head_dim; i++) qkv[i] += layer->qkv_bias[i];
        for (int h = 0; h < both; h++) {
            float* x = qkv + h * c.head_dim;
            if (layer->qk_norm) norm(x, layer->qk_norm + h * c.head_dim, c.head_dim, c.norm_eps);
            const float scale = h < c.heads ? c.query_scale : 1.0f;
            for (int i = 0; i < half; i++) {
                const float cos = look->cosines[r * half + i], sin = look->sines[r * half + i], a = x[i], b = x[i + half];
                x[i] = (a * cos - b * sin) * scale;
                x[i + half] = (b * cos + a * sin) * scale;
            }
        }
        const int cell = run->cells[r], padded = up16(c.head_dim);
        for (int h = 0; h < c.kv_heads; h++) {
            const float *k = qkv + (c.heads + h) * c.head_dim, *v = qkv + (both + h) * c.head_dim;
            float* keys = cache->keys + ((size_t)h * cache->cells + cell / LANES * LANES) * c.head_dim + cell % LANES;
            for (int i = 0; i < c.head_dim; i++) keys[i * LANES] = k[i];
            std::memcpy(cache->values + ((size_t)h * cache->cells + cell) * padded, v, c.head_dim * sizeof(float));
        }
    }
    const int together = std::max(1, 48 * c.kv_heads / c.heads), pieces = (rows + together - 1) / together;
    const float* qkv = wider.data();  // this thread's: others have their own by these names
    float* mixed = attended.data();
#pragma omp parallel for num_threads(c.threads) if (c.threads > 1)
    for (int at = 0; at < pieces * c.kv_heads; at++) {
        const int first = at % pieces * together;
        attend(c, *run, *look, *cache, at / pieces, first, std::min(rows, first + together), qkv, qkv_width, mixed,
               out_width);
    }
    Rows& x = inputs_for(layer->output, rows);
    const int used = c.heads * c.head_dim;
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < out_width; i += LANES)
            put(layer->output, x, r, i, some(attended.data() + (size_t)r * out_width + i, std::max(0, used - i)));
    multiply(layer->output, x, change.data(), c.threads);
    add(layer->post_attention_norm);

    multiply(layer->gate_up, normed(layer->gate_up, layer->mlp_norm), wider.data(), c.threads);
    Rows& gated = inputs_for(layer->down, rows);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < wide(c.intermediate); i += LANES) {
            const int left = std::max(0, c.intermediate - i);
            const float* gates = wider.data() + (size_t)r * inner + i;
            const F gate = some(gates, left), up = some(gates + c.intermediate, left);
            F turned = gate;
            if (c.gelu)  // tanh(x) = 2 / (1 + exp(-2x)) - 1
                turned = 1.5957691216f * (gate + 0.044715f * gate * gate * gate);
            put(layer->down, gated, r, i, gate / (1.0f + exponential(-turned)) * up);
        }
    multiply(layer->down, gated, change.data(), c.threads);
    add(layer->post_mlp_norm);
    for (size_t i = 0; c.round_hidden && i < (size_t)rows * width; i += LANES)
        store(hidden + i, (F)(to_bfloat16(load<F>(hidden + i)) << 16));
}

// Final norm and LM head: logits are [rows][wide(vocabulary)].
void pipesim_head(const Config* c, const Matrix* head, const float* weight, const float* hidden, int32_t rows,
                  float* logits) {
    Rows& x = inputs_for(*head, rows);
    const int width = wide(c->hidden);
    for (int r = 0; r < rows; r++) {
        const float* h = hidden + (size_t)r * width;
        const float inverse = inverse_rms(h, c->hidden, c->norm_eps);
        for (int i = 0; i < width; i += LANES) put(*head, x, r, i, load<F>(h + i) * inverse * load<F>(weight + i));
    }
    multiply(*head, x, logits, c->threads);
}

}  // extern "C"
