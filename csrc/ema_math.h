// The arithmetic of the exponential moving average: one formula for host and device, so that the CPU tests run what the GPU runs.
//
// No operation is fused: on the device by the _rn intrinsics, on the host by -ffp-contract=off (CMakeLists.txt). Every vector
// width, the GPU and the plain PyTorch reference then give the same bits, and so does any way of cutting a tensor into shards.
// (Not the payload and sign of a float32 NaN, which processors choose themselves; a NaN in 16 bits is always the same one.)
// Nothing branches, and 16-bit numbers are converted as integers of 32 bits, so that the host's compiler vectorises every loop.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>
#include <cstring>

#include "philox.h"

#define CROSSMASK_MATH C10_HOST_DEVICE inline __attribute__((always_inline))

namespace crossmask {

struct Average {
  float student_weight;
  float teacher_weight;
};

inline Average average(double decay) { return {static_cast<float>(1.0 - decay), static_cast<float>(decay)}; }

CROSSMASK_MATH float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

CROSSMASK_MATH float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// From the nearer end, as torch.lerp: a teacher that equals its student stays where it is, and the ends are exact, whatever
// the other side holds.
CROSSMASK_MATH bool near_teacher(Average weights) { return weights.student_weight != 0.0f && weights.student_weight < 0.5f; }

CROSSMASK_MATH float from_teacher(float teacher, float student, Average weights) {
  return add(teacher, multiply(weights.student_weight, add(student, -teacher)));
}

CROSSMASK_MATH float ema(float teacher, float student, Average weights) {
  if (weights.student_weight == 0.0f) return teacher;
  if (weights.teacher_weight == 0.0f) return student;
  if (near_teacher(weights)) return from_teacher(teacher, student, weights);
  return add(student, -multiply(weights.teacher_weight, add(student, -teacher)));
}

// ---- 16-bit numbers by their bits. What is stored in a teacher of 16 bits is what its copy then gets: copy = teacher.to(copy's dtype).

CROSSMASK_MATH uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

CROSSMASK_MATH float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

constexpr uint32_t kMagnitude = 0x7FFFFFFFu;
constexpr uint32_t kInfinity32 = 0x7F800000u;
constexpr uint32_t kSmallestNormal16 = 0x38800000u;  // 2^-14, fp16's smallest normal number, as fp32
constexpr uint32_t kBeyond16 = 0x47800000u;          // 2^16: from here on fp16 has infinity alone

CROSSMASK_MATH float from_bf16(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

CROSSMASK_MATH float from_f16(uint16_t x) {
  const uint32_t magnitude = (x & 0x7FFFu) << 13, exponent = magnitude & 0x0F800000u;
  const uint32_t normal = magnitude + (112u << 23) + (exponent == 0x0F800000u ? 112u << 23 : 0u);  // infinity and NaN keep theirs
  // a subnormal is read with the exponent of the smallest normal number, which is then taken off: exact, and no fp32 subnormal
  const float subnormal = add(float_of(magnitude + kSmallestNormal16), -float_of(kSmallestNormal16));
  return float_of((exponent == 0 ? bits_of(subnormal) : normal) | (x & 0x8000u) << 16);
}

// To the nearest, ties to even.
CROSSMASK_MATH uint16_t to_bf16(float x) {
  const uint32_t bits = bits_of(x), rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & kMagnitude) > kInfinity32 ? 0x7FC0u : rounded);
}

CROSSMASK_MATH uint16_t to_f16(float x) {
  const uint32_t magnitude = bits_of(x) & kMagnitude;
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_of(add(float_of(magnitude), 0.5f)) - bits_of(0.5f);  // 0.5 has fp16's smallest spacing: the sum rounds
  const uint32_t finite = magnitude < kSmallestNormal16 ? subnormal : normal;
  const uint32_t rounded = magnitude < kBeyond16 ? finite : 0x7C00u;  // from 65520 on `normal` has carried into infinity by itself
  return static_cast<uint16_t>(magnitude > kInfinity32 ? 0x7E00u : rounded | (bits_of(x) >> 16 & 0x8000u));
}

// Up with the probability of what is cut off, else down: `draw` has 16 random bits. The mean over all draws is x, for an fp16
// subnormal to within 2^-16 of the spacing. Past the largest finite number the next one up is infinity.
CROSSMASK_MATH uint16_t to_bf16(float x, uint32_t draw) {
  const uint32_t bits = bits_of(x);
  return static_cast<uint16_t>((bits & kMagnitude) > kInfinity32 ? 0x7FC0u : (bits + draw) >> 16);
}

CROSSMASK_MATH uint16_t to_f16(float x, uint32_t draw) {
  const uint32_t magnitude = bits_of(x) & kMagnitude, moved = magnitude + (draw >> 3);  // 13 bits are cut off
  // a subnormal as a multiple of 2^-40, 16 bits below the smallest spacing; anything larger is held back from the conversion to int
  const uint32_t held = magnitude < kSmallestNormal16 ? magnitude : kSmallestNormal16;
  const uint32_t subnormal = (static_cast<uint32_t>(static_cast<int32_t>(multiply(float_of(held), 0x1p40f))) + draw) >> 16;
  const uint32_t finite = magnitude < kSmallestNormal16 ? subnormal : (moved - (112u << 23)) >> 13;
  const uint32_t rounded = moved < kBeyond16 ? finite : 0x7C00u;
  return static_cast<uint16_t>(magnitude > kInfinity32 ? 0x7E00u : rounded | (bits_of(x) >> 16 & 0x8000u));
}

// Eight elements share the four words of one Philox call: element e of tensor i takes 16 bits of the words of counter
// (e / 8, i). They do not depend on threads, chunks, vector width or device.
struct Draws {
  uint32_t word[4];
  CROSSMASK_MATH uint32_t of(int lane) const { return (word[lane / 2] >> (lane % 2 * 16)) & 0xFFFFu; }
};

CROSSMASK_MATH Draws draws(uint64_t seed, int64_t group, uint32_t tensor) {
  Draws d{{static_cast<uint32_t>(group), static_cast<uint32_t>(static_cast<uint64_t>(group) >> 32), tensor, 0}};
  philox(d.word[0], d.word[1], d.word[2], d.word[3], seed);
  return d;
}

}  // namespace crossmask
