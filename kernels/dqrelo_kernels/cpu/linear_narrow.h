// SPDX-License-Identifier: Apache-2.0
//
// The rows of a delta in bf16 (narrow.h), 32 rows of a matrix at a time.
#pragma once

#include "linear_units.h"
#include "workspace.h"

namespace {

struct InBf16 {
    const Work& work;

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
    void stage(const Unit& unit) const {
        const Group& group = *unit.group;
        int rows = std::min(TILE, height_of(group.count) - unit.first);
        stage_left(work.staged<Bf16>(group, unit.first), work.x, group.rows + unit.first,
                   std::min(TILE, group.count - unit.first), rows, work.columns,
                   work.padded);
        for (const Job& job : work.jobs) {
            if (job.group != &group || !job.rank) continue;
            int width = Work::padded_rank(job);
            Bf16* t = work.t<Bf16>(job) + unit.first * width;
            std::memset(t + (width - PADDING) * rows, 0, PADDING * rows * sizeof(Bf16));
        }
    }

    // c[m] += row m of x times `rows` <= 32 rows of the matrix
    static void multiply(Floats (*c)[2], const Matrix& matrix, int first, int rows,
                         const Left& x) {
        alignas(64) Bf16 buffer[2][DEPTH * TILE];
        const Bf16* right[] = {buffer[0], buffer[rows > TILE]};
        for (int k = 0, columns; k < matrix.columns; k += columns) {
            columns = matrix.columns - k <= DEPTH ? matrix.columns - k : BLOCK;
            for (int i = 0; i * TILE < rows; i++)
                lay_out(buffer[i], matrix, first + i * TILE,
                        std::min(TILE, rows - i * TILE), k, columns, x.shifted);
            Products::multiply(c, right, x.from(k), columns);
        }
    }

    Left x_of(const Group& group) const {
        return {work.staged<Bf16>(group, 0), group.count, work.padded};
    }
    Left t_of(const Job& job) const {
        return {work.t<Bf16>(job), job.group->count, Work::padded_rank(job), true};
    }

    // Ranks r to r + 16 of row m of t, which are shifted where int4 columns of B are.
    static void keep(const Left& t, const Job& job, int m, int r, Floats values) {
        int n = std::min(TILE, job.rank - r);
        int shift = job.entry[FACTOR_DTYPE] == I4 ? shift_of(job.rank) : 0;
        int half = job.rank - job.rank % I4_BLOCK / 2;  // of the last block
        if (!shift || r + n <= half) return put(t, m, r, values, n);
        for (int j = 0; j < n; j++)
            put(t, m, r + j + (r + j < half ? 0 : shift), Floats{} + values[j], 1);
    }

    // Ranks r to r + n of row m of t = values. They are in one operand.
    static void put(const Left& t, int m, int r, Floats values, int n) {
        Bf16* out = t.x + m / TILE * t.stride() + m % TILE * SPAN +
                    r / SPAN * SPAN * t.rows() + r % SPAN;
        store(out, BF16, values, n);
    }

    void shrink(const Unit& unit) const {
        const Job& job = *unit.job;
        int rows = Work::rows_of(unit, job.rank);
        Left x = x_of(*unit.group), t = t_of(job);
        Floats c[WINDOW][2], scale[] = {Floats{} + 1, Floats{} + 1};
        std::memset(c, 0, x.height() * sizeof *c);
        Matrix a = work.factor(job, LORA_A);
        multiply(c, a, unit.first, rows, x);
        if (job.entry[LORA_SCALE] != ABSENT)
            load_pair(scale, work.floats(job, LORA_SCALE) + unit.first, rows);
        for (int i = 0; i * TILE < rows; i++) {
            int r = unit.first + i * TILE;
            for (int m = 0; m < x.height() && work.part == WHOLE; m++)
                keep(t, job, m, r, c[m][i] * scale[i]);
            for (int m = 0; m < unit.group->count && work.part == SHRINK; m++)
                work.to_scratch(unit, m, r, c[m][i] * scale[i]);
        }
    }

    void fetch(const Unit& unit) const {
        const Job& job = *unit.job;
        Left t = t_of(job);
        for (int r = unit.first; r < std::min(unit.first + PAIR, job.rank); r += TILE)
            for (int m = 0; m < t.height(); m++)
                keep(t, job, m, r,
                     m < unit.group->count ? work.from_scratch(unit, m, r) : Floats{});
    }

    void expand(const Unit& unit) const {
        const Job& job = *unit.job;
        const Group& group = *unit.group;
        int rows = Work::rows_of(unit, job.size);
        int column = job.column + unit.first;
        for (int m = 0; m < group.count; m++)
            __builtin_prefetch(work.y.at(group.rows[m], column), 1);
        Left x = x_of(group);
        Floats c[WINDOW][2];
        std::memset(c, 0, x.height() * sizeof *c);
        for (int plane = 0; plane < planes_of(job.entry); plane++) {
            Floats more[WINDOW][2], scale[2], (*sums)[2] = plane ? more : c;
            if (plane) std::memset(more, 0, x.height() * sizeof *more);
            multiply(sums, work.signs(job, plane), unit.first, rows, x);
            const float* scales = work.floats(job, SCALE) + plane * job.size;
            load_pair(scale, scales + unit.first, rows);
            for (int m = 0; m < x.height(); m++)
                for (int i = 0; i < 2; i++)
                    c[m][i] = scale[i] * sums[m][i] + (plane ? c[m][i] : Floats{});
        }
        if (job.rank) multiply(c, work.factor(job, LORA_B), unit.first, rows, t_of(job));
        Floats bias[2] = {};
        if (job.entry[BIAS] != ABSENT)
            load_pair(bias, work.floats(job, BIAS) + unit.first, rows);
        for (int m = 0; m < group.count; m++)
            for (int i = 0; i * TILE < rows; i++)
                work.add(group.rows[m], column + i * TILE, c[m][i] + bias[i],
                         std::min(TILE, rows - i * TILE));
    }

    static void load_pair(Floats* out, const float* in, int rows) {
        out[0] = load(in, F32, std::min(TILE, rows));
        out[1] = rows > TILE ? load(in + TILE, F32, rows - TILE) : Floats{};
    }
#else
    void stage(const Unit&) const {}
    void shrink(const Unit&) const {}
    void fetch(const Unit&) const {}
    void expand(const Unit&) const {}
#endif
};

}  // namespace
