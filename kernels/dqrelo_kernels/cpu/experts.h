// SPDX-License-Identifier: Apache-2.0
//
// Products of rows with the matrices of their experts, for ops.cpp: as the base has packed
// them for its own kernel, which computes steps without deltas. 16 rows of a matrix, a
// tile, lie side by side: tile[k][n], or tile[k / 2][n][k % 2] where the CPU has a matrix
// unit, which is a right operand of narrow.h. Other numbers than bf16 are multiplied
// as floats.
#pragma once

#include "lanes.h"
#include "narrow.h"
#include "workspace.h"

#include <vector>

namespace {

struct Experts {
    const char* data;
    int count, rows, columns;  // rows and columns of each matrix: multiples of 32
    int dtype;
    bool in_pairs;

    // 16 rows of a matrix, from column k on
    const char* tile(int expert, int row, int k = 0) const {
        int64_t first = (int64_t(expert) * rows + row) * columns + int64_t(k) * TILE;
        return data + first * size_of(dtype);
    }

    // Columns k and k + 1 of a tile
    void load(Floats* out, int expert, int row, int k) const {
        const char* in = tile(expert, row, k);
        if (in_pairs) {
            Words both;
            std::memcpy(&both, in, sizeof both);
            out[0] = Floats(both << 16);
            out[1] = Floats(both & 0xFFFF0000);
        } else {
            out[0] = ::load(in, dtype, TILE);
            out[1] = ::load(in + TILE * size_of(dtype), dtype, TILE);
        }
    }
};

class ExpertLinear {
 public:
    ExpertLinear(Rows y, Rows x, const Experts& experts)
        : y(y),
          x(x),
          experts(experts),
          columns(experts.columns),
          is_narrow(HAS_NARROW && x.dtype == BF16 && experts.dtype == BF16) {}

    // y = W x for rows begin to end, of which those before ends[e] are of experts 0 to e
    void run(const int32_t* ends, int begin, int end) {
        plan(ends, begin, end);
        int count[] = {int(stages.size()), int(units.size())};
#pragma omp parallel
        {
#pragma omp for schedule(dynamic)
            for (int i = 0; i < count[0]; i++) stage(stages[i]);
            // Long runs of units for each thread, as for deltas (linear.h)
#pragma omp for schedule(guided) nowait
            for (int i = 0; i < count[1]; i++)
                is_narrow ? multiply_narrow(units[i]) : multiply_floats(units[i]);
#if defined(__AMX_BF16__)
            Products::release();
#endif
        }
    }

 private:
    struct Group {  // rows of one expert
        int expert, first, count;
        size_t x;  // staged rows, bytes in the workspace
    };
    struct Unit {
        const Group* group;
        int first;  // row of x, or of the matrix
    };

    void plan(const int32_t* ends, int begin, int end) {
        size_t bytes = 0;
        groups.reserve(experts.count);
        for (int expert = 0, from = 0; expert < experts.count; from = ends[expert++]) {
            int first = std::max(begin, from), count = std::min(end, ends[expert]) - first;
            if (count <= 0) continue;
            groups.push_back({expert, first, count, bytes});
            int height = is_narrow ? height_of(count) : count;
            bytes += size_t(height) * columns * (is_narrow ? sizeof(Bf16) : sizeof(float));
            bytes = (bytes + 63) & ~size_t(63);
            for (int m = 0; m < count; m += TILE) stages.push_back({&groups.back(), m});
            for (int n = 0; n < experts.rows; n += PAIR)
                units.push_back({&groups.back(), n});
        }
        memory = workspace(bytes);
    }

    template <class T>
    T* staged(const Group& group, int m = 0) const {
        return reinterpret_cast<T*>(memory + group.x) + int64_t(m) * columns;
    }

    void stage(const Unit& unit) const {
        const Group& group = *unit.group;
        int32_t numbers[TILE], count = std::min(TILE, group.count - unit.first);
        for (int m = 0; m < count; m++) numbers[m] = group.first + unit.first + m;
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
        int rows = std::min(TILE, height_of(group.count) - unit.first);
        if (is_narrow)
            return stage_left(staged<Bf16>(group, unit.first), x, numbers, count, rows,
                              columns, columns);
#endif
        stage_rows(staged<float>(group, unit.first), x, numbers, count, columns, columns);
    }

    void multiply_narrow(const Unit& unit) const {
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
        const Group& group = *unit.group;
        Left left = {staged<Bf16>(group), group.count, columns};
        Floats sums[WINDOW][2];
        std::memset(sums, 0, left.height() * sizeof *sums);
        alignas(64) Bf16 buffer[2][DEPTH * TILE];
        for (int k = 0, some; k < columns; k += some) {
            some = experts.in_pairs ? columns : std::min(DEPTH, columns - k);
            const Bf16* right[2];
            for (int i = 0; i < 2; i++) {
                const char* tile = experts.tile(group.expert, unit.first + i * TILE, k);
                right[i] = reinterpret_cast<const Bf16*>(tile);
                if (experts.in_pairs) continue;
                lay_out_columns(buffer[i], right[i], some);
                right[i] = buffer[i];
            }
            Products::multiply(sums, right, left.from(k), some);
        }
        keep(unit, sums);
#endif
    }

    void multiply_floats(const Unit& unit) const {
        const Group& group = *unit.group;
        Floats sums[WINDOW][2] = {};
        for (int begin = 0; begin < columns; begin += DEPTH)
            by_fours(group.count, [&](auto M, int m) {
                int end = std::min(begin + DEPTH, columns);
                const float* row = staged<float>(group, m);
                for (int k = begin; k < end; k += 2) {
                    Floats both[2][2];
                    for (int i = 0; i < 2; i++)
                        experts.load(both[i], group.expert, unit.first + i * TILE, k);
                    for (int j = 0; j < M; j++)
                        for (int i = 0; i < 2; i++)
                            for (int next = 0; next < 2; next++)
                                sums[m + j][i] +=
                                    row[j * int64_t(columns) + k + next] * both[i][next];
                }
            });
        keep(unit, sums);
    }

    void keep(const Unit& unit, const Floats (*sums)[2]) const {
        for (int m = 0; m < unit.group->count; m++)
            for (int i = 0; i < 2; i++)
                store(y.at(unit.group->first + m, unit.first + i * TILE), y.dtype,
                      sums[m][i], TILE);
    }

    const Rows y, x;
    const Experts& experts;
    const int columns;
    const bool is_narrow;
    char* memory = nullptr;
    std::vector<Group> groups;
    std::vector<Unit> stages, units;
};

}  // namespace
