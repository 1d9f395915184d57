// SPDX-License-Identifier: Apache-2.0
//
// The ops of reference.py for CPUs, in plain C++17. cpu.py builds and calls them.
//
// A linear computes t = A x for all rows of a delta, then the sums S x, to which B t and
// the bias are added before they are rounded, once, into y. There are three ways
// (cpu_linear.h), which one is a question of how many rows the delta has in the step:
// few by lanes, more by AMX where the CPU has it, else by tiles.
//
// Numbers are bf16 where the activations are, the factors are exact in it and the CPU
// multiplies bf16, else float. All sums are float; a bf16 t is two numbers, what it is
// rounded to and the rest.
//
// The sum behind an element of y depends on its row of x, on its delta and on whether
// that has few rows, and not on the rows of others, on where a group is cut, or on the
// threads.

#include "cpu_linear.h"

#include <cmath>

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// ---- embedding and norm -------------------------------------------------------------

int count_rows(const int32_t* slots, int capacity) {
    return std::find_if(slots, slots + capacity, [](int slot) { return slot < 0; }) -
           slots;
}

constexpr int TOGETHER = 8;  // rows of a delta for which a row of A is read once

// y[m] += row ids[m] of a matrix of `size` rows, for `count` <= TOGETHER rows
void embed(char* const* y, int dtype, const int64_t* ids, int count, int columns,
           int size, const Deltas& deltas, const int64_t* entry) {
    int rank = rank_of(entry), factors = entry[FACTOR_DTYPE];
    auto b = reinterpret_cast<float*>(workspace(count * (rank + 1) * sizeof(float)));
    for (int m = 0; m < count && rank; m++) {
        float* row = b + m * (rank + 1);
        read(row, Matrix{deltas.at(entry, LORA_B), rank, factors}.at(ids[m], 0),
             factors, rank);
        if (entry[LORA_SCALE] == ABSENT) continue;
        for (int r = 0; r < rank; r++) row[r] *= deltas.floats(entry, LORA_SCALE)[r];
    }
    for (int k = 0; k < columns; k += BLOCK) {
        int width = std::min(BLOCK, columns - k);
        float change[TOGETHER][BLOCK] = {}, part[BLOCK] = {};
        auto add = [&](int m, float factor) {
            for (int i = 0; i < BLOCK; i++) change[m][i] += factor * part[i];
        };
        for (int plane = 0; plane < planes_of(entry); plane++)
            for (int m = 0; m < count; m++) {
                const char* words =
                    deltas.signs(entry, plane, size, columns).at(ids[m], k);
                unpack(part, reinterpret_cast<const uint16_t*>(words),
                       (width + 15) / 16);
                add(m, deltas.floats(entry, SCALE)[int64_t(plane) * size + ids[m]]);
            }
        for (int r = 0; r < rank; r++) {
            read(part, Matrix{deltas.at(entry, LORA_A), columns, factors}.at(r, k),
                 factors, width);
            for (int m = 0; m < count; m++) add(m, b[m * (rank + 1) + r]);
        }
        for (int m = 0; m < count; m++)
            for (int i = 0; i < width; i += 16) {
                int numbers = std::min(16, width - i);
                char* out = y[m] + (k + i) * size_of(dtype);
                store(out, dtype,
                      load(out, dtype, numbers) + load(change[m] + i, F32, 16),
                      numbers);
            }
    }
}

// y = x / rms(x) * weight + bias, of x less its mean if it is `centred`
void normalise(char* y, int y_dtype, const char* x, int x_dtype, int columns,
               const float* weight, const float* bias, float eps, bool centred) {
    auto at = [&](int i, int part) {
        return load(x + i * size_of(x_dtype), x_dtype, part);
    };
    Floats sum = {}, squares = {};
    for (int i = 0; centred && i < columns; i += 16)
        sum += at(i, std::min(16, columns - i));
    float mean = total(sum) / columns;
    for (int i = 0; i < columns; i += 16) {
        int part = std::min(16, columns - i);
        Floats number = at(i, part) - mean;
        for (int k = part; k < 16; k++) number[k] = 0;
        squares += number * number;
    }
    float factor = 1 / std::sqrt(total(squares) / columns + eps);
    for (int i = 0; i < columns; i += 16) {
        int part = std::min(16, columns - i);
        Floats number = (at(i, part) - mean) * factor * load(weight + i, F32, part);
        if (bias) number += load(bias + i, F32, part);
        store(y + i * size_of(y_dtype), y_dtype, number, part);
    }
}

}  // namespace

// ---- called by cpu.py -----------------------------------------------------------------

extern "C" {

// Whether this process may use what the library was built for. Call it before the ops.
int dqrelo_prepare() {
#if defined(__AMX_BF16__)
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
#else
    return 1;
#endif
}

void dqrelo_linear(char* y, int64_t y_stride, int y_dtype, char* x, int64_t x_stride,
                   int x_dtype, int columns, const char* arena, const int64_t* table,
                   int slots, int slices, const int32_t* ends, const int32_t* rows,
                   const int32_t* starts, int threads) {
    Deltas deltas = {arena, table, slots, slices};
    for (int begin = 0; begin < starts[slots]; begin += WINDOW) {
        Linear op({y, y_stride, y_dtype}, {x, x_stride, x_dtype}, columns, deltas,
                  ends);
        op.run(rows, starts, begin, std::min(begin + WINDOW, starts[slots]), threads);
    }
}

void dqrelo_embedding(char* y, int64_t y_stride, int y_dtype, const char* ids,
                      int id_bytes, int columns, int size, const char* arena,
                      const int64_t* table, const int32_t* rows, const int32_t* slots,
                      int capacity, int threads) {
    Deltas deltas = {arena, table, 0, 1};
    int count = count_rows(slots, capacity);
#pragma omp parallel for num_threads(threads)
    for (int first = 0; first < count; first += TOGETHER) {
        int end = std::min(first + TOGETHER, count);
        for (int i = first, next; i < end; i = next) {
            char* out[TOGETHER];
            int64_t id[TOGETHER] = {};
            for (next = i; next < end && slots[next] == slots[i]; next++) {
                std::memcpy(&id[next - i], ids + int64_t(rows[next]) * id_bytes,
                            id_bytes);
                out[next - i] = y + rows[next] * y_stride * size_of(y_dtype);
            }
            embed(out, y_dtype, id, next - i, columns, size, deltas,
                  deltas.entry(slots[i]));
        }
    }
}

void dqrelo_norm(char* y, int64_t y_stride, int64_t y_inner, int y_dtype, char* x,
                 int64_t x_stride, int64_t x_inner, int x_dtype, int inner, int columns,
                 const char* arena, const int64_t* table, const int32_t* rows,
                 const int32_t* slots, int capacity, float eps, int centred,
                 int threads) {
    Deltas deltas = {arena, table, 0, 1};
    int count = count_rows(slots, capacity);
#pragma omp parallel for num_threads(threads) if (int64_t(count) * inner * columns > \
                                                      1 << 16)
    for (int i = 0; i < count; i++) {
        const int64_t* entry = deltas.entry(slots[i]);
        if (entry[WEIGHT] == ABSENT) continue;
        for (int g = 0; g < inner; g++) {
            char* out = y + (rows[i] * y_stride + g * y_inner) * size_of(y_dtype);
            const char* in = x + (rows[i] * x_stride + g * x_inner) * size_of(x_dtype);
            normalise(out, y_dtype, in, x_dtype, columns, deltas.floats(entry, WEIGHT),
                      entry[BIAS] == ABSENT ? nullptr : deltas.floats(entry, BIAS), eps,
                      centred);
        }
    }
}
}
