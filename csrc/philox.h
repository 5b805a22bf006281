// Philox4x32-7 (Salmon et al., SC 2011): the same words as kernels/philox.py and, with n_rounds=7, tl.philox. Host and device.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>

namespace crossmask {

// Replaces the counter c by its four random words.
C10_HOST_DEVICE inline __attribute__((always_inline)) void philox(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    const uint64_t first = static_cast<uint64_t>(c0) * 0xD2511F53u, second = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(first);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// In the open interval (0, 1): the upper 23 bits and a half, exact in fp32.
C10_HOST_DEVICE inline __attribute__((always_inline)) float uniform(uint32_t word) {
  return (static_cast<float>(static_cast<int32_t>(word >> 9)) + 0.5f) * 0x1p-23f;
}

}  // namespace crossmask
