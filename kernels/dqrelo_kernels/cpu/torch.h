// SPDX-License-Identifier: Apache-2.0
//
// How torch calls the ops of ops.cpp: arguments by its stable C interface, so that what
// was built works with other versions of torch, and no Python is between.
#pragma once

#include "experts.h"
#include "linear.h"

#include <omp.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>

namespace {

// A tensor among the arguments of an op, whose memory torch keeps while it runs
struct Tensor {
    AtenTensorHandle handle;

    template <class T = char>
    T* data() const {
        void* found;
        aoti_torch_get_data_ptr(handle, &found);
        return static_cast<T*>(found);
    }
    int64_t dim() const {
        int64_t found;
        aoti_torch_get_dim(handle, &found);
        return found;
    }
    int64_t size(int64_t i) const {
        int64_t* found;
        aoti_torch_get_sizes(handle, &found);
        return found[i];
    }
    int64_t stride(int64_t i) const {
        int64_t* found;
        aoti_torch_get_strides(handle, &found);
        return found[i];
    }
    int32_t dtype() const {
        int32_t found;
        aoti_torch_get_dtype(handle, &found);
        return found;
    }

    // Activations [M, ..., K]: the code of their dtype. Throws if they cannot be read.
    int numbers() const {
        int64_t last = dim() - 1;
        if (size(last) < 2 || stride(last) == 1) {
            if (dtype() == aoti_torch_dtype_float32()) return F32;
            if (dtype() == aoti_torch_dtype_bfloat16()) return BF16;
            if (dtype() == aoti_torch_dtype_float16()) return F16;
        }
        throw std::invalid_argument(
            "dqrelo: activations must be float32, bfloat16 or float16, with the elements "
            "of a row side by side");
    }
};

// What an op is called with: its first arguments are tensors, which it has to give back.
template <int TENSORS>
class Arguments {
 public:
    explicit Arguments(StableIValue* stack) : stack(stack) {}
    ~Arguments() {
        for (int i = 0; i < TENSORS; i++)
            aoti_torch_delete_tensor_object((*this)[i].handle);
    }

    Tensor operator[](int i) const {
        return {reinterpret_cast<AtenTensorHandle>(stack[i])};
    }
    template <class T>
    T value(int i) const {
        T found;
        std::memcpy(&found, &stack[i], sizeof found);
        return found;
    }

 private:
    StableIValue* const stack;
};

}  // namespace
