// SPDX-License-Identifier: Apache-2.0
//
// The op for linear layers: the rows of every delta by the way that suits them best.
#pragma once

#include "linear_lanes.h"
#include "linear_narrow.h"
#include "linear_tiles.h"
#include "workspace.h"

namespace {

constexpr int AHEAD = 2;  // units whose bytes are asked for before they are multiplied

class Linear : Work {
 public:
    Linear(Part part, Rows y, Rows scratch, Rows x, int columns, const Deltas& deltas,
           const int32_t* ends)
        : Work{part, y, scratch, x, columns, deltas, round_up(columns, PADDING)},
          ends(ends) {}

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
                if (group.way == LANES) ByLanes{*this, own}.stage({&group, nullptr, 0});
#pragma omp for schedule(dynamic)
            for (int i = 0; i < count[0]; i++)
                by_way(stages[i], own, [&](auto way) { way.stage(stages[i]); });
#pragma omp for schedule(guided)
            for (int i = 0; i < count[1]; i++) {
                if (part == EXPAND) {
                    by_way(shrinks[i], own, [&](auto way) { way.fetch(shrinks[i]); });
                    continue;
                }
                if (i + AHEAD < count[1]) prefetch_shrink(shrinks[i + AHEAD]);
                by_way(shrinks[i], own, [&](auto way) { way.shrink(shrinks[i]); });
            }
            // Long runs of units for each thread, which the CPU then fetches ahead. With runs
            // of 16, four deltas of two rows each took 1.3 to 1.6 times as long (two
            // threads, AMD EPYC).
#pragma omp for schedule(guided) nowait
            for (int i = 0; i < count[2]; i++) {
                if (i + AHEAD < count[2]) prefetch_expand(expands[i + AHEAD]);
                by_way(expands[i], own, [&](auto way) { way.expand(expands[i]); });
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

    __attribute__((always_inline)) void prefetch_shrink(const Unit& unit) const {
        const Job& job = *unit.job;
        factor(job, LORA_A).prefetch(unit.first, rows_of(unit, job.rank));
        if (job.entry[LORA_SCALE] != ABSENT)
            __builtin_prefetch(floats(job, LORA_SCALE) + unit.first);
    }
    __attribute__((always_inline)) void prefetch_expand(const Unit& unit) const {
        const Job& job = *unit.job;
        int rows = rows_of(unit, job.size);
        for (int plane = 0; plane < planes_of(job.entry); plane++) {
            signs(job, plane).prefetch(unit.first, rows);
            const float* scale = floats(job, SCALE) + plane * job.size;
            __builtin_prefetch(scale + unit.first);
        }
        if (job.rank) factor(job, LORA_B).prefetch(unit.first, rows);
        if (unit.group->way == LANES)
            for (int m = 0; m < unit.group->count; m++)
                __builtin_prefetch(y.at(unit.group->rows[m], job.column + unit.first),
                                   1);
    }

    // f(the way of the unit)
    template <class F>
    void by_way(const Unit& unit, Own& own, F f) const {
        switch (unit.group->way) {
            case LANES: return f(ByLanes{*this, own});
            case NARROW: return f(InBf16{*this});
            case FLOATS: return f(ByTiles{*this});
        }
    }

    const int32_t* const ends;
    size_t few_bytes = 0, pair_bytes = 0;
    std::vector<Unit> stages, shrinks, expands;
};

}  // namespace
