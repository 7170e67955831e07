// Every row of a sense table along one direction: one pass over it, as it is stored.
#pragma once

#include "mix.h"

namespace {

// out[n] = (row n) · direction; four rows at a time share the horizontal sums. The number of threads is given: a thread
// that never called torch would take all cores, whatever torch was told.
template <typename Cell>
void project(const Cell* table, int64_t rows, int width, const float* direction, int threads, float* out) {
    const size_t step = stride(table, width);
#pragma omp parallel for schedule(dynamic, 1024) num_threads(threads)
    for (int64_t n = 0; n < rows; n += 4) {
        Floats part[4] = {};
        int some = int(std::min<int64_t>(4, rows - n));
        for (int i = 0; i < some; i++) part[i] = dot(direction, table + (n + i) * step, width);
        Floats sums = horizontal(part[0], part[1], part[2], part[3]);
        for (int i = 0; i < some; i++) out[n + i] = sums[4 * i];
    }
}

}  // namespace
