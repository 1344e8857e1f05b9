// The choice of target.
#include "cpu_target.h"

#include <array>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "core_test.h"

namespace core_test {
namespace {

void test_every_target_can_be_chosen() {
  const std::vector<std::string> targets = fastopt::cpu_targets();
  check(!targets.empty() && targets.back() == "portable", "every machine runs the portable kernels");
  for (const std::string& target : targets) {
    fastopt::use_cpu_target(target);
    check(fastopt::kernels().target == target, "chose ", target, ", got ", fastopt::kernels().target);
  }
}

void test_an_unknown_target_is_refused() {
  const std::string before = fastopt::kernels().target;
  for (const char* wrong : {"", "nonsense", "AVX2", "portable "}) {
    std::string message;
    try {
      fastopt::use_cpu_target(wrong);
    } catch (const std::invalid_argument& error) {
      message = error.what();
    }
    check(message.find(text("'", wrong, "'")) != std::string::npos, "'", wrong, "' went through, or: ", message);
    for (const std::string& target : fastopt::cpu_targets()) {
      check(message.find(target) != std::string::npos, target, " is missing in: ", message);
    }
    check(fastopt::kernels().target == before, "a refused target changed the choice");
  }
}

}  // namespace

std::span<const Test> cpu_target_tests() {
  static constexpr std::array kTests{
      TEST(test_every_target_can_be_chosen),
      TEST(test_an_unknown_target_is_refused),
  };
  return kTests;
}

}  // namespace core_test
