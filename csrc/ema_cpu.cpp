// crossmask::ema_update_ on the CPU: one pass over memory, at its speed. Each thread takes a contiguous run of chunks.
//
// The inner loop is left to the compiler's vectoriser: it streams two arrays in and one out, so memory is the limit.
// Stores are ordinary ones: non-temporal stores slow an update in place, whose line is in the cache already.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "ema.h"
#include "ema_math.h"

namespace crossmask {
namespace {

constexpr int64_t kChunk = 1 << 15;  // elements: small enough to share unequal tensors evenly, large enough to hide the loop over chunks

template <typename Student>
void update(float* __restrict__ teacher, const Student* __restrict__ student, int64_t size, float student_weight) {
  for (int64_t i = 0; i < size; ++i) teacher[i] = ema(teacher[i], student[i], student_weight);
}

struct Chunk {
  size_t tensor;
  int64_t begin;
};

void ema_update_cpu(const std::vector<Tensor>& teacher, const std::vector<Tensor>& student, double decay) {
  const std::vector<EmaTensor> tensors = checked(teacher, student, decay);
  const float student_weight = static_cast<float>(1.0 - decay);
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < tensors.size(); ++i)
    for (int64_t begin = 0; begin < tensors[i].size; begin += kChunk) chunks.push_back({i, begin});

  // libtorch's own thread pool: OMP_NUM_THREADS and torch.set_num_threads hold here too
  torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), /*grain_size=*/1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const EmaTensor& t = tensors[chunks[c].tensor];
      const int64_t begin = chunks[c].begin;
      const int64_t size = std::min(kChunk, t.size - begin);
      float* const to = t.teacher + begin;
      if (t.student_dtype == ScalarType::Float) {
        update(to, static_cast<const float*>(t.student) + begin, size, student_weight);
      } else if (t.student_dtype == ScalarType::BFloat16) {
        update(to, static_cast<const torch::headeronly::BFloat16*>(t.student) + begin, size, student_weight);
      } else {
        update(to, static_cast<const torch::headeronly::Half*>(t.student) + begin, size, student_weight);
      }
    }
  });
}

}  // namespace
}  // namespace crossmask

STABLE_TORCH_LIBRARY_IMPL(crossmask, CPU, m) { m.impl("ema_update_", TORCH_BOX(&crossmask::ema_update_cpu)); }
