// crossmask::topk_mask on the CPU: checks, results, and the rows of topk_mask.h shared among torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "topk_mask.h"

namespace crossmask {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Scores, about fifty microseconds: less is not worth a second thread, which on a busy machine is waited for far longer.
constexpr int64_t kGrain = 1 << 16;
constexpr int64_t kNoise = 3;  // drawing a score's noise takes three times what selecting it does

template <typename Score>
CROSSMASK_INLINE void select_rows(const Selection& s, int64_t first, int64_t last) {
  using Value = std::conditional_t<std::is_same_v<Score, double>, double, float>;
  const size_t padded = static_cast<size_t>((s.positions + kLanes - 1) / kLanes * kLanes);
  std::vector<typename KeyOf<Value>::Key> key(padded);
  std::vector<Value> value(std::is_same_v<Score, Value> && s.partials == 1 && s.gumbel_seed == nullptr ? 0 : padded);
  for (int64_t row = first; row < last; ++row) select_row<Score, Value>(s, row, value.data(), key.data());
}

CROSSMASK_INLINE void select_rows_of(ScalarType dtype, const Selection& s, int64_t first, int64_t last) {
  switch (dtype) {
    case ScalarType::Double: return select_rows<double>(s, first, last);
    case ScalarType::Float: return select_rows<float>(s, first, last);
    case ScalarType::Half: return select_rows<torch::headeronly::Half>(s, first, last);
    default: return select_rows<torch::headeronly::BFloat16>(s, first, last);
  }
}

// One binary for every x86-64: the same code for each vector width, chosen at the first call. No wider set allows fused
// multiply-adds to change a result: CMakeLists.txt switches contraction off for this file.
using SelectRows = void (*)(ScalarType, const Selection&, int64_t, int64_t);

void select_baseline(ScalarType dtype, const Selection& s, int64_t first, int64_t last) { select_rows_of(dtype, s, first, last); }

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2"))) void select_avx2(ScalarType dtype, const Selection& s, int64_t first, int64_t last) {
  select_rows_of(dtype, s, first, last);
}
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) void select_avx512(ScalarType dtype, const Selection& s, int64_t first,
                                                                                int64_t last) {
  select_rows_of(dtype, s, first, last);
}
SelectRows widest() {
  const char* const told = std::getenv("ATEN_CPU_CAPABILITY");  // PyTorch's own limit: default, avx2 or avx512
  const std::string limit = told == nullptr ? "avx512" : told;
  if (limit == "default") return select_baseline;
  __builtin_cpu_init();
  if (limit != "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return select_avx512;
  return __builtin_cpu_supports("avx2") ? select_avx2 : select_baseline;
}
#else
SelectRows widest() { return select_baseline; }
#endif

const int64_t* per_row(const std::optional<Tensor>& x, const char* name, int64_t size) {
  if (!x.has_value()) return nullptr;
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Long && x->dim() == 1 && x->size(0) == size && x->is_contiguous() && x->is_cpu(),
                  "topk_mask: ", name, " must be ", size, " contiguous int64 on the CPU");
  return static_cast<const int64_t*>(x->const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> topk_mask_cpu(const Tensor& scores, std::optional<Tensor> valid, std::optional<int64_t> k,
                                                         std::optional<int64_t> ratio, std::optional<Tensor> row_k,
                                                         std::optional<Tensor> row_ratio, std::optional<double> threshold, bool largest,
                                                         std::optional<Tensor> gumbel_seed, std::optional<Tensor> gumbel_rows, int64_t width) {
  static const SelectRows select = widest();
  const ScalarType dtype = scores.scalar_type();
  STD_TORCH_CHECK(scores.dim() == 3 && scores.size(1) > 0, "topk_mask: scores must be (rows, partials, positions)");
  STD_TORCH_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "topk_mask: scores must be float64, float32, float16 or bfloat16");
  const int64_t B = scores.size(0), N = scores.size(2);
  STD_TORCH_CHECK(width >= 0, "topk_mask: width must not be negative, got ", width);
  STD_TORCH_CHECK(gumbel_seed.has_value() == gumbel_rows.has_value(), "topk_mask: gumbel_seed and gumbel_rows go together");

  const Tensor read = N < 2 || scores.stride(2) == 1 ? scores : torch::stable::contiguous(scores);
  Tensor flags = valid.has_value() ? *valid : scores;
  if (valid.has_value()) {
    STD_TORCH_CHECK(valid->scalar_type() == ScalarType::Bool && valid->dim() == 2 && valid->size(0) == B && valid->size(1) == N &&
                        valid->is_cpu(),
                    "topk_mask: valid must be bool (", B, ", ", N, ") on the CPU");
    if (N >= 2 && valid->stride(1) != 1) flags = torch::stable::contiguous(flags);
  }
  Tensor mask = torch::stable::new_empty(scores, {B, N}, ScalarType::Bool);
  Tensor indices = torch::stable::new_empty(scores, {B, width}, ScalarType::Long);
  Tensor count = torch::stable::new_empty(scores, {B}, ScalarType::Long);
  Tensor nan = torch::stable::new_empty(scores, {B}, ScalarType::Long);

  Selection s{};
  s.scores = read.const_data_ptr();
  s.row_stride = read.stride(0);
  s.partial_stride = read.stride(1);
  s.rows = B;
  s.partials = read.size(1);
  s.positions = N;
  s.valid = valid.has_value() ? static_cast<const uint8_t*>(flags.const_data_ptr()) : nullptr;
  s.valid_stride = flags.stride(0);
  s.k = k.value_or(kAll);
  s.ratio = ratio.value_or(kNoRatio);
  s.row_k = per_row(row_k, "row_k", B);
  s.row_ratio = per_row(row_ratio, "row_ratio", B);
  s.has_threshold = threshold.has_value();
  s.threshold = threshold.value_or(0.0);
  s.largest = largest;
  s.gumbel_seed = per_row(gumbel_seed, "gumbel_seed", 1);
  s.gumbel_rows = per_row(gumbel_rows, "gumbel_rows", B);
  s.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());
  s.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  s.width = width;
  s.count = static_cast<int64_t*>(count.mutable_data_ptr());
  s.nan = static_cast<int64_t*>(nan.mutable_data_ptr());
  // libtorch's own thread pool: OMP_NUM_THREADS and torch.set_num_threads hold here too
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, N * (s.partials + (s.gumbel_seed != nullptr ? kNoise : 0))));
  torch::stable::parallel_for(0, B, grain, [&](int64_t first, int64_t last) { select(dtype, s, first, last); });
  return {mask, indices, count, nan};
}

}  // namespace
}  // namespace crossmask

STABLE_TORCH_LIBRARY_IMPL(crossmask, CPU, m) { m.impl("topk_mask", TORCH_BOX(&crossmask::topk_mask_cpu)); }
