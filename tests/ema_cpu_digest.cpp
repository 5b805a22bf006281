// csrc/ema_cpu.h alone, without PyTorch: prints a digest of what it computes for each mix of dtypes, the same for every processor.
// tests/test_ema_aarch64.py compiles it for this one and for another.
#include "ema_cpu.h"

#include <cstdio>

namespace {

using namespace crossmask;

constexpr int64_t kSize = 3 * kBlock + 29;

uint64_t digest(uint64_t seen, const void* data, size_t bytes) {  // FNV-1a
  for (size_t i = 0; i < bytes; ++i) seen = (seen ^ static_cast<const unsigned char*>(data)[i]) * 0x100000001B3u;
  return seen;
}

// Arbitrary bits, NaN, infinities and subnormals among them; in their upper half those of every dtype.
uint32_t bits(int64_t i, uint32_t stream) {
  uint32_t c0 = static_cast<uint32_t>(i), c1 = stream, c2 = 0, c3 = 0;
  philox(c0, c1, c2, c3, 42);
  return i % 3 == 0 ? c0 : (c0 & 0x87FFFFFFu) | 0x38000000u;  // two in three near one
}

void fill(Float dtype, void* to, uint32_t stream) {
  for (int64_t i = 0; i < kSize; ++i) {
    const uint32_t x = bits(i, stream);
    const uint16_t half = dtype == Float::bf16 ? static_cast<uint16_t>(x >> 16) : static_cast<uint16_t>(x);
    if (dtype == Float::f32) std::memcpy(static_cast<char*>(to) + 4 * i, &x, 4);
    else std::memcpy(static_cast<char*>(to) + 2 * i, &half, 2);
  }
}

uint64_t digest_of(uint64_t seen, Float dtype, const void* x) {
  if (dtype != Float::f32) return digest(seen, x, 2 * kSize);
  for (int64_t i = 0; i < kSize; ++i) {
    uint32_t word;
    std::memcpy(&word, static_cast<const char*>(x) + 4 * i, 4);
    if ((word & kMagnitude) > kInfinity32) word = 0x7FC00000u;  // processors choose a NaN's sign and payload
    seen = digest(seen, &word, 4);
  }
  return seen;
}

}  // namespace

int main() {
  static uint32_t teacher[kSize], student[kSize], copy[kSize];
  for (int t = 0; t < 3; ++t)
    for (int s = 0; s < 3; ++s)
      for (int c = 0; c < 4; ++c) {
        uint64_t seen = 0xCBF29CE484222325u;
        for (const double decay : {0.0, 0.25, 0.995, 1.0})
          for (const bool stochastic : {false, true}) {
            EmaTensor tensor{teacher, student, c == 3 ? nullptr : copy, kSize, 5, Float(t), Float(s), Float(c % 3)};
            fill(tensor.teacher_dtype, teacher, 1);
            fill(tensor.student_dtype, student, 2);
            update_run<PortableHalf>({average(decay), stochastic, 7, c == 1}, tensor, 0, kSize);
            seen = digest_of(seen, tensor.teacher_dtype, teacher);
            if (c != 3) seen = digest_of(seen, tensor.copy_dtype, copy);
          }
        std::printf("%d %d %d %016llx\n", t, s, c, static_cast<unsigned long long>(seen));
      }
}
