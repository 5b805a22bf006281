// What one thread of the CUDA kernel of crossmask::ema_update_ does, and how the list of tensors is cut into blocks.
//
// Nothing here needs a GPU: the tests run every thread of every block on the host, with a Memory that notes each access.
//
// A tensor is cut into units of kUnit elements, eight for each thread of a block; a block takes some consecutive units of
// one tensor and finds the tensor by its own number. Where every pointer is a multiple of 16 bytes, whole units move by
// 128-bit accesses; the last unit of a tensor and unaligned tensors move element by element, neighbours by neighbouring
// threads. In both ways all loads of a thread's eight elements are under way before the first of them is used.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "ema.h"
#include "ema_math.h"

namespace crossmask {

constexpr int kThreads = 256;  // a block
constexpr int kLanes = 8;      // elements of a thread in a unit; those of one Philox call
constexpr int kUnit = kThreads * kLanes;
constexpr int64_t kMostUnits = 16;        // a block, where the list is long
constexpr int64_t kBlocksAProcessor = 16; // wanted before blocks grow: two rounds of the eight that fit at a time
constexpr int64_t kMostBlocks = 2147483647;

// The kernel's one argument: it travels with the launch, so nothing is copied to the device beforehand and a captured
// graph holds all of it.
template <int kTensors>
struct Table {
  void* teacher[kTensors];
  const void* student[kTensors];
  void* copy[kTensors];
  int64_t size[kTensors];
  uint32_t first_block[kTensors];
  uint32_t index[kTensors];
  uint8_t code[kTensors];
  const int64_t* seed;  // on the device: read when the kernel runs, so a graph's replays can draw afresh
  int64_t units;        // a block
  Average weights;
  int32_t tensors;
};

// Kernel arguments end at 4 KiB, from CUDA 12.1 on at 32,764 bytes.
constexpr int kFewTensors = 98, kManyTensors = 798;
static_assert(sizeof(Table<kFewTensors>) <= 4096 && sizeof(Table<kManyTensors>) <= 32764);

// ---- what is said of a tensor in its code

constexpr uint8_t kHasCopy = 1 << 6;
constexpr uint8_t kAligned = 1 << 7;

inline uint8_t code_of(const EmaTensor& t) {
  const auto address = reinterpret_cast<uintptr_t>(t.teacher) | reinterpret_cast<uintptr_t>(t.student) |
                       reinterpret_cast<uintptr_t>(t.copy);
  return static_cast<uint8_t>(static_cast<int>(t.teacher_dtype) | static_cast<int>(t.student_dtype) << 2 |
                              (t.copy ? static_cast<int>(t.copy_dtype) << 4 | kHasCopy : 0) |
                              (address % 16 == 0 ? kAligned : 0));
}

CROSSMASK_MATH Float dtype_in(uint8_t code, int place) { return static_cast<Float>(code >> (2 * place) & 3); }

// ---- the host's part: which block does what

// Calls launch(table, blocks) as often as the table's length asks for. Blocks are as long as still leaves every processor
// some: 400 small tensors fill the GPU by their number, one large one by its length.
template <int kTensors, typename Launch>
void for_each_launch(const std::vector<EmaTensor>& tensors, Average weights, const int64_t* seed, int processors,
                     const Launch& launch) {
  const auto units_of = [](const EmaTensor& t) { return (t.size - 1) / kUnit + 1; };
  int64_t all = 0;
  for (const EmaTensor& t : tensors) all += units_of(t);
  Table<kTensors> table;
  table.seed = seed;
  table.weights = weights;
  table.units = std::clamp<int64_t>(all / (kBlocksAProcessor * processors), 1, kMostUnits);
  table.units = std::max(table.units, all / (kMostBlocks - kTensors) + 1);  // beyond 2^41 elements
  for (size_t begin = 0; begin < tensors.size(); begin += kTensors) {
    table.tensors = static_cast<int32_t>(std::min<size_t>(kTensors, tensors.size() - begin));
    uint32_t blocks = 0;
    for (int i = 0; i < table.tensors; ++i) {
      const EmaTensor& t = tensors[begin + i];
      table.teacher[i] = t.teacher;
      table.student[i] = t.student;
      table.copy[i] = t.copy;
      table.size[i] = t.size;
      table.first_block[i] = blocks;
      table.index[i] = t.index;
      table.code[i] = code_of(t);
      blocks += static_cast<uint32_t>((units_of(t) - 1) / table.units + 1);
    }
    launch(table, blocks);
  }
}

// ---- the thread's part

struct alignas(16) Words {
  uint32_t word[4];
};

// The plain accesses of the GPU.
struct DeviceMemory {
  template <typename T>
  static CROSSMASK_MATH T load(const void* base, int index) {
    return static_cast<const T*>(base)[index];
  }
  template <typename T>
  static CROSSMASK_MATH void store(void* base, int index, const T& value) {
    static_cast<T*>(base)[index] = value;
  }
};

template <typename Pointer>
CROSSMASK_MATH Pointer advanced(Pointer base, Float dtype, int64_t elements) {
  using Byte = std::conditional_t<std::is_same_v<Pointer, const void*>, const char, char>;
  return static_cast<Byte*>(base) + elements * (dtype == Float::f32 ? 4 : 2);
}

// fp16 to and from the nearest by the GPU's own conversions: one instruction each, and the same bits as from_f16 and to_f16.
CROSSMASK_MATH float widened(uint32_t bits, Float dtype) {
  if (dtype == Float::f32) return float_of(bits);
  if (dtype == Float::bf16) return from_bf16(static_cast<uint16_t>(bits));
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(bits)));
  return value;
#else
  return from_f16(static_cast<uint16_t>(bits));
#endif
}

CROSSMASK_MATH uint32_t nearest(float value, Float dtype) {
  if (dtype == Float::f32) return bits_of(value);
  if (dtype == Float::bf16) return to_bf16(value);
#ifdef __CUDA_ARCH__
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return value != value ? 0x7E00u : bits;
#else
  return to_f16(value);
#endif
}

CROSSMASK_MATH uint32_t stochastic(float value, Float dtype, uint32_t draw) {
  return dtype == Float::bf16 ? to_bf16(value, draw) : to_f16(value, draw);
}

using Bits = uint32_t[kLanes];  // of fp32, or of 16-bit floats in the lower halves
using Values = float[kLanes];

// body(dtype) with the dtype as a constant: it is the same for the whole block, so one branch does instead of eight.
template <typename Body>
CROSSMASK_MATH void with_constant(Float dtype, const Body& body) {
  if (dtype == Float::f32) return body(std::integral_constant<Float, Float::f32>());
  if (dtype == Float::bf16) return body(std::integral_constant<Float, Float::bf16>());
  body(std::integral_constant<Float, Float::f16>());
}

// kPairs: 16-bit floats come two in a word.
template <bool kPairs>
CROSSMASK_MATH void widen(const Bits& bits, Float dtype, Values& values) {
  with_constant(dtype, [&](auto constant) {
    constexpr Float kDtype = decltype(constant)::value;
#pragma unroll
    for (int i = 0; i < kLanes; ++i)
      values[i] = widened(kPairs && kDtype != Float::f32 ? bits[i / 2] >> (i % 2 * 16) & 0xFFFFu : bits[i], kDtype);
  });
}

CROSSMASK_MATH void round_nearest(const Values& values, Float dtype, Bits& bits) {
  with_constant(dtype, [&](auto constant) {
    constexpr Float kDtype = decltype(constant)::value;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) bits[i] = nearest(values[i], kDtype);
  });
}

CROSSMASK_MATH void average_all(Values& teachers, const Values& students, Average weights) {
  const auto all = [&] {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) teachers[i] = ema(teachers[i], students[i], weights);
  };
  // the cases of ema(), told apart here so that the compiler need not do so for each element
  if (weights.student_weight == 0.0f || weights.teacher_weight == 0.0f) {
    all();
  } else if (weights.student_weight < 0.5f) {
    all();
  } else {
    all();
  }
}

// How a thread's eight elements lie in a unit, and their way to registers and back. Base: of the unit.

// Whole and aligned. A tensor without 16-bit floats moves four and four, so that a warp's accesses lie side by side.
struct Wide {
  static constexpr bool kPairs = true;
  int low, high;
  CROSSMASK_MATH Wide(int thread, bool four_and_four)
      : low(thread * (four_and_four ? 4 : 8)), high(low + (four_and_four ? kUnit / 2 : 4)) {}

  template <typename Memory>
  CROSSMASK_MATH void load(const void* base, Float dtype, Bits& words) const {  // as they are: unpacking would wait for them
    const bool fp32 = dtype == Float::f32;
    const Words first = Memory::template load<Words>(base, low >> (fp32 ? 2 : 3));
    Words second{};
    if (fp32) second = Memory::template load<Words>(base, high / 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = first.word[i];
      words[i + 4] = second.word[i];
    }
  }

  template <typename Memory>
  CROSSMASK_MATH void store(void* base, Float dtype, const Bits& bits) const {
    if (dtype == Float::f32) {
      Memory::store(base, low / 4, Words{{bits[0], bits[1], bits[2], bits[3]}});
      Memory::store(base, high / 4, Words{{bits[4], bits[5], bits[6], bits[7]}});
    } else {
      Words words;
#pragma unroll
      for (int i = 0; i < 4; ++i) words.word[i] = bits[2 * i] | bits[2 * i + 1] << 16;
      Memory::store(base, low / 8, words);
    }
  }
};

// Element thread + i * kThreads for each i, as far as the tensor goes.
struct Scattered {
  static constexpr bool kPairs = false;
  int thread, left;  // elements of the tensor from the unit's first on

  template <typename Memory, typename T>
  CROSSMASK_MATH void load_as(const void* base, Bits& bits) const {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const int element = thread + i * kThreads;
      bits[i] = element < left ? Memory::template load<T>(base, element) : 0;
    }
  }
  template <typename Memory, typename T>
  CROSSMASK_MATH void store_as(void* base, const Bits& bits) const {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const int element = thread + i * kThreads;
      if (element < left) Memory::store(base, element, static_cast<T>(bits[i]));
    }
  }
  template <typename Memory>
  CROSSMASK_MATH void load(const void* base, Float dtype, Bits& bits) const {
    dtype == Float::f32 ? load_as<Memory, uint32_t>(base, bits) : load_as<Memory, uint16_t>(base, bits);
  }
  template <typename Memory>
  CROSSMASK_MATH void store(void* base, Float dtype, const Bits& bits) const {
    dtype == Float::f32 ? store_as<Memory, uint32_t>(base, bits) : store_as<Memory, uint16_t>(base, bits);
  }
};

// ---- stochastic rounding: 16 random bits an element

// Eight neighbours share one Philox call...
CROSSMASK_MATH void draw(const Wide&, int thread, uint64_t seed, int64_t unit, uint32_t tensor, Bits& random) {
  const Draws drawn = draws(seed, unit * kThreads + thread, tensor);
#pragma unroll
  for (int i = 0; i < kLanes; ++i) random[i] = drawn.of(i);
}

// ... of which a scattered thread takes the same one each time: kThreads is a multiple of eight.
CROSSMASK_MATH void draw(const Scattered&, int thread, uint64_t seed, int64_t unit, uint32_t tensor, Bits& random) {
  const int lane = thread % kLanes;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    const Draws drawn = draws(seed, unit * kThreads + i * (kThreads / kLanes) + thread / kLanes, tensor);
    uint32_t word = drawn.word[0];  // chosen, not indexed: an index that varies would put the words into memory
#pragma unroll
    for (int w = 1; w < 4; ++w) word = lane / 2 == w ? drawn.word[w] : word;
    random[i] = word >> (lane % 2 * 16) & 0xFFFFu;
  }
}

template <bool kStochastic, typename Memory, typename Layout, int kTensors>
CROSSMASK_MATH void update_unit(const Table<kTensors>& table, const Layout& layout, int thread, int tensor, int64_t unit,
                                uint64_t seed) {
  const uint8_t code = table.code[tensor];
  const Float teacher_dtype = dtype_in(code, 0), student_dtype = dtype_in(code, 1);
  void* const teacher = advanced(table.teacher[tensor], teacher_dtype, unit * kUnit);
  Bits from_teacher, from_student;
  layout.template load<Memory>(teacher, teacher_dtype, from_teacher);
  layout.template load<Memory>(advanced(table.student[tensor], student_dtype, unit * kUnit), student_dtype, from_student);
  Values values, students;
  widen<Layout::kPairs>(from_teacher, teacher_dtype, values);
  widen<Layout::kPairs>(from_student, student_dtype, students);
  average_all(values, students, table.weights);

  Bits rounded;
  if (kStochastic && teacher_dtype != Float::f32) {
    draw(layout, thread, seed, unit, table.index[tensor], rounded);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) rounded[i] = stochastic(values[i], teacher_dtype, rounded[i]);
  } else {
    round_nearest(values, teacher_dtype, rounded);
  }
  layout.template store<Memory>(teacher, teacher_dtype, rounded);
  if (code & kHasCopy) {
    const Float dtype = dtype_in(code, 2);
    widen<false>(rounded, teacher_dtype, values);  // what was stored
    round_nearest(values, dtype, rounded);
    layout.template store<Memory>(advanced(table.copy[tensor], dtype, unit * kUnit), dtype, rounded);
  }
}

template <bool kStochastic, typename Memory, int kTensors>
CROSSMASK_MATH void update_block(const Table<kTensors>& table, uint32_t block, int thread) {
  int tensor = 0;  // the last that does not begin after this block
  for (int end = table.tensors; end - tensor > 1;) {
    const int middle = (tensor + end) / 2;
    if (table.first_block[middle] <= block) {
      tensor = middle;
    } else {
      end = middle;
    }
  }
  const int64_t size = table.size[tensor];
  const uint8_t code = table.code[tensor];
  const bool all_fp32 = (code & 0x3F) == 0;
  const uint64_t seed = kStochastic ? static_cast<uint64_t>(Memory::template load<int64_t>(table.seed, 0)) : 0;
  int64_t unit = (block - table.first_block[tensor]) * table.units;
  for (int64_t i = 0; i < table.units; ++i, ++unit) {
    const int64_t left = size - unit * kUnit;
    if (left <= 0) return;
    if ((code & kAligned) && left >= kUnit) {
      update_unit<kStochastic, Memory>(table, Wide(thread, all_fp32), thread, tensor, unit, seed);
    } else {
      const Scattered layout{thread, static_cast<int>(left < kUnit ? left : kUnit)};
      update_unit<kStochastic, Memory>(table, layout, thread, tensor, unit, seed);
    }
  }
}

}  // namespace crossmask
