#include "cpu_target.h"

#include <atomic>
#include <stdexcept>

namespace fastopt {
namespace {

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    found.push_back(&kAvx512Kernels);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) {
    found.push_back(&kAvx2Kernels);
  }
#endif
  found.push_back(&kPortableKernels);
  return found;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> chosen{available().front()};
  return chosen;
}

}  // namespace

std::vector<std::string> cpu_targets() {
  std::vector<std::string> names;
  for (const Kernels* candidate : available()) {
    names.emplace_back(candidate->target);
  }
  return names;
}

const Kernels& kernels() {
  return *current().load(std::memory_order_relaxed);
}

void use_cpu_target(const std::string& name) {
  std::string names;
  for (const Kernels* candidate : available()) {
    if (name == candidate->target) {
      current().store(candidate, std::memory_order_relaxed);
      return;
    }
    names += (names.empty() ? "" : ", ") + std::string(candidate->target);
  }
  throw std::invalid_argument("unknown CPU target '" + name + "': this machine runs " + names);
}

}  // namespace fastopt
