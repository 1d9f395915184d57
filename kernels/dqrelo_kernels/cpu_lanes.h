// SPDX-License-Identifier: Apache-2.0
//
// Products of a matrix with few rows of activations, for cpu.cpp: 16 rows of the matrix
// are the lanes of a vector, so that a sum stays in its register and has no lanes to add
// up. Against tiles (cpu_tiles.h), nothing is laid out as numbers in memory first.
#pragma once

#include "cpu_tiles.h"

#include <type_traits>

namespace {

#if defined(__AVX512BW__)

// Rows of x. With 8 this takes as long as tiles, with 4 three quarters, with 1 less than
// half of it (decode steps on SmolLM2-135M, Xeon with AMX).
constexpr int FEW = 8;

// out[i] has in lane n the 32 bits that are word i of row n, of 16 words from `in`.
// What is beyond `bytes` is clear, or if these are whole words not there.
inline void load_words(Floats* out, const char* in, int64_t stride, int rows,
                       int bytes) {
    if (bytes <= 16 && bytes % 4 == 0) {  // less work than a transposition
        __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2,
                                        1, 0);
        __m512i at = _mm512_mullo_epi32(lane, _mm512_set1_epi32(stride));
        for (int i = 0; i < bytes / 4; i++)
            out[i] = Floats(_mm512_mask_i32gather_epi32(
                _mm512_setzero_si512(), (1u << rows) - 1, at, in + 4 * i, 1));
        return;
    }
    __mmask64 lanes = bytes >= 64 ? ~0ull : (1ull << bytes) - 1;
    for (int n = 0; n < TILE; n++)
        out[n] = Floats(_mm512_maskz_loadu_epi8(n < rows ? lanes : 0, in + n * stride));
    transpose(out);
}

// table[the lowest four bits of index], lane by lane
inline Floats look_up(Floats table, Words index) {
    return _mm512_permutexvar_ps(__m512i(index), table);
}

#else

constexpr int FEW = 0;
inline void load_words(Floats*, const char*, int64_t, int, int) {}
inline Floats look_up(Floats table, Words) { return table; }

#endif

// Number `part` of those in each lane
template <int DTYPE>
Floats number(Words word, int part) {
    if (DTYPE == F32) return Floats(word);
    if (DTYPE == BF16) return Floats(part ? word & 0xFFFF0000 : word << 16);
    if (DTYPE == I8) {
        Integers byte = Integers(word << (24 - 8 * part)) >> 24;
        return __builtin_convertvector(byte, Floats);
    }
    if (DTYPE == I4) {
        constexpr Floats values = {-8, -7, -6, -5, -4, -3, -2, -1,
                                   0,  1,  2,  3,  4,  5,  6,  7};
        return look_up(values, word >> (4 * part));
    }
    Words half = part ? word >> 16 : word & 0xFFFF;  // as in load()
    Words number = Words(Floats((half & 0x7FFF) << 13) * 0x1p112f);
    Words largest = Words((half & 0x7C00) == 0x7C00) & 0x7F800000;
    return Floats((half & 0x8000) << 16 | number | largest);
}

// Puts the numbers of x in the order of the bits of a row of `columns` numbers: that of
// the columns but for I4. Clears the rest of out, which has `padded` numbers.
inline void reorder(float* out, const float* x, int dtype, int columns, int padded) {
    std::memcpy(out, x, columns * sizeof *x);
    std::memset(out + columns, 0, (padded - columns) * sizeof *x);
    if (dtype != I4) return;
    for (int block = 0; block < columns; block += I4_BLOCK) {
        int end = std::min(I4_BLOCK, columns - block), width = (end + 1) / 2;
        for (int i = 0; i < width; i++) {
            out[block + 2 * i] = x[block + i];
            out[block + 2 * i + 1] = width + i < end ? x[block + width + i] : 0;
        }
    }
}

// Where reorder() puts the number of a column
inline int place(int dtype, int column, int columns) {
    if (dtype != I4) return column;
    int within = column % I4_BLOCK, block = column - within;
    int width = (std::min(I4_BLOCK, columns - block) + 1) / 2;
    return block + within % width * 2 + within / width;
}

// sums[m] += row n of the matrix, lane n, times row m of x, which is as reorder() leaves
// it, rows of `padded` numbers
template <int M, int DTYPE>
void multiply_lanes(Floats* sums, const Matrix& matrix, int row, int rows,
                    const float* x, int padded) {
    constexpr int numbers = DTYPE == I4 ? 8 : DTYPE == I8 ? 4 : DTYPE == F32 ? 1 : 2;
    int bytes = matrix.row_bytes();
    Floats parts[2][M] = {};
    for (int first = 0; first < bytes; first += 64, x += 16 * numbers) {
        Floats words[TILE];
        load_words(words, matrix.at(row, 0) + first, bytes, rows, bytes - first);
        int count = std::min(16, (bytes - first + 3) / 4);
        for (int i = 0; i < count; i++)
#pragma GCC unroll 8
            for (int part = 0; part < numbers; part++) {
                Floats value = number<DTYPE>(Words(words[i]), part);
#pragma GCC unroll 4
                for (int m = 0; m < M; m++)
                    parts[part % 2][m] += value * x[m * padded + i * numbers + part];
            }
    }
    for (int m = 0; m < M; m++) sums[m] += parts[0][m] + parts[1][m];
}

template <int M>
void multiply_lanes(Floats* sums, const Matrix& matrix, int row, int rows,
                    const float* x, int padded) {
    switch (matrix.dtype) {
        case F32: return multiply_lanes<M, F32>(sums, matrix, row, rows, x, padded);
        case BF16: return multiply_lanes<M, BF16>(sums, matrix, row, rows, x, padded);
        case F16: return multiply_lanes<M, F16>(sums, matrix, row, rows, x, padded);
        case I8: return multiply_lanes<M, I8>(sums, matrix, row, rows, x, padded);
        case I4: return multiply_lanes<M, I4>(sums, matrix, row, rows, x, padded);
    }
}

// Tables of a plane of signs with K columns: one for every four bits of a row.
inline int tables_of(int columns) { return round_up((columns + 15) / 16, 2) * 4; }

// tables[i * M + m][bits] = the sum of the four numbers of row m of x that stand for the
// i-th four bits of a row of signs, + where a bit is set and - where it is clear
template <int M>
void fill_tables(Floats* tables, const float* x, int padded, int columns) {
    constexpr Floats one = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};
    constexpr Floats two = {-1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1};
    constexpr Floats four = {-1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1};
    constexpr Floats eight = {-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1};
    int words = (columns + 15) / 16;
    for (int word = 0; word < words; word++) {
        int block = word / 16 * BLOCK, width = std::min(16, words - word / 16 * 16);
        for (int part = 0; part < 4; part++)
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                const float* at =
                    x + m * padded + block + part * 4 * width + word % 16;
                *tables++ = one * at[0] + two * at[width] + four * at[2 * width] +
                            eight * at[3 * width];
            }
    }
    if (words % 2) std::fill_n(tables, 4 * M, Floats{});
}

// sums[m] = row n of the signs, lane n, times the row m of x that `tables` are of
template <int M>
void multiply_signs(Floats* sums, const Matrix& signs, int row, int rows,
                    const Floats* tables) {
    int bytes = signs.row_bytes();
    Floats parts[2][M] = {};
    for (int first = 0; first < bytes; first += 64) {
        Floats words[TILE];
        load_words(words, signs.at(row, 0) + first, bytes, rows, bytes - first);
        int count = std::min(16, (bytes - first + 3) / 4);
        for (int i = 0; i < count; i++, tables += 8 * M)
#pragma GCC unroll 8
            for (int part = 0; part < 8; part++) {
                Words index = Words(words[i]) >> (4 * part);
#pragma GCC unroll 4
                for (int m = 0; m < M; m++)
                    parts[part % 2][m] += look_up(tables[part * M + m], index);
            }
    }
    for (int m = 0; m < M; m++) sums[m] = parts[0][m] + parts[1][m];
}

// f(number of rows, first row) for `count` rows, up to four at a time: the number is a
// constant in f
template <class F>
void by_fours(int count, F f) {
    for (int m = 0; m < count; m += 4) switch (std::min(4, count - m)) {
            case 1: f(std::integral_constant<int, 1>(), m); break;
            case 2: f(std::integral_constant<int, 2>(), m); break;
            case 3: f(std::integral_constant<int, 3>(), m); break;
            case 4: f(std::integral_constant<int, 4>(), m); break;
        }
}

}  // namespace
