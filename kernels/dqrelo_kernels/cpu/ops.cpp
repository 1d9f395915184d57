// SPDX-License-Identifier: Apache-2.0
//
// The ops of reference.py for CPUs, in plain C++17. build.py builds them, torch calls them.
//
// A linear computes t = A x for all rows of a delta, then the sums S x, to which B t and
// the bias are added before they are rounded, once, into y. There are three ways
// (linear.h), which one is a question of how many rows the delta has in the step:
// few by lanes, more in bf16 where the CPU multiplies it, else by tiles of float.
//
// Lanes multiply integers that stand for bf16 activations. Of many rows numbers are bf16,
// t as well, where the activations are and the factors are exact in it; else float. All
// other sums are float.
//
// The sum behind an element of y depends on its row of x, on its delta and on whether
// that has few rows, and not on the rows of others, on where a group is cut, or on the
// threads.

#include "torch.h"

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
    int rank = rank_of(entry, RANK_B), factors = entry[FACTOR_DTYPE];
    auto b = reinterpret_cast<float*>(workspace(count * (rank + 1) * sizeof(float)));
    for (int m = 0; m < count && rank; m++) {
        float* row = b + m * (rank + 1);
        Matrix matrix = {deltas.at(entry, LORA_B), size, rank, factors};
        for (int r = 0; r < rank; r += BLOCK)
            read_row(row + r, matrix, ids[m], r, std::min(BLOCK, rank - r));
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
                read_row(part, deltas.signs(entry, plane, size, columns), ids[m], k,
                         width);
                add(m, deltas.floats(entry, SCALE)[int64_t(plane) * size + ids[m]]);
            }
        for (int r = 0; r < rank; r++) {
            Matrix matrix = {deltas.at(entry, LORA_A), rank, columns, factors};
            read_row(part, matrix, r, k, width);
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

// ---- called by torch: arguments as in ops.py -----------------------------------------

Rows rows_of(const Tensor& numbers) {
    return {numbers.data(), numbers.stride(0), numbers.numbers()};
}

// For all rows; `ends` are those of the slices of y, and y is nothing to a SHRINK.
void linear(Part part, Rows y, Tensor scratch, Tensor x, Tensor arena, Tensor table,
            const int32_t* ends, Tensor rows, Tensor starts) {
    Deltas deltas = {arena.data(), table.data<int64_t>(), int(table.size(0)),
                     int(table.size(1))};
    auto start = starts.data<int32_t>();
    for (int begin = 0, all = start[deltas.slots]; begin < all; begin += WINDOW) {
        Linear op(part, y, rows_of(scratch), rows_of(x), x.size(1), deltas, ends);
        op.run(rows.data<int32_t>(), start, begin, std::min(begin + WINDOW, all),
               omp_get_max_threads());
    }
}

void delta_linear(StableIValue* stack, uint64_t, uint64_t) {
    Arguments<10> at(stack);
    if (!*at[9].data<int32_t>()) return;
    linear(WHOLE, rows_of(at[0]), at[1], at[2], at[3], at[4], at[5].data<int32_t>(),
           at[6], at[8]);
}

void delta_shrink(StableIValue* stack, uint64_t, uint64_t) {
    Arguments<8> at(stack);
    if (!*at[7].data<int32_t>()) return;
    linear(SHRINK, {}, at[0], at[1], at[2], at[3], nullptr, at[4], at[6]);
}

void delta_expand(StableIValue* stack, uint64_t, uint64_t) {
    Arguments<10> at(stack);
    if (!*at[9].data<int32_t>()) return;
    linear(EXPAND, rows_of(at[0]), at[1], at[2], at[3], at[4], at[5].data<int32_t>(),
           at[6], at[8]);
}

void expert_linear(StableIValue* stack, uint64_t, uint64_t) {
    Arguments<4> at(stack);
    Tensor y = at[0], x = at[1], weight = at[2];
    auto ends = at[3].data<int32_t>();
    Experts experts = {weight.data(),       int(weight.size(0)), int(weight.size(1)),
                       int(weight.size(2)), weight.numbers(),    at.value<bool>(4)};
    if (experts.rows % PAIR || experts.columns % PAIR)
        throw std::invalid_argument(
            "dqrelo: the matrices of experts must have multiples of 32 rows and columns");
    for (int begin = 0, all = ends[experts.count - 1]; begin < all; begin += WINDOW) {
        ExpertLinear op(rows_of(y), rows_of(x), experts);
        op.run(ends, begin, std::min(begin + WINDOW, all));
    }
}

void delta_embedding(StableIValue* stack, uint64_t, uint64_t) {
    Arguments<8> at(stack);
    if (!*at[7].data<int32_t>()) return;
    Tensor y = at[0], ids = at[1];
    Rows out = rows_of(y);
    int id_bytes = ids.dtype() == aoti_torch_dtype_int64() ? 8 : 4;
    Deltas deltas = {at[2].data(), at[3].data<int64_t>(), 0, 1};
    int columns = y.size(1), size = at[4].data<int32_t>()[1];
    auto rows = at[5].data<int32_t>(), slots = at[6].data<int32_t>();
    int count = count_rows(slots, at[5].size(0));
#pragma omp parallel for
    for (int first = 0; first < count; first += TOGETHER) {
        int end = std::min(first + TOGETHER, count);
        for (int i = first, next; i < end; i = next) {
            char* to[TOGETHER];
            int64_t id[TOGETHER] = {};
            for (next = i; next < end && slots[next] == slots[i]; next++) {
                std::memcpy(&id[next - i],
                            ids.data() + rows[next] * ids.stride(0) * id_bytes, id_bytes);
                to[next - i] = out.at(rows[next]);
            }
            embed(to, out.dtype, id, next - i, columns, size, deltas,
                  deltas.entry(slots[i]));
        }
    }
}

void delta_norm(StableIValue* stack, uint64_t, uint64_t) {
    Arguments<7> at(stack);
    if (!*at[6].data<int32_t>()) return;
    Tensor y = at[0], x = at[1];
    Rows out = rows_of(y), in = rows_of(x);
    bool has_groups = y.dim() == 3, centred = at.value<bool>(8);
    int groups = has_groups ? y.size(1) : 1, columns = y.size(y.dim() - 1);
    int64_t y_group = has_groups ? y.stride(1) : 0, x_group = has_groups ? x.stride(1) : 0;
    float eps = at.value<double>(7);
    Deltas deltas = {at[2].data(), at[3].data<int64_t>(), 0, 1};
    auto rows = at[4].data<int32_t>(), slots = at[5].data<int32_t>();
    int count = count_rows(slots, at[4].size(0));
#pragma omp parallel for if (int64_t(count) * groups * columns > 1 << 16)
    for (int i = 0; i < count; i++) {
        const int64_t* entry = deltas.entry(slots[i]);
        if (entry[WEIGHT] == ABSENT) continue;
        const float* bias =
            entry[BIAS] == ABSENT ? nullptr : deltas.floats(entry, BIAS);
        for (int g = 0; g < groups; g++)
            normalise(out.at(rows[i], g * y_group), out.dtype,
                      in.at(rows[i], g * x_group), in.dtype, columns,
                      deltas.floats(entry, WEIGHT), bias, eps, centred);
    }
}

TorchLibraryHandle registered = nullptr;

}  // namespace

// ---- called by build.py -----------------------------------------------------------------

extern "C" {

// Whether this process may use what the library was built for. Call it before the next.
int dqrelo_prepare() {
#if defined(__AMX_BF16__)
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
#else
    return 1;
#endif
}

// Give torch the ops, in place of those in Python; returns 0 if it does not take them.
int dqrelo_register() {
    if (aoti_torch_library_init_impl("dqrelo", "CPU", __FILE__, __LINE__, &registered))
        return 0;
    return !aoti_torch_library_impl(registered, "delta_linear_", delta_linear) &&
           !aoti_torch_library_impl(registered, "delta_shrink_", delta_shrink) &&
           !aoti_torch_library_impl(registered, "delta_expand_", delta_expand) &&
           !aoti_torch_library_impl(registered, "expert_linear_", expert_linear) &&
           !aoti_torch_library_impl(registered, "delta_embedding_", delta_embedding) &&
           !aoti_torch_library_impl(registered, "delta_norm_", delta_norm);
}

// Take them back.
void dqrelo_unregister() {
    if (registered) aoti_torch_delete_library_object(registered);
    registered = nullptr;
}
}
