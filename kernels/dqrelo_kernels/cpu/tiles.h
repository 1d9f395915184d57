// SPDX-License-Identifier: Apache-2.0
//
// What ops.cpp computes with: numbers of each Dtype, tiles of a matrix laid out as
// numbers, and their products with rows of activations.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int TILE = 16;         // rows of a matrix, and rows of x, in one product
constexpr int BLOCK = 256;       // columns of a sign block, layout.BLOCK
constexpr int ROW_BYTES = 2048;  // of a tile, which fills two thirds of a 48 KB L1
constexpr int PADDING = 64;      // columns of x are padded to a multiple of this

// The index in table.FACTOR_DTYPES. A byte of I4 holds two integers, see layout.py.
enum Dtype { F32, BF16, F16, I8, I4 };

struct Bf16 {
    uint16_t bits;
};

// 16 lanes, whatever the CPU has: the compiler cuts them to its size.
typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef int8_t Bytes __attribute__((vector_size(16)));

inline int round_up(int value, int step) { return (value + step - 1) / step * step; }

inline int size_of(int dtype) { return dtype == F32 ? 4 : dtype == I8 ? 1 : 2; }

// ---- numbers ------------------------------------------------------------------------

inline Halves load_halves(const void* in, int n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    return Halves(_mm256_maskz_loadu_epi16((1u << n) - 1, in));
#else
    Halves out = {};
    n == 16 ? std::memcpy(&out, in, 32) : std::memcpy(&out, in, 2 * n);
    return out;
#endif
}

// n <= 16 numbers, zeros behind them
inline Floats load(const void* in, int dtype, int n) {
    if (dtype == F32) {
        Floats out = {};
        n == 16 ? std::memcpy(&out, in, 64) : std::memcpy(&out, in, 4 * n);
        return out;
    }
    Words word = __builtin_convertvector(load_halves(in, n), Words);
    if (dtype == BF16) return Floats(word << 16);
    // Times 2^112 corrects the bias of the exponent and normalises subnormals;
    // infinity and NaN have the largest exponent before and after.
    Words number = Words(Floats((word & 0x7FFF) << 13) * 0x1p112f);
    Words largest = Words((word & 0x7C00) == 0x7C00) & 0x7F800000;
    return Floats((word & 0x8000) << 16 | number | largest);
}

// The first n <= 16 numbers, rounded to nearest even
inline void store(void* out, int dtype, Floats in, int n) {
    if (dtype == F32) {
        n == 16 ? std::memcpy(out, &in, 64) : std::memcpy(out, &in, 4 * n);
        return;
    }
#if defined(__AVX512BF16__)
    if (dtype == BF16) {
        Halves half = Halves(_mm512_cvtneps_pbh(in));
        n == 16 ? std::memcpy(out, &half, 32) : std::memcpy(out, &half, 2 * n);
        return;
    }
#endif
    Words word = Words(in), sign = word >> 16 & 0x8000, nan = Words(in != in);
    if (dtype == BF16) {
        word = (word + 0x7FFF + (word >> 16 & 1)) >> 16;
        word = (nan & 0x7FC0) | (~nan & word);
    } else {
        word &= 0x7FFFFFFF;
        Words normal = (word - (112u << 23) + 0xFFF + (word >> 13 & 1)) >> 13;
        // 0.5 + x has a subnormal half, rounded, in the low bits of its mantissa.
        Words subnormal = Words(Floats(word) + 0.5f) - 0x3F000000;
        Words small = Words(word < (113u << 23)), large = Words(word >= 0x477FF000);
        word = (small & subnormal) | (~small & ~large & normal) | (large & 0x7C00);
        word = sign | (nan & 0x7E00) | (~nan & word);
    }
    Halves half = __builtin_convertvector(word, Halves);
    n == 16 ? std::memcpy(out, &half, 32) : std::memcpy(out, &half, 2 * n);
}

// n <= 16 integers of eight bits, zeros behind them
inline Floats load_bytes(const char* in, int n) {
    Bytes bytes = {};
    n == 16 ? std::memcpy(&bytes, in, 16) : std::memcpy(&bytes, in, n);
    return __builtin_convertvector(__builtin_convertvector(bytes, Integers), Floats);
}

constexpr int I4_BLOCK = 64;  // layout.INT4_BLOCK

// The lower halves of `width` <= 32 bytes, less 8, and behind them the upper halves
inline void read_block(float* out, const char* in, int width) {
    for (int shift : {0, 4})
        for (int i = 0; i < width; i += 16) {
            int part = std::min(16, width - i);
            Bytes bytes = {};
            part == 16 ? std::memcpy(&bytes, in + i, 16)
                       : std::memcpy(&bytes, in + i, part);
            Integers number = __builtin_convertvector(bytes, Integers) >> shift & 15;
            Floats value = __builtin_convertvector(number - 8, Floats);
            store(out + (shift ? width : 0) + i, F32, value, part);
        }
}

#if defined(__AVX512BF16__)
// bfloat16 of -8 to 7, twice: an index has five bits, of which the highest is
// another number's.
alignas(64) constexpr uint16_t INT4_NUMBERS[32] = {
    0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80,
    0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0,
    0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80,
    0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0};

inline void read_block(Bf16* out, const char* in, int width) {
    __m512i table = _mm512_load_si512(INT4_NUMBERS);
    __mmask32 lanes = width == 32 ? ~0u : (1u << width) - 1;
    __m512i bytes = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(lanes, in));
    _mm512_mask_storeu_epi16(out, lanes, _mm512_permutexvar_epi16(bytes, table));
    bytes = _mm512_srli_epi16(bytes, 4);
    _mm512_mask_storeu_epi16(out + width, lanes,
                             _mm512_permutexvar_epi16(bytes, table));
}
#endif

// n numbers from the start of a row or of a block; of I4, one more if n is odd
template <class T>
void read(T* out, const char* in, int dtype, int n) {
    constexpr int narrow = sizeof(T) == 2;
    if (narrow && dtype == BF16) {
        std::memcpy(out, in, 2 * n);
    } else if (dtype == I4) {
        for (int i = 0; i < n; i += I4_BLOCK)
            read_block(out + i, in + i / 2, std::min(I4_BLOCK, n - i + 1) / 2);
    } else {
        for (int i = 0; i < n; i += 16) {
            int part = std::min(16, n - i);
            const char* from = in + i * size_of(dtype);
            store(out + i, narrow ? BF16 : F32,
                  dtype == I8 ? load_bytes(from, part) : load(from, dtype, part), part);
        }
    }
}

template <class Vector>
float total(Vector sums) {
    float lanes[sizeof sums / sizeof(float)];
    std::memcpy(lanes, &sums, sizeof sums);
    for (int half = sizeof sums / sizeof(float) / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

// out[n][m] = in[m][n]
inline void transpose(Floats* matrix) {
#if defined(__AVX512F__)
    // Swap the off-diagonal quarters of ever larger blocks.
#pragma GCC unroll 4
    for (int bit = 0; bit < 4; bit++) {
        int step = 1 << bit;
        Words lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        Words second = Words((lane & step) != 0);
        __m512i low = __m512i(lane + (second & (16 - step)));
        __m512i high = __m512i(lane + (~second & step) + (second & 16));
        for (int i = 0; i < TILE; i++)
            if (!(i & step)) {
                Floats a = matrix[i], b = matrix[i + step];
                matrix[i] = _mm512_permutex2var_ps(a, low, b);
                matrix[i + step] = _mm512_permutex2var_ps(a, high, b);
            }
    }
#else
    for (int n = 0; n < TILE; n++)
        for (int m = 0; m < n; m++) {
            float swap = matrix[n][m];
            matrix[n][m] = matrix[m][n];
            matrix[m][n] = swap;
        }
#endif
}

// ---- tiles --------------------------------------------------------------------------

// Numbers from one row of a tile to the next. 64 bytes more than a power of two: rows
// that compete for the same sets of the cache are slower.
constexpr int CHUNK = ROW_BYTES / sizeof(float), STRIDE = CHUNK + 16;

// As many bit planes as fit in a vector of numbers, shifted such that one shift of all
// lanes brings that many planes to the sign bits. A plane is `width` words.
inline Words first_planes(const uint16_t* words, int width, float) {
    return __builtin_convertvector(load_halves(words, width), Words);
}

#if defined(__AVX512BF16__)
inline auto first_planes(const uint16_t* words, int width, Bf16) {
    typedef uint16_t Planes __attribute__((vector_size(64)));
    __mmask32 lanes = (1u << width) - 1;
    __m512i first = _mm512_slli_epi16(_mm512_maskz_loadu_epi16(lanes, words), 1);
    return Planes(_mm512_mask_loadu_epi16(first, lanes << width, words - width));
}
#endif

// out[plane * width + i] = +1 if the bit of words[i] is set, else -1, for 16 planes.
// Writes whole vectors: at most 256 numbers, the last ones may mean nothing.
template <class T>
void unpack(T* out, const uint16_t* words, int width) {
    constexpr int bits = 8 * sizeof(T), planes = 4 / sizeof(T);
    constexpr uint32_t sign = 1u << (bits - 1), minus_one = 0xBF800000 >> (32 - bits);
    auto first = first_planes(words, width, T());
#pragma GCC unroll 16
    for (int plane = 0; plane < 16; plane += planes) {
        auto ones = ((first << (bits - planes - plane)) & sign) ^ minus_one;
        std::memcpy(out + plane * width, &ones, sizeof ones);
    }
}

// A matrix of which every TILE rows lie side by side (layout.py)
struct Matrix {
    const char* data;
    int rows, columns;
    int dtype;  // of a factor, or SIGN
    static constexpr int SIGN = -1;

    int64_t bytes_of(int columns) const {
        return dtype == SIGN ? (columns + 15) / 16 * 2
               : dtype == I4 ? (columns + 1) / 2
                             : columns * size_of(dtype);
    }
    int64_t row_bytes() const { return bytes_of(columns); }
    // What starts with `row`, the first of a tile, and how many rows it has
    const char* tile(int row) const { return data + row * row_bytes(); }
    int height(int row) const { return std::min(TILE, rows - row); }

    // `columns` columns of a row from k on, the first of a block
    void copy(char* out, int row, int k, int columns) const {
        int lane = row % TILE, size = row_bytes(), whole = size / 4 * 4;
        const char* in = tile(row - lane);
        int lanes = height(row - lane), end = bytes_of(k) + bytes_of(columns);
        for (int at = bytes_of(k); at < end; at += 4, out += 4) {
            const char* from = in + at * lanes + lane * std::min(4, size - at);
            std::memcpy(out, from, at < whole ? 4 : size - whole);
        }
    }

    // Loads `rows` rows into the cache ahead of their use: a decode step of 4 deltas on
    // SmolLM2-135M takes 23 ms of one core with it and 28 ms without (Xeon with AMX).
    // Inlined, because GCC drops calls of a function that only prefetches.
    __attribute__((always_inline)) void prefetch(int row, int rows) const {
        for (int64_t i = 0; i < rows * row_bytes(); i += 64)
            __builtin_prefetch(tile(row) + i);
    }
};

// Columns k to k + `columns` of a row as numbers, k being the first of a block. Of
// signs, whole vectors are written: the last ones may mean nothing.
template <class T>
void read_row(T* out, const Matrix& matrix, int row, int k, int columns) {
    alignas(64) char bytes[ROW_BYTES + 64];
    matrix.copy(bytes, row, k, columns);
    if (matrix.dtype != Matrix::SIGN) return read(out, bytes, matrix.dtype, columns);
    auto words = reinterpret_cast<const uint16_t*>(bytes);
    for (int i = 0; i < columns; i += BLOCK)
        unpack(out + i, words + i / 16, (std::min(BLOCK, columns - i) + 15) / 16);
}

// Lays out columns k to k + CHUNK of `rows` rows from `row` as numbers. Those beyond
// the matrix are finite up to the padding of x: they meet zeros.
inline void fill(float* tile, const Matrix& matrix, int row, int rows, int k) {
    int columns = std::min(CHUNK, matrix.columns - k);
    int padded = round_up(columns, PADDING);
    std::memset(tile + rows * STRIDE, 0, (TILE - rows) * STRIDE * sizeof *tile);
    for (int r = 0; r < rows; r++, tile += STRIDE) {
        if (columns < padded)
            std::memset(tile + padded - PADDING, 0, PADDING * sizeof *tile);
        read_row(tile, matrix, row + r, k, columns);
    }
}

// ---- products -----------------------------------------------------------------------

// A matrix of activations. Strides are in elements; the last dimension is contiguous.
struct Rows {
    char* data;
    int64_t stride;
    int dtype;

    char* at(int64_t row, int64_t column = 0) const {
        return data + (row * stride + column) * size_of(dtype);
    }
};

// Every lane of a vector register sums the products of every so many columns. Four
// rows of x and UNROLL of the tile keep as many sums in registers as there is room for.
#if defined(__AVX512F__)
typedef Floats Lanes;
constexpr int UNROLL = 4;
#elif defined(__AVX__)
typedef float Lanes __attribute__((vector_size(32)));
constexpr int UNROLL = 2;
#else
typedef float Lanes __attribute__((vector_size(16)));
constexpr int UNROLL = 4;
#endif

inline Lanes multiply_add(Lanes sum, const float* a, const float* b) {
    Lanes left, right;
    std::memcpy(&left, a, sizeof left);
    std::memcpy(&right, b, sizeof right);
    return sum + left * right;
}

// Copies `count` <= 16 rows of x, padded with zeros to `padded` columns.
inline void stage_rows(float* out, const Rows& x, const int32_t* rows, int count,
                       int columns, int padded) {
    for (int m = 0; m < count; m++, out += padded) {
        read(out, x.at(rows[m]), x.dtype, columns);
        std::fill(out + columns, out + padded, 0.0f);
    }
}

// c[n][m] += sum over `columns` columns of tile[n] * x[m], for M rows of x from m on
template <int M>
void dot(Floats* c, const float* tile, const float* x, int m, int padded, int columns) {
    for (int n = 0; n < TILE; n += UNROLL, tile += UNROLL * STRIDE) {
        Lanes sums[UNROLL][M] = {};
        for (int k = 0; k < columns; k += sizeof(Lanes) / sizeof(float))
#pragma GCC unroll 4
            for (int i = 0; i < UNROLL; i++)
#pragma GCC unroll 4
                for (int j = 0; j < M; j++)
                    sums[i][j] = multiply_add(sums[i][j], tile + i * STRIDE + k,
                                              x + j * padded + k);
        for (int i = 0; i < UNROLL; i++)
            for (int j = 0; j < M; j++) c[n + i][m + j] += total(sums[i][j]);
    }
}

// c[n][m] += sum over `columns` columns from k of tile[n] * x[m], x as staged
inline void multiply_tile(Floats* c, const float* tile, const float* x, int count,
                          int padded, int k, int columns) {
    for (int m = 0; m < count; m += 4) {
        const float* rows = x + m * padded + k;
        switch (std::min(4, count - m)) {
            case 1: dot<1>(c, tile, rows, m, padded, columns); break;
            case 2: dot<2>(c, tile, rows, m, padded, columns); break;
            case 3: dot<3>(c, tile, rows, m, padded, columns); break;
            case 4: dot<4>(c, tile, rows, m, padded, columns); break;
        }
    }
}

}  // namespace
