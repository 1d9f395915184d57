// SPDX-License-Identifier: Apache-2.0
//
// The rows of a delta by lanes (lanes.h). Each thread has its own copy of x, of A x and of
// the tables: to fetch them from the other core's cache would take longer than to make
// them.
#pragma once

#include "linear_units.h"

namespace {

struct Own {  // of a thread
    char* memory;  // a `Few` of each group
    Pairs pairs;
};

struct ByLanes {
    const Work& work;
    Own& own;

#if defined(__AVX512VNNI__)
    Few few(const Group& group) const {
        return {own.memory + group.x, group.count, work.columns, work.padded};
    }

    void stage(const Unit& unit) const {
        few(*unit.group).stage(work.x, unit.group->rows, own.pairs.integers);
    }

    void shrink(const Unit& unit) const {
        const Job& job = *unit.job;
        const float* x = few(*unit.group).x;
        Matrix a = work.factor(job, LORA_A);
        Floats scale = Floats{} + 1;
        if (job.entry[LORA_SCALE] != ABSENT)
            scale = load(work.floats(job, LORA_SCALE) + unit.first, F32,
                         Work::rows_of(unit, job.rank));
        own.pairs.stage(a, x, work.padded, unit.group->count);
        by_fours(unit.group->count, [&](auto M, int m) {
            Floats sums[M] = {};
            own.pairs.multiply<M>(sums, a, unit.first, x, work.padded, m);
            for (int i = 0; i < M; i++)
                if (work.part == WHOLE)
                    store(work.t<float>(job, m + i) + unit.first, F32, sums[i] * scale,
                          TILE);
                else
                    work.to_scratch(unit, m + i, unit.first, sums[i] * scale);
        });
    }

    void fetch(const Unit& unit) const {
        for (int m = 0; m < unit.group->count; m++)
            store(work.t<float>(*unit.job, m) + unit.first, F32,
                  work.from_scratch(unit, m, unit.first), TILE);
    }

    void expand(const Unit& unit) const {
        const Job& job = *unit.job;
        const Group& group = *unit.group;
        Few x = few(group);
        Matrix b = work.factor(job, LORA_B);
        int rows = Work::rows_of(unit, job.size);
        Floats bias = {};
        if (job.entry[BIAS] != ABSENT)
            bias = load(work.floats(job, BIAS) + unit.first, F32, rows);
        if (job.rank)
            own.pairs.stage(b, work.t<float>(job), Work::padded_rank(job), group.count);
        by_fours(group.count, [&](auto M, int m) {
            Floats c[M] = {};
            for (int plane = 0; plane < planes_of(job.entry); plane++) {
                const float* scale = work.floats(job, SCALE) + plane * job.size;
                x.multiply<M>(c, work.signs(job, plane), unit.first,
                              load(scale + unit.first, F32, rows), m);
            }
            if (job.rank)
                own.pairs.multiply<M>(c, b, unit.first, work.t<float>(job),
                                      Work::padded_rank(job), m);
            for (int i = 0; i < M; i++)
                work.add(group.rows[m + i], job.column + unit.first, c[i] + bias, rows);
        });
    }
#else
    void stage(const Unit&) const {}
    void shrink(const Unit&) const {}
    void fetch(const Unit&) const {}
    void expand(const Unit&) const {}
#endif
};

}  // namespace
