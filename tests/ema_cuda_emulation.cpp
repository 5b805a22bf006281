// csrc/ema_cuda_kernel.h on the host: every thread of every block in turn, each access to memory noted and, if asked, done.
// tests/test_ema_cuda_emulated.py compiles and calls it.
#include "ema_cuda_kernel.h"

namespace {

using namespace crossmask;

struct Access {
  uint64_t address;
  uint32_t bytes;
  uint32_t stored;
};

std::vector<Access> accesses;
std::vector<int64_t> launches;  // blocks of each
bool touch;

struct NotedMemory {
  template <typename T>
  static T load(const void* base, int index) {
    const T* const at = static_cast<const T*>(base) + index;
    if (std::is_same_v<T, int64_t>) return *at;  // the seed
    accesses.push_back({reinterpret_cast<uint64_t>(at), sizeof(T), 0});
    return touch ? *at : T{};
  }
  template <typename T>
  static void store(void* base, int index, const T& value) {
    T* const at = static_cast<T*>(base) + index;
    accesses.push_back({reinterpret_cast<uint64_t>(at), sizeof(T), 1});
    if (touch) *at = value;
  }
};

template <int kTensors, bool kStochastic>
void run(const std::vector<EmaTensor>& tensors, Average weights, const int64_t* seed, int processors,
         const std::vector<int64_t>* chosen) {
  for_each_launch<kTensors>(tensors, weights, seed, processors, [&](const Table<kTensors>& table, uint32_t blocks) {
    const auto block = [&](int64_t number) {
      for (int thread = kThreads - 1; thread >= 0; --thread)
        update_block<kStochastic, NotedMemory>(table, static_cast<uint32_t>(number), thread);
    };
    launches.push_back(blocks);
    if (chosen == nullptr)
      for (int64_t number = blocks - 1; number >= 0; --number) block(number);  // the last first: no order may be assumed
    else
      for (const int64_t number : *chosen) block(number < 0 ? blocks + number : number);
  });
}

}  // namespace

extern "C" {

// chosen: blocks of each launch to run, counted from the end where negative; chosen_count < 0: all. Returns the number of
// accesses. seed: nullptr to round to the nearest. many: the kernel with the large argument.
int64_t emulate(const EmaTensor* tensors, int64_t count, double decay, const int64_t* seed, int many, int processors,
                const int64_t* chosen, int64_t chosen_count, int touch_memory) {
  accesses.clear();
  launches.clear();
  touch = touch_memory;
  const std::vector<EmaTensor> list(tensors, tensors + count);
  const std::vector<int64_t> blocks(chosen, chosen + std::max<int64_t>(chosen_count, 0));
  const auto kernel = many ? (seed ? run<kManyTensors, true> : run<kManyTensors, false>)
                           : (seed ? run<kFewTensors, true> : run<kFewTensors, false>);
  kernel(list, average(decay), seed, processors, chosen_count < 0 ? nullptr : &blocks);
  return static_cast<int64_t>(accesses.size());
}

const Access* noted() { return accesses.data(); }
int64_t launch_count() { return static_cast<int64_t>(launches.size()); }
const int64_t* launch_blocks() { return launches.data(); }

// elements of a unit, most units a block, tensors a launch (few, many), bytes of the argument (few, many), bytes of an EmaTensor
void constants(int64_t* into) {
  const int64_t values[] = {kUnit, kMostUnits, kFewTensors, kManyTensors, sizeof(Table<kFewTensors>), sizeof(Table<kManyTensors>),
                            sizeof(EmaTensor)};
  std::copy(std::begin(values), std::end(values), into);
}

}  // extern "C"
