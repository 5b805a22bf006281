// What crossmask::ema_update_ refuses, in the words of kernels/ema/checks.py. Every call pays for it: metadata once, one pass over
// addresses in their order, and for memory of the CPU a few system calls in all.
#include <fcntl.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "ema.h"

namespace crossmask {
namespace {

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  message << "ema_update_: ";
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

struct Named {
  const char* list;
  size_t index;
};
std::ostream& operator<<(std::ostream& out, const Named& x) { return out << x.list << '[' << x.index << ']'; }

struct Numbers {
  const int64_t* values;
  int64_t count;
};
std::ostream& operator<<(std::ostream& out, const Numbers& x) {  // as Python writes a tuple
  out << '(';
  for (int64_t i = 0; i < x.count; ++i) out << (i == 0 ? "" : ", ") << x.values[i];
  return out << (x.count == 1 ? ",)" : ")");
}

struct Device {
  int32_t type;
  int32_t index;
  bool operator!=(const Device& other) const { return type != other.type || index != other.index; }
};

struct Layout {
  int64_t dims;
  const int64_t* sizes;
  const int64_t* strides;
};

int32_t dtype_of(AtenTensorHandle x) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x, &dtype));
  return dtype;
}

Device device_of(AtenTensorHandle x) {
  Device device;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x, &device.type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x, &device.index));
  return device;
}

Layout layout_of(AtenTensorHandle x) {
  Layout layout;
  int64_t *sizes, *strides;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(x, &layout.dims));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(x, &sizes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(x, &strides));
  layout.sizes = sizes, layout.strides = strides;
  return layout;
}

bool row_major(const Layout& x) {
  int64_t expected = 1;
  for (int64_t axis = x.dims - 1; axis >= 0; --axis) {
    if (x.sizes[axis] == 1) continue;
    if (x.strides[axis] != expected) return false;
    expected *= x.sizes[axis];
  }
  return true;
}

// Every element has a place of its own, and together they leave no gap: the tensor is a flat array in some order.
bool dense(const Layout& x) {
  if (row_major(x)) return true;
  std::vector<std::array<int64_t, 2>> axes;
  for (int64_t axis = 0; axis < x.dims; ++axis)
    if (x.sizes[axis] != 1) axes.push_back({x.strides[axis], x.sizes[axis]});
  std::sort(axes.begin(), axes.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : axes) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

bool same_order(const Layout& a, const Layout& b) {
  for (int64_t axis = 0; axis < a.dims; ++axis)
    if (a.sizes[axis] != 1 && a.strides[axis] != b.strides[axis]) return false;
  return true;
}

struct Dtypes {  // asked for once a call
  int32_t f32 = aoti_torch_dtype_float32(), bf16 = aoti_torch_dtype_bfloat16(), f16 = aoti_torch_dtype_float16();

  Float of(AtenTensorHandle x, const Named& name) const {
    const int32_t dtype = dtype_of(x);
    if (dtype == f32) return Float::f32;
    if (dtype == bf16) return Float::bf16;
    if (dtype != f16) refuse(name, " must be float32, bfloat16 or float16");
    return Float::f16;
  }
};

int64_t bytes_of(Float dtype) { return dtype == Float::f32 ? 4 : 2; }

// The teacher's partner: of its shape, on the first teacher's device, and in the same order in memory.
void check_partner(AtenTensorHandle x, const Named& name, const Layout& teacher, size_t index, const Device& device) {
  const Named teacher_name{"teacher", index};
  const Layout layout = layout_of(x);
  if (layout.dims != teacher.dims || !std::equal(layout.sizes, layout.sizes + layout.dims, teacher.sizes))
    refuse(teacher_name, " is ", Numbers{teacher.sizes, teacher.dims}, " but ", name, " is ", Numbers{layout.sizes, layout.dims});
  if (device_of(x) != device) refuse(name, " is not on the device of teacher[0]");
  if (std::find(layout.sizes, layout.sizes + layout.dims, 0) != layout.sizes + layout.dims) return;
  if (!dense(layout)) refuse(name, " is not dense: elements share memory or leave gaps (make it contiguous)");
  if (!same_order(layout, teacher))
    refuse(name, " has strides ", Numbers{layout.strides, layout.dims}, " but ", teacher_name, " has ",
           Numbers{teacher.strides, teacher.dims});
}

struct Extent {
  uintptr_t begin, end;
  Named name;
  bool written;
};

bool by_begin(const Extent& a, const Extent& b) { return a.begin < b.begin; }

// `written` and `read` apart: each is often in the order of its addresses already.
void refuse_overlap(const std::vector<Extent>& written, const std::vector<Extent>& read) {
  const Extent none{0, 0, {"", 0}, false};
  const Extent *furthest = &none, *furthest_written = &none;
  const auto visit = [&](const Extent& extent) {
    const Extent* const other = extent.written ? furthest : furthest_written;  // what is only read may share its memory
    if (extent.begin < other->end) refuse(other->name, " and ", extent.name, " overlap in memory");
    if (extent.end > furthest->end) furthest = &extent;
    if (extent.written && extent.end > furthest_written->end) furthest_written = &extent;
  };
  size_t w = 0;
  for (const Extent& r : read) {
    while (w < written.size() && written[w].begin <= r.begin) visit(written[w++]);
    visit(r);
  }
  while (w < written.size()) visit(written[w++]);
}

// ---- A page mapped read-only, as of a file by np.memmap(mode="r"), would end the process at the first store. Linux says so before.

struct MapQuery {  // struct procmap_query of linux/fs.h, from Linux 6.11
  uint64_t size, flags, address, begin, end, access, page, offset, inode;
  uint32_t major, minor, name_size, build_id_size;
  uint64_t name, build_id;
};
constexpr unsigned long kMapQuery = _IOWR('f', 17, MapQuery);
constexpr uint64_t kWritable = 2;

// /proc/self/maps, opened once: opening it costs a small call as much as its arithmetic. A forked child's own is another one.
class Maps {
 public:
  // The mapping that holds an address; false where Linux does not answer: it is older, there is no /proc, or nothing is mapped there.
  static bool ask(uintptr_t address, MapQuery& query) {
    static const int forgotten_in_children = pthread_atfork(nullptr, nullptr, forget);
    int file = file_.load();
    if (file < 0) {
      file = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
      int none = -1;
      if (file >= 0 && !file_.compare_exchange_strong(none, file)) {  // another thread was faster
        close(file);
        file = none;
      }
    }
    query = {};
    query.size = sizeof(query);
    query.address = address;
    return forgotten_in_children == 0 && ioctl(file, kMapQuery, &query) == 0;
  }

 private:
  static void forget() { close(file_.exchange(-1)); }
  static inline std::atomic<int> file_{-1};
};

// One question for each mapping, which holds many tensors. The first tensor that is read-only; `asked`: whether Linux answered.
const Extent* read_only_mapping(const std::vector<Extent>& extents, bool& asked) {
  uintptr_t writable_to = 0;
  MapQuery query;
  for (const Extent& extent : extents) {
    writable_to = std::max(writable_to, extent.begin);
    while (writable_to < extent.end) {
      if (!(asked = Maps::ask(writable_to, query))) return nullptr;
      if ((query.access & kWritable) == 0) return &extent;
      writable_to = query.end;
    }
  }
  return nullptr;
}

// Older kernels: one byte of every tensor goes into a pipe and back to where it came from, which fails where it cannot be written.
bool writable_by_pipe(const iovec* bytes, size_t count) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return true;  // out of file descriptors: not asked
  const ssize_t taken = writev(ends[1], bytes, static_cast<int>(count));
  const bool refused = taken < 0 ? errno == EFAULT : readv(ends[0], bytes, static_cast<int>(count)) < 0 && errno == EFAULT;
  close(ends[0]);
  close(ends[1]);
  return !refused;
}

const Extent* read_only_by_pipe(const std::vector<Extent>& extents) {
  constexpr size_t kBatch = 1024;  // IOV_MAX
  std::vector<iovec> bytes;
  bytes.reserve(extents.size());
  for (const Extent& extent : extents) bytes.push_back({reinterpret_cast<void*>(extent.begin), 1});
  for (size_t first = 0; first < bytes.size(); first += kBatch) {
    const size_t count = std::min(kBatch, bytes.size() - first);
    if (writable_by_pipe(&bytes[first], count)) continue;
    for (size_t i = first; i < first + count; ++i)
      if (!writable_by_pipe(&bytes[i], 1)) return &extents[i];
  }
  return nullptr;
}

void refuse_read_only(const std::vector<Extent>& extents) {
  bool asked = true;
  const Extent* found = read_only_mapping(extents, asked);
  if (!asked) found = read_only_by_pipe(extents);
  if (found != nullptr) refuse(found->name, " is in memory that is mapped read-only (clone it)");
}

int64_t numel_of(AtenTensorHandle x) {
  int64_t numel;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(x, &numel));
  return numel;
}

void* writable_data(AtenTensorHandle x) {
  void* data;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(x, &data));
  return data;
}

const void* data_of(AtenTensorHandle x) {
  const void* data;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(x, &data));
  return data;
}

thread_local bool holding = false;
thread_local std::vector<AtenTensorHandle> held;

struct TensorList {  // an argument of a boxed kernel, which owns it
  explicit TensorList(StableIValue list) {
    const auto handle = torch::stable::detail::to<StableListHandle>(list);
    size_t size = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_size(handle, &size));
    tensors.resize(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue element;
      STABLE_TORCH_ERROR_CODE_CHECK(torch_list_get_item(handle, i, &element));
      tensors[i] = torch::stable::detail::to<AtenTensorHandle>(element);
    }
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_list(handle));
  }
  ~TensorList() {
    if (holding) {
      held.insert(held.end(), tensors.begin(), tensors.end());
    } else {
      for (AtenTensorHandle tensor : tensors) aoti_torch_delete_tensor_object(tensor);
    }
  }
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;

  std::vector<AtenTensorHandle> tensors;
};

using Handles = std::vector<AtenTensorHandle>;

EmaCall checked(const Handles& teachers, const Handles& students, double decay, const Handles& copies, AtenTensorHandle seed) {
  if (!(decay >= 0.0 && decay <= 1.0)) refuse("decay must lie in [0, 1], got ", decay);
  if (teachers.size() != students.size()) refuse(teachers.size(), " teacher tensors but ", students.size(), " student tensors");
  if (!copies.empty() && teachers.size() != copies.size()) refuse(teachers.size(), " teacher tensors but ", copies.size(), " copies");
  EmaCall call;
  call.weights = average(decay);
  if (teachers.empty()) return call;
  call.tensors.reserve(teachers.size());
  std::vector<Extent> written, read;
  written.reserve(teachers.size() + copies.size());
  read.reserve(students.size() + 1);
  const Dtypes dtypes;
  const Device device = device_of(teachers[0]);
  call.device = device.index;
  const int32_t no_copy = aoti_torch_dtype_uint8();

  for (size_t i = 0; i < teachers.size(); ++i) {
    const Named teacher_name{"teacher", i}, student_name{"student", i}, copy_name{"copies", i};
    AtenTensorHandle teacher = teachers[i], student = students[i], copy = copies.empty() ? nullptr : copies[i];
    if (copy != nullptr && dtype_of(copy) == no_copy && numel_of(copy) == 0) copy = nullptr;
    EmaTensor tensor{};
    tensor.index = static_cast<uint32_t>(i);
    tensor.size = numel_of(teacher);
    tensor.teacher_dtype = dtypes.of(teacher, teacher_name);
    tensor.student_dtype = dtypes.of(student, student_name);
    if (copy != nullptr) tensor.copy_dtype = dtypes.of(copy, copy_name);
    if (device_of(teacher) != device) refuse(teacher_name, " is not on the device of teacher[0]");
    const Layout layout = layout_of(teacher);
    if (tensor.size > 0 && !dense(layout)) refuse(teacher_name, " is not dense: elements share memory or leave gaps (make it contiguous)");
    check_partner(student, student_name, layout, i, device);
    if (copy != nullptr) check_partner(copy, copy_name, layout, i, device);
    if (tensor.size == 0) continue;
    const auto add = [&](std::vector<Extent>& extents, const void* data, Float dtype, const Named& name) {
      const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
      extents.push_back({begin, begin + static_cast<uintptr_t>(tensor.size * bytes_of(dtype)), name, &extents == &written});
    };
    add(written, tensor.teacher = writable_data(teacher), tensor.teacher_dtype, teacher_name);
    add(read, tensor.student = data_of(student), tensor.student_dtype, student_name);
    if (copy != nullptr) add(written, tensor.copy = writable_data(copy), tensor.copy_dtype, copy_name);
    call.tensors.push_back(tensor);
  }
  if (seed != nullptr) {
    if (dtype_of(seed) != aoti_torch_dtype_int64() || layout_of(seed).dims != 1 || numel_of(seed) != 1 || device_of(seed) != device)
      refuse("seed must be one int64, shape (1,), on the device of teacher[0]");
    call.seed = static_cast<const int64_t*>(data_of(seed));
    const uintptr_t begin = reinterpret_cast<uintptr_t>(call.seed);
    read.push_back({begin, begin + sizeof(int64_t), {"seed", 0}, false});
  }
  for (std::vector<Extent>* extents : {&written, &read})
    if (!std::is_sorted(extents->begin(), extents->end(), by_begin)) std::stable_sort(extents->begin(), extents->end(), by_begin);
  refuse_overlap(written, read);
  if (device.type == aoti_torch_device_type_cpu()) refuse_read_only(written);
  return call;
}

}  // namespace

void hold_tensors() { holding = true; }

void release_tensors() {
  holding = false;
  for (AtenTensorHandle tensor : held) aoti_torch_delete_tensor_object(tensor);
  held.clear();
}

void check_and_run(StableIValue* stack, void (*run)(const EmaCall&)) {
  const TensorList teachers(stack[0]), students(stack[1]), copies(stack[3]);
  const auto seed = torch::stable::detail::to<std::optional<torch::stable::Tensor>>(stack[4]);
  const EmaCall call = checked(teachers.tensors, students.tensors, torch::stable::detail::to<double>(stack[2]), copies.tensors,
                               seed.has_value() ? seed->get() : nullptr);
  if (!call.tensors.empty()) run(call);
}

}  // namespace crossmask
