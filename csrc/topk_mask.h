// One row of crossmask::topk_mask on the CPU: values to integer keys, the k-th largest key by bisection, the mask.
//
// Bisection needs only counts of keys above a bound, which vectorise to sixteen keys an instruction, and it stops as soon as a
// bound has exactly k keys above it: about as many passes over a row in the first-level cache as the row's length has bits.
// Everything is inlined into the functions of topk_mask_cpu.cpp, which are compiled once for each vector width.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "philox.h"

#define CROSSMASK_INLINE inline __attribute__((always_inline))

namespace crossmask {

constexpr int64_t kAll = std::numeric_limits<int64_t>::max();
constexpr int64_t kNoRatio = -1;
constexpr int kLanes = 16;  // rows are padded to a multiple of it, so that no loop has a tail

struct Selection {  // one call; strides in elements, last dimensions contiguous
  const void* scores;
  int64_t row_stride, partial_stride;
  int64_t rows, partials, positions;
  const uint8_t* valid;  // null: all are
  int64_t valid_stride;
  int64_t k, ratio;  // for every row; kAll and kNoRatio where not given
  const int64_t *row_k, *row_ratio;
  bool has_threshold;
  double threshold;
  bool largest;
  const int64_t *gumbel_seed, *gumbel_rows;  // null: no noise
  uint8_t* mask;
  int64_t* indices;
  int64_t width;
  int64_t *count, *nan;
};

// ---- keys: integers in the order of selection. An ordinary score's key is above kNan, NaN's is kNan, what is not valid has kInvalid.

template <typename Value>
struct KeyOf {
  using Key = std::conditional_t<sizeof(Value) == 4, int32_t, int64_t>;
  static constexpr Key kMax = std::numeric_limits<Key>::max();
  static constexpr Key kInvalid = std::numeric_limits<Key>::min();
  static constexpr Key kNan = kInvalid + 1;
  static constexpr Key kInfinity = sizeof(Value) == 4 ? static_cast<Key>(0x7f800000) : static_cast<Key>(0x7ff0000000000000);
};

template <typename Value>
CROSSMASK_INLINE typename KeyOf<Value>::Key key_of(Value x, bool largest) {
  using K = KeyOf<Value>;
  using Key = typename K::Key;
  Key bits;
  std::memcpy(&bits, &x, sizeof(bits));
  Key key = bits ^ ((bits >> (8 * sizeof(Key) - 1)) & K::kMax);  // negative numbers in the opposite order of their magnitude
  key += key == -1;                                              // -0 is +0
  key = largest ? key : ~key;
  return (bits & K::kMax) > K::kInfinity ? K::kNan : key;
}

// ---- values

CROSSMASK_INLINE float log_of_normal(float x) {  // as in Cephes' logf: error below one ulp; no libm, so that it vectorises
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  bits += 0x3f800000u - 0x3f3504f3u;
  const float exponent = static_cast<float>(static_cast<int32_t>(bits >> 23) - 127);
  bits = (bits & 0x7fffffu) + 0x3f3504f3u;  // mantissa in [sqrt(1/2), sqrt(2))
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  f -= 1.0f;
  const float z = f * f;
  float y = 7.0376836292e-2f;
  y = y * f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  y = y * f * z - 2.12194440e-4f * exponent - 0.5f * z;
  return (f + y) + 0.693359375f * exponent;
}

template <typename Value>
CROSSMASK_INLINE void add_gumbel(Value* value, int64_t padded, int64_t seed, int64_t row) {
  const uint32_t low = static_cast<uint32_t>(row), high = static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32);
  for (int64_t begin = 0; begin < padded; begin += 4 * kLanes) {
    uint32_t word[4][kLanes];
    for (int i = 0; i < kLanes; ++i) {
      uint32_t c0 = static_cast<uint32_t>(begin / 4 + i), c1 = low, c2 = high, c3 = 0;
      philox(c0, c1, c2, c3, static_cast<uint64_t>(seed));
      word[0][i] = c0, word[1][i] = c1, word[2][i] = c2, word[3][i] = c3;
    }
    float noise[4][kLanes];
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < kLanes; ++i) noise[j][i] = -log_of_normal(-log_of_normal(uniform(word[j][i])));
    const int64_t size = std::min<int64_t>(4 * kLanes, padded - begin) / 4;
    for (int64_t i = 0; i < size; ++i)
      for (int j = 0; j < 4; ++j) value[begin + 4 * i + j] += static_cast<Value>(noise[j][i]);
  }
}

template <typename Score, typename Value>
CROSSMASK_INLINE void mean(const Score* score, const Selection& s, Value* value) {
  for (int64_t i = 0; i < s.positions; ++i) value[i] = static_cast<Value>(score[i]);
  if (s.partials == 1) return;
  for (int64_t r = 1; r < s.partials; ++r) {
    const Score* const partial = score + r * s.partial_stride;
    for (int64_t i = 0; i < s.positions; ++i) value[i] += static_cast<Value>(partial[i]);
  }
  const Value share = static_cast<Value>(1.0 / static_cast<double>(s.partials));
  for (int64_t i = 0; i < s.positions; ++i) value[i] *= share;
}

// ---- selection

// min(k, count), or the ratio's share of count: the exact integer arithmetic of share_of in request.py.
CROSSMASK_INLINE int64_t how_many(const Selection& s, int64_t row, int64_t count) {
  const int64_t ratio = s.row_ratio != nullptr ? s.row_ratio[row] : s.ratio;
  if (ratio == kNoRatio) return std::max<int64_t>(0, std::min(s.row_k != nullptr ? s.row_k[row] : s.k, count));
  const int64_t high = ratio >> 24, low = ratio & 0xFFFFFF;
  const int64_t share = (high * count + ((low * count) >> 24)) >> 24;
  return std::min(ratio > 0 ? std::max<int64_t>(share, 1) : 0, count);
}

template <typename Key>
CROSSMASK_INLINE int64_t count_from(const Key* key, int64_t padded, Key least) {
  Key count = 0;  // of the width of the keys, for the vectoriser; a row of 2^31 floats is beyond any row
  for (int64_t i = 0; i < padded; ++i) count += key[i] >= least;
  return count;
}

template <typename Key>
struct Cut {
  Key above;      // every key above it is selected,
  int64_t equal;  // and of those equal to it the first so many
};

// The k-th largest of `numbers` keys that lie in [low, high]; 0 < k < numbers.
template <typename Key>
CROSSMASK_INLINE Cut<Key> bisect(const Key* key, int64_t padded, int64_t k, Key low, Key high) {
  using Wide = std::make_unsigned_t<Key>;
  int64_t above = 0;  // keys above high; from low on there are at least k
  while (low < high) {
    const Wide gap = static_cast<Wide>(high) - static_cast<Wide>(low);
    const Key middle = static_cast<Key>(static_cast<Wide>(low) + gap / 2 + (gap & 1));
    const int64_t count = count_from(key, padded, middle);
    if (count == k) return {static_cast<Key>(middle - 1), 0};
    if (count > k) {
      low = middle;
    } else {
      high = static_cast<Key>(middle - 1);
      above = count;
    }
  }
  return {low, k - above};
}

// `value` and `key` have room for as many positions as there are, rounded up to kLanes.
template <typename Score, typename Value>
CROSSMASK_INLINE void select_row(const Selection& s, int64_t row, Value* value, typename KeyOf<Value>::Key* key) {
  using K = KeyOf<Value>;
  using Key = typename K::Key;
  const int64_t N = s.positions, padded = (N + kLanes - 1) / kLanes * kLanes;
  const Score* const score = static_cast<const Score*>(s.scores) + row * s.row_stride;
  const Value* source = value;
  if constexpr (std::is_same_v<Score, Value>) {
    if (s.partials == 1 && s.gumbel_seed == nullptr) source = score;
  }
  if (source == value) mean(score, s, value);
  if (s.gumbel_seed != nullptr) add_gumbel(value, padded, *s.gumbel_seed, s.gumbel_rows[row]);

  const uint8_t* const valid = s.valid == nullptr ? nullptr : s.valid + row * s.valid_stride;
  for (int64_t i = 0; i < N; ++i) key[i] = key_of(source[i], s.largest);
  if (valid != nullptr) {
    for (int64_t i = 0; i < N; ++i) {
      const Key all = -static_cast<Key>(valid[i]);  // bits, where a choice would keep this from being vectorised
      key[i] = (key[i] & all) | (K::kInvalid & ~all);
    }
  }
  for (int64_t i = N; i < padded; ++i) key[i] = K::kInvalid;

  using Wide = std::make_unsigned_t<Key>;
  constexpr Wide kFirst = static_cast<Wide>(K::kNan + 1);  // counted from here, what is not a number is above every number
  Wide least = std::numeric_limits<Wide>::max();
  Key high = K::kNan;
  for (int64_t i = 0; i < padded; ++i) {
    least = std::min(least, static_cast<Wide>(static_cast<Wide>(key[i]) - kFirst));
    high = std::max(high, key[i]);
  }
  const Key low = static_cast<Key>(least + kFirst);
  const int64_t numbers = count_from(key, padded, static_cast<Key>(K::kNan + 1));
  const int64_t count = numbers == N ? N : count_from(key, padded, K::kNan);

  const int64_t k = how_many(s, row, count);
  Cut<Key> cut{K::kMax, 0};
  if (k >= count) {
    cut = {K::kInvalid, 0};
  } else if (k >= numbers) {
    cut = {K::kNan, k - numbers};
  } else if (k > 0) {
    cut = bisect(key, padded, k, low, high);
  }
  int64_t selected = k;
  if (s.has_threshold) {
    const Value threshold = static_cast<Value>(s.threshold);
    const Key beyond = threshold == threshold ? key_of(threshold, s.largest) : K::kMax;  // nothing is beyond NaN
    if (beyond >= cut.above) {
      cut = {beyond, 0};
      selected = beyond == K::kMax ? 0 : count_from(key, padded, static_cast<Key>(beyond + 1));
    }
  }

  uint8_t* const mask = s.mask + row * N;
  for (int64_t i = 0; i < N; ++i) mask[i] = key[i] > cut.above;
  for (int64_t i = 0, left = cut.equal; left > 0; ++i) {
    const bool equal = key[i] == cut.above;
    mask[i] |= equal;
    left -= equal;
  }
  s.count[row] = selected;
  s.nan[row] = count - numbers;
  if (s.width > 0) {
    int64_t* const indices = s.indices + row * s.width;
    int64_t found = 0;
    for (int64_t i = 0; i < N && found < s.width; ++i) {
      indices[found] = i;  // overwritten unless selected
      found += mask[i];
    }
    for (; found < s.width; ++found) indices[found] = -1;
  }
}

}  // namespace crossmask
