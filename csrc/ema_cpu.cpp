// crossmask::ema_update_ on the CPU: one pass over memory, at its speed, shared evenly among torch's threads.
#include "ema_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <string>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace crossmask {
namespace {

// Bytes of memory traffic, half a millisecond: less is not worth a second thread, which on a busy machine is waited for far longer.
constexpr int64_t kGrain = 1 << 25;
constexpr int64_t kOverhead = 1 << 10;    // a tensor's own cost, in bytes of traffic
constexpr int64_t kManyCopies = 1 << 24;  // bytes: more would push everything else out of the cache before they are read

// One binary for every x86-64: the same code for each vector width, chosen at the first call. On AArch64 NEON is the baseline.
// No wider set allows fused multiply-adds to change a result: CMakeLists.txt switches contraction off for this file.
using UpdateRun = void (*)(const Update&, const EmaTensor&, int64_t, int64_t);

void update_baseline(const Update& update, const EmaTensor& tensor, int64_t begin, int64_t end) {
  update_run<PortableHalf>(update, tensor, begin, end);
}

#if defined(__x86_64__) && defined(__GNUC__)
// Not inlined, because update_run is compiled for the baseline before it is for AVX: a call for each block, of up to 128 elements.
struct HardwareHalf {
  static constexpr int kLanes = 8;

  __attribute__((target("avx2,f16c"), noinline)) static void widen(const uint16_t* bits, float* to, int64_t size) {
    const auto eight = [&](int64_t i) __attribute__((target("avx2,f16c"), always_inline)) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bits + i))));
    };
    if (size == kBlock) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < kBlock; i += kLanes) eight(i);
      return;
    }
    const int64_t whole = size / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) eight(i);
    for (int64_t i = whole; i < size; ++i) to[i] = from_f16(bits[i]);
  }

  __attribute__((target("avx2,f16c"), noinline)) static void narrow(const float* values, uint16_t* to, int64_t size) {
    const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000));  // whose 16 bits are those of ema_math.h
    const auto eight = [&](int64_t i) __attribute__((target("avx2,f16c"), always_inline)) {
      const __m256 x = _mm256_loadu_ps(values + i);
      const __m256 one_nan = _mm256_blendv_ps(x, nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(one_nan, _MM_FROUND_TO_NEAREST_INT));
    };
    if (size == kBlock) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < kBlock; i += kLanes) eight(i);
      return;
    }
    const int64_t whole = size / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) eight(i);
    for (int64_t i = whole; i < size; ++i) to[i] = to_f16(values[i]);
  }
};

__attribute__((target("avx2"))) void update_avx2(const Update& update, const EmaTensor& tensor, int64_t begin, int64_t end) {
  update_run<HardwareHalf>(update, tensor, begin, end);
}
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))) void update_avx512(const Update& update,
                                                                                                        const EmaTensor& tensor,
                                                                                                        int64_t begin, int64_t end) {
  update_run<HardwareHalf>(update, tensor, begin, end);
}
UpdateRun widest() {
  const char* const told = std::getenv("ATEN_CPU_CAPABILITY");  // PyTorch's own limit: default, avx2 or avx512
  const std::string limit = told == nullptr ? "avx512" : told;
  __builtin_cpu_init();
  if (limit == "default" || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("f16c")) return update_baseline;
  if (limit != "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return update_avx512;
  return update_avx2;
}
#else
UpdateRun widest() { return update_baseline; }
#endif

int64_t bytes_of(Float dtype) { return dtype == Float::f32 ? 4 : 2; }

int64_t traffic(const EmaTensor& t) {  // bytes an element
  return 2 * bytes_of(t.teacher_dtype) + bytes_of(t.student_dtype) + (t.copy == nullptr ? 0 : 2 * bytes_of(t.copy_dtype));
}

void ema_update_cpu(const EmaCall& call) {
  static const UpdateRun run = widest();
  const std::vector<EmaTensor>& tensors = call.tensors;
  Update update{call.weights, call.seed != nullptr, call.seed != nullptr ? static_cast<uint64_t>(*call.seed) : 0, false};

  std::vector<int64_t> places{0};  // of each tensor, and the end, on one line of traffic, which is cut evenly wherever that falls
  places.reserve(tensors.size() + 1);
  int64_t copied = 0;
  for (const EmaTensor& t : tensors) {
    places.push_back(places.back() + t.size * traffic(t) + kOverhead);
    copied += t.copy == nullptr ? 0 : t.size * bytes_of(t.copy_dtype);
  }
  update.stream_copies = copied >= kManyCopies;
  // the element of tensor i at a place; both neighbours of a cut compute the same one
  const auto element = [&](size_t i, int64_t place) {
    return std::clamp<int64_t>((place - places[i]) / traffic(tensors[i]) / kBlock * kBlock, 0, tensors[i].size);
  };
  // libtorch's own thread pool: OMP_NUM_THREADS and torch.set_num_threads hold here too
  torch::stable::parallel_for(0, places.back(), kGrain, [&](int64_t first, int64_t last) {
    const auto after = std::upper_bound(places.begin(), places.end(), first);
    for (size_t i = static_cast<size_t>(after - places.begin()) - 1; i < tensors.size() && places[i] < last; ++i)
      run(update, tensors[i], first <= places[i] ? 0 : element(i, first), last >= places[i + 1] ? tensors[i].size : element(i, last));
  });
}

}  // namespace
}  // namespace crossmask

STABLE_TORCH_LIBRARY_IMPL(crossmask, CPU, m) { m.impl("ema_update_", &crossmask::boxed<crossmask::ema_update_cpu>); }
