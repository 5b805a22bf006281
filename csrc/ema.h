// What the CPU and the CUDA kernel of crossmask::ema_update_ share: the checks, and the list of tensors as plain pointers.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

namespace crossmask {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct EmaTensor {
  float* teacher;
  const void* student;
  ScalarType student_dtype;
  int64_t size;  // elements; int64, because one ZeRO shard may hold more than 2^31 of them
};

inline bool is_student_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// Refuses everything the kernels do not handle, and names the tensor; returns the tensors that have elements.
inline std::vector<EmaTensor> checked(const std::vector<Tensor>& teachers, const std::vector<Tensor>& students, double decay) {
  STD_TORCH_CHECK(decay >= 0.0 && decay <= 1.0, "ema_update_: decay must lie in [0, 1], got ", decay);
  STD_TORCH_CHECK(teachers.size() == students.size(), "ema_update_: ", teachers.size(), " teacher tensors but ", students.size(),
                  " student tensors");
  std::vector<EmaTensor> tensors;
  tensors.reserve(teachers.size());
  for (size_t i = 0; i < teachers.size(); ++i) {
    const Tensor& teacher = teachers[i];
    const Tensor& student = students[i];
    STD_TORCH_CHECK(teacher.scalar_type() == ScalarType::Float, "ema_update_: teacher[", i, "] must be float32");
    STD_TORCH_CHECK(is_student_dtype(student.scalar_type()), "ema_update_: student[", i, "] must be float32, bfloat16 or float16");
    STD_TORCH_CHECK(teacher.is_contiguous() && student.is_contiguous(), "ema_update_: teacher[", i, "] and student[", i,
                    "] must be contiguous");
    bool same_shape = teacher.dim() == student.dim();
    for (int64_t axis = 0; same_shape && axis < teacher.dim(); ++axis) same_shape = teacher.size(axis) == student.size(axis);
    STD_TORCH_CHECK(same_shape, "ema_update_: teacher[", i, "] and student[", i, "] differ in shape (", teacher.numel(), " and ",
                    student.numel(), " elements)");
    STD_TORCH_CHECK(teacher.device() == teachers[0].device() && student.device() == teachers[0].device(), "ema_update_: teacher[", i,
                    "] and student[", i, "] must be on the device of teacher[0]");
    if (teacher.numel() == 0) continue;
    tensors.push_back({static_cast<float*>(teacher.mutable_data_ptr()), student.const_data_ptr(), student.scalar_type(),
                       teacher.numel()});
  }
  return tensors;
}

}  // namespace crossmask
