// What the CPU and the CUDA kernel of crossmask::ema_update_ share: the checks, and the list of tensors as plain pointers.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <vector>

#include "ema_math.h"

namespace crossmask {

enum class Float : uint8_t { f32, bf16, f16 };

struct EmaTensor {
  void* teacher;
  const void* student;
  void* copy;      // of the teacher; nullptr where none is asked for
  int64_t size;    // elements, in the order of the teacher's memory; int64: one ZeRO shard may hold more than 2^31
  uint32_t index;  // in the caller's list, for the draws of stochastic rounding
  Float teacher_dtype;
  Float student_dtype;
  Float copy_dtype;
};

struct EmaCall {  // checked, ready to run
  std::vector<EmaTensor> tensors;  // those that have elements
  Average weights;
  const int64_t* seed = nullptr;  // on the tensors' device; nullptr: teachers are rounded to the nearest
  int32_t device = 0;
};

// Checks the arguments as the dispatcher hands them over, in the order of the schema, and runs the kernel on them, unless no tensor
// has elements. What the kernels do not handle is refused, and the tensor named, before anything is written. An empty uint8 tensor
// among the copies stands for a tensor that gets none. Not TORCH_BOX, which wraps each tensor in a shared pointer: with hundreds of
// small ones that is felt.
void check_and_run(StableIValue* stack, void (*run)(const EmaCall&));

// A tensor of Python's takes the GIL when C++ drops its last reference, and an op runs without the GIL: with hundreds of small tensors
// that is a quarter of the call. From the one call to the other, in this thread, the references are kept; the second is made with
// the GIL held.
void hold_tensors();
void release_tensors();

template <void (*kRun)(const EmaCall&)>
void boxed(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  check_and_run(stack, kRun);
}

}  // namespace crossmask
