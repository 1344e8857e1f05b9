// Tests of csrc/core, and of what in csrc/cuda needs no CUDA, by themselves; `tests/test_core.py` compiles them with
// AddressSanitizer and with ThreadSanitizer, and runs them.
#include <cstdio>
#include <exception>
#include <string_view>

#include "core_test.h"

using core_test::Test;

// The tests whose names hold the argument, or all of them.
int main(int count, char** arguments) {
  const std::string_view part = count > 1 ? arguments[1] : "";
  int failures = 0;
  for (const auto& tests :
       {core_test::audit_tests(), core_test::cpu_target_tests(), core_test::cutting_tests(), core_test::file_tests(),
        core_test::kernels_tests(), core_test::launches_tests(), core_test::ring_tests(), core_test::slab_tests(),
        core_test::torch_zip_tests(), core_test::transfers_tests()}) {
    for (const Test& test : tests) {
      if (std::string_view(test.name).find(part) == std::string_view::npos) {
        continue;
      }
      try {
        test.body();
        std::printf("ok      %s\n", test.name);
      } catch (const std::exception& error) {
        ++failures;
        std::printf("FAILED  %s: %s\n", test.name, error.what());
      }
    }
  }
  return failures == 0 ? 0 : 1;
}
