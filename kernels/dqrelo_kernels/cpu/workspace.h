// SPDX-License-Identifier: Apache-2.0
//
// Memory in which rows of x are staged, for ops.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace {

constexpr int WINDOW = 256;  // rows of x in work at a time: they stay in the L2 cache

// Memory of this thread that stays for the next call; what is in it does not.
enum Use { SHARED, OWN, USES };
char* workspace(size_t bytes, Use use = SHARED) {
    static thread_local std::unique_ptr<char[]> memory[USES];
    static thread_local size_t size[USES] = {};
    if (size[use] < bytes) memory[use].reset(new char[(size[use] = bytes) + 64]);
    auto start = reinterpret_cast<uintptr_t>(memory[use].get());
    start = (start + 63) & ~uintptr_t(63);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(memory[use].get(), size[use] + 64);
    __asan_unpoison_memory_region(reinterpret_cast<void*>(start), bytes);
#endif
    return reinterpret_cast<char*>(start);
}

}  // namespace
