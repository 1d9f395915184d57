// SPDX-License-Identifier: Apache-2.0
//
// Where the tensors of the deltas are: the arena and its table (table.py).
#pragma once

#include "tiles.h"

namespace {

constexpr int64_t ABSENT = -1;

// table.Field
enum Field {
    SIGNS,
    PLANES,
    SCALE,
    LORA_A,
    LORA_B,
    LORA_SCALE,
    RANK_A,
    RANK_B,
    FIRST_A,
    FIRST_B,
    FACTOR_DTYPE,
    BIAS,
    WEIGHT,
    SIDE_BY_SIDE,
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
        Matrix matrix = {at(entry, SIGNS), int(rows), columns, Matrix::SIGN};
        matrix.data += plane * rows * matrix.row_bytes();
        return matrix;
    }
};

int planes_of(const int64_t* entry) { return entry[SIGNS] == ABSENT ? 0 : entry[PLANES]; }
int rank_of(const int64_t* entry, Field rank) {
    return entry[rank] == ABSENT ? 0 : entry[rank];
}

}  // namespace
