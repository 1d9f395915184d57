// SPDX-License-Identifier: Apache-2.0
//
// The rows of a delta by tiles of float (tiles.h), for any CPU and all dtypes.
#pragma once

#include "linear_units.h"
#include "workspace.h"

namespace {

struct ByTiles {
    const Work& work;

    void stage(const Unit& unit) const {
        const Group& group = *unit.group;
        stage_rows(work.staged<float>(group, unit.first), work.x, group.rows + unit.first,
                   std::min(TILE, group.count - unit.first), work.columns,
                   work.padded);
    }

    // c[m + n] += row `unit.first` + n of the matrix * row m of x, as staged
    static void multiply(Floats* c, const Unit& unit, const Matrix& matrix, int rows,
                         const float* x, int padded) {
        alignas(64) float tile[TILE * STRIDE];
        int count = unit.group->count;
        for (int k = 0; k < matrix.columns; k += CHUNK) {
            fill(tile, matrix, unit.first, rows, k);
            for (int m = 0; m < count; m += TILE)
                multiply_tile(c + m, tile, x + int64_t(m) * padded,
                              std::min(TILE, count - m), padded, k,
                              std::min(CHUNK, padded - k));
        }
    }

    // t = scale * A x for a tile of rows of A
    void shrink(const Unit& unit) const {
        Floats c[WINDOW];
        const Job& job = *unit.job;
        int rows = Work::rows_of(unit, job.rank), count = unit.group->count;
        std::fill_n(c, round_up(count, TILE), Floats{});
        multiply(c, unit, work.factor(job, LORA_A), rows,
                 work.staged<float>(*unit.group, 0), work.padded);
        if (job.entry[LORA_SCALE] != ABSENT)
            multiply_rows(c, count, work.floats(job, LORA_SCALE) + unit.first, rows);
        for (int m = 0; m < count; m += TILE) {
            transpose(c + m);
            int rows = std::min(TILE, count - m);
            if (work.part == WHOLE) keep(work.t<float>(job, m), c + m, unit, rows);
            for (int i = m; work.part == SHRINK && i < m + rows; i++)
                work.to_scratch(unit, i, unit.first, c[i]);
        }
    }

    void fetch(const Unit& unit) const {
        Floats c[TILE];
        for (int m = 0, rows; m < unit.group->count; m += rows) {
            rows = std::min(TILE, unit.group->count - m);
            for (int i = 0; i < rows; i++)
                c[i] = work.from_scratch(unit, m + i, unit.first);
            keep(work.t<float>(*unit.job, m), c, unit, rows);
        }
    }

    // Ranks `unit.first` to `unit.first` + 16 of t for some rows
    static void keep(float* t, const Floats* values, const Unit& unit, int rows) {
        int last = unit.first + TILE, rank = unit.job->rank;
        int width = Work::padded_rank(*unit.job);
        for (int m = 0; m < rows; m++, t += width) {
            store(t + unit.first, F32, values[m], TILE);
            if (last >= rank) std::fill(t + last, t + width, 0.0f);
        }
    }

    // c[m + n] *= scale[n] for the first `rows` n, all m
    static void multiply_rows(Floats* c, int count, const float* scale, int rows) {
        for (int m = 0; m < count; m += TILE)
            for (int n = 0; n < rows; n++) c[m + n] *= scale[n];
    }

    // y += sum of scale * S x + B t + bias for a tile of rows of S and B
    void expand(const Unit& unit) const {
        Floats c[WINDOW];
        const Job& job = *unit.job;
        int rows = Work::rows_of(unit, job.size), count = unit.group->count;
        int padded_count = round_up(count, TILE);
        std::fill_n(c, padded_count, Floats{});
        for (int plane = 0; plane < planes_of(job.entry); plane++) {
            Floats sums[WINDOW];
            std::fill_n(sums, padded_count, Floats{});
            multiply(sums, unit, work.signs(job, plane), rows,
                     work.staged<float>(*unit.group, 0), work.padded);
            const float* scale = work.floats(job, SCALE) + plane * job.size;
            multiply_rows(sums, padded_count, scale + unit.first, rows);
            for (int i = 0; i < padded_count; i++) c[i] += sums[i];
        }
        if (job.rank)
            multiply(c, unit, work.factor(job, LORA_B), rows, work.t<float>(job),
                     Work::padded_rank(job));
        if (job.entry[BIAS] != ABSENT) {
            const float* bias = work.floats(job, BIAS) + unit.first;
            for (int m = 0; m < count; m += TILE)
                for (int n = 0; n < rows; n++) c[m + n] += bias[n];
        }
        for (int m = 0; m < count; m += TILE) {
            transpose(c + m);
            for (int i = m; i < std::min(m + TILE, count); i++)
                work.add(unit.group->rows[i], job.column + unit.first, c[i], rows);
        }
    }
};

}  // namespace
