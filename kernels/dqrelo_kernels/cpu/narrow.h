// SPDX-License-Identifier: Apache-2.0
//
// Products of a matrix with many rows of bf16 activations, for ops.cpp: sums of 16 rows of
// x and 16 rows of the matrix over 32 columns at a time, by the matrix unit of the CPU
// (AMX) or, without one, by vectors (AVX512-BF16). The left operand is x[m][k]; the right
// one has pairs of columns, right[k / 2][n] = (matrix[n][k], matrix[n][k + 1]), so that
// lane n of a sum is row n of the matrix.
#pragma once

#include "lanes.h"

namespace {

constexpr int SPAN = 32;              // columns of an operand
constexpr int OPERAND = TILE * SPAN;  // its numbers
constexpr int DEPTH = 384;            // columns laid out at a time, at most
constexpr int PAIR = 2 * TILE;        // rows of a matrix laid out at a time

// Rows of x as left operands: x[m / 16][k / 32][m % 16][k % 32]. Of less than 16, no
// more than there are.
inline int height_of(int count) { return count < TILE ? count : round_up(count, TILE); }

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
constexpr bool HAS_NARROW = true;

// ---- right operands: a matrix ---------------------------------------------------------

// Every 16 bits of which the highest one is set become +1, else -1.
inline __m512i plus_or_minus_one(__m512i signs) {
    __m512i highest = _mm512_set1_epi16(short(0x8000));
    __m512i minus_one = _mm512_set1_epi16(short(0xBF80));
    return _mm512_ternarylogic_epi64(signs, highest, minus_one, 0x6A);
}

// A block of signs: `words` words of a tile's rows from the first one on
inline void lay_out_signs(Bf16* out, const Run& tile, int first, int words) {
    for (int word = 0; word < words; word++, out += 2 * TILE) {
        Bf16* to = out;
        __m512i bits = __m512i(tile[first + word]);
#pragma GCC unroll 16
        for (int plane = 0; plane < 16; plane++, to += words * 2 * TILE) {
            __m512i moved = _mm512_slli_epi16(bits, 15 - plane);
            _mm512_store_si512(to, plus_or_minus_one(moved));
        }
    }
}

// The same of I4. The second half of a block starts behind 4 * `words` columns.
inline void lay_out_int4(Bf16* out, const Run& tile, int first, int words) {
    __m512i numbers = _mm512_load_si512(INT4_NUMBERS);
    __m512i order = _mm512_set4_epi32(0x0F0D0E0C, 0x0B090A08, 0x07050604, 0x03010200);
    for (int word = 0; word < words; word++, out += 4 * TILE) {
        __m512i bytes = _mm512_shuffle_epi8(__m512i(tile[first + word]), order);
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++) {
            Bf16* to = out + (part % 2 * 2 * words + part / 2) * 2 * TILE;
            __m512i moved = _mm512_srli_epi16(bytes, 4 * part);
            _mm512_store_si512(to, _mm512_permutexvar_epi16(moved, numbers));
        }
    }
}

// `columns` <= 256 columns of any matrix, in their order
inline void lay_out_columns(Bf16* out, const Matrix& matrix, int row, int rows, int k,
                            int columns) {
    alignas(64) Bf16 numbers[TILE][BLOCK + SPAN];
    for (int n = 0; n < rows; n++) {
        read_row(numbers[n], matrix, row + n, k, columns);
    }
    for (int first = 0; first < columns; first += SPAN, out += OPERAND) {
        __mmask32 lanes = columns - first < SPAN ? (1u << (columns - first)) - 1 : ~0u;
        Floats pairs[TILE];
        for (int n = 0; n < TILE; n++)
            pairs[n] = Floats(
                _mm512_maskz_loadu_epi16(n < rows ? lanes : 0, numbers[n] + first));
        transpose(pairs);
        std::memcpy(out, pairs, sizeof pairs);
    }
}

// Signs or I4 from column k on: whole blocks, and the last one of a row if it has whole
// words or may be `shifted`. Returns how many columns these are.
inline int lay_out_blocks(Bf16* out, const Matrix& matrix, int row, int k, int columns,
                          bool shifted) {
    constexpr int words_of_block = 8;
    bool is_sign = matrix.dtype == Matrix::SIGN;
    int block = is_sign ? BLOCK : I4_BLOCK, tail = columns % block;
    int width = is_sign ? (tail + 15) / 16 * 2 : (tail + 1) / 2;
    if (width % 4 && (is_sign || !shifted)) width = tail = 0;
    int first = matrix.bytes_of(k) / 4;
    int end = first + columns / block * words_of_block + (width + 3) / 4;
    Run tile(matrix, row);
    for (; first < end; first += words_of_block, out += block * TILE) {
        int words = std::min(words_of_block, end - first);
        is_sign ? lay_out_signs(out, tile, first, words)
                : lay_out_int4(out, tile, first, words);
    }
    return columns / block * block + tail;
}

// By how much the second half of the last block of I4 is shifted
inline int shift_of(int columns) {
    int width = (columns % I4_BLOCK + 1) / 2;
    return round_up(width, 4) - width;
}

// `columns` columns from k of `rows` rows from `row`, as right operands up to the padding
// of x. What is beyond the matrix is finite: it meets zeros of x, or is in lanes that
// nobody reads.
inline void lay_out(Bf16* out, const Matrix& matrix, int row, int rows, int k,
                    int columns, bool shifted) {
    if (int padding = columns % PADDING)
        std::memset(out + (columns - padding) * TILE, 0, PADDING * TILE * sizeof *out);
    int done = 0;
    if (matrix.dtype == Matrix::SIGN || matrix.dtype == I4)
        done = lay_out_blocks(out, matrix, row, k, columns, shifted);
    for (; done < columns; done += BLOCK)
        lay_out_columns(out + done * TILE, matrix, row, rows, k + done,
                        std::min(BLOCK, columns - done));
}

// Two columns of 16 rows side by side, as `columns` of them are in memory one after the
// other, become a right operand's.
inline void lay_out_columns(Bf16* out, const Bf16* in, int columns) {
    alignas(64) static constexpr uint16_t ORDER[] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i order = _mm512_load_si512(ORDER);
    for (int k = 0; k < columns; k += 2, in += 2 * TILE, out += 2 * TILE)
        _mm512_store_si512(out, _mm512_permutexvar_epi16(order, _mm512_loadu_si512(in)));
}

// ---- left operands: activations -------------------------------------------------------

// `count` rows of x, of `rows` <= 16 that an operand has; zeros are behind them and behind
// the columns.
inline void stage_left(Bf16* out, const Rows& x, const int32_t* numbers, int count,
                       int rows, int columns, int padded) {
    for (int m = 0; m < rows; m++, out += SPAN) {
        const char* in = m < count ? x.at(numbers[m]) : nullptr;
        for (int k = 0; k < padded; k += SPAN) {
            int n = in ? std::clamp(columns - k, 0, SPAN) : 0;
            Bf16* to = out + k * rows;
            if (n < SPAN) std::memset(to, 0, SPAN * sizeof *to);
            if (n) std::memcpy(to, in + 2 * k, 2 * n);
        }
    }
}

// ---- products -------------------------------------------------------------------------

// A matrix of activations as left operands
struct Left {
    Bf16* x;
    int count, padded;     // rows that there are, and columns as they are staged
    bool shifted = false;  // by shift_of() in the second half of the last block of I4

    int height() const { return height_of(count); }
    int rows() const { return std::min(count, TILE); }
    int64_t stride() const { return int64_t(TILE) * padded; }  // to the next 16 rows
    Left from(int column) const {
        return {x + column * rows(), count, padded, shifted};
    }
};

#if defined(__AMX_BF16__)
struct Products {
    // Setting the shapes takes as long as ten products, so keep them.
    static void configure(int height) {
        if (height == configured) return;
        configured = height;
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {};
        } config;
        for (int tile = 0; tile < 8; tile++) config.rows[tile] = height;
        config.rows[6] = config.rows[7] = TILE;
        asm volatile("" : : "r"(&config) : "memory");
        _tile_loadconfig(&config);
    }

    static void release() {
        configured = 0;
        _tile_release();
    }

    // c[m][i] += row m of x times the matrix whose right operands are right[i], over
    // `columns` columns
    static void multiply(Floats (*c)[2], const Bf16* const* right, const Left& x,
                         int columns) {
        constexpr int line = sizeof *c;
        configure(x.rows());
        asm volatile("" : : : "memory");  // GCC's tile loads do not say what they read
        for (int m = 0; m < x.height(); m += 2 * TILE, c += 2 * TILE) {
            bool two = m + TILE < x.height();
            _tile_loadd(0, c[0], line);
            _tile_loadd(1, c[0] + 1, line);
            if (two) {
                _tile_loadd(2, c[TILE], line);
                _tile_loadd(3, c[TILE] + 1, line);
            }
            const Bf16* left = x.x + m / TILE * x.stride();
            const Bf16 *first = right[0], *second = right[1];
            for (int k = 0; k < columns; k += SPAN) {
                _tile_loadd(6, first, 64);
                _tile_loadd(4, left, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, second, 64);
                _tile_dpbf16ps(1, 4, 7);
                if (two) {
                    _tile_loadd(5, left + x.stride(), 64);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
                first += OPERAND, second += OPERAND, left += x.rows() * SPAN;
            }
            _tile_stored(0, c[0], line);
            _tile_stored(1, c[0] + 1, line);
            if (two) {
                _tile_stored(2, c[TILE], line);
                _tile_stored(3, c[TILE] + 1, line);
            }
        }
        asm volatile("" : : : "memory");
    }

    static thread_local int configured;
};
thread_local int Products::configured = 0;

#else
struct Products {
    // c[m][i] += row m of x times the matrix whose right operands are right[i], over
    // `columns` columns
    static void multiply(Floats (*c)[2], const Bf16* const* right, const Left& x,
                         int columns) {
        int height = std::min(round_up(x.count, 8), x.height()), step = x.rows() * SPAN;
        for (int m = 0; m < height;) {
            const Bf16* left = x.x + m / TILE * x.stride() + m % TILE * SPAN;
            if (height - m >= 8) {  // whose sums, two of each, stay in registers
                multiply_rows<8>(c + m, right, left, step, columns), m += 8;
            } else if (height - m >= 4) {
                multiply_rows<4>(c + m, right, left, step, columns), m += 4;
            } else {
                multiply_rows<1>(c + m, right, left, step, columns), m++;
            }
        }
    }

    // The same for M rows of x, of which the next 32 columns are `step` numbers ahead.
    template <int M>
    static void multiply_rows(Floats (*c)[2], const Bf16* const* right,
                              const Bf16* left, int step, int columns) {
        __m512 sums[M][2];
        for (int m = 0; m < M; m++)
            for (int i = 0; i < 2; i++) sums[m][i] = __m512(c[m][i]);
        for (int k = 0; k < columns; k += SPAN, left += step)
            for (int pair = 0; pair < SPAN; pair += 2) {
                __m512bh matrix[2];
                for (int i = 0; i < 2; i++)
                    matrix[i] = __m512bh(_mm512_loadu_si512(right[i] + (k + pair) * TILE));
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) {
                    int numbers;
                    std::memcpy(&numbers, left + m * SPAN + pair, sizeof numbers);
                    __m512bh both = __m512bh(_mm512_set1_epi32(numbers));
                    for (int i = 0; i < 2; i++)
                        sums[m][i] = _mm512_dpbf16_ps(sums[m][i], both, matrix[i]);
                }
            }
        for (int m = 0; m < M; m++)
            for (int i = 0; i < 2; i++) c[m][i] = Floats(sums[m][i]);
    }
};
#endif

#else
constexpr bool HAS_NARROW = false;
#endif

}  // namespace
