// SPDX-License-Identifier: Apache-2.0
//
// What the op of a linear layer has to do: the rows of each delta times its matrices, in
// units that one thread does at a time. linear.h plans them; each way of computing
// (linear_lanes.h, linear_narrow.h, linear_tiles.h) stages x, makes A x and adds to y.
#pragma once

#include "narrow.h"
#include "table.h"

#include <vector>

namespace {

// By lanes (linear_lanes.h), in bf16 (linear_narrow.h), or by tiles of float
// (linear_tiles.h)
enum Way { LANES, NARROW, FLOATS };

// All of the op; or A x into scratch; or the rest of it, with A x from there
enum Part { WHOLE, SHRINK, EXPAND };

struct Group {  // rows of one delta
    const int32_t* rows;
    int count;
    Way way;
    size_t x;  // staged rows, bytes in the workspace; for LANES, in each thread's own
};

struct Job {  // one matrix of one delta
    const Group* group;
    const int64_t* entry;
    int rank;
    int first;   // column of scratch
    int column;  // of y
    int size;    // rows of the matrix
    size_t t;    // A x in the workspace, staged as x is: [rows, padded rank]
};

struct Unit {  // what one thread does at a time
    const Group* group;
    const Job* job;
    int first;  // row of the tile
};

// The units of a call share it.
struct Work {
    const Part part;
    const Rows y, scratch, x;
    const int columns;
    const Deltas& deltas;
    const int padded;  // columns, as they are staged
    char* memory = nullptr;
    std::vector<Group> groups;
    std::vector<Job> jobs;

    template <class T>
    T* staged(const Group& group, int m) const {
        return reinterpret_cast<T*>(memory + group.x) + int64_t(m) * padded;
    }
    static int padded_rank(const Job& job) { return round_up(job.rank, PADDING); }
    template <class T>
    T* t(const Job& job, int m = 0) const {
        return reinterpret_cast<T*>(memory + job.t) + int64_t(m) * padded_rank(job);
    }
    Matrix signs(const Job& job, int plane) const {
        return deltas.signs(job.entry, plane, job.size, columns);
    }
    Matrix factor(const Job& job, Field which) const {
        int dtype = job.entry[FACTOR_DTYPE];
        const char* data = deltas.at(job.entry, which);
        if (which == LORA_A) return {data, job.rank, columns, dtype};
        return {data, job.size, job.rank, dtype};
    }
    const float* floats(const Job& job, Field which) const {
        return deltas.floats(job.entry, which);
    }
    static int height_of_tile(Way way) { return way == NARROW ? PAIR : TILE; }
    // Of the matrix's `size` rows, those in the unit
    static int rows_of(const Unit& unit, int size) {
        return std::min(height_of_tile(unit.group->way), size - unit.first);
    }

    // 16 numbers of a row of scratch, or what there is of them
    float* of_scratch(const Unit& unit, int m, int r) const {
        char* found = scratch.at(unit.group->rows[m], unit.job->first + r);
        return reinterpret_cast<float*>(found);
    }
    Floats from_scratch(const Unit& unit, int m, int r) const {
        return load(of_scratch(unit, m, r), F32, std::min(TILE, unit.job->rank - r));
    }
    void to_scratch(const Unit& unit, int m, int r, Floats values) const {
        store(of_scratch(unit, m, r), F32, values, std::min(TILE, unit.job->rank - r));
    }

    // y[row, column:] += sums
    void add(int row, int column, Floats sums, int count) const {
        char* out = y.at(row, column);
        store(out, y.dtype, load(out, y.dtype, count) + sums, count);
    }
};

}  // namespace
