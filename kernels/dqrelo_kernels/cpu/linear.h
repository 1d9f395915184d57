// SPDX-License-Identifier: Apache-2.0
//
// The op for linear layers: the rows of every delta by the way that suits them best.
#pragma once

#include "lanes.h"
#include "narrow.h"
#include "table.h"
#include "tiles.h"
#include "workspace.h"

#include <vector>

namespace {

constexpr int AHEAD = 2;     // units whose bytes are asked for before they are multiplied

// By lanes (lanes.h), in bf16 (narrow.h), or by tiles of float (tiles.h)
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

struct Own {  // of a thread, for LANES
    char* memory;  // a `Few` of each group
    Pairs pairs;
};

struct Unit {  // what one thread does at a time
    const Group* group;
    const Job* job;
    int first;  // row of the tile
};

class Linear {
 public:
    Linear(Part part, Rows y, Rows scratch, Rows x, int columns, const Deltas& deltas,
           const int32_t* ends)
        : part(part),
          y(y),
          scratch(scratch),
          x(x),
          columns(columns),
          deltas(deltas),
          ends(ends),
          padded(round_up(columns, PADDING)) {}

    // y += delta for rows[begin:end], of which slot s has rows[starts[s]:starts[s + 1]]
    void run(const int32_t* rows, const int32_t* starts, int begin, int end,
             int threads) {
        plan(rows, starts, begin, end);
        int count[] = {int(stages.size()), int(shrinks.size()), int(expands.size())};
#pragma omp parallel num_threads(threads)
        {
            char* memory = workspace(few_bytes + pair_bytes, OWN);
            Own own = {memory, {reinterpret_cast<int16_t*>(memory + few_bytes)}};
            for (int i = 0; i < std::min(AHEAD, count[1]) && part != EXPAND; i++)
                prefetch_shrink(shrinks[i]);
            for (int i = 0; i < std::min(AHEAD, count[2]); i++)
                prefetch_expand(expands[i]);
            for (const Group& group : groups)
                if (group.way == LANES) stage_few(group, own);
#pragma omp for schedule(dynamic)
            for (int i = 0; i < count[0]; i++) stage(stages[i]);
#pragma omp for schedule(guided)
            for (int i = 0; i < count[1]; i++) {
                if (part == EXPAND) {
                    fetch(shrinks[i]);
                    continue;
                }
                if (i + AHEAD < count[1]) prefetch_shrink(shrinks[i + AHEAD]);
                shrink(shrinks[i], own);
            }
            // Long runs of units for each thread, which the CPU then fetches ahead. With runs
            // of 16, four deltas of two rows each took 1.3 to 1.6 times as long (two
            // threads, AMD EPYC).
#pragma omp for schedule(guided) nowait
            for (int i = 0; i < count[2]; i++) {
                if (i + AHEAD < count[2]) prefetch_expand(expands[i + AHEAD]);
                expand(expands[i], own);
            }
#if defined(__AMX_BF16__)
            Products::release();
#endif
        }
    }

 private:
    void plan(const int32_t* rows, const int32_t* starts, int begin, int end) {
        groups.reserve(deltas.slots);
        jobs.reserve(deltas.slots * deltas.slices);
        size_t bytes = 0;
        for (int slot = 0; slot < deltas.slots; slot++) {
            int from = std::max(begin, starts[slot]),
                to = std::min(end, starts[slot + 1]);
            if (from >= to || !is_changed_by(slot)) continue;
            Way way = way_of(slot, starts[slot + 1] - starts[slot]);
            groups.push_back({rows + from, to - from, way, bytes});
            Group& group = groups.back();
            int height = way == NARROW ? height_of(group.count) : group.count;
            size_t staged = size_t(height) * padded * sizeof(float);
            if (way == LANES) {
                group.x = few_bytes;
                few_bytes += group.count * tables_of(columns) * sizeof(Floats) +
                             staged + sizeof(Floats);
                static_assert(FEW * sizeof(Row) <= sizeof(Floats));
            } else {
                bytes += staged;
                for (int m = 0; m < group.count; m += TILE)
                    stages.push_back({&group, nullptr, m});
            }
            for (int slice = 0; slice < deltas.slices; slice++) {
                const int64_t* entry = deltas.entry(slot, slice);
                if (!changes(entry)) continue;
                int rank = rank_of(entry, part == EXPAND ? RANK_B : RANK_A);
                int first = entry[part == EXPAND ? FIRST_B : FIRST_A];
                int column = part == SHRINK ? 0 : ends[slice];
                int size = part == SHRINK ? 0 : ends[slice + 1] - column;
                jobs.push_back({&group, entry, rank, first, column, size, bytes});
                size_t t_bytes = size_t(height) * padded_rank(jobs.back()) * sizeof(float);
                bytes += t_bytes;
                if (way == LANES) pair_bytes = std::max({pair_bytes, staged, t_bytes});
                int tile = height_of_tile(way);
                for (int r = 0; r < rank; r += tile)
                    shrinks.push_back({&group, &jobs.back(), r});
                for (int n = 0; n < size; n += tile)
                    expands.push_back({&group, &jobs.back(), n});
            }
        }
        memory = workspace(bytes);
    }

    bool changes(const int64_t* entry) const {
        if (part == SHRINK) return rank_of(entry, RANK_A);
        return entry[SIGNS] != ABSENT || rank_of(entry, RANK_B) || entry[BIAS] != ABSENT;
    }

    bool is_changed_by(int slot) const {
        for (int slice = 0; slice < deltas.slices; slice++)
            if (changes(deltas.entry(slot, slice))) return true;
        return false;
    }

    Way way_of(int slot, int count) const {
        if (count <= FEW && columns <= MOST_COLUMNS && x.dtype == BF16) return LANES;
        if (!HAS_NARROW || x.dtype != BF16) return FLOATS;
        for (int slice = 0; slice < deltas.slices; slice++) {
            const int64_t* entry = deltas.entry(slot, slice);
            int factors = entry[FACTOR_DTYPE];
            bool has_factors = rank_of(entry, RANK_A) || rank_of(entry, RANK_B);
            if (has_factors && (factors == F32 || factors == F16)) return FLOATS;
        }
        return NARROW;
    }

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
    static int height_of_tile(Way way) { return way == NARROW ? PAIR : TILE; }
    // Of the matrix's `size` rows, those in the unit
    static int rows_of(const Unit& unit, int size) {
        return std::min(height_of_tile(unit.group->way), size - unit.first);
    }

    __attribute__((always_inline)) void prefetch_shrink(const Unit& unit) const {
        const Job& job = *unit.job;
        factor(job, LORA_A).prefetch(unit.first, rows_of(unit, job.rank));
        if (job.entry[LORA_SCALE] != ABSENT)
            __builtin_prefetch(deltas.floats(job.entry, LORA_SCALE) + unit.first);
    }
    __attribute__((always_inline)) void prefetch_expand(const Unit& unit) const {
        const Job& job = *unit.job;
        int rows = rows_of(unit, job.size);
        for (int plane = 0; plane < planes_of(job.entry); plane++) {
            signs(job, plane).prefetch(unit.first, rows);
            const float* scale = deltas.floats(job.entry, SCALE) + plane * job.size;
            __builtin_prefetch(scale + unit.first);
        }
        if (job.rank) factor(job, LORA_B).prefetch(unit.first, rows);
        if (unit.group->way == LANES)
            for (int m = 0; m < unit.group->count; m++)
                __builtin_prefetch(y.at(unit.group->rows[m], job.column + unit.first),
                                   1);
    }

    void stage(const Unit& unit) const {
        switch (unit.group->way) {
            case LANES: break;
            case NARROW: return stage_narrow(unit);
            case FLOATS: return stage_tiles(unit);
        }
    }
    void shrink(const Unit& unit, Own& own) const {
        switch (unit.group->way) {
            case LANES: return shrink_few(unit, own);
            case NARROW: return shrink_narrow(unit);
            case FLOATS: return shrink_tiles(unit);
        }
    }
    void fetch(const Unit& unit) const {
        switch (unit.group->way) {
            case LANES: return fetch_few(unit);
            case NARROW: return fetch_narrow(unit);
            case FLOATS: return fetch_tiles(unit);
        }
    }
    void expand(const Unit& unit, Own& own) const {
        switch (unit.group->way) {
            case LANES: return expand_few(unit, own);
            case NARROW: return expand_narrow(unit);
            case FLOATS: return expand_tiles(unit);
        }
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

    // By tiles.

    void stage_tiles(const Unit& unit) const {
        const Group& group = *unit.group;
        stage_rows(staged<float>(group, unit.first), x, group.rows + unit.first,
                   std::min(TILE, group.count - unit.first), columns, padded);
    }

    // c[m + n] += row `unit.first` + n of the matrix * row m of x, as staged
    void multiply(Floats* c, const Unit& unit, const Matrix& matrix, int rows,
                  const float* x, int padded) const {
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
    void shrink_tiles(const Unit& unit) const {
        Floats c[WINDOW];
        const Job& job = *unit.job;
        int rows = rows_of(unit, job.rank), count = unit.group->count;
        std::fill_n(c, round_up(count, TILE), Floats{});
        multiply(c, unit, factor(job, LORA_A), rows, staged<float>(*unit.group, 0),
                 padded);
        if (job.entry[LORA_SCALE] != ABSENT)
            multiply_rows(c, count, deltas.floats(job.entry, LORA_SCALE) + unit.first,
                          rows);
        for (int m = 0; m < count; m += TILE) {
            transpose(c + m);
            int rows = std::min(TILE, count - m);
            if (part == WHOLE) keep(t<float>(job, m), c + m, unit, rows);
            for (int i = m; part == SHRINK && i < m + rows; i++)
                to_scratch(unit, i, unit.first, c[i]);
        }
    }

    void fetch_tiles(const Unit& unit) const {
        Floats c[TILE];
        for (int m = 0, rows; m < unit.group->count; m += rows) {
            rows = std::min(TILE, unit.group->count - m);
            for (int i = 0; i < rows; i++)
                c[i] = from_scratch(unit, m + i, unit.first);
            keep(t<float>(*unit.job, m), c, unit, rows);
        }
    }

    // Ranks `unit.first` to `unit.first` + 16 of t for some rows
    static void keep(float* t, const Floats* values, const Unit& unit, int rows) {
        int last = unit.first + TILE, rank = unit.job->rank;
        int width = padded_rank(*unit.job);
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
    void expand_tiles(const Unit& unit) const {
        Floats c[WINDOW];
        const Job& job = *unit.job;
        int rows = rows_of(unit, job.size), count = unit.group->count;
        int padded_count = round_up(count, TILE);
        std::fill_n(c, padded_count, Floats{});
        for (int plane = 0; plane < planes_of(job.entry); plane++) {
            Floats sums[WINDOW];
            std::fill_n(sums, padded_count, Floats{});
            multiply(sums, unit, signs(job, plane), rows,
                     staged<float>(*unit.group, 0), padded);
            const float* scale = deltas.floats(job.entry, SCALE) + plane * job.size;
            multiply_rows(sums, padded_count, scale + unit.first, rows);
            for (int i = 0; i < padded_count; i++) c[i] += sums[i];
        }
        if (job.rank)
            multiply(c, unit, factor(job, LORA_B), rows, t<float>(job), padded_rank(job));
        if (job.entry[BIAS] != ABSENT) {
            const float* bias = deltas.floats(job.entry, BIAS) + unit.first;
            for (int m = 0; m < count; m += TILE)
                for (int n = 0; n < rows; n++) c[m + n] += bias[n];
        }
        for (int m = 0; m < count; m += TILE) {
            transpose(c + m);
            for (int i = m; i < std::min(m + TILE, count); i++)
                add(unit.group->rows[i], job.column + unit.first, c[i], rows);
        }
    }

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
    // In bf16: 32 rows of a matrix at a time.

    void stage_narrow(const Unit& unit) const {
        const Group& group = *unit.group;
        int rows = std::min(TILE, height_of(group.count) - unit.first);
        stage_left(staged<Bf16>(group, unit.first), x, group.rows + unit.first,
                   std::min(TILE, group.count - unit.first), rows, columns, padded);
        for (const Job& job : jobs) {
            if (job.group != &group || !job.rank) continue;
            int width = padded_rank(job);
            std::memset(t<Bf16>(job) + unit.first * width + (width - PADDING) * rows, 0,
                        PADDING * rows * sizeof(Bf16));
        }
    }

    // c[m] += row m of x times `rows` <= 32 rows of the matrix
    static void multiply_narrow(Floats (*c)[2], const Matrix& matrix, int first,
                                int rows, const Left& x) {
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
        return {staged<Bf16>(group, 0), group.count, padded};
    }
    Left t_of(const Job& job) const {
        return {t<Bf16>(job), job.group->count, padded_rank(job), true};
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

    void shrink_narrow(const Unit& unit) const {
        const Job& job = *unit.job;
        int rows = rows_of(unit, job.rank);
        Left x = x_of(*unit.group), t = t_of(job);
        Floats c[WINDOW][2], scale[] = {Floats{} + 1, Floats{} + 1};
        std::memset(c, 0, x.height() * sizeof *c);
        Matrix a = factor(job, LORA_A);
        multiply_narrow(c, a, unit.first, rows, x);
        if (job.entry[LORA_SCALE] != ABSENT)
            load_pair(scale, deltas.floats(job.entry, LORA_SCALE) + unit.first, rows);
        for (int i = 0; i * TILE < rows; i++) {
            int r = unit.first + i * TILE;
            for (int m = 0; m < x.height() && part == WHOLE; m++)
                keep(t, job, m, r, c[m][i] * scale[i]);
            for (int m = 0; m < unit.group->count && part == SHRINK; m++)
                to_scratch(unit, m, r, c[m][i] * scale[i]);
        }
    }

    void fetch_narrow(const Unit& unit) const {
        const Job& job = *unit.job;
        Left t = t_of(job);
        for (int r = unit.first; r < std::min(unit.first + PAIR, job.rank); r += TILE)
            for (int m = 0; m < t.height(); m++)
                keep(t, job, m, r,
                     m < unit.group->count ? from_scratch(unit, m, r) : Floats{});
    }

    void expand_narrow(const Unit& unit) const {
        const Job& job = *unit.job;
        const Group& group = *unit.group;
        int rows = rows_of(unit, job.size);
        int column = job.column + unit.first;
        for (int m = 0; m < group.count; m++)
            __builtin_prefetch(y.at(group.rows[m], column), 1);
        Left x = x_of(group);
        Floats c[WINDOW][2];
        std::memset(c, 0, x.height() * sizeof *c);
        for (int plane = 0; plane < planes_of(job.entry); plane++) {
            Floats more[WINDOW][2], scale[2], (*sums)[2] = plane ? more : c;
            if (plane) std::memset(more, 0, x.height() * sizeof *more);
            multiply_narrow(sums, signs(job, plane), unit.first, rows, x);
            const float* scales = deltas.floats(job.entry, SCALE) + plane * job.size;
            load_pair(scale, scales + unit.first, rows);
            for (int m = 0; m < x.height(); m++)
                for (int i = 0; i < 2; i++)
                    c[m][i] = scale[i] * sums[m][i] + (plane ? c[m][i] : Floats{});
        }
        if (job.rank)
            multiply_narrow(c, factor(job, LORA_B), unit.first, rows, t_of(job));
        Floats bias[2] = {};
        if (job.entry[BIAS] != ABSENT)
            load_pair(bias, deltas.floats(job.entry, BIAS) + unit.first, rows);
        for (int m = 0; m < group.count; m++)
            for (int i = 0; i * TILE < rows; i++)
                add(group.rows[m], column + i * TILE, c[m][i] + bias[i],
                    std::min(TILE, rows - i * TILE));
    }

    static void load_pair(Floats* out, const float* in, int rows) {
        out[0] = load(in, F32, std::min(TILE, rows));
        out[1] = rows > TILE ? load(in + TILE, F32, rows - TILE) : Floats{};
    }
#else
    void stage_narrow(const Unit&) const {}
    void shrink_narrow(const Unit&) const {}
    void fetch_narrow(const Unit&) const {}
    void expand_narrow(const Unit&) const {}
#endif

#if defined(__AVX512VNNI__)
    // By lanes. Each thread has its own copy of x, of A x and of the tables: to fetch them
    // from the other core's cache would take longer than to make them.

    Few few(const Group& group, const Own& own) const {
        return {own.memory + group.x, group.count, columns, padded};
    }

    void stage_few(const Group& group, const Own& own) const {
        few(group, own).stage(x, group.rows, own.pairs.integers);
    }

    void shrink_few(const Unit& unit, Own& own) const {
        const Job& job = *unit.job;
        const float* x = few(*unit.group, own).x;
        Matrix a = factor(job, LORA_A);
        Floats scale = Floats{} + 1;
        if (job.entry[LORA_SCALE] != ABSENT)
            scale = load(deltas.floats(job.entry, LORA_SCALE) + unit.first, F32,
                         rows_of(unit, job.rank));
        own.pairs.stage(a, x, padded, unit.group->count);
        by_fours(unit.group->count, [&](auto M, int m) {
            Floats sums[M] = {};
            own.pairs.multiply<M>(sums, a, unit.first, x, padded, m);
            for (int i = 0; i < M; i++)
                if (part == WHOLE)
                    store(t<float>(job, m + i) + unit.first, F32, sums[i] * scale, TILE);
                else
                    to_scratch(unit, m + i, unit.first, sums[i] * scale);
        });
    }

    void fetch_few(const Unit& unit) const {
        for (int m = 0; m < unit.group->count; m++)
            store(t<float>(*unit.job, m) + unit.first, F32,
                  from_scratch(unit, m, unit.first), TILE);
    }

    void expand_few(const Unit& unit, Own& own) const {
        const Job& job = *unit.job;
        const Group& group = *unit.group;
        Few x = few(group, own);
        Matrix b = factor(job, LORA_B);
        int rows = rows_of(unit, job.size);
        Floats bias = {};
        if (job.entry[BIAS] != ABSENT)
            bias = load(deltas.floats(job.entry, BIAS) + unit.first, F32, rows);
        if (job.rank) own.pairs.stage(b, t<float>(job), padded_rank(job), group.count);
        by_fours(group.count, [&](auto M, int m) {
            Floats c[M] = {};
            for (int plane = 0; plane < planes_of(job.entry); plane++) {
                const float* scale = deltas.floats(job.entry, SCALE) + plane * job.size;
                x.multiply<M>(c, signs(job, plane), unit.first,
                              load(scale + unit.first, F32, rows), m);
            }
            if (job.rank)
                own.pairs.multiply<M>(c, b, unit.first, t<float>(job),
                                      padded_rank(job), m);
            for (int i = 0; i < M; i++)
                add(group.rows[m + i], job.column + unit.first, c[i] + bias, rows);
        });
    }
#else
    void stage_few(const Group&, const Own&) const {}
    void shrink_few(const Unit&, Own&) const {}
    void fetch_few(const Unit&) const {}
    void expand_few(const Unit&, Own&) const {}
#endif

    // y[row, column:] += sums
    void add(int row, int column, Floats sums, int count) const {
        char* out = y.at(row, column);
        store(out, y.dtype, load(out, y.dtype, count) + sums, count);
    }

    const Part part;
    const Rows y, scratch, x;
    const int columns;
    const Deltas& deltas;
    const int32_t* const ends;
    const int padded;  // columns, as they are staged
    char* memory = nullptr;
    size_t few_bytes = 0, pair_bytes = 0;
    std::vector<Group> groups;
    std::vector<Job> jobs;
    std::vector<Unit> stages, shrinks, expands;
};

}  // namespace
