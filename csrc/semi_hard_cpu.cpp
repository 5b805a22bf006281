// crossmask::semi_hard_walk on the CPU: each sample's s-th most similar among those that are left, one after the other.
//
// A pick scans the unused samples once, in ascending order, and keeps the s best: M^2 / 2 comparisons a walk. Nothing is computed, so
// the order is bit for bit the reference's. On one thread: each pick depends on the one before it, and the other cores are training.
// A text's similarities with images are a column; read as one, every value is a cache line and a page of its own, which takes many
// times the whole walk. So the columns are turned into rows first, a tile at a time: M^2 more floats while it walks.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "topk_mask.h"

namespace crossmask {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kSorted = 32;  // up to this rank the best are kept sorted; beyond it all candidates are partitioned

struct Candidate {
  int32_t key;  // key_of(): in the order of similarity, NaN last
  int32_t sample;
};

void transpose(const float* from, float* to, int64_t size) {
  constexpr int64_t kTile = 32;  // two tiles are in the first-level cache
  for (int64_t top = 0; top < size; top += kTile)
    for (int64_t left = 0; left < size; left += kTile)
      for (int64_t i = left; i < std::min(left + kTile, size); ++i)
        for (int64_t j = top; j < std::min(top + kTile, size); ++j) to[i * size + j] = from[j * size + i];
}

bool more_similar(const Candidate& a, const Candidate& b) { return a.key != b.key ? a.key > b.key : a.sample < b.sample; }

class Walk {
 public:
  Walk(const float* similarity, const int64_t* groups, int64_t samples, int64_t similar, int64_t apart)
      : by_image_(similarity),
        by_text_(new float[static_cast<size_t>(samples * samples)]),
        samples_(samples),
        similar_(similar),
        apart_(apart),
        unused_(static_cast<size_t>(samples)) {
    transpose(similarity, by_text_.get(), samples);
    std::iota(unused_.begin(), unused_.end(), 0);
    best_.reserve(static_cast<size_t>(similar <= kSorted ? similar : samples));
    if (groups == nullptr) return;
    std::vector<int64_t> numbers(groups, groups + samples);
    std::sort(numbers.begin(), numbers.end());
    numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
    for (int64_t i = 0; i < samples; ++i)
      group_.push_back(static_cast<int32_t>(std::lower_bound(numbers.begin(), numbers.end(), groups[i]) - numbers.begin()));
    recent_.assign(numbers.size(), 0);
  }

  void order(int64_t start, int64_t* order) {
    for (int64_t place = 0; place < samples_; ++place) {
      const int32_t sample = place == 0 ? static_cast<int32_t>(start) : next(static_cast<int32_t>(order[place - 1]), place % 2 == 1);
      unused_.erase(std::lower_bound(unused_.begin(), unused_.end(), sample));
      order[place] = sample;
      if (group_.empty()) continue;
      ++recent_[group_[sample]];
      if (place >= apart_) --recent_[group_[order[place - apart_]]];
    }
  }

 private:
  int32_t next(int32_t from, bool by_image) {
    if (!group_.empty()) {
      const int32_t group = group_[from];
      int32_t found = pick(from, by_image, [this](int32_t j) { return recent_[group_[j]] == 0; });
      if (found < 0 && apart_ > 1) found = pick(from, by_image, [this, group](int32_t j) { return group_[j] != group; });
      if (found >= 0) return found;
    }
    return pick(from, by_image, [](int32_t /*j*/) { return true; });
  }

  // The min(s, left)-th most similar of the allowed ones; -1 where none is.
  template <typename Allowed>
  int32_t pick(int32_t from, bool by_image, Allowed allowed) {
    const float* const row = (by_image ? by_image_ : by_text_.get()) + from * samples_;
    best_.clear();
    if (similar_ > kSorted) {
      for (const int32_t j : unused_)
        if (allowed(j)) best_.push_back({key_of(row[j], true), j});
      if (best_.empty()) return -1;
      const auto chosen = best_.begin() + (std::min<int64_t>(similar_, static_cast<int64_t>(best_.size())) - 1);
      std::nth_element(best_.begin(), chosen, best_.end(), more_similar);
      return chosen->sample;
    }
    for (const int32_t j : unused_) {  // ascending: one that equals the last of the best ranks behind it
      const Candidate candidate{key_of(row[j], true), j};
      const bool full = static_cast<int64_t>(best_.size()) == similar_;
      if ((full && candidate.key <= best_.back().key) || !allowed(j)) continue;
      if (full) best_.pop_back();
      best_.push_back(candidate);
      for (size_t i = best_.size() - 1; i > 0 && best_[i - 1].key < best_[i].key; --i) std::swap(best_[i - 1], best_[i]);
    }
    return best_.empty() ? -1 : best_.back().sample;
  }

  const float* const by_image_;
  const std::unique_ptr<float[]> by_text_;
  const int64_t samples_, similar_, apart_;
  std::vector<int32_t> unused_;  // ascending
  std::vector<int32_t> group_;   // numbered from 0; empty: there are none
  std::vector<int32_t> recent_;  // of each group, how many are among the last `apart` samples
  std::vector<Candidate> best_;
};

Tensor semi_hard_walk_cpu(const Tensor& similarity, std::optional<Tensor> groups, int64_t similar, int64_t start, int64_t apart) {
  STD_TORCH_CHECK(similarity.dim() == 2 && similarity.size(0) == similarity.size(1) && similarity.size(0) > 0,
                  "semi_hard_walk: similarity must be (samples, samples) and not empty");
  STD_TORCH_CHECK(similarity.scalar_type() == ScalarType::Float && similarity.is_contiguous(),
                  "semi_hard_walk: similarity must be contiguous float32");
  const int64_t samples = similarity.size(0);
  STD_TORCH_CHECK(samples <= std::numeric_limits<int32_t>::max(), "semi_hard_walk: too many samples, ", samples);
  STD_TORCH_CHECK(similar >= 1 && apart >= 1 && start >= 0 && start < samples,
                  "semi_hard_walk: similar and apart must be at least 1 and start one of the samples");
  const int64_t* group = nullptr;
  if (groups.has_value()) {
    STD_TORCH_CHECK(groups->scalar_type() == ScalarType::Long && groups->dim() == 1 && groups->size(0) == samples &&
                        groups->is_contiguous() && groups->is_cpu(),
                    "semi_hard_walk: groups must be ", samples, " contiguous int64 on the CPU");
    group = static_cast<const int64_t*>(groups->const_data_ptr());
  }
  Tensor order = torch::stable::new_empty(similarity, {samples}, ScalarType::Long);
  Walk(static_cast<const float*>(similarity.const_data_ptr()), group, samples, similar, apart)
      .order(start, static_cast<int64_t*>(order.mutable_data_ptr()));
  return order;
}

}  // namespace
}  // namespace crossmask

STABLE_TORCH_LIBRARY_IMPL(crossmask, CPU, m) { m.impl("semi_hard_walk", TORCH_BOX(&crossmask::semi_hard_walk_cpu)); }
