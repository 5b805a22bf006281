// crossmask::ema_update_ on CUDA: one launch for the whole list, on the current stream, whatever its dtypes and sizes; no
// synchronisation, no allocation and no copy to the device, so that a CUDA graph can hold it.
//
// What a thread does is in ema_cuda_kernel.h. Only a list longer than the kernel's argument takes further launches: 798
// tensors, or 98 where the driver is older than CUDA 12.1.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "ema_cuda_kernel.h"

namespace crossmask {
namespace {

#define CROSSMASK_LARGE_ARGUMENTS 12010  // the CUDA version, of compiler and driver, from which arguments may take 32,764 bytes

// The last number: blocks a processor, which bounds the registers of a thread to 40 and 64.
template <int kTensors, bool kStochastic>
__global__ void __launch_bounds__(kThreads, kStochastic ? 4 : 6) ema_update_kernel(const __grid_constant__ Table<kTensors> table) {
  update_block<kStochastic, DeviceMemory>(table, blockIdx.x, static_cast<int>(threadIdx.x));
}

// not STD_CUDA_CHECK: it calls into libtorch_cuda, which a CPU-only torch does not have, and the import would fail there
void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "ema_update_: CUDA error: ", cudaGetErrorString(error));
}

template <int kTensors>
void launch(const std::vector<EmaTensor>& tensors, Average weights, const int64_t* seed, int processors, cudaStream_t stream) {
  for_each_launch<kTensors>(tensors, weights, seed, processors, [&](const Table<kTensors>& table, uint32_t blocks) {
    if (seed == nullptr) {
      ema_update_kernel<kTensors, false><<<blocks, kThreads, 0, stream>>>(table);
    } else {
      ema_update_kernel<kTensors, true><<<blocks, kThreads, 0, stream>>>(table);
    }
    check(cudaGetLastError());
  });
}

void ema_update_cuda(const EmaCall& call) {
  const torch::stable::accelerator::DeviceGuard guard(call.device);
  const auto stream = static_cast<cudaStream_t>(torch::stable::accelerator::getCurrentStream(call.device).nativeHandle());
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, call.device));
#if CUDART_VERSION >= CROSSMASK_LARGE_ARGUMENTS
  // the small argument where it is enough: every launch carries all of it
  static const bool large = [] {
    int driver = 0;
    return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= CROSSMASK_LARGE_ARGUMENTS;
  }();
  if (large && call.tensors.size() > kFewTensors)
    return launch<kManyTensors>(call.tensors, call.weights, call.seed, processors, stream);
#endif
  launch<kFewTensors>(call.tensors, call.weights, call.seed, processors, stream);
}

}  // namespace
}  // namespace crossmask

STABLE_TORCH_LIBRARY_IMPL(crossmask, CUDA, m) { m.impl("ema_update_", &crossmask::boxed<crossmask::ema_update_cuda>); }
