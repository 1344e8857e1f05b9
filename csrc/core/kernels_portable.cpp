// Kernels for any machine: a "vector" of one lane, in loops that a compiler vectorises for its baseline target.
#include "cast_loop.h"

namespace fastopt {
namespace {

struct OneLane {
  static constexpr int64_t kWidth = 1;

  template <class T>
  static float load(const char* from) {
    T value;
    std::memcpy(&value, from, sizeof(T));
    return to_float(value);
  }

  template <class T>
  static void store(char* to, float lane) {
    T value;
    from_float(lane, value);
    std::memcpy(to, &value, sizeof(T));
  }
};

}  // namespace

constexpr Kernels kPortableKernels = make_kernels<OneLane>("portable");

}  // namespace fastopt
