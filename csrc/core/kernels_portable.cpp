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

  // There is no portable way past the cache.
  template <class T, Store>
  static void store(char* to, float lane) {
    T value;
    from_float(lane, value);
    std::memcpy(to, &value, sizeof(T));
  }

  static void stream_line(const char* from, char* to) { std::memcpy(to, from, kLine); }

  static void fence() {}
};

}  // namespace

constexpr Kernels kPortableKernels = make_kernels<OneLane>("portable");

}  // namespace fastopt
