// crossmask::ema_update_ on CUDA: a few launches for any number of tensors, no copy of metadata to the device, no synchronisation.
//
// The list of tensors travels in the kernel's arguments (at most 4 KiB); every block updates one chunk of one tensor.
// Loads and stores are 128 bits wide where both pointers allow it, so bf16 and fp16 students are read eight at a time.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "ema.h"
#include "ema_math.h"

namespace crossmask {
namespace {

constexpr int kTensors = 64;      // a launch
constexpr int kBlocks = 320;      // a launch
constexpr int kThreads = 256;     // a block
constexpr int64_t kChunk = 65536; // elements a block; a multiple of 8, so that a chunk is as aligned as its tensor

struct Launch {
  float* teacher[kTensors];
  const void* student[kTensors];
  int64_t size[kTensors];
  int32_t chunk[kBlocks];
  uint8_t tensor[kBlocks];
};
static_assert(sizeof(Launch) + sizeof(float) <= 4096, "kernel arguments are limited to 4 KiB");
static_assert(kTensors <= 256 && kChunk % 8 == 0);

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T values[N];
};

template <typename Student>
__global__ void __launch_bounds__(kThreads) ema_update_kernel(const __grid_constant__ Launch launch, float student_weight) {
  const int tensor = launch.tensor[blockIdx.x];
  const int64_t begin = static_cast<int64_t>(launch.chunk[blockIdx.x]) * kChunk;
  float* __restrict__ teacher = launch.teacher[tensor] + begin;
  const Student* __restrict__ student = static_cast<const Student*>(launch.student[tensor]) + begin;
  const int64_t left = launch.size[tensor] - begin;
  const int size = static_cast<int>(left < kChunk ? left : kChunk);

  constexpr int kWide = 16 / sizeof(Student);  // students in 128 bits: 4 or 8
  int done = 0;
  if (((reinterpret_cast<uintptr_t>(teacher) | reinterpret_cast<uintptr_t>(student)) & 15) == 0) {
    const int vectors = size / kWide;
    for (int i = threadIdx.x; i < vectors; i += kThreads) {
      const auto s = reinterpret_cast<const Vector<Student, kWide>*>(student)[i];
#pragma unroll
      for (int quarter = 0; quarter < kWide / 4; ++quarter) {
        auto* const slot = reinterpret_cast<Vector<float, 4>*>(teacher) + i * (kWide / 4) + quarter;
        Vector<float, 4> t = *slot;
#pragma unroll
        for (int j = 0; j < 4; ++j) t.values[j] = ema(t.values[j], s.values[quarter * 4 + j], student_weight);
        *slot = t;
      }
    }
    done = vectors * kWide;
  }
  for (int i = done + threadIdx.x; i < size; i += kThreads) teacher[i] = ema(teacher[i], student[i], student_weight);
}

// All tensors whose student has this dtype, in as many launches as the argument space asks for.
template <typename Student>
void update(const std::vector<EmaTensor>& tensors, ScalarType dtype, float student_weight, cudaStream_t stream) {
  Launch launch;
  int used_tensors = 0;
  int used_blocks = 0;
  const auto flush = [&] {
    if (used_blocks == 0) return;
    ema_update_kernel<Student><<<used_blocks, kThreads, 0, stream>>>(launch, student_weight);
    // not STD_CUDA_CHECK: it calls into libtorch_cuda, which a CPU-only torch does not have, and the import would fail there
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "ema_update_: CUDA error: ", cudaGetErrorString(error));
    used_tensors = used_blocks = 0;
  };
  for (const EmaTensor& tensor : tensors) {
    if (tensor.student_dtype != dtype) continue;
    const int64_t chunks = (tensor.size + kChunk - 1) / kChunk;
    for (int64_t chunk = 0; chunk < chunks;) {
      if (used_tensors == kTensors || used_blocks == kBlocks) flush();
      launch.teacher[used_tensors] = tensor.teacher;
      launch.student[used_tensors] = tensor.student;
      launch.size[used_tensors] = tensor.size;
      for (; chunk < chunks && used_blocks < kBlocks; ++chunk, ++used_blocks) {
        launch.tensor[used_blocks] = static_cast<uint8_t>(used_tensors);
        launch.chunk[used_blocks] = static_cast<int32_t>(chunk);
      }
      ++used_tensors;  // a tensor that did not fit goes on in the next launch, under a new number
    }
  }
  flush();
}

void ema_update_cuda(const std::vector<Tensor>& teacher, const std::vector<Tensor>& student, double decay) {
  const std::vector<EmaTensor> tensors = checked(teacher, student, decay);
  if (tensors.empty()) return;
  const int32_t device = teacher[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto stream = static_cast<cudaStream_t>(torch::stable::accelerator::getCurrentStream(device).nativeHandle());
  const float student_weight = static_cast<float>(1.0 - decay);
  update<float>(tensors, ScalarType::Float, student_weight, stream);
  update<torch::headeronly::BFloat16>(tensors, ScalarType::BFloat16, student_weight, stream);
  update<torch::headeronly::Half>(tensors, ScalarType::Half, student_weight, stream);
}

}  // namespace
}  // namespace crossmask

STABLE_TORCH_LIBRARY_IMPL(crossmask, CUDA, m) { m.impl("ema_update_", TORCH_BOX(&crossmask::ema_update_cuda)); }
