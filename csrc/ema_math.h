// The arithmetic of the exponential moving average: one formula for host and device, so that the CPU tests run what the GPU runs.
#pragma once

#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace crossmask {

// teacher + (1 - decay) * (student - teacher), in fp32 whatever the student's dtype. The difference form, not
// decay * teacher + (1 - decay) * student: it leaves a teacher that equals its student exactly where it is.
template <typename Student>
C10_HOST_DEVICE inline float ema(float teacher, Student student, float student_weight) {
  return teacher + student_weight * (static_cast<float>(student) - teacher);
}

}  // namespace crossmask
