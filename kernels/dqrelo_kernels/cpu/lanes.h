// SPDX-License-Identifier: Apache-2.0
//
// Products of a matrix with few rows of bf16 activations, for ops.cpp: 16 rows of the
// matrix are the lanes of a vector, so that a sum stays in its register and has no lanes
// to add up. Against tiles (tiles.h), nothing is laid out as numbers in memory first.
//
// Signs and I4 are multiplied by integers: a row of x, or of A x, is rounded to a float
// times whole numbers up to 8191. Each of its numbers is wrong by at most 1 / 16382 of the
// largest one, where bf16 has rounded x by up to 1 / 512 of itself before.
#pragma once

#include "tiles.h"

#include <type_traits>

namespace {

// What the integers of a row of x stand for: times `scale`. NaN where x is not finite.
struct Row {
    float scale;
    int sum;  // of the integers
};

// Tables of a plane of signs with K columns: four for every word of 32 bits of a row
inline int tables_of(int columns) { return (columns + 31) / 32 * 4; }

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

#if defined(__AVX512VNNI__)

// Rows of x. A decode step of one delta on SmolLM2-135M takes 6.3 ms of one core for 4 rows
// and 8.2 for 5, by AMX 7.1 and 7.4 (Xeon with AMX).
#if defined(__AMX_BF16__)
constexpr int FEW = 4;
#else
constexpr int FEW = 8;
#endif
constexpr int MOST_COLUMNS = 32768;  // whose sums fit into 32 bits

// The rows of a tile of a matrix, four bytes of each at a time
class Run {
 public:
    Run(const Matrix& matrix, int row)
        : data(matrix.tile(row)),
          height(matrix.height(row)),
          lanes((1u << height) - 1),
          whole(matrix.row_bytes() / 4),
          rest(matrix.row_bytes() % 4) {}

    int count() const { return whole + (rest > 0); }

    // Lane n: bytes 4 i to 4 i + 3 of row n, clear where there are none
    Words operator[](int i) const {
        const char* in = data + 4 * i * height;
        if (i < whole) return Words(_mm512_maskz_loadu_epi32(lanes, in));
        // Four rows to each quarter of the register, then `rest` bytes to each lane
        Words lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        Words from = lane / 4 * rest + lane % 4;
        Words bytes = (lane % 4 * rest) * 0x01010101 + 0x03020100;
        Words clear = Words{} + uint32_t(0x80808080ull << 8 * rest);
        __mmask64 there = (1ull << rest * height) - 1;
        __m512i all = _mm512_maskz_loadu_epi8(there, in);
        all = _mm512_permutexvar_epi32(__m512i(from), all);
        return Words(_mm512_shuffle_epi8(all, __m512i(bytes | clear)));
    }

 private:
    const char* data;
    int height;
    __mmask16 lanes;
    int whole, rest;
};

// ---- rows of x as integers ------------------------------------------------------------

constexpr float LARGEST = 8191;  // four of them fit into 16 bits

inline Row row_of(const float* x, int columns) {
    Floats peak = {}, wrong = {};
    for (int k = 0; k < columns; k += TILE) {
        Floats numbers = load(x + k, F32, std::min(TILE, columns - k));
        peak = _mm512_max_ps(peak, _mm512_abs_ps(numbers));
        wrong += numbers * 0;
    }
    return {_mm512_reduce_max_ps(peak) / LARGEST + total(wrong), 0};
}

// Writes 16 more integers of a row; those of NaN mean nothing.
inline void round(int16_t* out, Floats numbers, Row& row) {
    __m512i integers = _mm512_cvtps_epi32(numbers * (row.scale > 0 ? 1 / row.scale : 0));
    row.sum += _mm512_reduce_add_epi32(integers);
    Halves halves = Halves(_mm512_cvtepi32_epi16(integers));
    std::memcpy(out, &halves, sizeof halves);
}

// ---- factors --------------------------------------------------------------------------

// A row of x as a factor of I4 expects it. Of the eight numbers of a word, number i and
// number i + 4 are a pair, which one shift of all halves of the word brings down.
inline Row put_in_pairs(int16_t* out, const float* x, int columns) {
    constexpr Words pairs = {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15};
    Row row = row_of(x, columns);
    for (int block = 0; block < columns; block += I4_BLOCK) {
        int end = std::min(I4_BLOCK, columns - block), width = (end + 1) / 2;
        alignas(64) float ordered[I4_BLOCK] = {};
        for (int i = 0; i < width; i++) ordered[2 * i] = x[block + i];
        for (int i = width; i < end; i++) ordered[2 * (i - width) + 1] = x[block + i];
        for (int i = 0; i < I4_BLOCK; i += TILE) {
            Floats numbers = load(ordered + i, F32, TILE);
            round(out + block + i, _mm512_permutexvar_ps(__m512i(pairs), numbers), row);
        }
    }
    return row;
}

// sums[m] += row n of the factor, lane n, times row m of x, of which the integers are
// `stride` apart
template <int M>
void multiply_pairs(Floats* sums, const Matrix& factor, int row, const int16_t* x,
                    int stride, const Row* rows) {
    __m512i low = _mm512_set1_epi16(15), parts[2][M] = {};
    Run words(factor, row);
    for (int i = 0; i < words.count(); i++, x += 8) {
        __m512i word = __m512i(words[i]);
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++) {
            __m512i value = _mm512_and_si512(_mm512_srli_epi16(word, 4 * part), low);
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                int pair;
                std::memcpy(&pair, x + m * stride + 2 * part, sizeof pair);
                parts[part % 2][m] = _mm512_dpwssd_epi32(parts[part % 2][m], value,
                                                         _mm512_set1_epi32(pair));
            }
        }
    }
    for (int m = 0; m < M; m++) {  // what is stored is 8 more than the number
        Integers sum = Integers(parts[0][m]) + Integers(parts[1][m]) - 8 * rows[m].sum;
        sums[m] += __builtin_convertvector(sum, Floats) * rows[m].scale;
    }
}

// Number `part` of those in each lane
template <int DTYPE>
Floats number(Words word, int part) {
    if (DTYPE == F32) return Floats(word);
    if (DTYPE == BF16) return Floats(part ? word & 0xFFFF0000 : word << 16);
    if (DTYPE == I8) {
        Integers byte = Integers(word << (24 - 8 * part)) >> 24;
        return __builtin_convertvector(byte, Floats);
    }
    Words half = part ? word >> 16 : word & 0xFFFF;  // as in load()
    Words number = Words(Floats((half & 0x7FFF) << 13) * 0x1p112f);
    Words largest = Words((half & 0x7C00) == 0x7C00) & 0x7F800000;
    return Floats((half & 0x8000) << 16 | number | largest);
}

// The same with factors of another dtype. Behind the columns of x there are zeros.
template <int M, int DTYPE>
void multiply_floats(Floats* sums, const Matrix& factor, int row, const float* x,
                     int stride) {
    constexpr int numbers = 4 / (DTYPE == I8 ? 1 : DTYPE == F32 ? 4 : 2);
    Floats parts[2][M] = {};
    Run words(factor, row);
    for (int i = 0; i < words.count(); i++, x += numbers) {
        Words word = words[i];
#pragma GCC unroll 4
        for (int part = 0; part < numbers; part++) {
            Floats value = number<DTYPE>(word, part);
#pragma GCC unroll 4
            for (int m = 0; m < M; m++)
                parts[part % 2][m] += value * x[m * stride + part];
        }
    }
    for (int m = 0; m < M; m++) sums[m] += parts[0][m] + parts[1][m];
}

template <int M>
void multiply_floats(Floats* sums, const Matrix& factor, int row, const float* x,
                     int stride) {
    switch (factor.dtype) {
        case F32: return multiply_floats<M, F32>(sums, factor, row, x, stride);
        case BF16: return multiply_floats<M, BF16>(sums, factor, row, x, stride);
        case F16: return multiply_floats<M, F16>(sums, factor, row, x, stride);
        case I8: return multiply_floats<M, I8>(sums, factor, row, x, stride);
    }
}

// ---- signs ----------------------------------------------------------------------------

// The table of part p of word i has at 2 v + h the sum of the four integers that stand for
// bits 4 p to 4 p + 3 of half h of the word, + where v has its bit set and - where clear.
// Rows of x are `stride` apart, and tables[i * 4 + p] of row m is M * (i * 4 + p) + m.
template <int M>
void fill_tables(__m512i* tables, const int16_t* x, int stride, int columns) {
    alignas(64) static constexpr auto ones = [] {
        struct {
            int16_t of[4][32];
        } out = {};
        for (int bit = 0; bit < 4; bit++)
            for (int i = 0; i < 32; i++) out.of[bit][i] = i >> (bit + 1) & 1 ? 1 : -1;
        return out;
    }();
    int words = (columns + 15) / 16;
    for (int word = 0; word < words; word += 2) {
        int block = word / 16 * BLOCK, width = std::min(16, words - word / 16 * 16);
        unsigned there = word + 1 < words ? ~0u : 0xFFFF;  // halves of the word
        for (int part = 0; part < 4; part++)
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                __m512i sum = {};
                for (int bit = 0; bit < 4; bit++) {
                    unsigned pair;
                    std::memcpy(&pair,
                                x + m * stride + block + (part * 4 + bit) * width +
                                    word % 16,
                                sizeof pair);
                    __m512i both = _mm512_set1_epi32(pair & there);
                    sum = _mm512_add_epi16(
                        sum, _mm512_mullo_epi16(both, _mm512_load_si512(ones.of[bit])));
                }
                *tables++ = sum;
            }
    }
}

// sums[m] = row n of the signs, lane n, times the row m of x that `tables` are of
template <int M>
void multiply_signs(Floats* sums, const Matrix& signs, int row, const __m512i* tables,
                    const Row* rows) {
    __m512i ones = _mm512_set1_epi16(1), nibble = _mm512_set1_epi16(0x1E);
    __m512i half = _mm512_set1_epi32(1 << 16), parts[2][M] = {};
    Run words(signs, row);
    for (int i = 0; i < words.count(); i++, tables += 4 * M) {
        __m512i word = __m512i(words[i]);
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++) {
            __m512i index = part ? _mm512_srli_epi16(word, std::max(0, 4 * part - 1))
                                 : _mm512_slli_epi16(word, 1);
            constexpr int and_or = 0xEA;  // (index & nibble) | half
            index = _mm512_ternarylogic_epi32(index, nibble, half, and_or);
#pragma GCC unroll 4
            for (int m = 0; m < M; m++)
                parts[part % 2][m] = _mm512_dpwssd_epi32(
                    parts[part % 2][m],
                    _mm512_permutexvar_epi16(index, tables[part * M + m]), ones);
        }
    }
    for (int m = 0; m < M; m++) {
        Integers sum = Integers(parts[0][m]) + Integers(parts[1][m]);
        sums[m] = __builtin_convertvector(sum, Floats) * rows[m].scale;
    }
}

// ---- a step -----------------------------------------------------------------------------

// The rows of x of one delta, in memory of a thread
struct Few {
    int count, columns, padded;  // rows, and numbers of a row, as they are and in memory
    __m512i* tables;
    float* x;
    Row* rows;  // as integers, which the tables are of

    Few(char* memory, int count, int columns, int padded)
        : count(count),
          columns(columns),
          padded(padded),
          tables(reinterpret_cast<__m512i*>(memory)),
          x(reinterpret_cast<float*>(tables + count * tables_of(columns))),
          rows(reinterpret_cast<Row*>(x + count * padded)) {}

    // `integers` is scratch, [count, padded].
    void stage(const Rows& in, const int32_t* numbers, int16_t* integers) {
        for (int m = 0; m < count; m++) {
            float* row = x + m * padded;
            read(row, in.at(numbers[m]), in.dtype, columns);
            std::memset(row + columns, 0, (padded - columns) * sizeof(float));
            rows[m] = row_of(row, columns);
            for (int k = 0; k < padded; k += TILE)
                round(integers + m * padded + k, load(row + k, F32, TILE), rows[m]);
        }
        by_fours(count, [&](auto M, int m) {
            fill_tables<M>(tables + m * tables_of(columns), integers + m * padded,
                           padded, columns);
        });
    }

    // c[i] += scales * (row n of the signs, lane n, times row m + i)
    template <int M>
    void multiply(Floats* c, const Matrix& signs, int row, Floats scales, int m) const {
        Floats sums[M];
        multiply_signs<M>(sums, signs, row, tables + m * tables_of(columns), rows + m);
        for (int i = 0; i < M; i++) c[i] += scales * sums[i];
    }
};

// Rows of x or of A x put in pairs: the last ones that a factor of I4 asked for
struct Pairs {
    int16_t* integers;
    const float* x = nullptr;
    Row rows[FEW] = {};

    void stage(const Matrix& factor, const float* x, int stride, int count) {
        if (factor.dtype != I4 || this->x == x) return;
        this->x = x;
        for (int m = 0; m < count; m++)
            rows[m] = put_in_pairs(integers + m * stride, x + m * stride, factor.columns);
    }

    // c[i] += row n of a factor, lane n, times row m + i of x, as staged
    template <int M>
    void multiply(Floats* c, const Matrix& factor, int row, const float* x, int stride,
                  int m) const {
        if (factor.dtype == I4)
            multiply_pairs<M>(c, factor, row, integers + m * stride, stride, rows + m);
        else
            multiply_floats<M>(c, factor, row, x + m * stride, stride);
    }
};

#else
constexpr int FEW = 0, MOST_COLUMNS = 0;
struct Pairs {
    int16_t* integers;
};
#endif

}  // namespace
