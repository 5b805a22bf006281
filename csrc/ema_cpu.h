// A run of elements of one tensor on the CPU: widened to fp32, averaged, rounded and copied, in blocks that stay in the first-level
// cache, so that memory is read and written once.
//
// Plain loops for the compiler's vectoriser; everything is inlined into the functions of ema_cpu.cpp, which are compiled once for
// each vector width. What is updated in place is stored in the ordinary way, its line being in the cache already; copies, which
// are written and not read, go past the cache where there are many.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "ema.h"
#include "ema_math.h"

#define CROSSMASK_INLINE inline __attribute__((always_inline))

namespace crossmask {

constexpr int64_t kGroup = 8;                      // elements that share one Philox call
constexpr int64_t kCounters = 16;                  // Philox calls side by side in vectors
constexpr int64_t kBlock = kGroup * kCounters;     // elements

struct Update {  // what holds for every tensor of a call
  Average weights;
  bool stochastic;
  uint64_t seed;
  bool stream_copies;
};

// fp16 by ema_math.h; ema_cpu.cpp has another one, for processors that convert by an instruction.
struct PortableHalf {
  static CROSSMASK_INLINE void widen(const uint16_t* __restrict__ bits, float* __restrict__ to, int64_t size) {
    for (int64_t i = 0; i < size; ++i) to[i] = from_f16(bits[i]);
  }
  static CROSSMASK_INLINE void narrow(const float* __restrict__ values, uint16_t* __restrict__ to, int64_t size) {
    for (int64_t i = 0; i < size; ++i) to[i] = to_f16(values[i]);
  }
};

// fp32 where it lies, or the 16-bit numbers widened into `buffer`.
template <typename Half>
CROSSMASK_INLINE const float* read(Float dtype, const void* from, int64_t begin, int64_t size, float* __restrict__ buffer) {
  if (dtype == Float::f32) return static_cast<const float*>(from) + begin;
  const uint16_t* __restrict__ const bits = static_cast<const uint16_t*>(from) + begin;
  if (dtype == Float::bf16) {
    for (int64_t i = 0; i < size; ++i) buffer[i] = from_bf16(bits[i]);
  } else {
    Half::widen(bits, buffer, size);
  }
  return buffer;
}

// To 16 bits, rounded to the nearest.
template <typename Half>
CROSSMASK_INLINE void narrow(Float dtype, const float* __restrict__ values, uint16_t* __restrict__ to, int64_t size) {
  if (dtype == Float::bf16) {
    for (int64_t i = 0; i < size; ++i) to[i] = to_bf16(values[i]);
  } else {
    Half::narrow(values, to, size);
  }
}

// The draws of a block, in the elements' order; `begin` is a multiple of kGroup.
CROSSMASK_INLINE void draw(uint64_t seed, uint32_t tensor, int64_t begin, uint16_t* to) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);  // the lower half of a word is the first
  uint32_t word[4][kCounters], in_order[kCounters * 4];
  for (int i = 0; i < kCounters; ++i) {
    const Draws d = draws(seed, begin / kGroup + i, tensor);
    for (int j = 0; j < 4; ++j) word[j][i] = d.word[j];
  }
  for (int i = 0; i < kCounters; ++i)
    for (int j = 0; j < 4; ++j) in_order[i * 4 + j] = word[j][i];
  std::memcpy(to, in_order, sizeof(in_order));
}

CROSSMASK_INLINE void narrow_stochastically(Float dtype, const float* __restrict__ values, const uint16_t* __restrict__ drawn,
                                            uint16_t* __restrict__ to, int64_t size) {
  if (dtype == Float::bf16) {
    for (int64_t i = 0; i < size; ++i) to[i] = to_bf16(values[i], drawn[i]);
  } else {
    for (int64_t i = 0; i < size; ++i) to[i] = to_f16(values[i], drawn[i]);
  }
}

// Past the cache: a line that is written whole is then not read first.
CROSSMASK_INLINE void stream(const void* from, void* to, int64_t bytes) {
#if defined(__SSE2__)
  const char* source = static_cast<const char*>(from);
  char* target = static_cast<char*>(to);
  const int64_t head = std::min<int64_t>(bytes, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(target) & 15));
  std::memcpy(target, source, static_cast<size_t>(head));
  int64_t i = head;
  for (; i + 16 <= bytes; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(target + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i)));
  std::memcpy(target + i, source + i, static_cast<size_t>(bytes - i));
#else
  std::memcpy(to, from, static_cast<size_t>(bytes));
#endif
}

template <typename Half>
CROSSMASK_INLINE void write_copy(bool past_cache, Float dtype, const float* values, void* copy, int64_t begin, int64_t size) {
  if (dtype == Float::f32) {
    float* const to = static_cast<float*>(copy) + begin;
    past_cache ? stream(values, to, size * 4) : static_cast<void>(std::copy(values, values + size, to));
    return;
  }
  uint16_t* const to = static_cast<uint16_t*>(copy) + begin;
  uint16_t bits[kBlock];
  narrow<Half>(dtype, values, past_cache ? bits : to, size);
  if (past_cache) stream(bits, to, size * 2);
}

// `result` may be `teacher`.
template <bool kNearTeacher>
CROSSMASK_INLINE void average_all(Average weights, const float* teacher, const float* student, float* result, int64_t size) {
  if constexpr (kNearTeacher) {
#pragma GCC ivdep
    for (int64_t i = 0; i < size; ++i) result[i] = from_teacher(teacher[i], student[i], weights);
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < size; ++i) result[i] = ema(teacher[i], student[i], weights);
  }
}

template <typename Half, bool kNearTeacher>
CROSSMASK_INLINE void update_block(const Update& update, const EmaTensor& tensor, int64_t begin, int64_t size) {
  float teacher[kBlock], student[kBlock];
  const float* const s = read<Half>(tensor.student_dtype, tensor.student, begin, size, student);
  const float* stored;
  if (tensor.teacher_dtype == Float::f32) {
    float* const t = static_cast<float*>(tensor.teacher) + begin;
    average_all<kNearTeacher>(update.weights, t, s, t, size);
    stored = t;
  } else {
    read<Half>(tensor.teacher_dtype, tensor.teacher, begin, size, teacher);
    average_all<kNearTeacher>(update.weights, teacher, s, teacher, size);
    uint16_t* const to = static_cast<uint16_t*>(tensor.teacher) + begin;
    if (update.stochastic) {
      uint16_t drawn[kBlock];
      draw(update.seed, tensor.index, begin, drawn);
      narrow_stochastically(tensor.teacher_dtype, teacher, drawn, to, size);
    } else {
      narrow<Half>(tensor.teacher_dtype, teacher, to, size);
    }
    if (tensor.copy != nullptr) read<Half>(tensor.teacher_dtype, tensor.teacher, begin, size, teacher);
    stored = teacher;
  }
  if (tensor.copy != nullptr) write_copy<Half>(update.stream_copies, tensor.copy_dtype, stored, tensor.copy, begin, size);
}

// Whole blocks have a length that the compiler knows.
template <typename Half, bool kNearTeacher>
CROSSMASK_INLINE void update_blocks(Update update, EmaTensor tensor, int64_t begin, int64_t end) {
  for (; end - begin >= kBlock; begin += kBlock) update_block<Half, kNearTeacher>(update, tensor, begin, kBlock);
  if (begin < end) update_block<Half, kNearTeacher>(update, tensor, begin, end - begin);
}

// The same code with what the compiler is told of it, so that nothing is asked again in every block.
template <typename Half, Float kTeacher, Float kStudent>
CROSSMASK_INLINE void update_known(Update update, EmaTensor tensor, int64_t begin, int64_t end) {
  tensor.teacher_dtype = kTeacher;
  tensor.student_dtype = kStudent;
  update.stochastic = false;
  if (tensor.copy == nullptr) {
    tensor.copy = nullptr;
    return update_blocks<Half, true>(update, tensor, begin, end);
  }
  tensor.copy_dtype = Float::bf16;
  if (update.stream_copies) {
    update.stream_copies = true;
    update_blocks<Half, true>(update, tensor, begin, end);
  } else {
    update.stream_copies = false;
    update_blocks<Half, true>(update, tensor, begin, end);
  }
}

// Elements [begin, end) of a tensor; `begin` is a multiple of kGroup.
template <typename Half>
CROSSMASK_INLINE void update_run(const Update& update, const EmaTensor& tensor, int64_t begin, int64_t end) {
  const Float t = tensor.teacher_dtype, s = tensor.student_dtype;
  const bool usual = near_teacher(update.weights) && !(update.stochastic && t != Float::f32) &&
                     (tensor.copy == nullptr || tensor.copy_dtype == Float::bf16);
  if (usual && t == Float::f32 && s == Float::f32) {
    update_known<Half, Float::f32, Float::f32>(update, tensor, begin, end);
  } else if (usual && t == Float::f32 && s == Float::bf16) {
    update_known<Half, Float::f32, Float::bf16>(update, tensor, begin, end);
  } else if (usual && t == Float::bf16 && s == Float::bf16) {
    update_known<Half, Float::bf16, Float::bf16>(update, tensor, begin, end);
  } else {
    update_blocks<Half, false>(update, tensor, begin, end);
  }
#if defined(__SSE2__)
  if (update.stream_copies) _mm_sfence();  // before another thread is told that this one is done
#endif
}

}  // namespace crossmask
