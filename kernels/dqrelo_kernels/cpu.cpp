// SPDX-License-Identifier: Apache-2.0
//
// The ops of reference.py for CPUs, in plain C++17. cpu.py builds and calls them.
//
// A linear multiplies tiles of 16 rows of a matrix with the activations of a group of
// rows: first t = A x, then S x, whose sums get B t and the bias added and are rounded
// once into y. A tile is laid out as numbers of type T before it is multiplied, signs
// and factors alike: bf16 where the activations are bf16, the factors are exact in it
// and the CPU multiplies bf16, else float. All sums are float; a bf16 t is two numbers,
// what it is rounded to and the rest.
//
// A delta with few rows in the step goes another way (cpu_lanes.h): 16 rows of a matrix
// are the lanes of a vector, and signs look up sums of four numbers of x.
//
// The sum behind an element of y depends on its row of x, on its delta and on whether
// that has few rows, and not on the rows of others, on where a group is cut, or on the
// threads.

#include "cpu_amx.h"
#include "cpu_lanes.h"
#include "cpu_tiles.h"

#include <cmath>
#include <memory>
#include <vector>

namespace {

constexpr int WINDOW = 256;  // rows of x in work at a time: they stay in the L2 cache
constexpr int64_t ABSENT = -1;
#ifndef UNIT_FROM
#define UNIT_FROM 9
#endif

// table.Field
enum Field {
    SIGNS,
    PLANES,
    SCALE,
    LORA_A,
    LORA_B,
    LORA_SCALE,
    RANK,
    FACTOR_DTYPE,
    BIAS,
    WEIGHT,
    FIELDS
};

struct Deltas {
    const char* arena;
    const int64_t* table;
    int slots, slices;

    const int64_t* entry(int slot, int slice = 0) const {
        return table + (int64_t(slot) * slices + slice) * FIELDS;
    }
    const char* at(const int64_t* entry, Field field) const {
        return arena + entry[field];
    }
    const float* floats(const int64_t* entry, Field field) const {
        return reinterpret_cast<const float*>(at(entry, field));
    }
    // one sign plane of a matrix of `rows` rows
    Matrix signs(const int64_t* entry, int plane, int64_t rows, int columns) const {
        Matrix matrix = {at(entry, SIGNS), columns, Matrix::SIGN};
        matrix.data += plane * rows * matrix.row_bytes();
        return matrix;
    }
};

int planes_of(const int64_t* entry) { return entry[SIGNS] == ABSENT ? 0 : entry[PLANES]; }
int rank_of(const int64_t* entry) { return entry[RANK] == ABSENT ? 0 : entry[RANK]; }

// ---- linear -------------------------------------------------------------------------

struct Group {  // rows of one delta
    const int32_t* rows;
    int count;
    bool few;     // at most FEW in the whole step
    bool narrow;  // numbers are bf16
    bool unit;
    size_t x;     // staged rows, bytes in the workspace; of few, in each thread's own
};

struct Job {  // one matrix of one delta
    const Group* group;
    const int64_t* entry;
    int rank;
    int column;  // of y
    int size;    // rows of the matrix
    size_t t;    // A x in the workspace, staged as x is: T [parts, rows, padded rank],
                 // of few rows float [rows, padded rank] as reorder() leaves it
};

struct Unit {  // what one thread does at a time
    const Group* group;
    const Job* job;
    int first;  // row of the tile
};

// Memory of this thread that stays for the next call; what is in it does not.
enum Use { SHARED, OWN, USES };
char* workspace(size_t bytes, Use use = SHARED) {
    static thread_local std::unique_ptr<char[]> memory[USES];
    static thread_local size_t size[USES] = {};
    if (size[use] < bytes) memory[use].reset(new char[(size[use] = bytes) + 64]);
    auto start = reinterpret_cast<uintptr_t>(memory[use].get());
    return reinterpret_cast<char*>((start + 63) & ~uintptr_t(63));
}

class Linear {
 public:
    Linear(Rows y, Rows x, int columns, const Deltas& deltas, const int32_t* ends)
        : y(y),
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
        int chunk = std::clamp(count[2] / (8 * threads), 1, 16);
#pragma omp parallel num_threads(threads)
        {
            alignas(64) char buffer[TILE_BYTES];
            char* own = workspace(few_bytes, OWN);
            for (const Group& group : groups)
                if (group.few) stage_few(group, own);
#pragma omp for schedule(dynamic)
            for (int i = 0; i < count[0]; i++)
                stages[i].group->unit     ? stage_unit(stages[i])
                : stages[i].group->narrow ? stage<Narrow>(stages[i])
                                        : stage<float>(stages[i]);
#pragma omp for schedule(dynamic)
            for (int i = 0; i < count[1]; i++)
                shrinks[i].group->unit     ? shrink_unit(shrinks[i])
                : shrinks[i].group->few    ? shrink_few(shrinks[i], own)
                : shrinks[i].group->narrow ? shrink<Narrow>(shrinks[i], buffer)
                                           : shrink<float>(shrinks[i], buffer);
#pragma omp for schedule(dynamic, chunk) nowait
            for (int i = 0; i < count[2]; i++) {
                if (i + 1 < count[2]) prefetch(expands[i + 1]);
                expands[i].group->unit     ? expand_unit(expands[i])
                : expands[i].group->few    ? expand_few(expands[i], own)
                : expands[i].group->narrow ? expand<Narrow>(expands[i], buffer)
                                           : expand<float>(expands[i], buffer);
            }
            Product<Narrow>::release();
            MatrixUnit::release();
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
            if (from >= to) continue;
            bool narrow = sizeof(Narrow) == 2 && x.dtype == BF16;
            for (int slice = 0; slice < deltas.slices; slice++) {
                const int64_t* entry = deltas.entry(slot, slice);
                int factors = entry[FACTOR_DTYPE];
                if (rank_of(entry) && (factors == F32 || factors == F16)) narrow = false;
            }
            int total = starts[slot + 1] - starts[slot];
            bool unit = narrow && total >= UNIT_FROM;
            bool few = !unit && total <= FEW;
            groups.push_back({rows + from, to - from, few, narrow, unit, bytes});
            Group& group = groups.back();
            size_t staged = size_t(height_of(group.count)) * padded * sizeof(float);
            if (few) {
                group.x = few_bytes;
                few_bytes += 2 * staged;
                few_bytes += group.count * tables_of(columns) * sizeof(Floats);
            } else {
                bytes += staged;
                for (int m = 0; m < group.count; m += TILE)
                    stages.push_back({&group, nullptr, m});
            }
            for (int slice = 0; slice < deltas.slices; slice++) {
                const int64_t* entry = deltas.entry(slot, slice);
                int rank = rank_of(entry);
                if (!rank && entry[SIGNS] == ABSENT && entry[BIAS] == ABSENT) continue;
                int size = ends[slice + 1] - ends[slice];
                jobs.push_back({&group, entry, rank, ends[slice], size, bytes});
                bytes += size_t(height_of(group.count)) * padded_rank(jobs.back()) *
                         sizeof(float);
                int tile = unit ? PAIR : TILE;
                for (int r = 0; r < rank; r += tile)
                    shrinks.push_back({&group, &jobs.back(), r});
                for (int n = 0; n < size; n += tile)
                    expands.push_back({&group, &jobs.back(), n});
            }
        }
        memory = workspace(bytes);
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
        return {deltas.at(job.entry, which), which == LORA_A ? columns : job.rank,
                dtype};
    }
    int rows_of(const Unit& unit, int size) const {
        return std::min(TILE, size - unit.first);
    }

    __attribute__((always_inline)) void prefetch(const Unit& unit) const {
        const Job& job = *unit.job;
        int rows = rows_of(unit, job.size);
        for (int plane = 0; plane < planes_of(job.entry); plane++)
            signs(job, plane).prefetch(unit.first, rows);
        if (job.rank) factor(job, LORA_B).prefetch(unit.first, rows);
    }

    template <class T>
    void stage(const Unit& unit) const {
        const Group& group = *unit.group;
        Product<T>::stage(staged<T>(group, unit.first), x, group.rows + unit.first,
                          std::min(TILE, group.count - unit.first), columns, padded);
    }

    // c[m + n] += row `unit.first` + n of the matrix * row m of x, for each of the parts
    // that x, as staged, is the sum of
    template <class T>
    void multiply(Floats* c, const Unit& unit, const Matrix& matrix, int rows,
                  char* buffer, const T* x, int padded, int parts = 1) const {
        T* tile = reinterpret_cast<T*>(buffer);
        int count = unit.group->count;
        for (int k = 0; k < matrix.columns; k += CHUNK<T>) {
            fill(tile, matrix, unit.first, rows, k);
            for (int part = 0; part < parts; part++)
                for (int m = 0; m < count; m += TILE)
                    Product<T>::multiply(
                        c + m, tile, x + (int64_t(part) * count + m) * padded,
                        std::min(TILE, count - m), padded, k,
                        std::min(CHUNK<T>, padded - k));
        }
    }

    // t = scale * A x for a tile of rows of A
    template <class T>
    void shrink(const Unit& unit, char* buffer) const {
        Floats c[WINDOW];
        const Job& job = *unit.job;
        int rows = rows_of(unit, job.rank), count = unit.group->count;
        std::fill_n(c, round_up(count, TILE), Floats{});
        multiply(c, unit, factor(job, LORA_A), rows, buffer, staged<T>(*unit.group, 0),
                 padded);
        if (job.entry[LORA_SCALE] != ABSENT)
            multiply_rows(c, count, deltas.floats(job.entry, LORA_SCALE) + unit.first,
                          rows);
        int last = unit.first + TILE, width = padded_rank(job);
        for (int m = 0; m < count; m += TILE)
            Product<T>::restage(t<T>(job, m), int64_t(count) * width, c + m,
                                std::min(TILE, count - m), width, unit.first,
                                last < job.rank ? last : width);
    }

    // c[m + n] *= scale[n] for the first `rows` n, all m
    static void multiply_rows(Floats* c, int count, const float* scale, int rows) {
        for (int m = 0; m < count; m += TILE)
            for (int n = 0; n < rows; n++) c[m + n] *= scale[n];
    }

    // y += sum of scale * S x + B t + bias for a tile of rows of S and B
    template <class T>
    void expand(const Unit& unit, char* buffer) const {
        Floats c[WINDOW];
        const Job& job = *unit.job;
        int rows = rows_of(unit, job.size), count = unit.group->count;
        int padded_count = round_up(count, TILE);
        std::fill_n(c, padded_count, Floats{});
        for (int plane = 0; plane < planes_of(job.entry); plane++) {
            Floats sums[WINDOW];
            std::fill_n(sums, padded_count, Floats{});
            multiply(sums, unit, signs(job, plane), rows, buffer,
                     staged<T>(*unit.group, 0), padded);
            const float* scale = deltas.floats(job.entry, SCALE) + plane * job.size;
            multiply_rows(sums, padded_count, scale + unit.first, rows);
            for (int i = 0; i < padded_count; i++) c[i] += sums[i];
        }
        if (job.rank)
            multiply(c, unit, factor(job, LORA_B), rows, buffer, t<T>(job),
                     padded_rank(job), PARTS<T>);
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

    // The same by the matrix unit: 32 rows of a matrix in a unit.

    void stage_unit(const Unit& unit) const {
        const Group& group = *unit.group;
        int rows = std::min(TILE, height_of(group.count) - unit.first);
        Bf16* out = staged<Bf16>(group, unit.first);
        for (int m = 0; m < rows; m++, out += SPAN) {
            bool there = unit.first + m < group.count;
            const char* in = there ? x.at(group.rows[unit.first + m]) : nullptr;
            for (int k = 0; k < padded; k += SPAN) {
                int n = there ? std::clamp(columns - k, 0, SPAN) : 0;
                Bf16* to = out + k * rows;
                if (n < SPAN) std::memset(to, 0, SPAN * sizeof *to);
                if (n) std::memcpy(to, in + 2 * k, 2 * n);
            }
        }
        for (const Job& job : jobs) {
            if (job.group != &group || !job.rank) continue;
            int width = padded_rank(job), height = height_of(group.count);
            for (int part = 0; part < 2; part++)
                std::memset(t<Bf16>(job) + int64_t(part) * width * height +
                                unit.first * width + (width - PADDING) * rows,
                            0, PADDING * rows * sizeof(Bf16));
        }
    }

    // c[m] += row m of x times `rows` <= 32 rows of the matrix
    template <int PARTS>
    static void multiply_unit(Floats (*c)[2], const Matrix& matrix, int first, int rows,
                              const Bf16* x, int64_t part, int height) {
        alignas(64) Bf16 buffer[2][DEPTH * TILE];
        const Bf16* right[] = {buffer[0], buffer[1]};
        int padded = round_up(matrix.columns, PADDING);
        for (int k = 0, columns; k < matrix.columns; k += columns) {
            columns = matrix.columns - k <= DEPTH ? matrix.columns - k : BLOCK;
            for (int i = 0; i < 2; i++)
                if (rows > i * TILE)
                    lay_out(buffer[i], matrix, first + i * TILE,
                            std::min(TILE, rows - i * TILE), k, columns, PARTS == 2);
            if (rows <= TILE) right[1] = right[0];
            MatrixUnit::multiply(c, right, x + int64_t(k) * std::min(TILE, height),
                                 int64_t(padded) * TILE, height, columns, PARTS, part);
        }
    }

    static void load_pair(Floats* out, const float* in, int rows) {
        out[0] = load(in, F32, std::min(TILE, rows));
        out[1] = rows > TILE ? load(in + TILE, F32, rows - TILE) : Floats{};
    }

    void shrink_unit(const Unit& unit) const {
        const Job& job = *unit.job;
        int rows = std::min(PAIR, job.rank - unit.first), width = padded_rank(job);
        int height = height_of(unit.group->count), block = std::min(TILE, height);
        Floats c[WINDOW][2], scale[] = {Floats{} + 1, Floats{} + 1};
        std::memset(c, 0, height * sizeof *c);
        if (job.entry[LORA_SCALE] != ABSENT)
            load_pair(scale, deltas.floats(job.entry, LORA_SCALE) + unit.first, rows);
        Matrix a = factor(job, LORA_A);
        multiply_unit<1>(c, a, unit.first, rows, staged<Bf16>(*unit.group, 0), 0, height);
        int tail = job.rank / I4_BLOCK * I4_BLOCK,
            half = tail + (job.rank - tail + 1) / 2,
            shift = a.dtype == I4 ? shift_of(job.rank) : 0;
        for (int part = 0; part < 2; part++) {
            Bf16* out = t<Bf16>(job) + int64_t(part) * width * height;
            for (int m = 0; m < height; m++) {
                Bf16* row = out + int64_t(m / TILE) * width * TILE + m % TILE * SPAN;
                for (int i = 0; i < 2 && i * TILE < rows; i++) {
                    Bf16 numbers[TILE];
                    if (part == 0) c[m][i] *= scale[i];
                    store(numbers, BF16, c[m][i], TILE);
                    c[m][i] -= load(numbers, BF16, TILE);
                    int r = unit.first + i * TILE;
                    if (r + TILE <= tail || !shift) {
                        std::memcpy(row + r / SPAN * SPAN * block + r % SPAN, numbers,
                                    sizeof numbers);
                    } else {
                        for (int n = 0; n < std::min(TILE, job.rank - r); n++) {
                            int at = r + n + (r + n >= half ? shift : 0);
                            row[at / SPAN * SPAN * block + at % SPAN] = numbers[n];
                        }
                    }
                }
            }
        }
    }

    // t of ranks beyond the last is zero: it meets numbers that mean nothing
    void expand_unit(const Unit& unit) const {
        const Job& job = *unit.job;
        int rows = std::min(PAIR, job.size - unit.first), count = unit.group->count;
        int height = height_of(count), width = padded_rank(job);
        Floats c[WINDOW][2], scale[2];
        std::memset(c, 0, height * sizeof *c);
        for (int m = 0; m < count; m++)
            __builtin_prefetch(y.at(unit.group->rows[m], job.column + unit.first), 1);
        for (int plane = 0; plane < planes_of(job.entry); plane++) {
            const float* scales = deltas.floats(job.entry, SCALE) + plane * job.size;
            load_pair(scale, scales + unit.first, rows);
            Floats more[WINDOW][2], (*sums)[2] = plane ? more : c;
            if (plane) std::memset(more, 0, height * sizeof *more);
            multiply_unit<1>(sums, signs(job, plane), unit.first, rows,
                             staged<Bf16>(*unit.group, 0), 0, height);
            for (int m = 0; m < height; m++)
                for (int i = 0; i < 2; i++)
                    c[m][i] = scale[i] * sums[m][i] + (plane ? c[m][i] : Floats{});
        }
        if (job.rank)
            multiply_unit<2>(c, factor(job, LORA_B), unit.first, rows, t<Bf16>(job),
                             int64_t(width) * height, height);
        Floats bias[2] = {};
        if (job.entry[BIAS] != ABSENT)
            load_pair(bias, deltas.floats(job.entry, BIAS) + unit.first, rows);
        for (int m = 0; m < count; m++)
            for (int i = 0; i < 2 && i * TILE < rows; i++)
                add(unit.group->rows[m], job.column + unit.first + i * TILE,
                    c[m][i] + bias[i], std::min(TILE, rows - i * TILE));
    }

    // The same for few rows. Each thread has its own copy of x, in the order of columns
    // and in that of I4, and of the tables: to fetch them from the other core's cache
    // would take longer than to make them.

    float* x_of(const Group& group, char* own, int dtype = F32) const {
        float* x = reinterpret_cast<float*>(own + group.x);
        return dtype == I4 ? x + group.count * padded : x;
    }
    Floats* tables_of_rows(const Group& group, char* own, int m) const {
        float* behind = x_of(group, own) + 2 * group.count * padded;
        return reinterpret_cast<Floats*>(behind) + m * tables_of(columns);
    }

    void stage_few(const Group& group, char* own) const {
        int count = group.count;
        float *x = x_of(group, own), *reordered = x_of(group, own, I4);
        for (int m = 0; m < count; m++) {
            read(x + m * padded, this->x.at(group.rows[m]), this->x.dtype, columns);
            std::memset(x + m * padded + columns, 0,
                        (padded - columns) * sizeof(float));
            reorder(reordered + m * padded, x + m * padded, I4, columns, padded);
        }
        by_fours(count, [&](auto M, int m) {
            fill_tables<M>(tables_of_rows(group, own, m), x + m * padded, padded,
                           columns);
        });
    }

    void shrink_few(const Unit& unit, char* own) const {
        const Job& job = *unit.job;
        const Group& group = *unit.group;
        int rows = rows_of(unit, job.rank), width = padded_rank(job);
        Matrix a = factor(job, LORA_A);
        const float* x = x_of(group, own, a.dtype);
        Floats sums[std::max(FEW, 4)] = {}, scale = Floats{} + 1;
        by_fours(group.count, [&](auto M, int m) {
            multiply_lanes<M>(sums + m, a, unit.first, rows, x + m * padded, padded);
        });
        if (job.entry[LORA_SCALE] != ABSENT)
            scale = load(deltas.floats(job.entry, LORA_SCALE) + unit.first, F32, rows);
        for (int m = 0; m < group.count; m++) {
            Floats values = sums[m] * scale;
            float* out = t<float>(job) + m * width;
            for (int n = 0; n < rows; n++)
                out[place(a.dtype, unit.first + n, job.rank)] = values[n];
            if (unit.first + TILE >= job.rank)
                std::memset(out + job.rank, 0, (width - job.rank) * sizeof(float));
        }
    }

    void expand_few(const Unit& unit, char* own) const {
        const Job& job = *unit.job;
        const Group& group = *unit.group;
        int rows = rows_of(unit, job.size), width = padded_rank(job);
        Floats c[std::max(FEW, 4)] = {};
        by_fours(group.count, [&](auto M, int m) {
            for (int plane = 0; plane < planes_of(job.entry); plane++) {
                Floats sums[M];
                multiply_signs<M>(sums, signs(job, plane), unit.first, rows,
                                  tables_of_rows(group, own, m));
                const float* scale = deltas.floats(job.entry, SCALE) + plane * job.size;
                Floats scales = load(scale + unit.first, F32, rows);
                for (int i = 0; i < M; i++) c[m + i] += scales * sums[i];
            }
            if (job.rank)
                multiply_lanes<M>(c + m, factor(job, LORA_B), unit.first, rows,
                                  t<float>(job, m), width);
        });
        Floats bias = {};
        if (job.entry[BIAS] != ABSENT)
            bias = load(deltas.floats(job.entry, BIAS) + unit.first, F32, rows);
        for (int m = 0; m < group.count; m++)
            add(group.rows[m], job.column + unit.first, c[m] + bias, rows);
    }

    // y[row, column:] += sums
    void add(int row, int column, Floats sums, int count) const {
        char* out = y.at(row, column);
        store(out, y.dtype, load(out, y.dtype, count) + sums, count);
    }

    const Rows y, x;
    const int columns;
    const Deltas& deltas;
    const int32_t* const ends;
    const int padded;
    char* memory = nullptr;
    size_t few_bytes = 0;
    std::vector<Group> groups;
    std::vector<Job> jobs;
    std::vector<Unit> stages, shrinks, expands;
};

// ---- embedding and norm -------------------------------------------------------------

int count_rows(const int32_t* slots, int capacity) {
    return std::find_if(slots, slots + capacity, [](int slot) { return slot < 0; }) -
           slots;
}

// y += row `id` of a matrix of `size` rows
void embed(char* y, int dtype, int64_t id, int columns, int size, const Deltas& deltas,
           const int64_t* entry) {
    int rank = rank_of(entry), factors = entry[FACTOR_DTYPE];
    auto b = reinterpret_cast<float*>(workspace((rank + 1) * sizeof(float)));
    if (rank)
        read(b, Matrix{deltas.at(entry, LORA_B), rank, factors}.at(id, 0), factors,
             rank);
    if (rank && entry[LORA_SCALE] != ABSENT)
        for (int r = 0; r < rank; r++) b[r] *= deltas.floats(entry, LORA_SCALE)[r];
    for (int k = 0; k < columns; k += BLOCK) {
        int width = std::min(BLOCK, columns - k);
        float change[BLOCK] = {}, part[BLOCK] = {};
        auto add = [&](float factor) {
            for (int i = 0; i < BLOCK; i++) change[i] += factor * part[i];
        };
        for (int plane = 0; plane < planes_of(entry); plane++) {
            const char* words = deltas.signs(entry, plane, size, columns).at(id, k);
            unpack(part, reinterpret_cast<const uint16_t*>(words), (width + 15) / 16);
            add(deltas.floats(entry, SCALE)[int64_t(plane) * size + id]);
        }
        for (int r = 0; r < rank; r++) {
            read(part, Matrix{deltas.at(entry, LORA_A), columns, factors}.at(r, k),
                 factors, width);
            add(b[r]);
        }
        for (int i = 0; i < width; i += 16) {
            int count = std::min(16, width - i);
            char* out = y + (k + i) * size_of(dtype);
            store(out, dtype, load(out, dtype, count) + load(change + i, F32, 16),
                  count);
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
    for (int i = 0; i < count; i++) {
        const char* at = ids + int64_t(rows[i]) * id_bytes;
        int64_t id = 0;
        std::memcpy(&id, at, id_bytes);
        embed(y + rows[i] * y_stride * size_of(y_dtype), y_dtype, id, columns, size,
              deltas, deltas.entry(slots[i]));
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
